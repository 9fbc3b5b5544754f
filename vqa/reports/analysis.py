"""The sections of the page of `analyze.py`.

Each function measures one thing on the out-of-fold rows, puts its main result on top of the page, and returns the
values that its section shows. `rows` are in the order of the results.
"""

from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd
from scipy.stats import chi2_contingency
from sklearn.metrics import confusion_matrix

from vqa.core.errors import pluralize, preview
from vqa.data.rows import LETTERS, Row, read_rows
from vqa.data.table import write_table
from vqa.evaluation.metrics import NOISE, accuracy, row_log_loss
from vqa.evaluation.reference import model_warning
from vqa.evaluation.significance import compare, error_overlap, mean_loss
from vqa.reports.charts import heat_map, learning_curves, reliability_diagram
from vqa.reports.diagnostics import find_label_issues, letter_bias, reliability
from vqa.reports.groups import TYPE, group_table
from vqa.reports.page import Page, card
from vqa.reports.results import Results

MAX_ERRORS = 24  # cards on the page
MAX_LABEL_ISSUES = 12
MAX_DISAGREEMENTS = 12
SECTIONS = {
    "highlights": "Highlights",
    "groups": "Groups",
    "weights": "Raw, EMA, SWA",
    "letters": "Letters",
    "calibration": "Calibration",
    "folds": "Folds",
    "models": "Models",
    "label-issues": "Label issues",
    "errors": "Largest errors",
}


def read_result_rows(results: Results, image_root: str | None, reader: Mapping) -> list[Row]:
    """The rows of the results, in their order. `reader`: the folds' `reader_options`."""
    by_id = {row["id"]: row for row in read_rows(results.labels.path, image_root, with_answer=True, **reader)}
    return [by_id[row_id] for row_id in results.ids]


def scores_section(results: Results, page: Page) -> list[dict]:
    """Accuracy and log-loss of each model on all rows, beside chance and the text alone; warnings come first."""
    section = []
    for name, model in results.models.items():
        score, reference = accuracy(results.correct(name), results.clusters()), results.reference(name)
        if warning := model_warning(model.name, results.probs[name], results.answers, reference, results.clusters()):
            page.highlight("groups", warning)
        loss = mean_loss(row_log_loss(results.probs[name], results.answers), results.clusters())
        section.append({"name": name, "model": model.name, "reference": reference})
        number = pluralize(len(results.ids), "out-of-fold row")
        text = f"{model.name}: accuracy {score}, log-loss {loss.value:.4f}, {number} ({reference})"
        page.highlight("groups", results.prefix(name) + text)
    return section


def groups_section(results: Results, groups: dict[str, pd.Series], page: Page) -> list[dict]:
    """Accuracy and log-loss of each model by fold and by what may make a row hard."""
    folds = {name: model.fold_of_row().loc[results.ids] for name, model in results.models.items()}
    same_folds = all(column.equals(folds["M1"]) for column in folds.values())
    tables = [group_table(results, "fold" if same_folds else "fold of M1", folds["M1"].astype("category"))]
    for grouping, group in groups.items():
        tables.append(group_table(results, grouping, group))
        if grouping == TYPE and (worst := tables[-1]["worst"]):
            for name, scores in zip(results.models, worst["models"]):
                overall = results.correct(name).mean()
                below = "below" if scores["accuracy"].high < overall else "within noise of"
                text = f"Worst question type: {worst['group']}, accuracy {scores['accuracy']} on "
                text += f"{pluralize(worst['rows'], 'row')}, {below} the {overall:.4f} of all rows"
                page.highlight("groups", results.prefix(name) + text)
    return tables


def weights_section(results: Results, page: Page) -> list[dict]:
    """Raw against averaged weights: by fold, by paired tests, and over the validations; two figures for each model."""
    section = []
    for name, model in results.models.items():
        probs = results.by_weights(name)
        averages = [weights for weights in probs if weights != "raw" and "raw" in probs]
        tests = {}
        for average in averages:
            tests[average] = compare(probs["raw"], probs[average], results.answers, results.clusters())
            page.highlight("weights", results.prefix(name) + tests[average].verdict("raw", average.upper()))
        for score in ("log_loss", "accuracy"):
            curves = {weights: [fold.curve(weights, score) for fold in model.folds] for weights in probs}
            curves = {weights: folds for weights, folds in curves.items() if all(len(points) for points in folds)}
            if any(len(points) > 1 for folds in curves.values() for points in folds):
                page.add_figure(f"{name}_{score}", learning_curves(curves, score.replace("_", "-")))
        section.append({"name": name, "model": model, "tests": tests})
    return section


def models_section(results: Results, rows: list[Row], page: Page) -> dict:
    """Paired tests of each model against the first, how alike the models are, the rows on which they disagree most.

    Several models get two heat maps.
    """
    tests = []
    for name in list(results.models)[1:]:
        test = compare(results.probs["M1"], results.probs[name], results.answers, results.clusters())
        sentence = test.verdict("M1", name)
        tests.append({"sentence": sentence, "test": test})
        page.highlight("models", sentence)
    label_probs = np.stack([probs[np.arange(len(rows)), results.answers] for probs in results.probs.values()])
    predictions = np.stack([probs.argmax(1) for probs in results.probs.values()])
    if tests:
        overlap, names = error_overlap(predictions, results.answers), list(results.models)
        page.highlight("models", overlap.describe(names))
        page.add_figure("error_overlap", heat_map(overlap.jaccard, names, "Jaccard index of the errors"))
        page.add_figure("disagreement", heat_map(overlap.disagreement, names, "share of rows with other letters"))
    disagree = np.flatnonzero((predictions != predictions[0]).any(0))
    widest = disagree[np.argsort(-np.ptp(label_probs, axis=0)[disagree], kind="stable")]
    return {"tests": tests, "disagree": len(disagree), "cards": cards(results, rows, widest[:MAX_DISAGREEMENTS])}


