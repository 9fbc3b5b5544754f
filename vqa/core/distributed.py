"""What one process settles for all, and what all share out, where several work together (`accelerate launch`)."""

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
    """What `decide` returns on the main process, on every process; with one process, a plain call.

    The processes look at the disk at different moments, while one of them writes there, so each on its own could come
    to another answer. A UserError is told once and ends all of them: first told, then passed on, since the launcher
    ends the others as soon as one has ended.
    """
    outcome = [None, False]
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
    """`work` of `items`, an array (items, ...) in their order, of which each process does its share.

    Every process is given the same number of items, by repeating the first: under FSDP all take part in every batch.
    """
    state = PartialState()
    filled = items + items[:1] * (-len(items) % state.num_processes)
    own = work(filled[state.process_index :: state.num_processes])
    return np.stack(gather_object([own]), axis=1).reshape(len(filled), *own.shape[1:])[: len(items)]


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that FSDP has split among the processes; all of them have to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(parameter: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` on the device of `parameter`, and split as FSDP has split that."""
    tensor = tensor.to(parameter.device)
    if isinstance(parameter, DTensor):
        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
    return tensor
