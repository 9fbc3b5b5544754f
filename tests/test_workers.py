"""Worker processes where /dev/shm is small, and what is printed where one dies, hangs or cannot start."""

import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from conftest import ROOT

from vqa.core import workers
from vqa.core.errors import UserError, run_main
from vqa.core.workers import Batch, WorkerCollator, check_workers, free_shared_memory, make_loader

# In a mount namespace, /dev/shm has 1 MB. The plain DataLoader of torch is the oracle: it waits for ever.
SCRIPT = """
import torch
from torch.utils.data import DataLoader
from vqa.core.workers import free_shared_memory, make_loader

def collate(rows):
    return {"x": torch.full((500_000,), float(rows[0])), "half": torch.ones(3, dtype=torch.bfloat16), "ids": rows}

assert free_shared_memory() <= 2**20
for epoch in range(2):
    batches = list(make_loader(range(6), 2, collate, workers=2))
    assert [batch["ids"] for batch in batches] == [[0, 1], [2, 3], [4, 5]]
    assert [batch["x"].unique().item() for batch in batches] == [0, 2, 4]
    assert batches[0]["half"].dtype == torch.bfloat16
try:
    list(DataLoader(list(range(6)), 2, collate_fn=collate, num_workers=2, timeout=1))
except RuntimeError as error:
    print(error)
"""


@pytest.mark.slow
def test_batches_arrive_where_dev_shm_has_one_megabyte():
    namespace = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount = "mount -t tmpfs -o size=1m tmpfs /dev/shm"
    if subprocess.run([*namespace, mount], capture_output=True).returncode:
        pytest.skip("this machine does not allow mount namespaces")
    words = [*namespace, f'{mount} && exec "$0" -c "$1"', sys.executable, SCRIPT]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and "DataLoader timed out" in done.stdout, done.stderr


@pytest.mark.parametrize(("free", "piped"), [(2**30, False), (7 * 4000, True), (0, True)])
def test_a_batch_goes_through_the_pipe_where_there_is_little_room(monkeypatch, free, piped):
    monkeypatch.setattr(workers, "free_shared_memory", lambda: free)
    way, arguments = Batch(x=torch.arange(1000.0), ids=["a"]).__reduce__()
    assert (way is not dict) == piped
    copy = way(*arguments)
    assert torch.equal(copy["x"], torch.arange(1000.0)) and copy["ids"] == ["a"]


def test_without_workers_a_batch_is_what_the_collator_made():
    batch = {"x": torch.ones(2)}
    assert WorkerCollator(lambda rows: batch)([1]) is batch and next(iter(make_loader([1], 1, lambda rows: batch)))


def test_workers_that_cannot_start_are_refused_with_the_remedy(monkeypatch):
    monkeypatch.setattr("os.statvfs", lambda path: (_ for _ in ()).throw(FileNotFoundError(path)))
    assert free_shared_memory() == 0

    def no_semaphore():
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("multiprocessing.Lock", no_semaphore)
    check_workers(0, "--workers")
    with pytest.raises(UserError, match="/dev/shm cannot be used .No space.* Set --workers to 0, or .*--shm-size"):
        check_workers(2, "--workers")


def refuse(rows):
    raise UserError(f"row {rows[0]} cannot be read. Delete it.")


def test_an_error_in_a_worker_is_the_line_that_it_is_without_one(capsys):
    with pytest.raises(SystemExit):
        run_main(lambda: list(make_loader([7], 1, refuse, workers=1)))
    assert capsys.readouterr().err == "error: row 7 cannot be read. Delete it.\n"


def killed(rows):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_hangs_or_is_killed_ends_the_run_in_one_line(capsys, monkeypatch):
    monkeypatch.setattr(workers, "TIMEOUT", 1)
    for collate, reason in ((lambda rows: time.sleep(2), "timed out after 1 seconds"), (killed, "unexpectedly.")):
        with pytest.raises(SystemExit) as stop:
            run_main(partial(lambda collate: list(make_loader([7], 1, collate, workers=1)), collate))
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("error: ") == 1 and reason in error
        assert "Set dataloader_num_workers" in error
