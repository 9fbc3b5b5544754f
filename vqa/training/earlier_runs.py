"""What a run takes from earlier runs: soft targets of a teacher, and the adapter to start from.

Neither may know a validation row by its label: a teacher's probabilities of a row come only from models that were not
trained on it, and an adapter to start from was not trained on validation rows.
"""

import io
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np

from vqa.config.args_file import build_dataclass
from vqa.config.arguments import DataArguments, ModelArguments, adapter_options, reader_options
from vqa.core.errors import UserError, preview
from vqa.core.hashing import checkpoint_fingerprint
from vqa.core.io import read_json
from vqa.data.predictions import read_card, read_predictions
from vqa.data.rows import Row, read_rows
from vqa.data.splits import repeated_rows, split_rows
from vqa.evaluation.oof import check_fold, check_measured, run_args, weights_folder
from vqa.modeling.loading import is_adapter

MATTERS = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern")  # options of LoRA that change what weights mean


def read_split(
    data: DataArguments, seed: int, rows: list[Row] | None = None, folds: np.ndarray | None = None
) -> tuple[list[Row], list[Row]]:
    """(training rows, validation rows) of a run. `rows` of train_csv and `folds` are read where they are None."""
    if rows is None:
        rows = read_rows(data.train_csv, data.image_root, with_answer=True, **reader_options(data))
    train_rows, valid_rows = split_rows(rows, data, seed, folds)
    return (with_teacher(train_rows, rows, data) if data.teacher else train_rows), valid_rows


def with_teacher(train_rows: list[Row], rows: list[Row], data: DataArguments) -> list[Row]:
    """The training rows with soft labels: `teacher_weight` times the teacher's probabilities, the rest of the label.

    `rows` are all rows of train_csv; training rows that are not among them, such as pseudo-labelled ones, stay as they
    are. The probabilities of a row are out of fold; several teachers are averaged. Raises UserError for a file that is
    not out of fold or not of these rows, and where rows have no teacher or not the same number of teachers.
    """
    by_id, found = {row["id"]: row for row in rows}, Counter[str]()
    total = {row_id: np.zeros(len(row["choices"])) for row_id, row in by_id.items()}
    for path in data.teacher or []:
        for row_id, probs in read_teacher(path, by_id, data.train_csv).items():
            found[row_id] += 1
            total[row_id] += probs
    own = [row["id"] for row in train_rows if row["id"] in by_id]
    if missing := [row_id for row_id in own if not found[row_id]]:
        raise UserError(
            f"teacher: {len(missing)} training rows have no out-of-fold probabilities: {preview(missing)}. Give all "
            "folds of the teacher."
        )
    if len(numbers := {found[row_id] for row_id in own}) > 1:
        raise UserError(
            f"teacher: training rows have {min(numbers)} to {max(numbers)} teachers. Give all folds of each teacher."
        )
    share = data.teacher_weight
    print(f"teacher: {len(own)} training rows get soft labels, {share:g} teacher and {1 - share:g} label")
    return [
        mix_label(row, total[row["id"]] / found[row["id"]], share) if row["id"] in by_id else row for row in train_rows
    ]


def mix_label(row: Row, probs: np.ndarray, weight: float) -> Row:
    """The row with `weight` times the probabilities of its choices (choices,) plus the rest of its label as target."""
    label = row.get("target") or np.eye(len(probs))[row["answer"]]
    return {**row, "target": (weight * probs + (1 - weight) * np.asarray(label)).tolist()}


