"""Helpers for distributed runs (`accelerate launch`): run on the main process and broadcast, split work."""

import os
import sys
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from vqa.core.errors import UserError, print_error

T = TypeVar("T")

SHARDED = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}  # environment variable -> its name


def check_launcher() -> None:
    """Raise UserError where `accelerate launch` would split the model over several GPUs."""
    for variable, name in SHARDED.items():
        if os.environ.get(variable) == "true":
            raise UserError(
                f"accelerate is configured for {name}, and these scripts need the complete model on each GPU. Launch "
                "with --config_file args/accelerate/two_gpus.yaml. docs/multi_gpu.md says what to do where a model "
                "does not fit on one GPU."
            )


def run_on_main_and_broadcast(decide: Callable[[], T]) -> T:
    """Run `decide` on the main process and return its result on every process.

    Use it for decisions that depend on files: each process reads them at another moment, while one of them writes. A
    UserError is printed once and ends all processes. It is printed before the broadcast, since the launcher kills the
    others as soon as one process ends.
    """
    outcome: list = [None, False]
    if PartialState().is_main_process:
        try:
            outcome = [decide(), False]
        except UserError as error:
            print_error(error)
            outcome = [None, True]
    answer, failed = broadcast_object_list(outcome)
    if failed:
        sys.exit(2)
    return answer


def distributed_map(items: list, work: Callable[[list], np.ndarray]) -> np.ndarray:
    """`work(items)`, an array (items, ...) in the order of `items`, split across the processes.

    The first item is repeated until every process has equally many, so that the results can be stacked.
    """
    state = PartialState()
    filled = items + items[:1] * (-len(items) % state.num_processes)
    local = work(filled[state.process_index :: state.num_processes])
    return np.stack(gather_object([local]), axis=1).reshape(len(filled), *local.shape[1:])[: len(items)]
