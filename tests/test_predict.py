"""predict.py: the same file however it is run, cached views, what the card says, and what is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ENVIRONMENT, ROOT, TINY
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

import predict
from vqa.data.collator import Collator
from vqa.data.predictions import read_predictions
from vqa.data.rows import read_rows
from vqa.inference import predictor
from vqa.inference.checkpoints import fold_checkpoint
from vqa.inference.scoring import first_generated
from vqa.modeling.loading import load_adapter, load_base

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "args/accelerate/cpu.yaml"]
VIEWS = ["--num_permutations", "2", "--scales", "1.0", "1.4"]
BAD = "row_007"


@pytest.fixture(scope="module")
def folds(trained):
    return [trained / "checkpoints" / "fold0", trained / "checkpoints" / "fold1"]


@pytest.fixture(autouse=True)
def one_processor(monkeypatch, processor):
    """Reading the processor's files takes longer than eight rows; every call here uses the same ones."""
    load = predictor.load_processor
    monkeypatch.setattr(
        predictor, "load_processor", lambda model, *args: processor if model == TINY else load(model, *args)
    )


@pytest.fixture(scope="module")
def bad_csv(trained, tmp_path_factory):
    """23 test rows, one of them with half an image; an odd number, so that two processes cannot halve it."""
    folder = tmp_path_factory.mktemp("bad")
    shutil.copytree(trained / "data" / "pictures", folder / "pictures")
    path = folder / "pictures" / "7.jpg"
    path.write_bytes(path.read_bytes()[:600])
    pd.read_csv(trained / "data" / "test.csv", dtype=str).iloc[:23].to_csv(folder / "test.csv", index=False)
    return folder / "test.csv"


