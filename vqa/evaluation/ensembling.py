"""Ensembles of letter probabilities, and how the best is chosen without fooling oneself.

A `stack` is float64 (members, rows, letters); a letter that a row does not offer has probability 0 in every member.
Whatever has parameters is fitted on out-of-fold rows; what a method is worth is measured nested: fitted on four
fifths of those rows, scored on the fifth.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import softmax

from vqa.evaluation.metrics import EPS, row_log_loss

METHODS = ("mean", "geometric", "weighted", "greedy", "stack", "majority")


TUNED = ("weighted", "greedy", "stack")  # they have weights


PARTS = 5


ROUNDS = 50  # weights in steps of 2 %


MOST_ROWS = 100_000  # more do not change a handful of weights


def ensemble(stack: np.ndarray, method: str, weights: Sequence[float] | None = None) -> np.ndarray:
    """One set of probabilities (rows, letters) out of `stack` (members, rows, letters).

    mean: of the probabilities. geometric: of their logarithms. weighted, greedy: mean with `weights` (members,).
    stack: softmax of the sum of log-probabilities times `weights`. majority: the share of the members' votes, ties
    going to the letter of the larger mean probability.
    """
    if method == "majority":
        votes = (stack.argmax(-1)[..., None] == np.arange(stack.shape[-1])).mean(0)
        # Votes are multiples of 1 / members, so a share this small can order ties and nothing else.
        share = 1e-3 / len(stack)
        return (1 - share) * votes + share * stack.mean(0)
    if method in ("geometric", "stack"):
        return log_opinion_pool(stack, weights if method == "stack" else np.full(len(stack), 1 / len(stack)))
    return np.average(stack, axis=0, weights=weights if method in TUNED else None)


def log_opinion_pool(stack: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """Softmax, over the letters that a row offers, of the log-probabilities summed with `weights` (members,)."""
    offered = (stack > 0).any(0)
    pooled = sum(weight * np.log(np.maximum(member, EPS)) for weight, member in zip(weights, stack))
    return softmax(np.where(offered, pooled, -np.inf), axis=1)


@dataclass(frozen=True)
class Ensemble:
    """A method with its weights (members,) and, where members are tempered first, 1 / temperature (members,)."""

    method: str
    weights: np.ndarray | None = None
    inverse_temperature: np.ndarray | None = None

    def __call__(self, stack: np.ndarray) -> np.ndarray:
        return ensemble(apply_temperature(stack, self.inverse_temperature), self.method, self.weights)


def apply_temperature(stack: np.ndarray, inverse_temperature: np.ndarray | None) -> np.ndarray:
    """Members at temperature 1 / sharpness: each row's probabilities to that power, summing to 1 again."""
    if inverse_temperature is None:
        return stack
    return np.stack([log_opinion_pool(member[None], [power]) for member, power in zip(stack, inverse_temperature)])


def fit(
    method: str, stack: np.ndarray, answers: np.ndarray, temperature: bool = False, weight_by: str = "log_loss"
) -> Ensemble:
    """The ensemble `method` of `stack` (members, rows, letters), fitted on answers' indices (rows,)."""
    if len(answers) > MOST_ROWS:
        drawn = np.random.default_rng(0).choice(len(answers), MOST_ROWS, replace=False)
        stack, answers = stack[:, drawn], answers[drawn]
    inverse_temperature = fit_inverse_temperature(stack, answers) if temperature else None
    stack = apply_temperature(stack, inverse_temperature)
    if method == "weighted":
        scores = [row_log_loss(member, answers).mean() for member in stack]
        if weight_by == "accuracy":
            scores = [(member.argmax(1) == answers).mean() for member in stack]
        return Ensemble(method, score_weights(scores, weight_by), inverse_temperature)
    fitted = {"greedy": fit_greedy, "stack": fit_stack}
    return Ensemble(method, fitted[method](stack, answers) if method in fitted else None, inverse_temperature)


