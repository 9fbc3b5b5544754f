"""Args files: what extends what, what overrides what, and what is refused."""

import json
from pathlib import Path

import pytest
from conftest import ROOT

import predict
from vqa.config.args_file import build_dataclass, read_args_file
from vqa.config.parser import CLASSES, check_launch, check_machine, field_names, parse_arguments
from vqa.config.recipe import RecipeArguments
from vqa.core.errors import UserError
from vqa.core.io import swap_root


@pytest.fixture
def args_file(tmp_path):
    """Write a dict as args/run/fold0.json and give its path."""

    def write(values: dict, name: str = "fold0.json") -> str:
        path = tmp_path / "args" / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
        return str(path)

    return write


def test_a_file_extends_another_and_its_own_values_win(args_file):
    args_file({"learning_rate": 1e-3, "image_size": 140}, "base.json")
    path = args_file({"extends": "base.json", "image_size": 112})
    assert read_args_file(path) == {"learning_rate": 1e-3, "image_size": 112}


def test_flags_override_the_file_and_defaults_fill_the_rest(args_file):
    path = args_file({"model": "m", "image_size": 112, "num_train_epochs": 7})
    model, data, recipe, resolved = parse_arguments([path, "--image_size", "84", "--loss", "letter"], "")
    assert (data.image_size, recipe.num_train_epochs, recipe.loss, model.lora_rank) == (84, 7, "letter", 16)
    assert (recipe.output_dir, recipe.seed, str(recipe.lr_scheduler_type.value)) == (
        "checkpoints/run/fold0",
        42,
        "cosine",
    )
    assert resolved["image_size"] == 84 and resolved["loss"] == "letter"


def test_what_a_fold_writes_as_its_args_repeats_it(args_file):
    first = parse_arguments([args_file({"model": "m", "image_size": 112, "fold": None, "max_steps": 3})], "")
    again = parse_arguments([args_file(json.loads(json.dumps(first[3])), "again.json")], "")
    assert again[:2] == first[:2] and again[3] == first[3]


@pytest.mark.parametrize(
    ("values", "rows"),
    [
        ({}, 16),
        ({"effective_batch_size": 24}, 24),
        ({"effective_batch_size": 24, "per_device_train_batch_size": 4}, 24),
        ({"per_device_train_batch_size": 4}, 8),  # files of release 0.1, whose defaults were 8 and 2
        ({"gradient_accumulation_steps": 3}, 24),
        ({"per_device_train_batch_size": 12, "gradient_accumulation_steps": 1}, 12),
    ],
)
@pytest.mark.parametrize("gpus", [1, 2, 4])
def test_a_step_has_the_same_rows_on_any_number_of_gpus(args_file, monkeypatch, values, rows, gpus):
    monkeypatch.setattr(RecipeArguments, "world_size", gpus)
    _, _, recipe, resolved = parse_arguments([args_file({"model": "m", **values})], "")
    size, batches = recipe.per_device_train_batch_size, recipe.gradient_accumulation_steps
    assert size * batches * gpus == rows == recipe.effective_batch_size
    assert size <= values.get("per_device_train_batch_size", rows)
    assert (resolved["effective_batch_size"], resolved["gradient_accumulation_steps"]) == (rows, None)


def test_rows_that_cannot_be_split_evenly_are_refused_with_what_works(args_file, monkeypatch):
    monkeypatch.setattr(RecipeArguments, "world_size", 3)
    with pytest.raises(UserError, match="16 rows .* over 3 GPUs. Set effective_batch_size to 15 or 18"):
        parse_arguments([args_file({"model": "m"})], "")
    with pytest.raises(UserError, match="Set effective_batch_size to 3,"):
        parse_arguments([args_file({"model": "m", "effective_batch_size": 2})], "")


@pytest.mark.parametrize("word", ["null", "none"])
def test_null_can_be_said_on_the_command_line(args_file, word):
    assert parse_arguments([args_file({"model": "m", "fold": 1}), "--fold", word], "")[1].fold is None