@pytest.fixture(scope="module")
def launched(folds, bad_csv, tmp_path_factory):
    """Two processes, started before the tests of one: (the process, its output folder)."""
    outputs = tmp_path_factory.mktemp("two")
    words = [*LAUNCH, "predict.py", *folds, "--csv", bad_csv, "--skip_bad_images", *VIEWS, "--output_dir", outputs]
    with open(outputs / "stdout.txt", "w") as stdout:
        process = subprocess.Popen(
            [str(word) for word in words],
            cwd=ROOT,
            env=ENVIRONMENT,
            stdout=stdout,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        yield process, outputs
    with suppress(ProcessLookupError):  # its processes would wait for each other forever
        os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def small_csv(trained):
    """Eight test rows."""
    path = trained / "data" / "small.csv"
    pd.read_csv(trained / "data" / "test.csv", dtype=str).iloc[:8].to_csv(path, index=False)
    return path


@pytest.fixture
def predict_rows(script, folds, tmp_path):
    """Run predict.py, by default on fold0 in plain view: (exit code, stdout, stderr)."""

    def call(*flags, outputs=tmp_path / "outputs", of=folds[:1]):
        return script("predict", *of, "--output_dir", outputs, "--check_generation", "0", *flags)

    return call


def table(path) -> np.ndarray:
    return pd.read_csv(path).filter(like="p_").to_numpy()


def test_batches_of_any_size_give_the_same_file(launched, predict_rows, small_csv, tmp_path):
    for size in (1, 3, 32):
        code, _, error = predict_rows("--batch_size", size, "--csv", small_csv, outputs=tmp_path / str(size))
        assert code == 0, error
    files = [table(tmp_path / str(size) / "fold0.csv") for size in (1, 3, 32)]
    assert np.abs(files[0] - files[1]).max() < 1e-5 and np.abs(files[0] - files[2]).max() < 1e-5


def test_the_same_command_gives_the_same_bytes(predict_rows, small_csv, tmp_path):
    for name in ("first", "second"):
        assert predict_rows(*VIEWS, "--csv", small_csv, outputs=tmp_path / name)[0] == 0
    assert (tmp_path / "first/fold0.csv").read_bytes() == (tmp_path / "second/fold0.csv").read_bytes()


class Killed(BaseException):
    pass


@pytest.fixture
def counted(monkeypatch):
    """Labels of the views that a model scores; the one that `counted.dies` names ends the run."""

    class Counted(list):
        dies = None

    scored = Counted()
    scored.rows = []

    def watched(score):
        def call(model, rows, collate, ids, size, *, label, workers):
            if label == scored.dies:
                raise Killed
            scored.append(label)
            scored.rows.append(len(rows))
            return score(model, rows, collate, ids, size, label=label, workers=workers)

        return call

    for name in ("choice_probs", "permutation_probs"):
        monkeypatch.setattr(predictor, name, watched(getattr(predictor, name)))
    return scored


def test_an_interrupted_run_continues_with_the_view_at_which_it_stopped(
    predict_rows, folds, counted, small_csv, tmp_path
):
    flags = [*VIEWS, "--csv", small_csv]
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert predict_rows(*flags, outputs=whole, of=folds)[0] == 0
    everything, counted.dies = list(counted), "fold1, plain + rotation 1"
    counted.clear()
    with pytest.raises(Killed):
        predict_rows(*flags, outputs=part, of=folds)
    assert counted == everything[:2] and (part / "fold0.csv").is_file() and not (part / "fold1.csv").exists()
    counted.dies = "fold1, scale 1.4"
    with pytest.raises(Killed):
        predict_rows(*flags, outputs=part, of=folds)
    counted.clear()
    counted.dies = None
    assert predict_rows(*flags, outputs=part, of=folds)[0] == 0
    assert counted == ["fold1, scale 1.4"]
    for name in ("fold0.csv", "fold1.csv", "plain/fold1.csv"):
        assert (part / name).read_bytes() == (whole / name).read_bytes(), name
    assert not list(part.rglob(".*")), "the cache is deleted once the file is written"


def test_cached_views_of_other_runs_are_not_used(predict_rows, folds, counted, small_csv, trained, tmp_path):
    """Each change is made to a copy of the interrupted run: to the weights, a question, an image, the image size."""

    def other_weights(data, fold):
        shutil.copy(folds[1] / "adapter_model.safetensors", fold)

    def other_question(data, fold):
        text = (data / "small.csv").read_text().replace("row_003,pictures/3.jpg,", "row_003,pictures/3.jpg,Well: ")
        (data / "small.csv").write_text(text)

    def other_image(data, fold):
        shutil.copy(data / "pictures" / "4.jpg", data / "pictures" / "3.jpg")

    def other_image_size(data, fold):
        args = json.loads((fold / "args.json").read_text())
        (fold / "args.json").write_text(json.dumps(args | {"image_size": 140}))

    def run(place):
        flags = ["--weights", "raw", "--csv", place / "data" / "small.csv", *VIEWS]
        return predict_rows(*flags, of=[place / "fold0"], outputs=place / "outputs")

    place = tmp_path / "interrupted"
    shutil.copytree(trained / "data", place / "data")
    shutil.copytree(folds[0], place / "fold0", ignore=shutil.ignore_patterns("checkpoint-*"))
    counted.dies = "fold0, scale 1.4"
    with pytest.raises(Killed):
        run(place)
    counted.dies = None
    for change in (None, other_weights, other_question, other_image, other_image_size):
        other = tmp_path / f"{change}"
        shutil.copytree(place, other)
        if change:
            change(other / "data", other / "fold0")
        counted.clear()
        assert run(other)[0] == 0
        expected = ["fold0, plain + rotation 1", "fold0, scale 1.4"] if change else ["fold0, scale 1.4"]
        assert counted == expected, change


def test_a_finished_prediction_is_not_made_again_and_no_model_loaded(predict_rows, counted, small_csv, monkeypatch):
    flags = ["--csv", small_csv, "--weights"]
    assert predict_rows(*flags, "raw")[0] == 0 and predict_rows(*flags, "ema")[0] == 0
    assert counted == ["fold0, plain"] * 2, "other weights, the same file"
    monkeypatch.setattr(predictor, "load_base", lambda *args: pytest.fail("a model was loaded"))
    code, output, error = predict_rows(*flags, "ema")
    assert code == 0 and "fold0.csv is finished; nothing to predict" in output, error


def test_the_card_has_the_mass_on_the_letters_and_the_agreement_with_generate(
    predict_rows, folds, processor, ids, contest, tmp_path
):
    flags = ["--weights", "raw", "--csv", contest / "test.csv", "--check_generation", "8"]
    code, output, error = predict_rows(*flags)
    assert code == 0, error
    card = json.loads((tmp_path / "outputs" / "fold0.json").read_text())
    rows = read_rows(contest / "test.csv")
    model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(TINY, dtype=torch.float32), folds[0])
    batch = Collator(processor, 112)(rows)
    offered, _ = batch.pop("offered"), batch.pop("ids")
    with torch.no_grad():
        logits = model.eval()(**batch).logits[:, -1]
    mass = (logits.softmax(-1)[:, ids] * offered).sum(1)
    assert mass.min() < 0.9999 and card["letter_mass"] == pytest.approx(mass.mean().item(), abs=1e-5)
    assert card["generate"]["rows"] == 8 and f"`generate` agrees in {card['generate']['agreeing']} of 8 rows" in output
    assert f"{card['letter_mass']:.2%} of the probability" in output


