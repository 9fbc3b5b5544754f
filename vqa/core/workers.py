"""Worker processes that prepare batches: they need little of /dev/shm, and one that hangs or dies ends the run.

torch passes a worker's tensors through files in /dev/shm, of which Docker gives a container 64 MB. A worker that finds
it full loses its batch, and the main process waits for that batch for ever. So a batch goes through a pipe where there
is not plenty of room for it. A pipe is slower and has no limit.
"""

import multiprocessing
import os
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, get_worker_info

from vqa.core.errors import UserError

ROOM = 8  # times a batch's size has to be free in /dev/shm: other workers and processes write there too
TIMEOUT = 600  # seconds for a batch


class Batch(dict):
    """A batch that knows by which way it reaches another process."""

    def __reduce__(self):
        size = sum(value.nbytes for value in self.values() if isinstance(value, torch.Tensor))
        if free_shared_memory() >= ROOM * size:
            return dict, (dict(self),)  # torch puts the tensors into /dev/shm
        return pickle.loads, (pickle.dumps(dict(self)),)  # plain bytes


class WorkerCollator:
    """`collate`, whose batches leave a worker process as `Batch` does."""

    def __init__(self, collate: Callable[[Any], dict]):
        self.collate = collate

    def __call__(self, rows) -> dict:
        batch = self.collate(rows)
        return batch if get_worker_info() is None else Batch(batch)


def make_loader(rows: Sequence, batch_size: int, collate: Callable[[Any], dict], workers: int = 0) -> DataLoader:
    """Batches of `rows` in their order, prepared by `workers` processes; 0: by this one."""
    dataset: Any = list(rows)  # DataLoader takes lists too, but its types do not say so
    timeout = TIMEOUT if workers else 0
    return DataLoader(dataset, batch_size, collate_fn=WorkerCollator(collate), num_workers=workers, timeout=timeout)


def free_shared_memory() -> int:
    """Free bytes of /dev/shm; 0 where there is none."""
    try:
        stat = os.statvfs("/dev/shm")
    except OSError:
        return 0
    return stat.f_bavail * stat.f_frsize


def check_workers(workers: int, flag: str) -> None:
    """Raise UserError where worker processes are asked for but cannot be used here. `flag`: what sets their number."""
    if workers < 1:
        return
    try:
        multiprocessing.Lock()  # a semaphore, which the queue of each worker has
    except OSError as error:
        raise UserError(
            f"/dev/shm cannot be used ({error.strerror}), and worker processes need it. Set {flag} to 0, or give the "
            "container more of it (docker run --shm-size 1g)."
        ) from None