@pytest.mark.parametrize(
    ("values", "flags", "message"),
    [
        ({"image_sise": 3}, [], "unknown field 'image_sise'. Did you mean 'image_size'"),
        ({}, ["--learning_rat", "1"], "unknown field 'learning_rat'. Did you mean 'learning_rate'"),
        ({"lora_rank": "many"}, [], "lora_rank"),
        ({}, ["--num_train_epochs", "few"], "num_train_epochs"),
        ({"loss": "huber"}, [], "token or letter"),
        ({"metric_for_best_model": "f1"}, [], "log_loss or accuracy"),
        ({"model": None}, [], "no model given"),
        ({"fp16": True}, [], "fp16 needs a CUDA GPU.*args/demo/fold0.json"),
        ({"load_in_4bit": True}, [], "load_in_4bit needs a CUDA GPU.*args/demo/fold0.json"),
        ({"eval_strategy": "sometimes"}, [], "sometimes"),
        ({"save_only_model": True}, [], "no run can resume"),
        ({"load_best_model_at_end": True}, [], "does not work with this recipe"),
        ({"swa_every": 0}, [], "1 or more"),
        ({"ema_decay": 1.0}, [], "below 1"),
        ({"save_total_limit": 1}, [], "Set it to 2 or more"),
        ({"effective_batch_size": 16}, ["--gradient_accumulation_steps", "1"], "Leave it out"),
        ({"swa_lr": 1e-4, "swa_start": None}, [], "Set swa_start"),
        ({"extends": "fold0.json"}, [], "extends itself"),
        ({"extends": "gone.json"}, [], "gone.json: no such file"),
        ({"extends": "other.json"}, [], "extends itself"),
    ],
)
def test_mistakes_are_named_in_one_line(args_file, monkeypatch, values, flags, message):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match=message) as error:
        args_file({"extends": "fold0.json"}, "other.json")
        parse_arguments([args_file({"model": "m"} | values), *flags], "")
    assert "\n" not in str(error.value)


def test_plain_python_with_several_gpus_is_sent_to_accelerate(args_file, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(UserError, match="accelerate launch"):
        check_launch()
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_machine({"fp16": True})


@pytest.mark.parametrize(
    ("variable", "name"), [("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepS")]
)
def test_a_launch_that_splits_the_model_is_refused(monkeypatch, variable, name):
    monkeypatch.setenv(variable, "true")  # `accelerate launch` sets it
    for check in (check_launch, predict.start_processes):
        with pytest.raises(UserError, match=f"for {name}.*two_gpus.yaml"):
            check()


def test_a_file_that_is_no_object_or_no_json_is_refused(args_file, tmp_path):
    with pytest.raises(UserError, match="one JSON object"):
        read_args_file(args_file([1]))
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_args_file(tmp_path / "x.json")


@pytest.mark.parametrize("path", sorted((ROOT / "args").rglob("*.json")), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_args_file_that_ships_is_valid(path, monkeypatch):
    monkeypatch.setattr("vqa.config.parser.check_machine", lambda values: None)  # fp16 presets are for GPUs
    values = read_args_file(path, field_names()) | {"fp16": False}
    model, data, recipe = (build_dataclass(kind, values | {"output_dir": "x"}) for kind in CLASSES)
    assert model.model and data.image_size > 0 and recipe.loss in ("token", "letter")
    if path.name.startswith("fold"):
        assert set(json.loads(path.read_text())) == {"extends", "fold"}, (
            "fold files hold nothing that could drift apart"
        )
        assert values["fold"] == int(path.stem.removeprefix("fold"))


def test_places_of_args_checkpoints_and_outputs_mirror_each_other():
    assert swap_root("checkpoints", "args/demo/fold0", below="args") == Path("checkpoints/demo/fold0")
    assert swap_root("outputs", "checkpoints", below="checkpoints") == Path("outputs")
    assert swap_root("outputs", "/", below="checkpoints") == Path("outputs")
    assert swap_root("checkpoints", "/x/args/fold0", below="args") == Path("checkpoints/fold0")
    assert swap_root("checkpoints", "elsewhere/fold0", below="args") == Path("checkpoints/fold0")


def test_of_two_folders_called_args_the_projects_own_counts():
    def place(path) -> str:
        return swap_root("checkpoints", path, below="args").as_posix()

    assert place("/data/args/me/args/demo/fold0") == "checkpoints/demo/fold0"
    assert place("args/x/args/fold0") == "checkpoints/x/args/fold0", "not that of args/fold0"
    assert place(Path.cwd() / "args/x/args/fold0") == "checkpoints/x/args/fold0"
