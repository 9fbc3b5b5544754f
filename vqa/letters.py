"""Whether letters are right equally often, and whether a model leans to one."""

from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest, chisquare

from vqa.statistics import NOISE


class Evenness(NamedTuple):
    """By letter: rows in which it is right, and how many a fair draw gives; p_value of so uneven a draw."""

    counts: np.ndarray
    fair: np.ndarray
    p_value: float


def evenness(answers: np.ndarray, offered: np.ndarray) -> Evenness:
    """Of the answers' indices (rows,) where `offered` choices (rows,) stand to choose from."""
    width = offered.max()
    counts = np.bincount(answers, minlength=width)
    fair = np.array([(1 / offered[offered > i]).sum() for i in range(width)])
    return Evenness(counts, fair, float(chisquare(counts, fair).pvalue))


def confusion(said: np.ndarray, answers: np.ndarray, width: int) -> np.ndarray:
    """Rows by right letter and answered letter, int (width, width), from indices (rows,)."""
    counts = np.zeros((width, width), dtype=int)
    np.add.at(counts, (answers, said), 1)
    return counts


def leanings(counts: np.ndarray) -> np.ndarray:
    """-1, 0 or 1 for each letter: answered too seldom, neither beyond noise, too often; of a confusion's counts.

    McNemar's exact test of rows where the letter is answered and wrong against those where it is right and not
    answered; among so many letters one is off by chance the more easily (Bonferroni).
    """
    hits = counts.diagonal()
    too_often, missed = counts.sum(0) - hits, counts.sum(1) - hits
    p_values = [binomtest(int(a), int(a + b)).pvalue if a + b else 1.0 for a, b in zip(too_often, missed)]
    return np.sign(too_often - missed) * (np.array(p_values) < NOISE / len(counts))
