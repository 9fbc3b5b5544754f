"""Prediction jobs: which checkpoint predicts which rows in which views, and the files that it writes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vqa.config.arguments import reader_options
from vqa.core.errors import UserError, preview
from vqa.core.io import check_writable, write_json
from vqa.data.images import check_images, find_bad_images, without_bad_images
from vqa.data.predictions import read_card, read_predictions, write_predictions
from vqa.data.rows import Row, read_rows
from vqa.data.splits import image_hashes
from vqa.evaluation.experiment_log import log_run
from vqa.evaluation.labels import Labels
from vqa.evaluation.metrics import accuracy_and_log_loss, score_with_interval
from vqa.inference.checkpoints import Checkpoint
from vqa.inference.tta import View, ViewPredictions
from vqa.inference.view_cache import ViewCache, view_fingerprint


def read_test_rows(csv: str, image_root: str | None, skip_bad_images: bool, reader: Mapping) -> list[Row]:
    """The rows to predict, each with its `image_hash`. `reader`: the fold's `reader_options`."""
    return _with_images(read_rows(csv, image_root, **reader), csv, skip_bad_images)


def read_oof_rows(
    csv: str, image_root: str | None, skip_bad_images: bool, checkpoints: Sequence[Checkpoint], reader: Mapping
) -> list[list[Row]]:
    """For each checkpoint the rows of its out-of-fold file, with their answers from the training CSV.

    Those of the untrained base model are all rows.
    """
    rows = _with_images(read_rows(csv, image_root, with_answer=True, **reader), csv, skip_bad_images)
    by_id, folds = {row["id"]: row for row in rows}, []
    for item in checkpoints:
        if item.adapter is None:
            folds.append(rows)
            continue
        oof = item.adapter / "oof.csv"
        if not oof.is_file():
            raise UserError(f"{item.adapter}: no oof.csv, so it was validated on no rows. Leave it out with --oof.")
        ids, _ = read_predictions(oof)
        if unknown := [row_id for row_id in ids if row_id not in by_id]:
            raise UserError(
                f"{csv}: {len(unknown)} out-of-fold rows of {item.name} are not in it: {preview(unknown)}. Give --csv "
                "the file that the fold was trained on."
            )
        folds.append([by_id[row_id] for row_id in ids])
    ids = [row["id"] for fold in folds for row in fold]
    if len(set(ids)) < len(ids):
        raise UserError("Two folds were validated on the same rows. Predict the folds of one model at a time.")
    return folds


def _with_images(rows: list[Row], csv: str, skip_bad: bool) -> list[Row]:
    """`rows` with the `image_hash` of each. Bad images raise UserError, or are left out and noted in their rows."""
    if skip_bad:
        rows = without_bad_images(rows, find_bad_images(rows, csv))
    else:
        check_images(rows, csv, "Replace the files, or answer their rows from the text alone with --skip_bad_images.")
    return [row | Row(image_hash=" ".join(hashes) or None) for row, hashes in zip(rows, image_hashes(rows))]


@dataclass(frozen=True)
class Job:
    """One prediction file to write.

    csv: the file of the rows. oof: whether they are the checkpoint's own validation rows. model: fingerprint of the
    weights and prompt settings. key: fingerprint of everything that decides the file's contents. card: further entries
    of the JSON beside the file.
    """

    checkpoint: Checkpoint
    views: list[View]
    path: Path
    csv: str
    oof: bool
    gate: float | None
    model: str
    key: str
    card: dict = field(default_factory=dict)

    @property
    def rows(self) -> list[Row]:
        return self.views[0].rows


def make_jobs(
    checkpoints: Sequence[Checkpoint],
    views: Sequence[list[View]],
    base_fingerprint: str,
    csv: str,
    oof: bool = False,
    gate: float | None = None,
    output_dir: str | None = None,
) -> list[Job]:
    """A job for each checkpoint and its views.

    Beside folds, the untrained base model is a baseline and gets the plain view only.
    """
    jobs = []
    for item, own_views in zip(checkpoints, views):
        folder = Path(output_dir or item.output_dir, *([] if item.adapter else ["base"]), *(["oof"] if oof else []))
        path = folder / f"{item.name}.csv"
        own_views = own_views if item.adapter or len(checkpoints) == 1 else own_views[:1]
        model = item.fingerprint(base_fingerprint)
        key = view_fingerprint(f"{model} {gate}", [row for view in own_views for row in view.changed_rows()])
        jobs.append(Job(item, own_views, path, csv, oof, gate, model, key))
    return jobs


