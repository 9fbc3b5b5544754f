"""The experiment log, experiments/log.csv: one row for every finished training, prediction and ensemble.

Rows are only added. A leaderboard score is a row too; its parent is the ensemble. The environment variable
EXPERIMENTS_LOG names another file. Beside the log, `<id>.csv` holds the out-of-fold probabilities of each scored run,
so that runs can be compared after their own files are gone.
"""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from filelock import FileLock

from vqa.core.errors import UserError
from vqa.data.predictions import write_probabilities
from vqa.data.table import read_table, write_table

SCORES = ("rows", "accuracy", "low", "high", "log_loss", "chance", "text_only")
COLUMNS = (
    *("id", "time", "kind", "revision", "output", "args", "data"),
    *SCORES,
    *("labels", "seconds", "peak_gib", "parents", "public_score"),
)
RENAMED = {"truth": "labels"}  # columns of older logs
PROJECT = Path(__file__).resolve().parent.parent.parent


def log_path() -> Path:
    return Path(os.environ.get("EXPERIMENTS_LOG") or "experiments/log.csv")


def log_run(
    kind: str,
    output: str | Path,
    args: Mapping,
    seconds: float | None = None,
    data: str = "",
    scores: Mapping | None = None,
    labels: str | Path = "",
    out_of_fold: tuple[Sequence[str], np.ndarray] | None = None,
    parents: Sequence[str] = (),
    public_score: float | None = None,
) -> str:
    """Add a row for a finished run. Returns its new id, or "" (and prints why) where the log cannot be written.

    args: those that differ from the defaults. scores: those of SCORES that are known, from the answers in the CSV
    `labels`. out_of_fold: the ids and probabilities (rows, letters) behind them. parents: ids of the runs that this
    one was made from.
    """
    row = {
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "kind": kind,
        "revision": git_revision(),
        "output": output,
        "args": json.dumps(args, ensure_ascii=False, sort_keys=True, default=str),
        "data": data,
        "labels": labels,
        "peak_gib": f"{peak_gib():.2f}",
        "parents": " ".join(filter(None, parents)),
    }
    numbers = {name: (scores or {}).get(name) for name in SCORES} | {"public_score": public_score}
    numbers["seconds"] = seconds and round(seconds, 1)
    row |= {name: number for name, number in numbers.items() if number is not None}
    try:
        return _append({name: str(value) for name, value in row.items()}, out_of_fold)
    except (UserError, OSError) as error:  # the run itself succeeded
        print(f"not in the experiment log: {error}", file=sys.stderr)
        return ""


def _append(row: dict[str, str], out_of_fold: tuple[Sequence[str], np.ndarray] | None) -> str:
    """Append under a lock, because folds can train in parallel. An older log gets the columns that it lacks."""
    path = log_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        table = read_log(path) if path.exists() else pd.DataFrame(columns=COLUMNS, dtype=str)
        row["id"] = _new_id(set(table["id"]))
        if out_of_fold:
            write_probabilities(path.with_name(f"{row['id']}.csv"), *out_of_fold)
        write_table(path, pd.concat([table, pd.DataFrame([row])]).fillna(""))
    return row["id"]


def read_log(path: str | Path) -> pd.DataFrame:
    """The log as text cells, oldest first. Columns of an older log are renamed; those that it lacks are blank."""
    if not Path(path).exists():
        raise UserError(f"{path}: no such file. Train something first, or name another log in EXPERIMENTS_LOG.")
    table = read_table(path, ("id", "kind"))
    for old, new in RENAMED.items():
        if old in table:
            values = table.pop(old)
            table[new] = table[new].where(table[new] != "", values) if new in table else values
    return table.reindex(columns=[*COLUMNS, *(name for name in table.columns if name not in COLUMNS)], fill_value="")


def _new_id(taken: set[str]) -> str:
    """Milliseconds since 1970 in base 36: eight characters that sort by time."""
    moment = time.time_ns() // 1_000_000
    while (name := np.base_repr(moment, 36).lower()) in taken:
        moment += 1
    return name


def git_revision() -> str:
    """The project's commit, with `-dirty` if files were changed since; blank outside git."""
    try:
        command = ("git", "describe", "--always", "--dirty", "--exclude=*")
        return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def peak_gib() -> float:
    """Peak memory of this process in GiB: of the GPU if it used one, otherwise main memory."""
    torch = sys.modules.get("torch")  # importing it for this would slow light scripts
    if torch and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
