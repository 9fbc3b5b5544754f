"""Groups of rows: every row in one, and scores that are pandas' and scikit-learn's."""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import log_loss

from vqa.evaluation.metrics import wilson_interval
from vqa.reports.groups import distractor_similarity, group_rows, group_table, quartile_groups
from vqa.reports.results import Model, Results


@pytest.mark.parametrize("values", [range(100), [5] * 7 + [9], [3] * 10, [1, 2], [0] * 50 + list(range(50))])
def test_parts_hold_every_value_and_are_named_by_their_ends(values):
    values = list(values)
    parts = quartile_groups(values, [f"r{i}" for i in range(len(values))])
    assert parts.notna().all()
    for name, own in pd.Series(values).groupby(parts.to_numpy()):
        assert name.replace(",", "").split(" to ") == [str(end) for end in sorted({own.min(), own.max()})]
    if len(set(values)) == 100:
        assert parts.value_counts().tolist() == [25] * 4


def test_distractor_similarity_is_that_of_the_most_similar_wrong_choice():
    row = {"choices": ["빨강", "top left", "top right", "xyz"], "answer": 1}
    assert distractor_similarity(row) == round(100 * 2 * 5 / 17), "`top ` and `t` of eight and nine letters"
    assert (
        distractor_similarity(row | {"answer": 0}) == 0
        and distractor_similarity({"choices": ["a", "a"], "answer": 0}) == 100
    )


class NoClusters:
    def clusters(self, ids):
        return {}


def test_scores_of_groups_are_those_of_the_libraries(rows):
    random = np.random.default_rng(0)
    answers = np.array([row["answer"] for row in rows])
    values = {name: random.dirichlet(np.ones(4), len(rows)) for name in ("M1", "M2")}
    models = {name: Model(name, []) for name in values}
    results = Results(models, NoClusters(), [row["id"] for row in rows], answers, values, 0)
    for name, group in group_rows(rows).items():
        assert list(group.index) == results.ids and group.notna().all(), name
        table = group_table(results, name, group)
        assert sum(line["rows"] for line in table["lines"]) == len(rows)
        for line in table["lines"]:
            at = (group == line["group"]).to_numpy()
            for scores, probabilities in zip(line["models"], values.values()):
                right = (probabilities.argmax(1) == answers)[at]
                assert scores["accuracy"][:3] == (right.mean(), *wilson_interval(right.sum(), len(right)))
                assert scores["log_loss"].value == pytest.approx(
                    log_loss(answers[at], probabilities[at], labels=range(4))
                )
        large = [line for line in table["lines"] if line["rows"] >= 20]
        assert (table["worst"] is None) == (len(large) < 2)


def test_the_worst_group_is_not_made_by_a_few_rows():
    """a: 12 of 20 right; b: 130 of 200; c: 2 of 10, too few; d: all of 70."""
    outcomes = {"a": (12, 20), "b": (130, 200), "c": (2, 10), "d": (70, 70)}
    right = np.concatenate([np.arange(rows) < right for right, rows in outcomes.values()])
    values = np.where(right[:, None], [0.8, 0.2], [0.2, 0.8])
    ids = [str(i) for i in range(len(right))]
    results = Results({"M1": Model("M1", [])}, NoClusters(), ids, np.zeros(len(right), dtype=int), {"M1": values}, 0)
    group = pd.Series(np.repeat(list(outcomes), [rows for _, rows in outcomes.values()]), ids, dtype="category")
    table = group_table(results, "kind", group)
    assert table["worst"]["group"] == "b", "65 % of 200 is surely worse than all rows' 71 %, 60 % of 20 is not"
    assert [line["group"] for line in table["lines"] if line["hard"]] == ["b", "c"]