def test_generate_is_greedy_search_from_the_pixels_and_its_first_token_counts(model, processor, rows, request):
    """The model never ends its turn, as one that writes the text of the choice after the letter."""
    collate, end = Collator(processor, 112), processor.tokenizer.eos_token_id

    def go_on(module, inputs, output):
        output.logits[..., end] = -1e9

    request.addfinalizer(model.register_forward_hook(go_on).remove)
    for row, token in zip(rows[:3], first_generated(model, rows[:3], collate, 2)):
        batch = collate([row])
        image = {name: batch[name] for name in ("pixel_values", "image_grid_thw")}
        with torch.no_grad():
            kinds = batch["mm_token_type_ids"]
            best = model(input_ids=batch["input_ids"], mm_token_type_ids=kinds, **image).logits[0, -1].argmax()
        assert token == best


def test_a_model_that_writes_on_after_the_letter_agrees_with_it(model, processor, ids, rows, request):
    def write_b(module, inputs, output):
        output.logits[..., ids[1]] += 1e3

    request.addfinalizer(model.register_forward_hook(write_b).remove)
    own = SimpleNamespace(load=lambda _: model, collate_pixels=Collator(processor, 112), batch_size=2, letter_ids=ids)
    job, predicted = SimpleNamespace(rows=rows[:4], checkpoint=None), np.eye(4)[[[1, 1, 1, 2]]]
    found = predictor.Predictor.compare_with_generate(own, job, SimpleNamespace(probabilities=predicted), 4)
    assert found == {"rows": 4, "agreeing": 3}


