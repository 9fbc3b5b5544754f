"""Stacks: logistic regression on the log-probabilities of models, with the same weights for all rows or by type.

A `stack` is float64 (members, rows, letters), as in `vqa.evaluation.ensembling`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import softmax

from vqa.evaluation.metrics import EPS, row_log_loss

PARTS = 5  # of cross-validation
# Candidates for the strength of the shrinkage: inverse variances of the types' weights around those of all rows.
SHRINKAGE = (1.0, 10.0, 100.0, 1000.0, np.inf)


def log_opinion_pool(stack: np.ndarray, weights: Sequence[float] | np.ndarray) -> np.ndarray:
    """Softmax, over the letters that a row offers, of the log-probabilities summed with `weights`.

    The weights are (members,), or (members, rows) where each row has its own.
    """
    offered = (stack > 0).any(0)
    pooled = sum(
        np.asarray(weight)[..., None] * np.log(np.maximum(member, EPS)) for weight, member in zip(weights, stack)
    )
    return softmax(np.where(offered, pooled, -np.inf), axis=1)


def fit_stack(stack: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """Coefficients (members,), none below 0, of a stack on log-probabilities.

    This is multinomial logistic regression in its conditional form (McFadden 1974): one coefficient a member, shared
    by all letters, and no intercepts. A letter has no meaning of its own (choices are shuffled in training), so a
    matrix of members x letters x letters would only overfit, and a row with fewer choices is a softmax over fewer.
    With two letters it is scikit-learn's LogisticRegression without intercept or penalty on the members' log-odds.
    One member's coefficient is its inverse temperature.

    Members are dropped one by one, weakest first, while their coefficient is not above 0 or gains less likelihood than
    the BIC charges for it, log(rows) / 2: a copy and a model of noise end with exactly 0.
    """
    members, rows = list(range(len(stack))), len(answers)
    fitted = _fit_coefficients(stack, answers)
    while len(members) > 1:
        weakest = int(np.argmin(fitted.z))
        others = members[:weakest] + members[weakest + 1 :]
        without = _fit_coefficients(stack[others], answers)
        if fitted.z[weakest] > 0 and rows * (without.loss - fitted.loss) > np.log(rows) / 2:
            break
        members, fitted = others, without
    coefficients = np.zeros(len(stack))
    coefficients[members] = np.maximum(fitted.coefficients, 0)
    return coefficients


@dataclass(frozen=True)
class _Fit:
    coefficients: np.ndarray
    z: np.ndarray  # coefficients in standard errors
    loss: float


def _fit_coefficients(stack: np.ndarray, answers: np.ndarray) -> _Fit:
    """Maximum likelihood by a trust-region Newton method: the loss is convex and has few coefficients."""
    from scipy.optimize import minimize  # takes a third of a second to import

    loss_and_gradient, hessian = _likelihood(stack, answers)
    start = np.full(len(stack), 1 / len(stack))
    result = minimize(loss_and_gradient, start, jac=True, hess=hessian, method="trust-exact", options={"gtol": 1e-10})
    # A tiny ridge makes the error of a coefficient that two copies share large instead of undefined.
    information = hessian(result.x) + 1e-9 * np.eye(len(stack))
    errors = np.sqrt(np.diag(np.linalg.inv(information)) / len(answers))
    return _Fit(result.x, result.x / errors, float(result.fun))


def _likelihood(stack: np.ndarray, answers: np.ndarray) -> tuple[Callable, Callable]:
    """Functions of the coefficients (members,): (mean log-loss and its gradient, its Hessian)."""
    offered = (stack > 0).any(0).T
    logs = np.where(offered, np.log(np.maximum(stack, EPS)).transpose(0, 2, 1), 0.0)  # sums along rows are fast
    logs_right = logs[:, answers, np.arange(len(answers))]

    def pool(coefficients):
        """(probabilities of the letters (letters, rows), loss)."""
        values = np.where(offered, np.tensordot(coefficients, logs, 1), -np.inf)
        top = values.max(0)
        probs = np.exp(values - top)
        total = probs.sum(0)
        return probs / total, float((top + np.log(total) - coefficients @ logs_right).mean())

    def loss_and_gradient(coefficients):
        probs, loss = pool(coefficients)
        return loss, ((logs * probs).sum((1, 2)) - logs_right.sum(1)) / len(answers)

    def hessian(coefficients):
        probs = pool(coefficients)[0]
        spread = (logs - (logs * probs).sum(1, keepdims=True)) * np.sqrt(probs)
        flat = spread.reshape(len(logs), -1)
        return flat @ flat.T / len(answers)

    return loss_and_gradient, hessian


def fit_stack_by_type(
    stack: np.ndarray, answers: np.ndarray, types: np.ndarray
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(weights (members,) of `fit_stack` for all rows, weights of each of the question `types` (rows,)).

    The weights of a type maximise the likelihood of its rows times a normal prior around the weights of all rows, as
    in a hierarchical model, and none is below 0. So a type with few rows stays near the others. The variance of the
    prior is chosen in cross-validation, by the one-standard-error rule: the smallest whose log-loss is within one
    standard error of the lowest, so that the choice does not follow luck. Where that is 0, the dict is empty.
    """
    parts = np.random.default_rng(0).permutation(len(answers)) % PARTS
    losses = np.empty((len(SHRINKAGE), len(answers)))
    for part in range(PARTS):
        held = parts == part
        overall = fit_stack(stack[:, ~held], answers[~held])
        for i, strength in enumerate(SHRINKAGE):
            by_type = _fit_types(stack[:, ~held], answers[~held], types[~held], overall, strength)
            weights = weights_of_rows(types[held], overall, by_type)
            losses[i, held] = row_log_loss(log_opinion_pool(stack[:, held], weights), answers[held])
    gaps = losses - losses[losses.mean(1).argmin()]
    near = gaps.mean(1) <= gaps.std(1) / np.sqrt(len(answers))
    overall = fit_stack(stack, answers)
    return overall, _fit_types(stack, answers, types, overall, SHRINKAGE[np.flatnonzero(near)[-1]])


def _fit_types(
    stack: np.ndarray, answers: np.ndarray, types: np.ndarray, overall: np.ndarray, strength: float
) -> dict[str, np.ndarray]:
    """Type -> weights (members,), by a prior with mean `overall` and inverse variance `strength`."""
    from scipy.optimize import minimize

    fitted: dict[str, np.ndarray] = {}
    for name in np.unique(types) if np.isfinite(strength) else []:
        rows = types == name
        loss_and_gradient, _ = _likelihood(stack[:, rows], answers[rows])
        penalty = strength / rows.sum()

        def objective(weights, loss_and_gradient=loss_and_gradient, penalty=penalty):
            loss, gradient = loss_and_gradient(weights)
            gap = weights - overall
            return loss + penalty / 2 * gap @ gap, gradient + penalty * gap

        fitted[str(name)] = minimize(
            objective, overall, jac=True, method="L-BFGS-B", bounds=[(0, None)] * len(stack)
        ).x
    return fitted


def weights_of_rows(types: np.ndarray, overall: np.ndarray, by_type: Mapping[str, np.ndarray]) -> np.ndarray:
    """The weights (members, rows) of rows with these types (rows,); of an unknown type, those of all rows."""
    return np.stack([by_type.get(name, overall) for name in types], axis=1)
