"""doctor.py and what it relies on: the checks before training, shapes without weights, and the memory estimate."""

import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import HEADER, ROOT, TINY, write_csv
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForImageTextToText

import vqa.data.folds
from vqa.config.arguments import ModelArguments
from vqa.core.errors import UserError
from vqa.core.io import read_json
from vqa.data.collator import IGNORE, Collator
from vqa.modeling.families import language_model
from vqa.modeling.families.base import Family
from vqa.modeling.loading import add_adapter, load_base
from vqa.training.doctor import Report, check_model
from vqa.training.memory import (
    Batch,
    Setup,
    base_bytes,
    checkpoint_bytes,
    layer_bytes,
    linear_attention_bytes,
    meta_model,
    trained_parameters,
    training_peak,
    validation_peak,
)
from vqa.training.preflight import adapter_problems, adapter_targets, check_before_training
from vqa.training.speed import operations

QWEN = Path(__file__).resolve().parent.parent.parent / "shared" / "qwen2-tokenizer"


@pytest.fixture
def case(contest, tmp_path, script):
    """Run doctor.py on a copy of the contest, its table and folds changed at will: (exit code, stdout, stderr)."""
    data = tmp_path / "data"
    shutil.copytree(contest, data)
    table = pd.read_csv(data / "train.csv", dtype=str)
    folds = pd.DataFrame({"id": table["id"], "fold": [number % 2 for number in range(len(table))]})

    def call(*flags, test=True):
        write_csv(data / "train.csv", table.values.tolist(), HEADER)
        folds.to_csv(data / "folds.csv", index=False)
        if not test:
            (data / "test.csv").unlink()
        args = {"model": TINY, "train_csv": str(data / "train.csv"), "test_csv": str(data / "test.csv")}
        (tmp_path / "args.json").write_text(json.dumps(args | {"image_size": 112}))
        return script("doctor", tmp_path / "args.json", *flags)

    call.data, call.table, call.folds = data, table, folds
    return call


@pytest.fixture
def adapted():
    """A tiny model of its own with the adapter that training attaches."""
    return add_adapter(load_base(TINY, False, torch.float32), 16, 32, 0.05)


def test_a_sound_run_is_ready_and_its_labels_are_shown(case, ids):
    code, output, error = case("--shuffle_choices", "false", test=False)
    assert code == 0 and output.endswith("\nready\n"), output + error
    answer = case.table["answer"][1]  # fold 0 is validated on, so row 1 is the first that is trained on
    assert f"row_001: the right choice {case.table[answer][1]!r} is shown at {answer}; " in output
    assert f"is shown at {answer}; the labels cover '{answer}<|im_end|>'" in output
    assert f"a {ids[0]}, b {ids[1]}, c {ids[2]}, d {ids[3]}" in output
    assert "6 q_proj, 6 k_proj" in output and "time: unknown without a GPU" in output