def unfinished_jobs(jobs: Sequence[Job]) -> list[Job]:
    """The jobs whose files have yet to be written. Raises UserError where two would write the same, or none can."""
    paths = [str(job.path) for job in jobs]
    if duplicates := sorted({path for path in paths if paths.count(path) > 1}):
        raise UserError(f"Two folders would both write {preview(duplicates)}. Give each its own --output_dir.")
    written = [job for job in jobs if not job.oof and job.path.is_file()]
    finished = [job.path for job in written if read_card(job.path).get("key") == job.key]
    for path in finished:
        print(f"{path} is finished; nothing to predict")
    unfinished = [job for job in jobs if job.path not in finished]
    for job in unfinished:
        check_writable(job.path.parent, "--output_dir")
    return unfinished


def write_outputs(job: Job, predictions: ViewPredictions, generated: dict | None, cli_args: Mapping) -> None:
    """Write the mean of the views and, if there are several, the plain view to plain/, each with a JSON card.

    generated: how many rows `generate` answered, and how many alike. cli_args: the arguments for the experiment log.
    """
    path, plain = job.path, job.path.parent / "plain" / job.path.name
    for outdated in (plain, plain.with_suffix(".json"), path.with_suffix(".json")):
        outdated.unlink(missing_ok=True)
    card = _make_card(job, predictions) | ({"generate": generated} if generated else {})
    if len(job.views) > 1:
        _write_file(plain, job.rows, predictions.probabilities[0], card | {"views": ["plain"], "gate": None})
    mean = predictions.mean(gate=job.gate)
    run_id = _log_prediction(job, mean, card["seconds"], cli_args)
    _write_file(path, job.rows, mean, card | {"key": job.key, "run": run_id})
    if not job.oof:  # out of fold the views stay, so that subsets of them can be tried for free
        ViewCache(path, job.model).remove()
    if job.gate is None:
        forwards = sum(len(view.changed) for view in job.views) / len(job.rows)
    else:
        forwards = predictions.used(range(len(job.views)), job.gate).sum(0).mean()
    cost = f"{forwards:.2f} forwards a row, {card['seconds']} s"
    print(f"{path}: {len(job.rows)} rows, {card['weights']} weights, {cost}")
    agreement = f"; `generate` agrees in {generated['agreeing']} of {generated['rows']} rows" if generated else ""
    if job.checkpoint.model.score == "suffix":
        print("  score suffix: the probabilities are among the choices; `generate` writes no such answers to compare")
    else:
        print(f"  {card['letter_mass']:.2%} of the probability is on the offered letters{agreement}")
    if without_image := card["without_image"]:
        print(f"  {len(without_image)} rows were answered without their unreadable image: {preview(without_image)}")


def _make_card(job: Job, predictions: ViewPredictions) -> dict:
    """The JSON beside a prediction file: its rows, its weights and its views."""
    item = job.checkpoint
    return {
        "train_csv" if job.oof else "test_csv": job.csv,
        "adapter": item.adapter and str(item.adapter),
        "weights": item.weights,
        "validation": item.validation,
        "model": job.model,
        "data": item.data_fingerprint,
        "views": predictions.names,
        "gate": job.gate,
        "seconds": round(float(predictions.seconds.sum()), 1),
        "letter_mass": predictions.letter_mass if item.model.score == "letter" else None,
        "without_image": [row["id"] for row in job.rows if "note" in row],
        **({"image_size": item.image_size} if item.image_size else {}),
        **job.card,
    }


def _write_file(path: Path, rows: list[Row], probabilities: np.ndarray, card: dict) -> None:
    """A prediction file, then its card. Where answers are known, the card has the scores."""
    write_predictions(path, rows, probabilities)
    if "answer" in rows[0]:
        card = card | {"scores": accuracy_and_log_loss(probabilities, [row["answer"] for row in rows])}
    write_json(path.with_suffix(".json"), card)


def _log_prediction(job: Job, probabilities: np.ndarray, seconds: float, cli_args: Mapping) -> str:
    """Add the prediction to the experiment log, with its scores if they are known. Returns its id there."""
    item, ids = job.checkpoint, [row["id"] for row in job.rows]
    scores: dict = {}
    if job.oof:
        answers, labels = np.array([row["answer"] for row in job.rows]), Labels(job.csv, **reader_options(item.data))
        oof_scores: dict = score_with_interval(probabilities, answers, labels.clusters(ids))
        oof_scores["text_only"] = (item.validation or {}).get("text_only")
        scores = {"scores": oof_scores, "labels": job.csv, "out_of_fold": (ids, probabilities)}
    elif len(job.views) == 1 and item.validation:  # training has scored the plain view
        scores = {"scores": item.validation, "labels": item.data.train_csv}
    return log_run("prediction", job.path, cli_args, seconds, item.data_fingerprint, parents=[item.run_id], **scores)
