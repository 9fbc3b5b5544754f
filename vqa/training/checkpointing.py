"""Resuming a run that was cut off: complete checkpoints only, and a stop before the time limit."""

import os
import time
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from vqa.core.compat import unwrap_parallel
from vqa.core.errors import UserError
from vqa.modeling.suffix_score import load_score_head, save_score_head

COMPLETE = "complete"  # written last into a checkpoint folder; without it, the checkpoint was cut off while written

STARTED = time.time()


class CheckpointMarkerCallback(TrainerCallback):
    """Marks a checkpoint as complete. Has to come after the callbacks that write into it, such as the averages.

    Where epochs are evaluated but steps saved, the checkpoint of an epoch's last step is written after the
    evaluation, as everywhere else: a resumed run has been evaluated at its step.
    """

    deferred = False

    def on_step_end(self, args, state, control, **kwargs):
        if args.eval_strategy == "epoch" and (is_epoch_end(state) or state.global_step >= state.max_steps):
            self.deferred, control.should_save = control.should_save, False

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_save |= self.deferred
        self.deferred = False

    def on_save(self, args, state, control, **kwargs):
        PartialState().wait_for_everyone()  # each process writes its random state
        if state.is_world_process_zero:
            marker = Path(args.output_dir, f"checkpoint-{state.global_step}", COMPLETE)
            marker.write_text(f"effective_batch_size {args.effective_batch_size}")


class ScoreHeadCallback(TrainerCallback):
    """Writes the head of `score` suffix into every checkpoint, and reads it when a run resumes: the Trainer saves and
    loads the adapter alone."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step:  # a resumed run
            load_score_head(unwrap_parallel(model), args.resume_from_checkpoint)

    def on_save(self, args, state, control, model=None, **kwargs):
        if state.is_world_process_zero:
            folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
            save_score_head(unwrap_parallel(model), folder)


def checkpoint_to_resume(wanted: str | None, folder: str | Path, rows: int) -> str | None:
    """The checkpoint that the args name; for `auto` the newest complete one in the fold's folder, if there is one.

    `rows`: of an optimiser step. Raises UserError where the checkpoint counts steps of another number of rows.
    """
    if wanted == "auto":
        complete = [path.parent for path in Path(folder).glob(f"checkpoint-*/{COMPLETE}")]
        newest = max(complete, key=lambda path: int(path.name.split("-")[1]), default=None)
        wanted = str(newest) if newest else None
    if not wanted:
        return None
    if not Path(wanted, COMPLETE).is_file():
        raise UserError(
            f"resume_from_checkpoint: {wanted} is not a checkpoint folder, or not a complete one. Try auto."
        )
    marker = Path(wanted, COMPLETE).read_text()
    if marker.isdigit() and int(marker) > 1:  # the number of processes, in release 0.1
        raise UserError(
            f"{wanted} was written by {marker} processes of an earlier release, where each step had {marker} times "
            f"the rows. Finish the run with that release, or delete {Path(wanted).parent} to start over."
        )
    if marker and not marker.isdigit() and int(marker.split()[1]) != rows:
        raise UserError(
            f"{wanted} is of a run with {marker}, and this run has {rows}. Set the same number, or resume another "
            "checkpoint."
        )
    return wanted


def is_epoch_end(state) -> bool:
    return state.epoch == int(state.epoch)


class TimeLimitCallback(TrainerCallback):
    """Stops the run, with a checkpoint, before `max_hours` have passed, and sets `stopped`. None: no limit.

    Hours count from the start of run.sh (`RUN_STARTED`, seconds since 1970), otherwise of this process. The longest
    step and the longest evaluation so far have to fit into the time left; before the first evaluation, it is assumed
    to take as long as `evaluation_steps` steps. A stop adds no evaluation, so that the resumed run is the same as one
    that was never stopped.
    """

    def __init__(self, max_hours: float | None, evaluation_steps: float = 0.0):
        hours = float("inf") if max_hours is None else max_hours
        self.deadline = float(os.environ.get("RUN_STARTED", STARTED)) + 3600 * hours
        self.evaluation_steps = evaluation_steps
        self.stopped = False
        self.last = time.time()  # the end of the latest step, evaluation or save
        self.longest_step = self.longest_evaluation = 0.0

    def is_late(self) -> bool:
        """Whether the next step and an evaluation may end after the time limit."""
        evaluation = self.longest_evaluation or self.evaluation_steps * self.longest_step
        return time.time() + 2 * self.longest_step + evaluation > self.deadline

    def on_train_begin(self, args, state, control, **kwargs):
        self.last = time.time()

    def on_step_end(self, args, state, control, **kwargs):
        if self.deadline == float("inf"):
            return
        self.longest_step, self.last = max(self.longest_step, time.time() - self.last), time.time()
        late = broadcast_object_list([self.is_late()])[0]  # the clocks of the processes differ
        if late and not control.should_evaluate and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True

    def on_evaluate(self, args, state, control, **kwargs):
        self.longest_evaluation, self.last = max(self.longest_evaluation, time.time() - self.last), time.time()

    def on_save(self, args, state, control, **kwargs):
        self.last = time.time()

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.stopped and not is_epoch_end(state):  # the Trainer treats any stop as the end of an epoch
            control.should_evaluate = control.should_save = False