def fit_inverse_temperature(stack: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """1 / temperature of each member (members,), by its log-loss: a stack of that member alone."""
    return np.array([fit_stack(member[None], answers)[0] for member in stack])


def score_weights(scores: Sequence[float], by: str) -> np.ndarray:
    """Weights that sum to 1: proportional to accuracies, or to the inverse of log-losses."""
    raw = np.asarray(scores, dtype=float)
    raw = raw if by == "accuracy" else 1 / np.maximum(raw, 1e-9)
    return raw / raw.sum()


def fit_greedy(stack: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """Weights (members,) by greedy selection with replacement (Caruana et al. 2004).

    Begun empty, the mean takes in whichever member lowers its log-loss most, fifty times; the best mean on the way
    is kept. A weight is the share of a member's selections, so one that never helps has none.
    """
    right = stack[:, np.arange(len(answers)), answers]  # log-loss looks at nothing else
    total, counts = np.zeros(len(answers)), np.zeros(len(stack))
    best, kept = np.inf, counts
    for chosen in range(1, ROUNDS + 1):
        losses = [-np.log(np.maximum((total + member) / chosen, EPS)).mean() for member in right]
        pick = int(np.argmin(losses))
        total, counts = total + right[pick], counts + (np.arange(len(stack)) == pick)
        if losses[pick] < best:
            best, kept = losses[pick], counts
    return kept / kept.sum()


def fit_stack(stack: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """Coefficients (members,), none below 0, of a stack on log-probabilities.

    This is multinomial logistic regression in its conditional form (McFadden 1974): one coefficient a member, shared
    by all letters, and no intercepts. A letter means nothing in itself (choices are shuffled in training), so a matrix
    of members x letters x letters would only be more to fit; and a row that offers fewer choices is simply a softmax
    over fewer. With two letters it is scikit-learn's LogisticRegression without intercept or penalty on the members'
    log-odds. One member's coefficient is the inverse of its temperature.

    Members are dropped one by one, weakest first, while their coefficient is not above 0 or is worth less to the
    likelihood than the BIC charges for it, log(rows) / 2: a copy and a model of noise end with 0, not with almost 0.
    """
    kept, count = list(range(len(stack))), len(answers)
    found = _fit_coefficients(stack, answers)
    while len(kept) > 1:
        weakest = int(np.argmin(found.strength))
        rest = kept[:weakest] + kept[weakest + 1 :]
        without = _fit_coefficients(stack[rest], answers)
        if found.strength[weakest] > 0 and count * (without.loss - found.loss) > np.log(count) / 2:
            break
        kept, found = rest, without
    coefficients = np.zeros(len(stack))
    coefficients[kept] = np.maximum(found.coefficients, 0)
    return coefficients


@dataclass(frozen=True)
class _Fit:
    coefficients: np.ndarray
    strength: np.ndarray  # coefficients in standard errors
    loss: float


def _fit_coefficients(stack: np.ndarray, answers: np.ndarray) -> _Fit:
    """Maximum likelihood by a trust-region Newton method: the loss is convex and a coefficient a member is few."""
    from scipy.optimize import minimize  # takes a third of a second to import

    offered = (stack > 0).any(0).T
    logs = np.where(offered, np.log(np.maximum(stack, EPS)).transpose(0, 2, 1), 0.0)  # sums run fast along rows
    logs_right = logs[:, answers, np.arange(len(answers))]

    def pooled(coefficients):
        """(shares of the letters (letters, rows), loss)."""
        values = np.where(offered, np.tensordot(coefficients, logs, 1), -np.inf)
        top = values.max(0)
        shares = np.exp(values - top)
        total = shares.sum(0)
        return shares / total, float((top + np.log(total) - coefficients @ logs_right).mean())

    def loss_and_gradient(coefficients):
        shares, loss = pooled(coefficients)
        return loss, ((logs * shares).sum((1, 2)) - logs_right.sum(1)) / len(answers)

    def curvature(coefficients):
        shares = pooled(coefficients)[0]
        spread = (logs - (logs * shares).sum(1, keepdims=True)) * np.sqrt(shares)
        flat = spread.reshape(len(logs), -1)
        return flat @ flat.T / len(answers)

    start = np.full(len(stack), 1 / len(stack))
    found = minimize(loss_and_gradient, start, jac=True, hess=curvature, method="trust-exact", options={"gtol": 1e-10})
    # The trace of a ridge makes the error of a coefficient that two copies share large instead of undefined.
    information = curvature(found.x) + 1e-9 * np.eye(len(stack))
    errors = np.sqrt(np.diag(np.linalg.inv(information)) / len(answers))
    return _Fit(found.x, found.x / errors, float(found.fun))


def nested(
    method: str,
    stack: np.ndarray,
    answers: np.ndarray,
    clusters: Mapping[str, np.ndarray] | None = None,
    temperature: bool = False,
    weight_by: str = "log_loss",
) -> np.ndarray:
    """Probabilities (rows, letters) of rows that had no part in fitting the ensemble that gives them.

    Rows of one image stay in one part, where `clusters` tells images.
    """
    groups = (clusters or {}).get("image", np.arange(len(answers)))
    parts = np.random.default_rng(0).permutation(groups.max() + 1)[groups] % PARTS
    result = np.empty(stack.shape[1:])
    for part in range(PARTS):
        held = parts == part
        result[held] = fit(method, stack[:, ~held], answers[~held], temperature, weight_by)(stack[:, held])
    return result