def test_an_unreadable_image_is_refused_or_answered_from_the_text_and_marked(
    predict_rows, bad_csv, folds, processor, ids, tmp_path
):
    code, _, error = predict_rows("--csv", bad_csv)
    assert (code, error.count("\n")) == (2, 1) and "1 of 23 images cannot be used" in error and "7.jpg" in error
    assert not (tmp_path / "outputs").exists()
    flags = ["--csv", bad_csv, "--skip_bad_images", "--check_generation", "2", "--weights", "raw"]
    code, output, error = predict_rows(*flags, *VIEWS)
    assert code == 0, error
    assert f"1 rows were answered without their unreadable image: {BAD}" in output
    assert json.loads((tmp_path / "outputs" / "fold0.json").read_text())["without_image"] == [BAD]
    got = pd.read_csv(tmp_path / "outputs" / "plain" / "fold0.csv", dtype={"note": str}).set_index("id")
    assert list(got.index[got["note"].notna()]) == [BAD] and "text alone" in got["note"][BAD]
    (row,) = [row for row in read_rows(bad_csv) if row["id"] == BAD]
    lines = [row["question"], *(f"{letter}. {choice}" for letter, choice in zip("abcd", row["choices"]))]
    content = [{"type": "text", "text": "\n".join([*lines, "Answer with the letter only."])}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    base = AutoModelForImageTextToText.from_pretrained(TINY, dtype=torch.float32)
    with torch.no_grad():
        batch = processor.tokenizer(prompt, return_tensors="pt")
        logits = PeftModel.from_pretrained(base, folds[0]).eval()(**batch).logits[0, -1]
    wanted = logits[ids[:4]].softmax(-1).numpy()
    assert np.abs(got.filter(like="p_").loc[BAD].to_numpy(dtype=float) - wanted).max() < 1e-5
    assert len(read_predictions(tmp_path / "outputs" / "fold0.csv")[0]) == 23


def test_a_fold_trained_elsewhere_predicts_with_its_own_base_and_no_other(predict_rows, folds, tmp_path):
    fold, moved, other = tmp_path / "fold0", tmp_path / "moved", tmp_path / "other"
    shutil.copytree(folds[0], fold, ignore=shutil.ignore_patterns("checkpoint-*"))
    args = json.loads((fold / "args.json").read_text()) | {"model": "/somewhere/else", "fp16": True}
    (fold / "args.json").write_text(json.dumps(args))
    shutil.copytree(TINY, moved)
    shutil.copytree(TINY, other)
    weights = load_file(other / "model.safetensors")
    name = next(name for name in weights if "layers.0" in name and "q_proj.weight" in name)
    save_file(weights | {name: weights[name] * 1.01}, other / "model.safetensors", metadata={"format": "pt"})
    assert predict_rows(outputs=tmp_path / "own")[0] == 0
    for flags, message in (
        (["--dtype", "float32"], "neither a model folder nor reachable"),
        (["--model", moved], "fp16 needs a CUDA GPU"),
        (["--model", other, "--dtype", "float32"], "fold0: not trained on the base weights in"),
    ):
        code, _, error = predict_rows(*flags, of=[fold])
        assert (code, error.count("\n")) == (2, 1) and message in error, error
    assert predict_rows("--model", moved, "--dtype", "float32", of=[fold])[0] == 0
    assert (tmp_path / "outputs/fold0.csv").read_bytes() == (tmp_path / "own/fold0.csv").read_bytes()


def test_the_dtype_is_that_of_training_unless_another_is_given(folds, monkeypatch):
    assert fold_checkpoint(folds[0]).dtype == torch.float32
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *args: (8, 0))
    assert fold_checkpoint(folds[0], dtype="float16").dtype == torch.float16
    assert fold_checkpoint(folds[0], dtype="bfloat16").dtype == torch.bfloat16


