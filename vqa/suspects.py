"""Rows that look mislabelled: confidently, consistently and out of fold something else is answered."""

import numpy as np


def find_suspects(stack: np.ndarray, answers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rows that look mislabelled, the choice that is answered there instead), both int (suspects,), worst first.

    `stack` (members, rows, letters) are out-of-fold probabilities, a member for each of the weights of each model. All
    members have to agree on the other choice, and each has to give it at least what the labels get on average: the
    threshold of confident learning (Northcutt et al. 2021), with one for all letters, since letters are no classes.
    """
    said = stack.argmax(2)
    given = stack[:, np.arange(len(answers)), answers]
    wrong = (said == said[0]).all(0) & (said[0] != answers)
    rows = np.flatnonzero(wrong & (stack.max(2).min(0) >= given.mean()))
    margin = (stack.max(2) - given).mean(0)
    rows = rows[np.argsort(-margin[rows], kind="stable")]
    return rows, said[0][rows]
