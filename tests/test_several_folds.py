"""Several args files in one process: each fold is the one that it is when it is trained alone."""

import json
from pathlib import Path

import pytest
import torch

from vqa.core.errors import UserError
from vqa.training import shared_base
from vqa.training.checkpointing import TimeLimitCallback
from vqa.training.fold_run import parse_runs
from vqa.training.shared_base import SharedBase


def args_file(folder: Path, name: str, base: Path, **fields) -> Path:
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"extends": str(base), "output_dir": str(folder / name)} | fields))
    return path


@pytest.mark.slow
def test_a_fold_trained_second_has_the_bytes_of_one_trained_alone(trained, script, tmp_path, monkeypatch):
    """The first fold leaves nothing behind: it checkpoints gradients and has another adapter and loss."""
    loaded, load_base = [], shared_base.load_base
    monkeypatch.setattr(shared_base, "load_base", lambda *args: (loaded.append(1), load_base(*args))[1])
    other = {"gradient_checkpointing": True, "lora_rank": 4, "lora_dropout": 0.1, "loss": "letter", "max_steps": 2}
    first = args_file(tmp_path, "first", trained / "args" / "fold1.json", **other)
    second = args_file(tmp_path, "second", trained / "args" / "fold0.json")
    code, output, error = script("train_fold", first, second)
    assert code == 0, error
    assert len(loaded) == 1 and output.count(": best weights ") == 2
    alone = trained / "checkpoints" / "fold0"
    for name in ("adapter_model.safetensors", "oof.csv", "swa/adapter_model.safetensors", "ema/oof.csv"):
        assert (tmp_path / "second" / name).read_bytes() == (alone / name).read_bytes(), name
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (tmp_path / "second", alone)]
    assert metrics[0]["fingerprints"] == metrics[1]["fingerprints"] and metrics[0]["weights"] == metrics[1]["weights"]

    # Both are finished now. A third one is left, for which there is no time.
    third = args_file(tmp_path, "third", trained / "args" / "fold0.json")
    monkeypatch.setattr(TimeLimitCallback, "is_late", lambda self: True)
    code, output, _ = script("train_fold", first, second, third, "--resume_from_checkpoint", "auto")
    assert code == 3 and output.count("is finished") == 2 and "third: no time is left" in output
    assert len(loaded) == 1 and not (tmp_path / "third").exists()


@pytest.mark.slow
def test_removing_an_adapter_leaves_the_base_as_it_was(processor):
    run = parse_runs(["--model", "checkpoints/tiny", "--output_dir", "run", "--use_cpu", "true"], "")[0]
    base = SharedBase(run.model_args, run.recipe)
    adapters = []
    for _ in range(2):
        model = base.add_adapter(run.model_args, run.recipe)
        adapters.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
        adapters[-1]["fingerprint"] = base.fingerprints()
        model.gradient_checkpointing_enable()
        base.remove_adapter()
        assert not base.base.is_gradient_checkpointing and not any("lora" in n for n, _ in base.base.named_modules())
    assert adapters[0].pop("fingerprint") == adapters[1].pop("fingerprint")
    assert adapters[0].keys() == adapters[1].keys()
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])


@pytest.mark.parametrize(
    ("second", "flags", "message"),
    [
        ({"model": "another"}, [], "first.json and .*second.json differ in model"),
        ({}, ["--resume_from_checkpoint", "checkpoint-4"], "one checkpoint for several args files"),
        ({}, ["--output_dir", "here"], "have the same output_dir"),
    ],
)
def test_what_folds_of_one_process_cannot_differ_in_is_refused(tmp_path, second, flags, message):
    (tmp_path / "base.json").write_text(json.dumps({"model": "checkpoints/tiny"}))
    files = [args_file(tmp_path, "first", tmp_path / "base.json")]
    files.append(args_file(tmp_path, "second", tmp_path / "base.json", **second))
    with pytest.raises(UserError, match=message):
        parse_runs([*map(str, files), *flags], "")
