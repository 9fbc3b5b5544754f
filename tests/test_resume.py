"""Whole checkpoints, and a stop in time: what a run that was cut off goes on from."""

import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import TrainerControl
from transformers.trainer_callback import DefaultFlowCallback

from vqa.core.errors import UserError
from vqa.training.checkpointing import COMPLETE, CheckpointMarkerCallback, TimeLimitCallback, checkpoint_to_resume
from vqa.training.validation import Validator

AGAIN = "Run the same command in a new session."


def checkpoint(folder, step: int, whole: bool = True):
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    (path / "trainer_state.json").write_text("{}")
    if whole:
        (path / COMPLETE).touch()
    return str(path)


def copy_fold(trained, tmp_path) -> tuple[Path, list]:
    """(a copy of the first fold's folder, the command line that continues it)."""
    part = tmp_path / "fold0"
    shutil.copytree(trained / "checkpoints" / "fold0", part)
    args = json.loads((part / "args.json").read_text())
    (part / "args.json").write_text(json.dumps(args | {"output_dir": str(part)}))
    return part, [trained / "args" / "fold0.json", "--output_dir", part, "--resume_from_checkpoint", "auto"]


def test_auto_takes_the_newest_whole_checkpoint_by_number(tmp_path):
    assert checkpoint_to_resume("auto", tmp_path, 16) is None
    nine, ten = checkpoint(tmp_path, 9), checkpoint(tmp_path, 10)
    half = checkpoint(tmp_path, 11, whole=False)
    assert nine != checkpoint_to_resume("auto", tmp_path, 16) == ten
    with pytest.raises(UserError, match="not a complete one"):
        checkpoint_to_resume(half, tmp_path, 16)
    assert checkpoint_to_resume(None, tmp_path, 16) is None


def state(step: int, epoch: float, steps: int = 100) -> SimpleNamespace:
    return SimpleNamespace(
        global_step=step, epoch=epoch, max_steps=steps, is_world_process_zero=True, eval_steps=10, logging_steps=10,
        save_steps=4,
    )  # fmt: skip


def flow(callbacks, event: str, args, now) -> TrainerControl:
    """The flags after an event, as the Trainer's own flow callback and then `callbacks` set them."""
    control = TrainerControl()
    for callback in (DefaultFlowCallback(), *callbacks):
        getattr(callback, event)(args, now, control)
    return control


def recipe(evaluate: str, save: str) -> SimpleNamespace:
    names = {"logging_strategy": "no", "logging_first_step": False, "eval_delay": 0}
    return SimpleNamespace(eval_strategy=evaluate, save_strategy=save, **names)


def test_an_epochs_last_step_is_saved_after_the_epochs_evaluation():
    args, callbacks = recipe("epoch", "steps"), [CheckpointMarkerCallback()]
    assert flow(callbacks, "on_step_end", args, state(4, 0.5)).should_save
    assert not flow(callbacks, "on_step_end", args, state(8, 1.0)).should_save
    end = flow(callbacks, "on_epoch_end", args, state(8, 1.0))
    assert end.should_evaluate and end.should_save
    assert not flow(callbacks, "on_epoch_end", args, state(18, 2.0)).should_save, "no step was to be saved there"


def late() -> TimeLimitCallback:
    stop = TimeLimitCallback(max_hours=1.0)
    stop.deadline = time.time() - 1
    return stop


def test_a_stop_is_saved_and_adds_no_evaluation():
    args, callbacks = recipe("epoch", "epoch"), [late(), CheckpointMarkerCallback()]
    control = flow(callbacks, "on_step_end", args, state(3, 0.375))
    assert control.should_save and control.should_training_stop and callbacks[0].stopped
    end = flow(callbacks, "on_epoch_end", args, state(3, 0.375))
    assert not end.should_evaluate and not end.should_save


def test_a_stop_at_an_epochs_end_comes_after_its_evaluation():
    args, callbacks = recipe("epoch", "steps"), [late(), CheckpointMarkerCallback()]
    assert not flow(callbacks, "on_step_end", args, state(8, 1.0)).should_save
    end = flow(callbacks, "on_epoch_end", args, state(8, 1.0))
    assert end.should_evaluate and end.should_save


