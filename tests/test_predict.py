"""predict.py: the same file however it is run, kept views, what the card says, and what is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ENVIRONMENT, ROOT, TINY
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

import predict
from vqa.core.errors import UserError
from vqa.data.collator import Collator
from vqa.data.predictions import read_predictions
from vqa.data.rows import read_rows
from vqa.inference.checkpoints import fold_checkpoint
from vqa.inference.scoring import generate_letters
from vqa.modeling.loading import load_adapter, load_base

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "args/accelerate/cpu.yaml"]
VIEWS = ["--num_permutations", "2", "--scales", "1.0", "1.4"]
BAD = "row_007"


@pytest.fixture(scope="module")
def folds(trained):
    return [trained / "checkpoints" / "fold0", trained / "checkpoints" / "fold1"]


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
    with open(outputs / "said.txt", "w") as said:
        started = subprocess.Popen(
            [str(word) for word in words],
            cwd=ROOT,
            env=ENVIRONMENT,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        yield started, outputs
    with suppress(ProcessLookupError):  # its processes would wait for each other forever
        os.killpg(started.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def small_csv(trained):
    """Eight test rows."""
    path = trained / "data" / "small.csv"
    pd.read_csv(trained / "data" / "test.csv", dtype=str).iloc[:8].to_csv(path, index=False)
    return path


@pytest.fixture
def ask(script, folds, tmp_path):
    """Run predict.py, by default on fold0 in plain view: (exit code, stdout, stderr)."""

    def call(*flags, outputs=tmp_path / "outputs", of=folds[:1]):
        return script("predict", *of, "--output_dir", outputs, "--check_generation", "0", *flags)

    return call


def table(path) -> np.ndarray:
    return pd.read_csv(path).filter(like="p_").to_numpy()


def test_batches_of_any_size_give_the_same_file(launched, ask, tmp_path):
    for size in (1, 8, 32):
        code, _, error = ask("--batch_size", size, outputs=tmp_path / str(size))
        assert code == 0, error
    files = [table(tmp_path / str(size) / "fold0.csv") for size in (1, 8, 32)]
    assert np.abs(files[0] - files[1]).max() < 1e-5 and np.abs(files[0] - files[2]).max() < 1e-5


def test_the_same_command_gives_the_same_bytes(ask, small_csv, tmp_path):
    for name in ("first", "second"):
        assert ask(*VIEWS, "--csv", small_csv, outputs=tmp_path / name)[0] == 0
    assert (tmp_path / "first/fold0.csv").read_bytes() == (tmp_path / "second/fold0.csv").read_bytes()


class Killed(BaseException):
    pass


@pytest.fixture
def counted(monkeypatch):
    """Labels of the views that a model is asked for; the one that `counted.dies` names ends the run."""

    class Counted(list):
        dies = None

    asked = Counted()
    asked.rows = []

    def watched(ask):
        def call(model, rows, collate, ids, size, label, workers):
            if label == asked.dies:
                raise Killed
            asked.append(label)
            asked.rows.append(len(rows))
            return ask(model, rows, collate, ids, size, label, workers)

        return call

    for name in ("choice_probs", "permutation_probs"):
        monkeypatch.setattr(predict, name, watched(getattr(predict, name)))
    return asked


def test_a_run_that_was_cut_off_goes_on_with_the_view_at_which_it_stopped(ask, folds, counted, small_csv, tmp_path):
    flags = [*VIEWS, "--csv", small_csv]
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert ask(*flags, outputs=whole, of=folds)[0] == 0
    everything, counted.dies = list(counted), "fold1, plain + rotation 1"
    counted.clear()
    with pytest.raises(Killed):
        ask(*flags, outputs=part, of=folds)
    assert counted == everything[:2] and (part / "fold0.csv").is_file() and not (part / "fold1.csv").exists()
    counted.dies = "fold1, scale 1.4"
    with pytest.raises(Killed):
        ask(*flags, outputs=part, of=folds)
    counted.clear()
    counted.dies = None
    assert ask(*flags, outputs=part, of=folds)[0] == 0
    assert counted == ["fold1, scale 1.4"]
    for name in ("fold0.csv", "fold1.csv", "plain/fold1.csv"):
        assert (part / name).read_bytes() == (whole / name).read_bytes(), name
    assert not list(part.rglob(".*")), "nothing is kept once the file is there"


@pytest.mark.parametrize("change", ["weights", "rows", "image", "image_size"])
def test_kept_views_of_other_runs_are_not_used(ask, folds, counted, small_csv, trained, tmp_path, change):
    data, fold = tmp_path / "data", tmp_path / "fold0"
    shutil.copytree(trained / "data", data)
    shutil.copytree(folds[0], fold, ignore=shutil.ignore_patterns("checkpoint-*"))
    flags = ["--weights", "raw", "--csv", data / "small.csv", *VIEWS]
    counted.dies = "fold0, scale 1.4"
    with pytest.raises(Killed):
        ask(*flags, of=[fold])
    counted.clear()
    if change == "weights":
        shutil.copy(folds[1] / "adapter_model.safetensors", fold)
    elif change == "rows":
        text = (data / "small.csv").read_text().replace("row_003,pictures/3.jpg,", "row_003,pictures/3.jpg,Well: ")
        (data / "small.csv").write_text(text)
    elif change == "image":
        shutil.copy(data / "pictures" / "4.jpg", data / "pictures" / "3.jpg")
    else:
        args = json.loads((fold / "args.json").read_text())
        (fold / "args.json").write_text(json.dumps(args | {"image_size": 140}))
    counted.dies = None
    assert ask(*flags, of=[fold])[0] == 0
    assert counted == ["fold0, plain + rotation 1", "fold0, scale 1.4"]


def test_a_finished_prediction_is_not_made_again_and_no_model_loaded(ask, counted, small_csv, monkeypatch):
    flags = ["--csv", small_csv, "--weights"]
    assert ask(*flags, "raw")[0] == 0 and ask(*flags, "ema")[0] == 0
    assert counted == ["fold0, plain"] * 2, "other weights, the same file"
    monkeypatch.setattr(predict, "load_base", lambda *args: pytest.fail("a model was loaded"))
    code, output, error = ask(*flags, "ema")
    assert code == 0 and "fold0.csv is finished; nothing to predict" in output, error


def test_the_card_tells_the_mass_on_the_letters_and_what_generate_writes(
    ask, folds, processor, ids, contest, tmp_path
):
    flags = ["--weights", "raw", "--csv", contest / "test.csv", "--check_generation", "8"]
    code, output, error = ask(*flags)
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
    assert card["generate"]["rows"] == 8 and f"same letter for {card['generate']['agreeing']} of 8 rows" in output
    assert f"{card['letter_mass']:.2%} of the probability" in output


def test_generate_is_greedy_search_from_the_pixels(model, processor, rows, request):
    """Two tokens: with a model that never ends its turn, so that the second is seen."""
    collate, end = Collator(processor, 112), processor.tokenizer.eos_token_id

    def go_on(module, inputs, output):
        output.logits[..., end] = -1e9

    request.addfinalizer(model.register_forward_hook(go_on).remove)
    for row, text in zip(rows[:3], generate_letters(model, rows[:3], collate, 2)):
        batch = collate([row])
        image = {name: batch[name] for name in ("pixel_values", "image_grid_thw")}
        tokens, kinds = batch["input_ids"], batch["mm_token_type_ids"]
        for _ in range(2):
            with torch.no_grad():
                best = model(input_ids=tokens, mm_token_type_ids=kinds, **image).logits[:, -1:].argmax(-1)
            tokens, kinds = torch.cat([tokens, best], 1), torch.cat([kinds, kinds[:, :1] * 0], 1)
        assert text == processor.decode(tokens[0, -2:], skip_special_tokens=True).strip() and len(text) > 1


def test_an_unreadable_image_is_refused_or_answered_from_the_text_and_marked(
    ask, bad_csv, folds, processor, ids, tmp_path
):
    code, _, error = ask("--csv", bad_csv)
    assert (code, error.count("\n")) == (2, 1) and "1 of 23 images cannot be used" in error and "7.jpg" in error
    assert not (tmp_path / "outputs").exists()
    flags = ["--csv", bad_csv, "--skip_bad_images", "--check_generation", "2", "--weights", "raw"]
    code, output, error = ask(*flags, *VIEWS)
    assert code == 0, error
    assert f"1 rows were answered without their image, which cannot be read: {BAD}" in output
    assert json.loads((tmp_path / "outputs" / "fold0.json").read_text())["without_image"] == [BAD]
    got = pd.read_csv(tmp_path / "outputs" / "plain" / "fold0.csv", dtype={"note": str}).set_index("id")
    assert list(got.index[got["note"].notna()]) == [BAD] and "text alone" in got["note"][BAD]
    (row,) = [row for row in read_rows(bad_csv) if row["id"] == BAD]
    said = [row["question"], *(f"{letter}. {choice}" for letter, choice in zip("abcd", row["choices"]))]
    content = [{"type": "text", "text": "\n".join([*said, "Answer with the letter only."])}]
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


def test_a_fold_trained_elsewhere_is_asked_with_its_own_base_and_no_other(ask, folds, tmp_path):
    fold, moved, other = tmp_path / "fold0", tmp_path / "moved", tmp_path / "other"
    shutil.copytree(folds[0], fold, ignore=shutil.ignore_patterns("checkpoint-*"))
    args = json.loads((fold / "args.json").read_text()) | {"model": "/somewhere/else", "fp16": True}
    (fold / "args.json").write_text(json.dumps(args))
    shutil.copytree(TINY, moved)
    shutil.copytree(TINY, other)
    weights = load_file(other / "model.safetensors")
    name = next(name for name in weights if "layers.0" in name and "q_proj.weight" in name)
    save_file(weights | {name: weights[name] * 1.01}, other / "model.safetensors", metadata={"format": "pt"})
    assert ask(outputs=tmp_path / "own")[0] == 0
    for flags, message in (
        (["--dtype", "float32"], "neither a model folder nor reachable"),
        (["--model", moved], "fp16 needs a CUDA GPU"),
        (["--model", other, "--dtype", "float32"], "fold0: not trained on the base weights in"),
    ):
        code, _, error = ask(*flags, of=[fold])
        assert (code, error.count("\n")) == (2, 1) and message in error, error
    assert ask("--model", moved, "--dtype", "float32", of=[fold])[0] == 0
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
def test_an_adapter_that_does_not_fit_is_refused_in_one_line(ask, folds, tmp_path, change):
    fold = tmp_path / "fold0"
    shutil.copytree(folds[0], fold, ignore=shutil.ignore_patterns("checkpoint-*"))
    adapter(fold, change)
    code, _, error = ask("--weights", "raw", of=[fold])
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


def test_folds_that_are_asked_otherwise_are_predicted_apart(ask, folds, tmp_path):
    fold = tmp_path / "fold7"
    shutil.copytree(folds[0], fold, ignore=shutil.ignore_patterns("checkpoint-*"))
    args = json.loads((fold / "args.json").read_text()) | {"image_size": 140}
    (fold / "args.json").write_text(json.dumps(args))
    code, _, error = ask(of=[folds[0], fold])
    assert (code, error.count("\n")) == (2, 1) and "image_size 112 and fold7 140; predict them in two" in error
    code, _, error = ask(of=[folds[0], folds[0]])
    assert (code, error.count("\n")) == (2, 1) and "would both write" in error


def test_gpus_that_are_not_used_are_told(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    predict.start_processes()
    assert "one of 2 GPUs is used; `accelerate launch predict.py" in capsys.readouterr().out


def test_fsdp_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="without FSDP"):
        predict.start_processes()


def test_the_gate_shows_further_views_of_unsure_rows_only(ask, counted, small_csv, tmp_path):
    flags = [*VIEWS, "--csv", small_csv]
    assert ask(*flags, outputs=tmp_path / "all")[0] == 0
    plain, everything = table(tmp_path / "all/plain/fold0.csv"), table(tmp_path / "all/fold0.csv")
    top = np.sort(plain)[:, ::-1]
    margins = top[:, 0] - top[:, 1]
    gate = float(np.sort(margins)[2:4].mean())
    counted.rows.clear()
    code, output, error = ask(*flags, "--gate", gate, outputs=tmp_path / "gated")
    assert code == 0, error
    assert counted.rows == [8, 3, 3] and "8 rows, " in output and "1.75 forwards a row" in output
    gated = table(tmp_path / "gated/fold0.csv")
    unsure = margins < gate
    assert np.abs(gated[~unsure] - plain[~unsure]).max() < 1e-5 and np.abs(gated - everything)[unsure].max() < 1e-5
    assert json.loads((tmp_path / "gated/fold0.json").read_text())["gate"] == gate
    assert np.abs(everything - plain)[~unsure].max() > 1e-4


def test_each_fold_answers_its_own_validation_rows_in_the_same_views(
    ask, folds, counted, trained, tmp_path, monkeypatch
):
    outputs = tmp_path / "outputs"
    code, output, error = ask("--oof", *VIEWS, "--weights", "ema", of=folds)
    assert code == 0, error
    for fold in folds:
        alone, plain = outputs / "oof" / f"{fold.name}.csv", outputs / "oof" / "plain" / f"{fold.name}.csv"
        wanted = pd.read_csv(fold / "ema" / "oof.csv")
        assert list(pd.read_csv(alone)["id"]) == list(pd.read_csv(plain)["id"]) == list(wanted["id"])
        assert np.abs(table(plain) - wanted.filter(like="p_").to_numpy()).max() < 1e-5, "what training logged"
        assert np.abs(table(alone) - table(plain)).max() > 1e-4
        card = json.loads(alone.with_suffix(".json").read_text())
        truth = pd.read_csv(trained / "data" / "train.csv").set_index("id")["answer"][wanted["id"]].to_numpy()
        assert card["scores"]["accuracy"] == (pd.read_csv(alone)["answer"] == truth).mean()
        assert card["views"] == ["plain", "rotation 1", "scale 1.4"] and "test_csv" not in card
    report = json.loads((outputs / "oof" / "tta.json").read_text())
    assert report["rows"] == 24 and [line["views"] for line in report["views"]][:3] == [
        "plain",
        "+ rotation 1",
        "+ scale 1.4",
    ]
    assert report["recommendation"] in output and "each view added to those before it, on 24 out-of-fold" in output
    written = pd.read_csv(outputs / "oof" / "tta.csv")
    assert list(written["log_loss"]) == pytest.approx([line["log_loss"] for line in report["views"]])

    monkeypatch.setattr(predict, "load_base", lambda *args: pytest.fail("views that are kept were asked for again"))
    code, output, error = ask("--oof", "--num_permutations", "2", "--gate", "0.5", "--weights", "ema", of=folds)
    assert code == 0, error
    ids, mean = read_predictions(outputs / "oof" / "fold1.csv")
    assert json.loads((outputs / "oof" / "fold1.json").read_text())["gate"] == 0.5
    plain = read_predictions(outputs / "oof" / "plain" / "fold1.csv")[1]
    top = np.sort(plain)[:, ::-1]
    sure = top[:, 0] - top[:, 1] >= 0.5
    assert np.abs(mean[sure] - plain[sure]).max(initial=0) < 1e-9 and 0 < (~sure).sum()
    assert np.abs(mean[~sure] - plain[~sure]).max() > 1e-4


def test_an_ensemble_is_tuned_on_out_of_fold_rows_of_the_same_views(ask, folds, script, tmp_path):
    outputs = tmp_path / "outputs"
    for flags in ([], ["--oof"]):
        assert ask("--num_permutations", "2", *flags, of=folds)[0] == 0
    files = [outputs / "fold0.csv", outputs / "fold1.csv"]
    code, output, error = script("ensemble", *files)
    assert code == 0 and "out of fold without" not in output, error
    scores = [json.loads((outputs / "oof" / f"fold{i}.json").read_text())["scores"]["log_loss"] for i in (0, 1)]
    assert f"log-loss {np.mean(scores):.4f}, 24 rows" in output
    assert ask("--num_permutations", "3", "--oof", of=folds)[0] == 0
    code, output, error = script("ensemble", *files)
    assert code == 0 and "made with TTA, out of fold without" in output, error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--base", "args/demo/fold0.json"], "--oof is for folds"),
        (["--csv", "small"], "out-of-fold rows of fold0 are not in it"),
        (["--weights", "swa"], "no oof.csv"),
    ],
)
def test_out_of_fold_rows_that_are_none_are_refused(ask, folds, trained, tmp_path, flags, message):
    fold = tmp_path / "fold0"
    shutil.copytree(folds[0], fold, ignore=shutil.ignore_patterns("checkpoint-*"))
    (fold / "swa" / "oof.csv").unlink()
    small = trained / "data" / "train_small.csv"
    pd.read_csv(trained / "data" / "train.csv", dtype=str).iloc[:8].to_csv(small, index=False)
    code, _, error = ask("--oof", *[small if flag == "small" else flag for flag in flags], of=[fold])
    assert (code, error.count("\n")) == (2, 1) and message in error, error
    assert not (tmp_path / "outputs").exists()


def test_rows_that_two_folds_were_validated_on_are_refused(ask, folds, tmp_path):
    shutil.copytree(folds[0], tmp_path / "fold9", ignore=shutil.ignore_patterns("checkpoint-*"))
    code, _, error = ask("--oof", of=[folds[0], tmp_path / "fold9"])
    assert (code, error.count("\n")) == (2, 1) and "validated on the same rows" in error


def test_two_processes_give_the_file_of_one(launched, ask, folds, bad_csv, tmp_path):
    started, outputs = launched
    flags = ["--csv", bad_csv, "--skip_bad_images", *VIEWS, "--check_generation", "32"]
    code, output, error = ask(*flags, of=folds)
    assert code == 0, error
    started.wait(timeout=300)
    said = (outputs / "said.txt").read_text()
    assert started.returncode == 0, said[-4000:]
    one = tmp_path / "outputs"
    for name in ("fold0.csv", "fold1.csv", "plain/fold0.csv"):
        first, second = (pd.read_csv(folder / name) for folder in (outputs, one))
        assert list(first["id"]) == list(second["id"]) and first["note"].equals(second["note"]) and len(first) == 23
        assert np.abs(first.filter(like="p_").to_numpy() - second.filter(like="p_").to_numpy()).max() < 1e-5
    cards = [json.loads((folder / "fold1.json").read_text()) for folder in (outputs, one)]
    assert cards[0].keys() == cards[1].keys() and cards[0]["key"] == cards[1]["key"]
    for line in ("scale 1.4: another grid", "fold1.csv: 23 rows", "rows were answered without their image"):
        assert said.count(line) == output.count(line) > 0, "each line is printed once"
    assert not list(outputs.rglob(".*"))
