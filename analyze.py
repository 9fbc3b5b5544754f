"""Look at what training gave: one page of the out-of-fold results of a model, or of several side by side.

    python analyze.py checkpoints/*/                       # every finished fold; what is none is passed over
    python analyze.py checkpoints/fold* checkpoints/7b/fold*
    python analyze.py checkpoints/demo/*/                  # outputs/demo/analyze/index.html

Every row is judged by the one model that was trained without it. Folders whose names differ only in the number after
"fold" are the folds of one model. Beside the page lie its figures as PNG files and mislabelled.csv: rows whose label
looks wrong, to review. What is worth knowing at a glance stands first on the page and is printed here.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import chi2_contingency

from vqa.core.errors import pluralize, preview, run_main
from vqa.core.io import atomic_write, swap_root
from vqa.data.prompt import LETTERS
from vqa.data.rows import read_rows
from vqa.evaluation.labels import Labels
from vqa.evaluation.metrics import NOISE, accuracy, row_log_loss
from vqa.evaluation.significance import compare, mean_loss
from vqa.reports.charts import learning_curves, reliability_diagram
from vqa.reports.diagnostics import confusion_matrix, find_label_issues, letter_bias, reliability
from vqa.reports.groups import TYPE, group_rows, group_table
from vqa.reports.page import Highlights, Page, card
from vqa.reports.results import Results, curve, finished, put_together, read_models, training_csv

SHOWN_ERRORS = 24
SHOWN_SUSPECTS = 12
SHOWN_PARTED = 12
SECTIONS = {
    "glance": "At a glance",
    "groups": "Groups",
    "weights": "Raw, EMA, SWA",
    "letters": "Letters",
    "calibration": "Calibration",
    "folds": "Folds",
    "models": "Models",
    "suspects": "Mislabelled?",
    "errors": "Costliest errors",
}


def main() -> None:
    args = parse_args()
    folders, passed_over = finished(args.folds)
    train_csv, image_root = training_csv(folders)
    truth = Labels(args.train_csv or train_csv)
    results = put_together(read_models(folders, truth), truth)
    rows = read_rows_of(results, args.image_root or image_root)
    groups = group_rows(rows)
    page = Page(args.output_dir or swap_root("outputs", common_folder(folders), below="checkpoints") / "analyze")
    glance = Glance(results)
    scores = look_at_scores(results, glance)
    tables = look_at_groups(results, groups, glance)
    weights = look_at_weights(results, page, glance)
    path = page.write(
        "analyze.html",
        sections=SECTIONS,
        results=results,
        letter_names=LETTERS,
        scores=scores,
        groups=tables,
        weights=weights,
        models=look_at_models(results, rows, glance),
        suspects=look_at_suspects(results, rows, page, glance),
        letters=look_at_letters(results, rows, glance),
        calibration=look_at_calibration(results, page, glance),
        folds=look_at_folds(results, groups[TYPE]),
        errors=costliest_errors(results, rows),
        passed_over=[str(folder) for folder in passed_over],
        glance=glance,
    )
    glance.print()
    print(f"{path}: {pluralize(len(results.ids), 'row')}, {pluralize(len(folders), 'fold')}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folds", nargs="+", help="folders that train_fold.py wrote, such as checkpoints/*/")
    parser.add_argument("--train_csv", help="the rows and their answers (default: as in training)")
    parser.add_argument("--image_root", help="folder that `path` is relative to (default: as in training)")
    parser.add_argument(
        "--output_dir", help="(default: analyze/ in outputs/, and the folds' place below checkpoints/)"
    )
    return parser.parse_args()


class Glance(Highlights):
    """What is worth knowing first; where there are several models, of which it is said."""

    def __init__(self, results: Results):
        super().__init__()
        self.several = len(results.models) > 1

    def add(self, section: str, text: str, model: str | None = None) -> None:
        super().add(section, f"{model}: {text}" if model and self.several else text)


def read_rows_of(results: Results, image_root: str | None) -> list[dict]:
    """The rows of the results, in their order."""
    by_id = {row["id"]: row for row in read_rows(results.truth.path, image_root, with_answer=True)}
    return [by_id[row_id] for row_id in results.ids]


def common_folder(folders: Sequence[Path]) -> str:
    return os.path.commonpath([folder.parent for folder in folders])


def look_at_scores(results: Results, glance: Glance) -> list[dict]:
    found = []
    for name, model in results.models.items():
        right = accuracy(results.right(name), results.clusters())
        loss = mean_loss(row_log_loss(results.best[name], results.answers), results.clusters())
        found.append({"name": name, "model": model.name, "accuracy": right, "log_loss": loss})
        told = f"{model.name}: accuracy {right}, log-loss {loss.value:.4f}"
        glance.add("groups", f"{told}, {pluralize(len(results.ids), 'row')} out of fold", name)
    return found


def look_at_groups(results: Results, groups: dict[str, pd.Series], glance: Glance) -> list[dict]:
    """Accuracy and log-loss of every model by fold and by what may make a row hard."""
    folds = {name: model.fold_of_row().loc[results.ids] for name, model in results.models.items()}
    agree = all(own.equals(folds["M1"]) for own in folds.values())
    tables = [group_table(results, "fold" if agree else "fold of M1", folds["M1"].astype("category"))]
    for name, group in groups.items():
        tables.append(group_table(results, name, group))
        if name == TYPE and (worst := tables[-1]["worst"]):
            for model, scores in zip(results.models, worst["models"]):
                overall = results.right(model).mean()
                sure = "beyond" if scores["accuracy"].high < overall else "within"
                told = f"Worst question type: {worst['group']}, accuracy {scores['accuracy']} at "
                told += f"{pluralize(worst['rows'], 'row')}, {sure} noise of the {overall:.4f} of all rows"
                glance.add("groups", told, model)
    return tables


def look_at_weights(results: Results, page: Page, glance: Glance) -> list[dict]:
    """Raw against averaged weights: by fold, by paired tests, and over the validations; two figures a model."""
    found = []
    for name, model in results.models.items():
        values, tests = results.by_weights(name), []
        for average in [weights for weights in values if weights != "raw" and "raw" in values]:
            tests.append(compare(values["raw"], values[average], results.answers, results.clusters()))
            glance.add("weights", tests[-1].verdict("raw", average.upper()), name)
        for score in ("log_loss", "accuracy"):
            curves = {weights: [curve(fold, weights, score) for fold in model.folds] for weights in values}
            curves = {weights: folds for weights, folds in curves.items() if all(len(points) for points in folds)}
            if any(len(points) > 1 for folds in curves.values() for points in folds):
                page.add(f"{name}_{score}", learning_curves(curves, score.replace("_", "-")))
        averages = [weights for weights in values if weights != "raw"]
        found.append({"name": name, "model": model, "tests": dict(zip(averages, tests))})
    return found


def look_at_models(results: Results, rows: list[dict], glance: Glance) -> dict:
    """Paired tests of each model against the first, and rows that models part on."""
    tests = []
    for name in list(results.models)[1:]:
        tested = compare(results.best["M1"], results.best[name], results.answers, results.clusters())
        tests.append({"sentence": tested.verdict("M1", name), "test": tested})
        glance.add("models", tests[-1]["sentence"])
    right = np.stack([values[np.arange(len(rows)), results.answers] for values in results.best.values()])
    said = np.stack([values.argmax(1) for values in results.best.values()])
    parted = np.flatnonzero((said != said[0]).any(0))
    widest = parted[np.argsort(-np.ptp(right, axis=0)[parted], kind="stable")]
    return {"tests": tests, "parted": len(parted), "cards": cards(results, rows, widest[:SHOWN_PARTED])}


def look_at_suspects(results: Results, rows: list[dict], page: Page, glance: Glance) -> dict:
    """Rows whose label looks wrong to every weights of every model; all of them go to mislabelled.csv."""
    stack = np.stack([values for name in results.models for values in results.by_weights(name).values()])
    found, instead = find_label_issues(stack, results.answers)
    mean, folds = stack.mean(0), results.models["M1"].fold_of_row()
    lines = [
        {
            "id": rows[i]["id"],
            "answer": LETTERS[rows[i]["answer"]],
            "suggested": LETTERS[other],
            "p_answer": mean[i, rows[i]["answer"]],
            "p_suggested": mean[i, other],
            "answer_text": rows[i]["choices"][rows[i]["answer"]],
            "suggested_text": rows[i]["choices"][other],
            "question": rows[i]["question"],
            "image": rows[i]["image"],
            "fold": folds[rows[i]["id"]],
        }
        for i, other in zip(found, instead)
    ]
    columns = ["id", "answer", "suggested", "p_answer", "p_suggested", "answer_text", "suggested_text", "question"]
    with atomic_write(page.folder / "mislabelled.csv") as temporary:
        table = pd.DataFrame(lines, columns=[*columns, "image", "fold"])
        table.to_csv(temporary, index=False, lineterminator="\n", float_format="%.4f")
    told = f"{pluralize(len(found), 'row')} whose label looks wrong, in mislabelled.csv"
    glance.add("suspects", told + (f": {preview([line['id'] for line in lines])}" if lines else ""))
    return {"rows": len(found), "members": len(stack), "cards": cards(results, rows, found[:SHOWN_SUSPECTS])}


def look_at_letters(results: Results, rows: list[dict], glance: Glance) -> list[dict]:
    """Which letter is answered where which is right, and whether a model leans to one."""
    found, width = [], max(len(row["choices"]) for row in rows)
    for name, values in results.best.items():
        counts = confusion_matrix(values.argmax(1), results.answers, width)
        leaning = letter_bias(counts)
        words = [f"{LETTERS[i]} too {'often' if leaning[i] > 0 else 'seldom'}" for i in np.flatnonzero(leaning)]
        sentence = f"Answers {' and '.join(words)}, beyond noise" if words else "Leans to no letter beyond noise"
        glance.add("letters", sentence, name)
        found.append({"name": name, "counts": counts, "sentence": sentence})
    return found


def look_at_calibration(results: Results, page: Page, glance: Glance) -> list[dict]:
    found = []
    for name, values in results.best.items():
        measured = reliability(values, results.answers)
        page.add(f"{name}_reliability", reliability_diagram(measured))
        how = "Too sure of itself" if measured.gap > 0 else "Not sure enough"
        sentence = f"{how}, by {abs(measured.gap):.4f} on average; expected calibration error {measured.error:.4f}"
        glance.add("calibration", sentence, name)
        found.append({"name": name, "sentence": sentence})
    return found


def look_at_folds(results: Results, types: pd.Series) -> list[dict]:
    """Accuracy by question type and fold, and whether the folds of a model differ beyond noise."""
    found = []
    for name, model in results.models.items():
        table = pd.DataFrame(
            {"type": types, "fold": model.fold_of_row().loc[results.ids], "right": results.right(name)}
        )
        means = table.pivot_table(
            index="type", columns="fold", values="right", aggfunc=["mean", "size"], observed=True
        )
        outcomes = pd.crosstab(table["fold"], table["right"])
        p_value = chi2_contingency(outcomes).pvalue if min(outcomes.shape) > 1 else 1.0
        sure = "beyond" if p_value < NOISE else "within"
        sentence = f"Accuracies of the folds differ {sure} noise (chi-squared test, p = {p_value:.3g})."
        found.append({"name": name, "means": means["mean"], "sizes": means["size"], "sentence": sentence})
    return found


def costliest_errors(results: Results, rows: list[dict]) -> list[dict]:
    losses = np.mean([row_log_loss(values, results.answers) for values in results.best.values()], axis=0)
    return cards(results, rows, np.argsort(-losses, kind="stable")[:SHOWN_ERRORS])


def cards(results: Results, rows: list[dict], at: Sequence[int]) -> list[dict]:
    """Cards of the rows at these places, with the probabilities of each model."""
    folds = results.models["M1"].fold_of_row()
    return [
        card(
            rows[i],
            [f"fold {folds[rows[i]['id']]}"],
            {name: list(values[i, : len(rows[i]["choices"])]) for name, values in results.best.items()},
        )
        for i in at
    ]


if __name__ == "__main__":
    run_main(main)
