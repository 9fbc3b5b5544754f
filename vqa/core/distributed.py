"""Helpers for distributed runs (`accelerate launch`): run on the main process and broadcast, split work, shard."""

import sys
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch.distributed.tensor import DTensor, distribute_tensor

from vqa.core.errors import UserError, print_error

T = TypeVar("T")


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

    The first item is repeated until every process has equally many: under FSDP all must take part in every batch.
    """
    state = PartialState()
    filled = items + items[:1] * (-len(items) % state.num_processes)
    local = work(filled[state.process_index :: state.num_processes])
    return np.stack(gather_object([local]), axis=1).reshape(len(filled), *local.shape[1:])[: len(items)]


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor of a parameter that FSDP has sharded; every process must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(parameter: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` on the device of `parameter`, sharded like it."""
    tensor = tensor.to(parameter.device)
    if isinstance(parameter, DTensor):
        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
    return tensor