def adapter(folder, change):
    """fold0's adapter as another run might have left it."""
    weights, config = (
        load_file(folder / "adapter_model.safetensors"),
        json.loads((folder / "adapter_config.json").read_text()),
    )
    name = sorted(weights)[0]
    if change == "a weight less":
        del weights[name]
    elif change == "a weight more":
        weights[name.replace("layers.0", "layers.99")] = weights[name].clone()
    elif change == "another width":
        weights = {name: tensor.repeat(1, 2) for name, tensor in weights.items()}
    elif change == "other layers":
        config["target_modules"] = r".*nowhere.*"
    save_file(weights, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("change", ["a weight less", "a weight more", "another width", "other layers"])
def test_an_adapter_that_does_not_fit_is_refused_in_one_line(predict_rows, folds, tmp_path, change):
    fold = tmp_path / "fold0"
    shutil.copytree(folds[0], fold, ignore=shutil.ignore_patterns("checkpoint-*"))
    adapter(fold, change)
    code, _, error = predict_rows("--weights", "raw", of=[fold])
    last = error.splitlines()[-1]  # below the bar of loading the model
    assert code == 2 and last.startswith(f"error: {fold}: the adapter does not fit this base model; give --model")
    assert "Traceback" not in error and not list((tmp_path / "outputs").rglob("*.csv"))


def test_adapters_are_swapped_and_do_not_pile_up(folds):
    model = load_adapter(load_base(TINY, False, torch.float32), folds[0], "run0")
    names = {name.replace("run0", "x") for name, _ in model.named_parameters()}
    model = load_adapter(model, folds[1], "run1")
    assert {name.replace("run1", "x") for name, _ in model.named_parameters()} == names
    assert model.active_adapters == ["run1"] and list(model.peft_config) == ["run1"]
    weights = load_file(folds[1] / "adapter_model.safetensors")
    held = {name.replace(".run1", ""): p for name, p in model.named_parameters() if "lora" in name}
    assert held.keys() == weights.keys() and all(torch.equal(held[name], weights[name]) for name in weights)


def test_folds_with_other_settings_are_predicted_separately(predict_rows, folds, tmp_path):
    fold = tmp_path / "fold7"
    shutil.copytree(folds[0], fold, ignore=shutil.ignore_patterns("checkpoint-*"))
    args = json.loads((fold / "args.json").read_text()) | {"image_size": 140}
    (fold / "args.json").write_text(json.dumps(args))
    code, _, error = predict_rows(of=[folds[0], fold])
    assert (code, error.count("\n")) == (2, 1) and "image_size 112, fold7 140. Predict them in two" in error
    code, _, error = predict_rows(of=[folds[0], folds[0]])
    assert (code, error.count("\n")) == (2, 1) and "would both write" in error


def test_unused_gpus_are_mentioned(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    predict.start_processes()
    assert "using one of 2 GPUs; `accelerate launch predict.py" in capsys.readouterr().out


def test_the_gate_shows_further_views_of_unsure_rows_only(predict_rows, counted, small_csv, tmp_path):
    flags = [*VIEWS, "--csv", small_csv]
    assert predict_rows(*flags, outputs=tmp_path / "all")[0] == 0
    plain, everything = table(tmp_path / "all/plain/fold0.csv"), table(tmp_path / "all/fold0.csv")
    top = np.sort(plain)[:, ::-1]
    margins = top[:, 0] - top[:, 1]
    gate = float(np.sort(margins)[2:4].mean())
    counted.rows.clear()
    code, output, error = predict_rows(*flags, "--gate", gate, outputs=tmp_path / "gated")
    assert code == 0, error
    assert counted.rows == [8, 3, 3] and "8 rows, " in output and "1.75 forwards a row" in output
    gated = table(tmp_path / "gated/fold0.csv")
    unsure = margins < gate
    assert np.abs(gated[~unsure] - plain[~unsure]).max() < 1e-5 and np.abs(gated - everything)[unsure].max() < 1e-5
    assert json.loads((tmp_path / "gated/fold0.json").read_text())["gate"] == gate
    assert np.abs(everything - plain)[~unsure].max() > 1e-4


def test_each_fold_answers_its_own_validation_rows_in_the_same_views(
    predict_rows, folds, counted, trained, tmp_path, monkeypatch
):
    outputs = tmp_path / "outputs"
    code, output, error = predict_rows("--oof", *VIEWS, "--weights", "ema", of=folds)
    assert code == 0, error
    for fold in folds:
        alone, plain = outputs / "oof" / f"{fold.name}.csv", outputs / "oof" / "plain" / f"{fold.name}.csv"
        wanted = pd.read_csv(fold / "ema" / "oof.csv")
        assert list(pd.read_csv(alone)["id"]) == list(pd.read_csv(plain)["id"]) == list(wanted["id"])
        assert np.abs(table(plain) - wanted.filter(like="p_").to_numpy()).max() < 1e-5, "what training logged"
        assert np.abs(table(alone) - table(plain)).max() > 1e-4
        card = json.loads(alone.with_suffix(".json").read_text())
        answers = pd.read_csv(trained / "data" / "train.csv").set_index("id")["answer"][wanted["id"]].to_numpy()
        assert card["scores"]["accuracy"] == (pd.read_csv(alone)["answer"] == answers).mean()
        assert card["views"] == ["plain", "rotation 1", "scale 1.4"] and "test_csv" not in card
    report = json.loads((outputs / "oof" / "tta.json").read_text())
    assert report["rows"] == 24 and [line["views"] for line in report["views"]][:3] == [
        "plain",
        "+ rotation 1",
        "+ scale 1.4",
    ]
    assert report["recommendation"] in output and "each view added to those above it, on 24 out-of-fold" in output
    written = pd.read_csv(outputs / "oof" / "tta.csv")
    assert list(written["log_loss"]) == pytest.approx([line["log_loss"] for line in report["views"]])

    monkeypatch.setattr(predictor, "load_base", lambda *args: pytest.fail("cached views were scored again"))
    code, output, error = predict_rows("--oof", "--orders", "2", "--gate", "0.5", "--weights", "ema", of=folds)
    assert code == 0, error
    ids, mean = read_predictions(outputs / "oof" / "fold1.csv")
    assert json.loads((outputs / "oof" / "fold1.json").read_text())["gate"] == 0.5
    plain = read_predictions(outputs / "oof" / "plain" / "fold1.csv")[1]
    top = np.sort(plain)[:, ::-1]
    sure = top[:, 0] - top[:, 1] >= 0.5
    assert np.abs(mean[sure] - plain[sure]).max(initial=0) < 1e-9 and 0 < (~sure).sum()
    assert np.abs(mean[~sure] - plain[~sure]).max() > 1e-4


def test_an_ensemble_is_tuned_on_out_of_fold_rows_of_the_same_views(predict_rows, folds, small_csv, script, tmp_path):
    outputs, sample = tmp_path / "outputs", tmp_path / "sample.csv"
    pd.read_csv(small_csv, dtype=str)[["id"]].assign(answer="a").to_csv(sample, index=False)
    for flags in (["--csv", small_csv], ["--oof"]):
        assert predict_rows("--num_permutations", "2", *flags, of=folds)[0] == 0
    files = [outputs / "fold0.csv", outputs / "fold1.csv", "--sample", sample]
    code, output, error = script("ensemble", *files)
    assert code == 0 and "out of fold without" not in output, error
    scores = [json.loads((outputs / "oof" / f"fold{i}.json").read_text())["scores"]["log_loss"] for i in (0, 1)]
    assert f"log-loss {np.mean(scores):.4f}, 24 rows" in output
    assert predict_rows("--num_permutations", "3", "--oof", of=folds)[0] == 0
    code, output, error = script("ensemble", *files)
    assert code == 0 and "predicted with TTA, but the out-of-fold rows without" in output, error


def test_the_untrained_base_is_a_member_with_all_rows_out_of_fold(predict_rows, folds, trained, script, tmp_path):
    """The training rows of this contest are also its test rows, which the base predicts without --oof."""
    outputs, base = tmp_path / "outputs", ["--base", trained / "args" / "fold0.json"]
    assert predict_rows(*base, of=folds)[0] == 0
    files = [outputs / "fold0.csv", outputs / "fold1.csv", outputs / "base" / "base.csv"]
    code, output, error = script("ensemble", *files)
    assert code == 0 and "base.csv is missing. Run `predict.py --base ARGS.json --oof`" in output, error
    code, output, error = predict_rows(*base, "--oof", of=[])
    assert code == 0, error
    ids, oof = read_predictions(outputs / "base" / "oof" / "base.csv")
    assert (ids, oof.tolist()) == (read_predictions(files[2])[0], read_predictions(files[2])[1].tolist())
    code, output, error = script("ensemble", *files, "--method", "stack")
    answers = pd.read_csv(trained / "data" / "train.csv").set_index("id")["answer"]
    right = (pd.read_csv(files[2], index_col="id")["answer"] == answers).mean()
    assert code == 0 and f"{files[2]}: out-of-fold accuracy {right:.4f}" in output and "24 rows" in output, error
    code, output, error = script("ensemble", *files[1:], "--method", "stack")
    assert code == 0 and output.count("12 rows") == 2, "one fold and the base have its rows in common"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--base", "args/demo/fold0.json"], "--oof predicts all training rows with the base model"),
        (["--csv", "small"], "out-of-fold rows of fold0 are not in it"),
        (["--weights", "swa"], "no oof.csv"),
    ],
)
def test_out_of_fold_rows_that_are_none_are_refused(predict_rows, folds, trained, tmp_path, flags, message):
    fold = tmp_path / "fold0"
    shutil.copytree(folds[0], fold, ignore=shutil.ignore_patterns("checkpoint-*"))
    (fold / "swa" / "oof.csv").unlink()
    small = trained / "data" / "train_small.csv"
    pd.read_csv(trained / "data" / "train.csv", dtype=str).iloc[:8].to_csv(small, index=False)
    code, _, error = predict_rows("--oof", *[small if flag == "small" else flag for flag in flags], of=[fold])
    assert (code, error.count("\n")) == (2, 1) and message in error, error
    assert not (tmp_path / "outputs").exists()


