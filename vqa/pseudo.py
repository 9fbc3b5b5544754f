"""Pseudo-labels: test rows that a prediction file is sure of, as further training rows with soft labels."""

from vqa.args_files import DataArguments
from vqa.checks import shared_images
from vqa.errors import UserError, first_few
from vqa.predictions import read_predictions
from vqa.rows import read_rows


def pseudo_rows(data: DataArguments, valid_rows: list[dict]) -> list[dict]:
    """The rows of test_csv to which pseudo_csv gives a choice of at least pseudo_min_confidence; none without it.

    Their `target` is what it says of their choices. Rows that show the very image of a validation row are left out.
    How many are taken is printed; their ids are given a prefix, since a test row may have the id of a training row.
    """
    if data.pseudo_csv is None:
        return []
    test = {row["id"]: row for row in read_rows(data.test_csv, data.image_root)}
    ids, probabilities = read_predictions(data.pseudo_csv)
    if unknown := [row_id for row_id in ids if row_id not in test]:
        raise UserError(
            f"{data.pseudo_csv}: {len(unknown)} of its ids are not in {data.test_csv}: {first_few(unknown)}; "
            "predict that file, or name the one it predicts as test_csv"
        )
    if wrong := [i for i, values in zip(ids, probabilities) if values[len(test[i]["choices"]) :].any()]:
        raise UserError(
            f"{data.pseudo_csv}: {len(wrong)} rows have probabilities of choices that {data.test_csv} does not offer: "
            f"{first_few(wrong)}; predict again"
        )
    sure = [(test[i], values) for i, values in zip(ids, probabilities) if values.max() >= data.pseudo_min_confidence]
    rows = [labelled(row, values.tolist()) for row, values in sure]
    seen = {row_id for row_id, _ in shared_images(rows, valid_rows)}
    taken = [row for row in rows if row["id"] not in seen]
    which = f"rows with a confidence of {data.pseudo_min_confidence:g} or more"
    if not taken:
        raise UserError(f"{data.pseudo_csv}: it has no {which} to train on; lower pseudo_min_confidence")
    print(
        f"{data.pseudo_csv}: of {len(ids)} rows {len(taken)} are taken as training rows: the {which}"
        + (f", but for {len(seen)} that show an image of a validation row" if seen else "")
    )
    return taken


def labelled(row: dict, probabilities: list[float]) -> dict:
    """A test row as a training row, by the probabilities of its letters."""
    target = probabilities[: len(row["choices"])]
    return {**row, "id": f"pseudo {row['id']}", "answer": target.index(max(target)), "target": target}