def read_teacher(path: str, by_id: dict[str, Row], train_csv: str) -> dict[str, np.ndarray]:
    """id -> probabilities (choices,) of a finished fold's out-of-fold file, or of the file itself.

    Raises UserError unless the file has exactly the rows that its model was not trained on, and the log-loss on these
    labels that was measured when it was written.
    """
    file, scores = Path(path), read_card(path).get("scores")
    if file.is_dir():
        if not (file / "metrics.json").is_file():
            raise UserError(f"teacher: {path} is no finished fold. Train it first, or name an out-of-fold file.")
        metrics = read_json(file / "metrics.json")
        file, scores = weights_folder(path, metrics["best"]) / "oof.csv", metrics["weights"].get(metrics["best"])
        if not file.is_file():
            raise UserError(
                f"teacher: {path} has no out-of-fold file, because it was trained on every row. Leave it out."
            )
    elif not run_args(file) and read_card(file).get("weights") != "base":
        raise UserError(
            f"teacher: nothing beside {path} says which rows its model was trained on. Give the fold's folder, or a "
            "file in oof/ that `predict.py --oof` wrote."
        )
    ids, probs = read_predictions(file)
    check_fold(ids, file)
    if unknown := [row_id for row_id in ids if row_id not in by_id]:
        raise UserError(
            f"teacher: {len(unknown)} rows of {file} are not in {train_csv}: {preview(unknown)}. Use a teacher that "
            "was trained on this file."
        )
    rows = [by_id[row_id] for row_id in ids]
    if wrong := [row["id"] for row, values in zip(rows, probs) if values[len(row["choices"]) :].any()]:
        raise UserError(
            f"teacher: {file} has choices that {train_csv} does not offer: {preview(wrong)}. Predict again."
        )
    if scores and scores.get("log_loss") is not None:
        check_measured(file, probs, np.array([row["answer"] for row in rows]), scores["log_loss"], train_csv)
    return {row["id"]: values[: len(row["choices"])] for row, values in zip(rows, probs)}


def check_init_adapter(args: ModelArguments, valid_rows: list[Row]) -> None:
    """Raise UserError unless a run can start from the adapter in `init_adapter`, which may know no validation row."""
    folder = Path(args.init_adapter or "")
    if not is_adapter(folder):
        raise UserError(f"init_adapter: {folder} holds no adapter. Name the folder of a finished run.")
    if args.score != "letter":
        raise UserError(f"init_adapter works with score letter, not {args.score}. Leave one of them out.")
    options = adapter_options(args)
    own = {"r": options["rank"], "lora_alpha": options["alpha"], **dict.fromkeys(MATTERS), **options["options"]}
    own.pop("init_lora_weights", None)
    saved = read_json(folder / "adapter_config.json")
    if other := [name for name, value in own.items() if (saved.get(name) or None) != (value or None)]:
        values = ", ".join(f"{name} {saved.get(name)} and not {own[name]}" for name in other)
        raise UserError(f"init_adapter: {folder} has {values}. Set the LoRA fields as in that run.")
    metrics = next((path for path in (folder, folder.parent) if (path / "metrics.json").is_file()), None)
    base = metrics and read_json(metrics / "metrics.json").get("fingerprints", {}).get("files")
    if base and base != checkpoint_fingerprint(args.model):
        raise UserError(f"init_adapter: {folder} was trained on other base weights than those in {args.model}.")
    if valid_rows:
        check_unseen(folder, valid_rows)


def check_unseen(folder: Path, valid_rows: list[Row]) -> None:
    """Raise UserError where the run that trained the adapter in `folder` may have trained on a validation row."""
    config = run_args(folder / "oof.csv")
    if not config:
        raise UserError(
            f"init_adapter: no args.json beside {folder} says on which rows it was trained. They may be validation "
            "rows: set fold to null, or name the folder of a run of this project."
        )
    data = build_dataclass(DataArguments, config)
    rows = read_rows(data.train_csv, data.image_root, with_answer=True, **reader_options(data))
    with redirect_stdout(io.StringIO()):  # what it prints is about the earlier run
        train_rows, _ = split_rows(rows, data, config["seed"])
    if seen := repeated_rows(valid_rows, train_rows):
        raise UserError(
            f"init_adapter: {folder} was trained on the images of {len(seen)} validation rows: {preview(seen)}. Use "
            "the same fold of a run with the same folds file."
        )
    if config.get("init_adapter"):
        check_unseen(Path(config["init_adapter"]), valid_rows)