def test_rows_that_two_folds_were_validated_on_are_refused(predict_rows, folds, tmp_path):
    shutil.copytree(folds[0], tmp_path / "fold9", ignore=shutil.ignore_patterns("checkpoint-*"))
    code, _, error = predict_rows("--oof", of=[folds[0], tmp_path / "fold9"])
    assert (code, error.count("\n")) == (2, 1) and "validated on the same rows" in error


def test_two_processes_give_the_file_of_one(launched, predict_rows, folds, bad_csv, tmp_path):
    process, outputs = launched
    flags = ["--csv", bad_csv, "--skip_bad_images", *VIEWS, "--check_generation", "32"]
    code, output, error = predict_rows(*flags, of=folds)
    assert code == 0, error
    process.wait(timeout=300)
    printed = (outputs / "stdout.txt").read_text()
    assert process.returncode == 0, printed[-4000:]
    one = tmp_path / "outputs"
    for name in ("fold0.csv", "fold1.csv", "plain/fold0.csv"):
        first, second = (pd.read_csv(folder / name) for folder in (outputs, one))
        assert list(first["id"]) == list(second["id"]) and first["note"].equals(second["note"]) and len(first) == 23
        assert np.abs(first.filter(like="p_").to_numpy() - second.filter(like="p_").to_numpy()).max() < 1e-5
    cards = [json.loads((folder / "fold1.json").read_text()) for folder in (outputs, one)]
    assert cards[0].keys() == cards[1].keys() and cards[0]["key"] == cards[1]["key"]
    for line in (
        "23 rows get another grid",
        "fold1.csv: 23 rows",
        "rows were answered without their unreadable image",
    ):
        assert printed.count(line) == output.count(line) > 0, "each line is printed once"
    assert not list(outputs.rglob(".*"))


