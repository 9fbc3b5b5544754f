"""An estimate for models that were trained on all rows: the out-of-fold score of the folds with the same settings."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vqa.core.errors import preview
from vqa.core.io import read_json
from vqa.data.predictions import read_card
from vqa.evaluation.labels import Labels
from vqa.evaluation.metrics import accuracy, row_log_loss
from vqa.evaluation.oof import is_of_all_rows, read_fold_oof


def print_estimates(files: Sequence[str | Path]) -> None:
    """Print an estimate for the models among the prediction `files` that were trained on all rows.

    The folds of checkpoints/all_rows/seed42 are those in checkpoints/, the folder above its own.
    """
    runs: dict[Path, list[Path]] = {}
    for file in filter(is_of_all_rows, files):
        adapter = Path(read_card(file).get("adapter") or Path(file).parent)
        run = adapter if (adapter / "args.json").is_file() else adapter.parent  # that of an average is in its run's
        runs.setdefault(run.parent, []).append(run)
    for parent, own in runs.items():
        print(f"{parent}: {estimate(own, parent.parent)}")


def estimate(runs: Sequence[Path], parent: Path) -> str:
    """The pooled score of the finished folds in `parent`; the reason where they do not have the settings of `runs`."""
    from vqa.config.same_run import changed_fields  # imports transformers, which takes seconds

    folds = sorted(path.parent for path in parent.glob("fold*/metrics.json"))
    if not folds:
        return f"no estimate, because {parent} has no folds with the same settings. Train them to get one."
    for run in runs:
        own = read_json(run / "args.json")
        for fold in folds:
            before = read_json(fold / "args.json") | {name: own.get(name) for name in ("fold", "seed")}
            if changed := changed_fields(before, own):
                return f"no estimate, because {fold} was trained with a different {preview(changed)} than {run.name}."
    labels = Labels(own["train_csv"], own.get("columns"), own.get("answer_form"))
    parts = [read_fold_oof(fold, read_json(fold / "metrics.json")["best"], labels) for fold in folds]
    ids, probs = [row_id for ids, _ in parts for row_id in ids], np.concatenate([values for _, values in parts])
    answers = labels.answers(ids)
    score, loss = accuracy(probs.argmax(1) == answers, labels.clusters(ids)), row_log_loss(probs, answers).mean()
    return (
        f"estimate from the folds {parent}/fold*: accuracy {score}, log-loss {loss:.4f}, {len(ids)} rows. It is the "
        "score of single models that were trained on a part of the rows; those of all rows have no validation rows."
    )