def label_issues_section(results: Results, rows: list[Row], page: Page) -> dict:
    """Rows whose label is probably wrong, by the mean of all weights that deserve no warning; see mislabelled.csv."""
    answers, clusters = results.answers, results.clusters()
    members = [
        values
        for name in results.models
        for values in results.by_weights(name).values()
        if not model_warning(name, values, answers, results.reference(name), clusters)
    ]
    mean = np.mean(members or [np.eye(len(LETTERS))[answers]], axis=0)  # without members no label is doubted
    issues, suggestions = find_label_issues(mean, answers)
    folds = results.models["M1"].fold_of_row()
    columns = ["id", "answer", "suggested", "p_answer", "p_suggested", "answer_text", "suggested_text"]
    lines = []
    for i, suggested in zip(issues, suggestions):
        row, answer = rows[i], rows[i]["answer"]
        letters, texts = [LETTERS[answer], LETTERS[suggested]], [row["choices"][answer], row["choices"][suggested]]
        probs = [mean[i, answer], mean[i, suggested]]
        lines.append([row["id"], *letters, *probs, *texts, row["question"], ";".join(row["images"]), folds[row["id"]]])
    table = pd.DataFrame(lines, columns=[*columns, "question", "image", "fold"])
    write_table(page.folder / "mislabelled.csv", table, float_format="%.4f")
    names = f": {preview(list(table['id']))}" if len(issues) else ""
    text = f"{pluralize(len(issues), 'row')} with a probably wrong label, listed in mislabelled.csv{names}"
    page.highlight("label-issues", text if members else "No label is doubted: no model is above the text alone")
    return {"rows": len(issues), "members": len(members), "cards": cards(results, rows, issues[:MAX_LABEL_ISSUES])}


def letters_section(results: Results, rows: list[Row], page: Page) -> list[dict]:
    """The confusion matrix of the letters, and whether a model predicts a letter too often or too rarely."""
    section, width = [], max(len(row["choices"]) for row in rows)
    for name, probs in results.probs.items():
        counts = confusion_matrix(results.answers, probs.argmax(1), labels=range(width))
        bias = letter_bias(counts)
        words = [f"{LETTERS[i]} too {'often' if bias[i] > 0 else 'rarely'}" for i in np.flatnonzero(bias)]
        sentence = f"Predicts {' and '.join(words)}, beyond noise" if words else "No letter bias beyond noise"
        page.highlight("letters", results.prefix(name) + sentence)
        section.append({"name": name, "counts": counts, "sentence": sentence})
    return section


def calibration_section(results: Results, page: Page) -> list[dict]:
    """Confidence against accuracy; one figure for each model."""
    section = []
    for name, probs in results.probs.items():
        bins = reliability(probs, results.answers)
        page.add_figure(f"{name}_reliability", reliability_diagram(bins))
        direction = "Overconfident" if bins.gap > 0 else "Underconfident"
        sentence = f"{direction} by {abs(bins.gap):.4f} on average; expected calibration error {bins.error:.4f}"
        page.highlight("calibration", results.prefix(name) + sentence)
        section.append({"name": name, "sentence": sentence})
    return section


def folds_section(results: Results, types: pd.Series) -> list[dict]:
    """Accuracy by question type and fold, and whether the folds of a model differ beyond noise."""
    section = []
    for name, model in results.models.items():
        folds = model.fold_of_row().loc[results.ids]
        table = pd.DataFrame({"type": types, "fold": folds, "correct": results.correct(name)})
        cells = table.pivot_table("correct", "type", "fold", aggfunc=["mean", "size"], observed=True)
        outcomes = pd.crosstab(table["fold"], table["correct"])
        p_value = chi2_contingency(outcomes).pvalue if min(outcomes.shape) > 1 else 1.0
        noise = "beyond" if p_value < NOISE else "within"
        sentence = f"The accuracies of the folds differ {noise} noise (chi-squared test, p = {p_value:.3g})."
        section.append({"name": name, "means": cells["mean"], "sizes": cells["size"], "sentence": sentence})
    return section


def errors_section(results: Results, rows: list[Row]) -> list[dict]:
    """Cards of the rows with the highest log-loss, averaged over models."""
    losses = np.mean([row_log_loss(probs, results.answers) for probs in results.probs.values()], axis=0)
    return cards(results, rows, np.argsort(-losses, kind="stable")[:MAX_ERRORS])


def cards(results: Results, rows: list[Row], indices: Iterable[int]) -> list[dict]:
    """Cards of the rows at these indices, with the probabilities of each model."""
    folds = results.models["M1"].fold_of_row()
    return [
        card(
            rows[i],
            [f"fold {folds[rows[i]['id']]}"],
            {name: probs[i, : len(rows[i]["choices"])].tolist() for name, probs in results.probs.items()},
        )
        for i in indices
    ]