def test_an_adapter_of_another_program_predicts_with_an_args_file(trained, predict_rows, small_csv, tmp_path):
    """It has no metrics.json, and the names of its weights are those of transformers before 4.52."""
    own, other = trained / "checkpoints" / "fold0", tmp_path / "elsewhere"
    other.mkdir()
    weights = load_file(own / "adapter_model.safetensors")
    renamed = {name.replace("model.language_model.layers", "model.layers"): values for name, values in weights.items()}
    assert len(set(renamed) - set(weights)) == len(weights) > 0
    save_file(renamed, other / "adapter_model.safetensors")
    config = json.loads((own / "adapter_config.json").read_text())
    targets = r"^(?!.*visual).*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)$"
    (other / "adapter_config.json").write_text(json.dumps(config | {"target_modules": targets}))
    code, _, error = predict_rows("--csv", small_csv, of=[other], outputs=tmp_path / "outputs")
    assert code == 2 and "trained elsewhere. Give --args ARGS.json" in error
    args = ["--args", trained / "args" / "fold0.json", "--csv", small_csv]
    code, _, error = predict_rows(*args, of=[other], outputs=tmp_path / "outputs")
    assert code == 0, error
    assert predict_rows("--weights", "raw", "--csv", small_csv, of=[own], outputs=tmp_path / "own")[0] == 0
    got, wanted = table(tmp_path / "outputs" / "elsewhere.csv"), table(tmp_path / "own" / "fold0.csv")
    assert np.abs(got - wanted).max() < 1e-6