def test_a_run_for_a_gpu_is_checked_without_one(case, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, output, error = case("--load_in_4bit", "true", "--fp16", "true", "--gradient_checkpointing", "true")
    assert code == 0, error
    assert "14.5 GiB" in output and "training needs one for load_in_4bit, fp16" in output


def test_warnings_are_printed_and_the_run_is_still_ready(case):
    case.table.loc[3, "b"] = case.table.loc[3, "a"]
    case.table.loc[5, "answer"] = "a"
    case.table.loc[5, "d"] = ""
    shutil.copy(case.data / "pictures" / "0.jpg", case.data / "pictures" / "only_test.jpg")
    test = pd.read_csv(case.data / "test.csv", dtype=str)[:1].assign(id="test_x", path="pictures/only_test.jpg")
    test.to_csv(case.data / "test.csv", index=False)
    code, output, _ = case()
    assert code == 0 and output.endswith("\nready\n"), output
    assert "1 row with two equal choices: row_003" in output
    assert "1 row with 3, 23 rows with 4" in output
    assert "1 test row with the same image as a training row: test_x and row_000" in output


def test_a_copied_image_on_both_sides_of_a_fold_must_be_fixed(case):
    shutil.copy(case.data / "pictures" / "0.jpg", case.data / "pictures" / "1.jpg")
    code, output, _ = case()
    assert code == 1 and "ready" not in output
    assert "1. 1 validation rows have the image of a training row (row_000 and row_001)" in output
    assert "python make_folds.py" in output


def test_a_broken_test_image_is_a_warning_and_a_broken_training_image_an_error(case):
    """Also where it is missing: the images of the other test rows are still compared with those of training."""
    test = pd.read_csv(case.data / "test.csv", dtype=str)[:3].assign(
        path=["pictures/x.jpg", "no.jpg", "pictures/2.jpg"]
    )
    test.to_csv(case.data / "test.csv", index=False)
    (case.data / "pictures" / "x.jpg").write_bytes(b"no image")
    code, output, error = case()
    assert code == 0 and output.endswith("\nready\n"), error
    assert "test.csv: 2 images cannot be used: " in output and "`predict.py --skip_bad_images`" in output
    assert "1 test row with the same image as a training row: row_002 and row_002" in output
    (case.data / "pictures" / "1.jpg").write_bytes(b"no image")
    code, _, error = case()
    assert (code, error.count("\n")) == (2, 1) and "train.csv: 1 of 24 images cannot be used" in error


def test_the_folds_file_is_read_once(case, monkeypatch):
    paths, read_table = [], vqa.data.folds.read_table
    monkeypatch.setattr(
        "vqa.data.folds.read_table", lambda path, columns: paths.append(path) or read_table(path, columns)
    )
    assert case()[0] == 0 and [path.name for path in paths] == ["folds.csv"]


def test_the_remedy_for_a_bad_adapter_names_a_file_that_exists(adapted):
    (problem,) = adapter_problems(adapted.requires_grad_(False))
    place = re.search(r"vqa/[\w/]+", problem).group()
    assert (ROOT / place).exists() and "lora_targets" in (ROOT / place / "base.py").read_text(), problem


def test_copies_in_two_training_folds_are_only_a_warning(case):
    case.folds["fold"] = [number % 3 for number in range(len(case.folds))]
    shutil.copy(case.data / "pictures" / "1.jpg", case.data / "pictures" / "2.jpg")
    code, output, _ = case()
    assert code == 0 and "1 image in more than one fold: row_001 and row_002" in output


@pytest.mark.slow
def test_a_run_that_will_not_fit_is_warned_of(case, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, output, _ = case("--per_device_train_batch_size", "20000", "--auto_batch", "false")
    assert code == 0 and "too much for a 16 GB T4: turn auto_batch on, halve per_device_train_batch_size" in output
    code, output, _ = case("--per_device_train_batch_size", "20000")
    batches, size = re.search(
        r"auto_batch on a 16 GB T4: a step of 40000 rows is (\d+) x (\d+), with", output
    ).groups()
    assert int(batches) * int(size) == 40000 and int(batches) > 1 and "too much" not in output


def test_what_cannot_be_read_is_one_line_and_exit_code_2(case):
    code, _, error = case("--train_csv", "nowhere.csv")
    assert (code, error.count("\n")) == (2, 1) and "nowhere.csv: no such file" in error
    code, _, error = case("--fold", "9")
    assert (code, error.count("\n")) == (2, 1) and "fold 9 is not in" in error


def test_the_longest_row_is_as_long_as_the_collator_makes_it(case, processor, rows):
    longest = max(Collator(processor, 112, with_answer=True)([row])["input_ids"].shape[1] for row in rows[1::2])
    _, output, _ = case()
    assert f"longest {longest}\n" in output


def test_help_teaches(script):
    code, output, _ = script("doctor", "--help")
    assert code == 0 and "usage: python doctor.py ARGS.json" in output and "--lora_rank" in output


def test_training_may_begin_where_all_is_well(adapted, processor, rows):
    check_before_training(adapted, Collator(processor, 112, with_answer=True), rows[:12], rows[12:])


@pytest.mark.parametrize("shift", [-1, 1])
def test_training_is_refused_where_labels_miss_the_answer(adapted, processor, rows, monkeypatch, shift):
    right = Collator.labels

    def shifted(self, input_ids, *texts):
        marked = right(self, input_ids, *texts).roll(shift, dims=1) != IGNORE
        return torch.where(marked, input_ids, IGNORE)

    monkeypatch.setattr(Collator, "labels", shifted)
    with pytest.raises(UserError, match="the labels of row_000 cover .* and not 'a<|im_end|>'"):
        check_before_training(adapted, Collator(processor, 112, with_answer=True), rows[:12], rows[12:])


def test_training_is_refused_where_the_adapter_reaches_the_vision_tower(processor, rows):
    config = LoraConfig(target_modules=["q_proj", "down_proj"])  # by names, as many notebooks do
    model = get_peft_model(load_base(TINY, False, torch.float32), config)
    with pytest.raises(UserError, match="8 parameters of the vision tower are trained .blocks.0.mlp.down_proj"):
        check_before_training(model, Collator(processor, 112, with_answer=True), rows[:12], rows[12:])


def test_training_is_refused_where_a_row_or_an_image_is_on_both_sides(adapted, processor, rows, tmp_path):
    collate = Collator(processor, 112, with_answer=True)
    with pytest.raises(UserError, match="1 validation rows are training rows too .row_011."):
        check_before_training(adapted, collate, rows[:12], rows[11:])
    copy = shutil.copy(rows[0]["images"][0], tmp_path / "another name.jpg")
    with pytest.raises(UserError, match="have the image of a training row .row_020 and row_000."):
        check_before_training(adapted, collate, rows[:12], [rows[20] | {"images": [str(copy)]}])


def test_training_is_refused_where_nothing_is_trained(adapted):
    assert "nothing of the model is trained" in adapter_problems(adapted.requires_grad_(False))[0]


def test_half_a_download_is_a_blocker(adapted, tmp_path, capsys):
    shutil.copytree(TINY, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    for content, problem in ((weights.read_bytes(), None), (weights.read_bytes()[:-1], "is incomplete")):
        weights.write_bytes(content)
        report = Report()
        check_model(report, ModelArguments(model=str(tmp_path / "model")), adapted)
        assert report.blockers == [] if problem is None else problem in report.blockers[0]
    assert "quantization: none" in capsys.readouterr().out


def test_the_meta_model_has_the_names_shapes_and_counts_of_the_model_and_no_weights(adapted):
    shape = meta_model(ModelArguments(model=TINY), torch.float32)
    assert {p.device.type for p in shape.parameters()} == {"meta"}
    described = [{name: (p.shape, p.requires_grad) for name, p in m.named_parameters()} for m in (shape, adapted)]
    assert described[0] == described[1]
    assert shape.get_nb_trainable_parameters() == adapted.get_nb_trainable_parameters()
    assert adapter_targets(shape) == dict.fromkeys(Family.lora_targets, 6)


@pytest.mark.parametrize(("name", "parameters"), [("3B", 3_754_622_976), ("7B", 8_292_166_656)])
def test_the_real_models_are_counted_in_full_without_weights(tmp_path, name, parameters):
    if not QWEN.is_dir():
        pytest.skip("the real configs are not here")
    values = read_json(QWEN / f"config_{name}.json")
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    config.save_pretrained(tmp_path)
    shape = meta_model(ModelArguments(model=str(tmp_path)), torch.float16)
    frozen = sum(p.numel() for p in shape.parameters() if not p.requires_grad)
    assert frozen == parameters
    text, vision = config.text_config, config.vision_config
    wide, narrow = text.hidden_size**2, text.hidden_size * text.num_key_value_heads * 128
    packed = text.num_hidden_layers * (2 * wide + 2 * narrow + 3 * text.hidden_size * text.intermediate_size)
    # 4 bits and, for 64 of them, 8 bits of scale and a 256th of 32 more
    wanted = packed * (4 + 8 / 64 + 32 / 64 / 256) / 8 + 2 * (parameters - packed)
    assert base_bytes(Setup(shape, load_in_4bit=True, checkpointing=True)) == pytest.approx(wanted, rel=1e-9)
    assert vision.depth == 32 and adapter_problems(shape) == []


def test_a_layer_keeps_as_many_bytes_as_estimated():
    """What autograd saves in a real layer under autocast; a CPU's norms keep a little more, and its dropout would."""
    model = add_adapter(load_base(TINY, False, torch.bfloat16), 4, 8, 0.0).train()
    text = model.get_base_model().model.language_model
    hidden = torch.randn(4, 100, 192, dtype=torch.bfloat16, requires_grad=True) * 1
    rotary = text.rotary_emb(hidden, torch.arange(100).expand(3, 4, 100))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        text.layers[2](hidden, position_embeddings=rotary)
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    setup = Setup(model, load_in_4bit=False, checkpointing=True)
    assert layer_bytes(setup, Batch(4, 100, 64)) == pytest.approx(measured, rel=0.08)
    assert checkpoint_bytes(setup, Batch(4, 100, 64)) == 6 * hidden.nbytes


def test_peaks_grow_with_what_they_should_grow_with(adapted):
    setup, small, large = Setup(adapted, False, True), Batch(8, 100, 64), Batch(16, 100, 64)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert trained_parameters(setup) == trained
    assert training_peak(setup, large) > training_peak(setup, small)
    assert training_peak(Setup(adapted, False, checkpointing=False), small) > training_peak(setup, small)
    more = training_peak(Setup(adapted, False, True, averages=3), small) - training_peak(setup, small)
    assert more == 4 * trained
    less = training_peak(setup, small) - training_peak(Setup(adapted, False, True, optimizer="adamw_8bit"), small)
    assert less == 6 * trained
    assert validation_peak(setup, small) < training_peak(setup, small)


def test_operations_are_those_that_torch_counts(processor, rows):
    """Forward and backward of the layers that are packed in 4 bits: nothing counted for the frozen weights."""
    shape = meta_model(ModelArguments(model=TINY), torch.float32)
    linear = [m.base_layer for name, m in shape.named_modules() if hasattr(m, "base_layer")]
    counter = FlopCounterMode(display=False)
    with counter:
        for layer in linear:
            layer(torch.zeros(5 * 70, layer.in_features, device="meta", requires_grad=True)).sum().backward()
    setup = Setup(shape, load_in_4bit=True, checkpointing=False)
    assert operations(setup, Batch(5, 70, 0)) == counter.get_total_flops()


@pytest.mark.slow
def test_the_memory_benchmark_runs_dry_and_leaves_the_model_as_it_was(tmp_path, monkeypatch, capsys):
    import memory

    model = tmp_path / "model"
    shutil.copytree(TINY, model)
    flags = ["--models", str(model), "--sizes", "112", "--batches", "1", "2", "--steps", "2"]
    output = tmp_path / "lines.jsonl"
    monkeypatch.setattr("sys.argv", ["memory.py", *flags, "--output", str(output)])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a model is slower on more, and on a busy machine by far
    memory.main()
    torch.set_num_threads(threads)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(line["batch"], line["patches"], line["averaged_steps"]) for line in lines] == [(1, 64, 2), (2, 64, 2)]
    assert all(line["estimated_gib"] > 0 and line["seconds"] > 0 for line in lines)
    assert sorted(path.name for path in model.iterdir()) == sorted(path.name for path in Path(TINY).iterdir())


def test_what_a_layer_of_linear_attention_keeps_is_counted():
    """Against the tensors that autograd saves: one decoder layer of a small Qwen3.5, in bf16."""
    text = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 1, "vocab_size": 99}
    text |= {"layer_types": ["linear_attention"], "linear_key_head_dim": 32, "linear_value_head_dim": 32}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 256}
    config = AutoConfig.for_model("qwen3_5", text_config=text, vision_config=vision)
    base = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16).requires_grad_(False)
    model = add_adapter(base, 8, 16, 0.05).train()
    hidden, saved = torch.randn(2, 256, 256, dtype=torch.bfloat16).requires_grad_(), {}

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        output = language_model(base).layers[0](hidden, position_embeddings=None)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = sum(size for pointer, size in saved.items() if pointer not in weights)
    setup, batch = Setup(model, False, True), Batch(2, 256, 0)
    counted = layer_bytes(setup, batch) + linear_attention_bytes(setup, batch)
    assert output.requires_grad and kept < counted < 1.35 * kept, "the count includes temporaries of the backward pass"
