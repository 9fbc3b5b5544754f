"""Files of a cascade: its report on out-of-fold rows, from files alone, and its prediction of the rows to send.

Both models are the folds of a run. The first one's predictions of the test rows are there already.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from accelerate import PartialState

from vqa.core.distributed import run_on_main_and_broadcast
from vqa.core.errors import UserError
from vqa.core.io import check_writable, hash_files, write_json
from vqa.data.predictions import join, read_card, read_predictions, write_probabilities
from vqa.data.rows import LETTERS, Row
from vqa.data.table import align_ids, write_table
from vqa.evaluation.cascade import Cascade, CascadeReport
from vqa.evaluation.metrics import accuracy_and_log_loss
from vqa.evaluation.oof import load_oof
from vqa.inference.checkpoints import Checkpoint, fold_adapter, output_folder
from vqa.inference.jobs import make_jobs, unfinished_jobs, write_outputs
from vqa.inference.predictor import Predictor
from vqa.inference.tta import View

FOLDER = "cascade"  # below the second model's folder of predictions


def report_cascade(
    first_folds: Sequence[str], second_folds: Sequence[str], weights: str, cascade: Cascade, output_dir: str | None
) -> None:
    """Print what cascades gain on the out-of-fold rows that training wrote, and write those of `cascade`.

    Nothing is predicted, and no base model is needed. `weights`: of the second model; the first has its best ones.
    """
    first = [fold_adapter(Path(fold))[1] for fold in first_folds]
    second = [fold_adapter(Path(fold), weights)[1] for fold in second_folds]
    models = {"the first model": oof_files(first), "the second model": oof_files(second)}
    oof = load_oof(models, {file: file for files in models.values() for file in files})
    report = CascadeReport(oof.stack[0], oof.stack[1], oof.answers, oof.clusters)
    lines, best, rows = report.table(), report.recommended(), len(oof.ids)
    sentence = f"recommended: no cascade; none gains accuracy beyond noise at {rows} rows."
    if best:
        sentence = (
            f"recommended: --cascade_share {best.share:g} --cascade_weight {best.weight:g}; more accurate than the "
            f"first model beyond noise at {rows} rows, and no larger share is better than that."
        )
    print(f"each cascade against the first model, on {rows} out-of-fold rows of {oof.labels.path}:")
    formats = {"float_format": "{:.4f}".format, "formatters": dict.fromkeys(("share", "weight"), "{:g}".format)}
    print(pd.DataFrame(lines).to_string(index=False, na_rep="-", **formats))
    print(f"\n{sentence}")

    folder = Path(output_dir or output_folder(Path(second_folds[0])) / FOLDER, "oof")
    check_writable(folder, "--output_dir")
    write_json(folder / "cascade.json", {"rows": rows, "cascades": lines, "recommendation": sentence})
    write_table(folder / "cascade.csv", pd.DataFrame(lines))
    combined = dict(zip(oof.ids, zip(cascade.combine(*oof.stack), oof.answers)))
    for fold, adapter, file in zip(second_folds, second, models["the second model"]):
        ids, _ = read_predictions(file)
        probabilities, answers = map(np.array, zip(*(combined[row_id] for row_id in ids)))
        path = folder / f"{Path(fold).resolve().name}.csv"
        write_probabilities(path, ids, probabilities)
        card = {"train_csv": str(oof.labels.path), "adapter": str(adapter), "views": ["plain"], "gate": None}
        scores = accuracy_and_log_loss(probabilities, answers)
        write_json(path.with_suffix(".json"), card | cascade_card(first, adapter, cascade) | {"scores": scores})
    print(f"{folder}: out-of-fold files with --cascade_share {cascade.share:g} --cascade_weight {cascade.weight:g}")


def oof_files(adapters: Sequence[Path]) -> list[str]:
    """The out-of-fold files that training wrote beside the adapters."""
    files = [adapter / "oof.csv" for adapter in adapters]
    if missing := [str(file) for file in files if not file.is_file()]:
        raise UserError(f"{missing[0]}: no such file, so its fold was validated on no rows. Leave it out.")
    return list(map(str, files))


def cascade_card(first: Sequence[Path], second: Path, cascade: Cascade) -> dict:
    """What the cards of a prediction file and of an out-of-fold file have in common, and no other cascade's.

    first: the adapters of the first model. second: the adapter that wrote the file.
    """
    settings = {"first": list(map(str, first)), "share": cascade.share, "weight": cascade.weight}
    hashes = hash_files([str(adapter / "adapter_model.safetensors") for adapter in (*first, second)])
    return {"model": digest(*hashes, cascade.share, cascade.weight), "cascade": settings}


def digest(*content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def predict_cascade(
    predictor: Predictor,
    checkpoints: Sequence[Checkpoint],
    first_folds: Sequence[str],
    cascade: Cascade,
    rows: list[Row],
    csv: str,
    base_fingerprint: str,
    output_dir: str | None,
    cli_args: Mapping,
) -> None:
    """Predict the rows of which the first model is unsure, and write a file of all rows for each checkpoint.

    The first model is the mean of its folds' prediction files in their default places.
    """
    first = run_on_main_and_broadcast(lambda: read_first(first_folds, [row["id"] for row in rows], csv))
    sent, adapters = cascade.sent(first), [fold_adapter(Path(fold))[1] for fold in first_folds]
    PartialState().print(f"cascade: the {sent.sum()} least sure of {len(rows)} rows are predicted")
    view = View("plain", rows, np.flatnonzero(sent).tolist())
    jobs = []
    for item in checkpoints:
        assert item.adapter  # predict.py takes no base model here
        card, folder = cascade_card(adapters, item.adapter, cascade), output_dir or str(item.output_dir / FOLDER)
        item = replace(item, validation=None)  # training has scored the model alone
        (job,) = make_jobs([item], [[view]], base_fingerprint, csv, False, None, folder)
        key = digest(job.key, card["model"], hashlib.sha256(first.tobytes()).hexdigest())
        jobs.append(replace(job, key=key, card=card))
    todo = set(run_on_main_and_broadcast(lambda: [job.path for job in unfinished_jobs(jobs)]))
    for job in jobs:
        if job.path in todo:
            predicted = predictor.predict(job)
            values, shown = cascade.combine(first, predicted.probabilities[0]), np.ones((1, len(rows)), dtype=bool)
            if PartialState().is_main_process:
                write_outputs(job, replace(predicted, probabilities=values[None], shown=shown), None, cli_args)


def read_first(folds: Sequence[str], ids: Sequence[str], csv: str) -> np.ndarray:
    """Probabilities (rows, letters) of the rows `ids`: the mean of the folds' prediction files."""
    files = [output_folder(Path(fold)) / f"{Path(fold).resolve().name}.csv" for fold in folds]
    for fold, file in zip(folds, files):
        if not file.is_file() or read_card(file).get("test_csv") not in (None, csv):
            raise UserError(f"{file}: no predictions of {csv}. First run `python predict.py {fold} --csv {csv}`.")
    file_ids, stack = join(files)
    mean = stack.mean(0)[align_ids(files[0], file_ids, ids, csv, "Predict it again.")]
    return np.pad(mean, ((0, 0), (0, len(LETTERS) - mean.shape[1])))