def test_a_step_that_is_evaluated_is_not_stopped_before_its_evaluation():
    stop = late()
    control = flow([stop], "on_step_end", recipe("steps", "steps"), state(10, 0.5))
    assert control.should_evaluate and not control.should_training_stop and not stop.stopped


def test_what_an_evaluation_takes_has_to_fit_before_the_deadline():
    args, stop = recipe("steps", "no"), TimeLimitCallback(max_hours=1.0)
    stop.deadline = time.time() + 60
    assert not flow([stop], "on_step_end", args, state(1, 0.1)).should_training_stop
    stop.longest_evaluation = 120.0
    assert flow([stop], "on_step_end", args, state(2, 0.2)).should_training_stop


def test_hours_count_from_the_start_of_the_loop(monkeypatch):
    monkeypatch.setenv("RUN_STARTED", str(time.time() - 7200))
    assert TimeLimitCallback(max_hours=1.9).deadline < time.time() < TimeLimitCallback(max_hours=2.1).deadline
    assert TimeLimitCallback(None).deadline == float("inf")


def test_a_stopped_fold_goes_on_to_the_bytes_of_one_that_was_not(trained, script, monkeypatch, tmp_path):
    """train_fold.py with no time left stops at its first step, says how to go on, and ends the same."""
    whole, part = trained / "checkpoints" / "fold0", tmp_path / "fold0"
    args = [trained / "args" / "fold0.json", "--output_dir", part, "--resume_from_checkpoint", "auto"]
    assert script("train_fold", *args, "--max_hours", "0")[:2] == (
        3,
        f"{part}: no time is left of max_hours. {AGAIN}\n",
    )
    assert not part.exists()
    with monkeypatch.context() as patch:
        patch.setattr(TimeLimitCallback, "is_late", lambda self: self.longest_step > 0)
        code, output, error = script("train_fold", *args, "--max_hours", "11.5")
    assert code == 3 and "stopped in time at step 1 of 4" in output, error
    assert not (part / "metrics.json").exists() and (part / "checkpoint-1" / COMPLETE).is_file()
    code, output, error = script("train_fold", *args)
    assert code == 0, error
    for name in ("adapter_model.safetensors", "ema.safetensors", "swa.safetensors"):
        assert (part / "checkpoint-4" / name).read_bytes() == (whole / "checkpoint-4" / name).read_bytes(), name
    assert (part / "oof.csv").read_bytes() == (whole / "oof.csv").read_bytes()
    weights = [json.loads((folder / "metrics.json").read_text())["weights"] for folder in (whole, part)]
    assert weights[0] == weights[1]


def test_a_checkpoint_of_steps_with_other_rows_is_refused(tmp_path):
    newest = checkpoint(tmp_path, 4)
    (tmp_path / "checkpoint-4" / COMPLETE).write_text("effective_batch_size 32")
    assert checkpoint_to_resume("auto", tmp_path, 32) == newest
    with pytest.raises(UserError, match="a run with effective_batch_size 32, and this run has 16"):
        checkpoint_to_resume("auto", tmp_path, 16)
    for marker in ("", "1"):  # of release 0.1, which wrote the number of processes
        (tmp_path / "checkpoint-4" / COMPLETE).write_text(marker)
        assert checkpoint_to_resume("auto", tmp_path, 16) == newest
    (tmp_path / "checkpoint-4" / COMPLETE).write_text("2")
    with pytest.raises(UserError, match="written by 2 processes of an earlier release"):
        checkpoint_to_resume("auto", tmp_path, 16)


def test_before_the_first_evaluation_its_length_is_assumed():
    args, stop = recipe("epoch", "no"), TimeLimitCallback(max_hours=1.0, evaluation_steps=50)
    stop.deadline, stop.last = time.time() + 60, time.time() - 2.0  # two seconds a step
    assert flow([stop], "on_step_end", args, state(1, 0.1)).should_training_stop
    stop = TimeLimitCallback(max_hours=1.0, evaluation_steps=5)
    stop.deadline, stop.last = time.time() + 60, time.time() - 2.0
    assert not flow([stop], "on_step_end", args, state(1, 0.1)).should_training_stop


