"""A classifier that reads question and choices and sees no image: its accuracy is what the text gives away."""

from collections.abc import Iterator, Sequence

import numpy as np
from scipy.sparse import diags_array
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold

from vqa.data.rows import LETTERS, Row
from vqa.evaluation.question_types import question_type

FOLDS = 5
MIN_ROWS = 10 * FOLDS  # with fewer it learns nothing
MAX_ROWS = 5000  # that text_only_accuracy learns from, and that it predicts: a few seconds
C = 0.1  # strong regularisation: there are many features, and most of them mean nothing


class TextOnlyBaseline:
    """A pairwise ranker on labelled rows: the choice with the highest score is the prediction.

    Scores are linear in the choice's binary text features. Their weights come from a logistic regression on the
    feature differences between the right choice and each wrong one.
    """

    def __init__(self, rows: Sequence[Row]):
        self.num_choices = np.array([len(row["choices"]) for row in rows])
        self.starts = np.cumsum(self.num_choices) - self.num_choices  # a row's first choice among all choices
        self.answers = np.array([row["answer"] for row in rows])
        self.vectorizer = CountVectorizer(analyzer=lambda features: features, binary=True, min_df=2)
        choices = [list(text_features(row, choice)) for row in rows for choice in range(len(row["choices"]))]
        self.features = self.vectorizer.fit_transform(choices).astype(float)  # (choices of all rows, features)

    def predict(self, train: np.ndarray, test: np.ndarray) -> np.ndarray:
        """Index of the choice predicted for the rows `test`, int (test rows,), learned from the rows `train`."""
        scores = self.features @ self._fit(train)
        return np.array([scores[self.starts[i] :][: self.num_choices[i]].argmax() for i in test], dtype=int)

    def cross_validate(self, groups: Sequence) -> np.ndarray:
        """Index of the choice predicted for each row, int (rows,). Rows of one group (image) share a fold."""
        predictions = np.empty(len(self.answers), dtype=int)
        splitter = GroupKFold(FOLDS, shuffle=True, random_state=0)
        for train, test in splitter.split(self.answers, groups=groups):
            predictions[test] = self.predict(train, test)
        return predictions

    def top_features(self, number: int = 10) -> list[tuple[str, float]]:
        """(feature, weight) of the largest positive weights; a weight of 0.7 doubles a choice's odds."""
        weights, names = self._fit(np.arange(len(self.answers))), self.vectorizer.get_feature_names_out()
        return [(names[i], float(weights[i])) for i in np.argsort(-weights)[:number] if weights[i] > 0]

    def _fit(self, rows: np.ndarray) -> np.ndarray:
        """The weight of each feature (features,), learned from these rows."""
        pairs = [
            (self.starts[i] + self.answers[i], self.starts[i] + choice)
            for i in rows
            for choice in range(self.num_choices[i])
            if choice != self.answers[i]
        ]
        right, wrong = np.array(pairs).T
        signs = np.where(np.arange(len(right)) % 2, 1.0, -1.0)  # the regression needs both classes
        differences = diags_array(signs) @ (self.features[right] - self.features[wrong])
        return LogisticRegression(C=C, fit_intercept=False, max_iter=1000).fit(differences, signs).coef_[0]


def text_features(row: Row, choice: int) -> Iterator[str]:
    """The features of a choice: its letter, its length relative to the others, overlap with the question, n-grams.

    Each n-gram also occurs combined with the question type and with the question's last two words: "red" may be
    likely where a colour is asked for and nowhere else.
    """
    text = " ".join(row["choices"][choice].lower().split())
    other_lengths = [len(other) for i, other in enumerate(row["choices"]) if i != choice]
    kind, ending = question_type(row["question"], row["choices"]), " ".join(row["question"].lower().split()[-2:])
    yield f"letter {LETTERS[choice]}"
    if len(text) > max(other_lengths):
        yield "longest choice"
    if len(text) < min(other_lengths):
        yield "shortest choice"
    if text in row["question"].lower():
        yield "occurs in the question"
    padded = f" {text} "
    ngrams = {padded[i : i + n] for n in (2, 3, 4) for i in range(len(padded) - n + 1)} | {text}
    for ngram in sorted(ngrams):
        yield f"“{ngram}”"
        yield f"“{ngram}” in a {kind} question"
    yield f"“{text}” after “{ending}”"


def text_only_accuracy(train_rows: Sequence[Row], valid_rows: Sequence[Row]) -> float | None:
    """The baseline's accuracy on validation rows, learned from training rows; None with fewer than MIN_ROWS of either.

    Of each, at most MAX_ROWS are used, drawn with a fixed seed.
    """
    if min(len(train_rows), len(valid_rows)) < MIN_ROWS:
        return None
    draw = np.random.default_rng(0).permutation
    train, valid = ([rows[i] for i in draw(len(rows))[:MAX_ROWS]] for rows in (train_rows, valid_rows))
    baseline, rows = TextOnlyBaseline([*train, *valid]), np.arange(len(train) + len(valid))
    answers = baseline.answers[len(train) :]
    return float((baseline.predict(rows[: len(train)], rows[len(train) :]) == answers).mean())
