"""What the text of question and choices gives away without the image: what a model that never looks would score."""

from collections.abc import Iterator, Sequence

import numpy as np
from scipy.sparse import diags_array
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold

from vqa.data.prompt import LETTERS
from vqa.reports.question_types import question_type

FOLDS = 5


STRENGTH = 0.1  # C of the regression: clues are many and most of them mean nothing


class TextOnlyBaseline:
    """A guesser that reads and never looks, on rows with answers.

    A choice scores by its clues (logistic regression on the difference between the right choice and each wrong one),
    and the highest of a row wins.
    """

    def __init__(self, rows: Sequence[dict]):
        self.offers = np.array([len(row["choices"]) for row in rows])
        self.starts = np.cumsum(self.offers) - self.offers
        self.answers = np.array([row["answer"] for row in rows])
        self.reader = CountVectorizer(analyzer=lambda text_features: text_features, binary=True, min_df=2)
        seen = [list(text_features(row, choice)) for row in rows for choice in range(len(row["choices"]))]
        self.counted = self.reader.fit_transform(seen).astype(float)  # (choices of all rows, clues)

    def guesses(self, groups: Sequence) -> np.ndarray:
        """Index of the choice that is guessed, int (rows,), by weights that saw no row of the same group (image)."""
        result = np.empty(len(self.answers), dtype=int)
        splitter = GroupKFold(FOLDS, shuffle=True, random_state=0)
        for train, test in splitter.split(self.answers, groups=groups):
            scores = self.counted @ self._weights(train)
            result[test] = [scores[self.starts[i] :][: self.offers[i]].argmax() for i in test]
        return result

    def strongest_clues(self, most: int = 10) -> list[tuple[str, float]]:
        """(clue, weight) of what speaks most for a choice; a weight of 0.7 doubles its odds against another."""
        weights, names = self._weights(np.arange(len(self.answers))), self.reader.get_feature_names_out()
        return [(names[i], float(weights[i])) for i in np.argsort(-weights)[:most] if weights[i] > 0]

    def _weights(self, rows: np.ndarray) -> np.ndarray:
        """Weight of each clue (clues,), learned from these rows."""
        pairs = [(self.starts[i] + self.answers[i], self.starts[i] + k) for i in rows for k in range(self.offers[i])]
        right, wrong = np.array([pair for pair in pairs if pair[0] != pair[1]]).T
        signs = np.where(np.arange(len(right)) % 2, 1.0, -1.0)  # both classes have to occur
        gaps = diags_array(signs) @ (self.counted[right] - self.counted[wrong])
        return LogisticRegression(C=STRENGTH, fit_intercept=False).fit(gaps, signs).coef_[0]


def text_features(row: dict, choice: int) -> Iterator[str]:
    """What is seen of a choice: its letter, how its length compares, whether the question holds it, pieces of it.

    Each piece also together with the question's type and with its last two words, so that "red" may speak for itself
    where colours are asked for and not elsewhere.
    """
    text = " ".join(row["choices"][choice].lower().split())
    others = [len(other) for i, other in enumerate(row["choices"]) if i != choice]
    asked = question_type(row["question"]), " ".join(row["question"].lower().split()[-2:])
    yield f"letter {LETTERS[choice]}"
    if len(text) > max(others):
        yield "the longest choice"
    if len(text) < min(others):
        yield "the shortest choice"
    if text in row["question"].lower():
        yield "stands in the question"
    padded = f" {text} "
    pieces = {padded[i : i + n] for n in (2, 3, 4) for i in range(len(padded) - n + 1)} | {text}
    for piece in sorted(pieces):
        yield f"“{piece}”"
        yield f"“{piece}” where {asked[0]} is asked"
    yield f"“{text}” after “{asked[1]}”"