def test_a_run_that_goes_on_from_its_last_step_trains_no_further(trained, script, tmp_path):
    """The steps end within an epoch, where the Trainer would take one more."""
    whole, (part, flags) = trained / "checkpoints" / "fold0", copy_fold(trained, tmp_path)
    (part / "metrics.json").unlink()  # killed before its last word
    code, _, error = script("train_fold", *flags)
    assert code == 0, error
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (whole, part)]
    assert metrics[1]["steps"] == 4 and metrics[0]["weights"] == metrics[1]["weights"]
    assert (part / "oof.csv").read_bytes() == (whole / "oof.csv").read_bytes()


def test_a_resumed_run_forgets_best_adapters_of_later_steps(tmp_path):
    """Their files may have been overwritten since; the run trains those steps again."""
    best = {"raw": {"log_loss": 0.5, "step": 4}, "ema": {"log_loss": 0.4, "step": 2}}
    (tmp_path / "best.json").write_text(json.dumps(best))
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text('{"global_step": 2}')
    args = SimpleNamespace(output_dir=str(tmp_path), resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert Validator(args, [], None, [], []).best == {"ema": best["ema"]}


def test_a_run_that_diverges_stops_early_and_keeps_its_best_adapter(trained, script, tmp_path):
    flags = ["--max_steps", 12, "--eval_steps", 1, "--early_stopping_patience", 2, "--learning_rate", 1]
    flags += ["--ema_decay", 0, "--swa_start", "null", "--max_valid_rows", 5]
    code, _, error = script("train_fold", trained / "args" / "fold0.json", "--output_dir", tmp_path / "fold0", *flags)
    assert code == 0, error
    metrics = json.loads((tmp_path / "fold0" / "metrics.json").read_text())
    losses = [logs["eval_log_loss"] for logs in json.loads((tmp_path / "fold0" / "history.json").read_text())]
    assert metrics["steps"] == len(losses) < 12 and min(losses) == losses[-3] < min(losses[-2:])
    assert metrics["weights"]["raw"]["step"] == metrics["steps"] - 2 and metrics["valid_rows"] == 5


def test_a_finished_fold_trains_for_longer_from_its_last_checkpoint(trained, script, tmp_path):
    part, flags = copy_fold(trained, tmp_path)
    code, output, error = script("train_fold", *flags, "--max_steps", 6)
    assert code == 0, error
    assert "continues from checkpoint-4, with max_steps 6 instead of 4. The learning rate follows the longer" in output
    logs = json.loads((part / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    assert [log["step"] for log in logs if "eval_log_loss" in log] == [2, 4, 6]
    metrics = json.loads((part / "metrics.json").read_text())
    assert metrics["steps"] == 6 and {scores["step"] for scores in metrics["weights"].values()} <= {2, 4, 6}
    assert "is finished" in script("train_fold", *flags, "--max_steps", 6)[1]
    code, _, error = script("train_fold", *flags)
    assert code == 2 and "a different max_steps" in error, "a shorter run is another one"
    for checkpoint in part.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    code, _, error = script("train_fold", *flags, "--max_steps", 8)
    assert code == 2 and "no checkpoint to continue from" in error and (part / "metrics.json").is_file()


@pytest.mark.slow
def test_an_older_releases_fingerprint_of_image_paths_is_not_compared(trained, script, tmp_path):
    part, flags = copy_fold(trained, tmp_path)
    assert json.loads((part / "rows.json").read_text())["version"] == 2
    (part / "rows.json").write_text('{"fingerprint": "0123456789abcdef"}')
    assert script("train_fold", *flags)[0] == 0
    (part / "rows.json").write_text('{"version": 2, "fingerprint": "0123456789abcdef"}')
    code, _, error = script("train_fold", *flags)
    assert code == 2 and "other rows" in error


def test_other_rows_are_another_run(trained, script, tmp_path):
    """New folds, or a corrected question: neither a checkpoint nor a finished fold of the old rows is used."""
    part, flags = copy_fold(trained, tmp_path)
    assert script("train_fold", *flags)[:2] == (0, f"{part} is finished; nothing to train\n")
    folds = trained / "data" / "folds.csv"
    before = folds.read_text()
    try:
        swap = str.maketrans({"0": "1", "1": "0"})
        lines = [line.rpartition(",") for line in before.splitlines()[1:]]
        folds.write_text("id,fold\n" + "".join(f"{row_id},{fold.translate(swap)}\n" for row_id, _, fold in lines))
        code, _, error = script("train_fold", *flags)
    finally:
        folds.write_text(before)
    assert code == 2 and "a run with a different split or other rows" in error
