"""Ensembles of choice probabilities, and the choice of a method without overfitting.

A `stack` is float64 (members, rows, letters). A letter that a row does not offer has probability 0 in every member.
Whatever has parameters is fitted on out-of-fold rows. Its score is nested: fitted on four fifths of these rows,
measured on the fifth.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.special import softmax

from vqa.core.errors import UserError
from vqa.data.predictions import validation_scores
from vqa.evaluation.metrics import EPS, accuracy, row_log_loss, score_with_interval
from vqa.evaluation.oof import OOFPredictions
from vqa.evaluation.significance import paired_difference

METHODS = ("mean", "geometric", "weighted", "greedy", "stack", "majority")
PARTS = 5  # of nested scores
NO_WEIGHT = 0.01
ROUNDS = 50  # of greedy selection: weights in steps of 2 %
MAX_FIT_ROWS = 100_000  # a few weights do not change with more


def ensemble(stack: np.ndarray, method: str, weights: Sequence[float] | np.ndarray | None = None) -> np.ndarray:
    """Probabilities (rows, letters) of an ensemble of `stack` (members, rows, letters).

    mean: of the probabilities. geometric: of their logarithms. weighted, greedy: mean with `weights` (members,).
    stack: softmax of the sum of log-probabilities times `weights`. majority: the share of the members' votes; ties go
    to the letter of the larger mean probability.
    """
    if method == "majority":
        votes = (stack.argmax(-1)[..., None] == np.arange(stack.shape[-1])).mean(0)
        # Votes are multiples of 1 / members, so a share this small only breaks ties.
        share = 1e-3 / len(stack)
        return (1 - share) * votes + share * stack.mean(0)
    if method in ("geometric", "stack"):
        equal = np.full(len(stack), 1 / len(stack))
        return log_opinion_pool(stack, equal if method == "geometric" or weights is None else weights)
    return np.average(stack, axis=0, weights=None if method == "mean" else weights)


def log_opinion_pool(stack: np.ndarray, weights: Sequence[float] | np.ndarray) -> np.ndarray:
    """Softmax, over the letters that a row offers, of the log-probabilities summed with `weights` (members,)."""
    offered = (stack > 0).any(0)
    pooled = sum(weight * np.log(np.maximum(member, EPS)) for weight, member in zip(weights, stack))
    return softmax(np.where(offered, pooled, -np.inf), axis=1)


@dataclass(frozen=True)
class Ensemble:
    """A method with its weights (members,) and, if members are scaled first, their 1 / temperature (members,)."""

    method: str
    weights: np.ndarray | None = None
    inverse_temperature: np.ndarray | None = None

    def __call__(self, stack: np.ndarray) -> np.ndarray:
        return ensemble(apply_temperature(stack, self.inverse_temperature), self.method, self.weights)

    def describe(self, names: Sequence[str]) -> str:
        """Lines with the method, the members `names`, their weights and their temperatures."""
        weights = [1.0] * len(names) if self.weights is None else self.weights
        shown = [f"{name} (weight {x:.3f})" if self.weights is not None else name for name, x in zip(names, weights)]
        lines = [f"{self.method} of {', '.join(shown)}"]
        if self.inverse_temperature is not None:
            temperatures = 1 / np.maximum(self.inverse_temperature, 1e-9)
            lines.append("temperatures: " + ", ".join(f"{name} {x:.3g}" for name, x in zip(names, temperatures)))
        useless = [name for name, weight in zip(names, weights) if weight <= NO_WEIGHT]
        lines += [f"{name} gets no weight: it does not improve the out-of-fold score" for name in useless]
        return "\n".join(lines)


def apply_temperature(stack: np.ndarray, inverse_temperature: np.ndarray | None) -> np.ndarray:
    """Each member's probabilities to the power 1 / temperature, scaled to sum to 1; None changes nothing."""
    if inverse_temperature is None:
        return stack
    return np.stack([log_opinion_pool(member[None], [power]) for member, power in zip(stack, inverse_temperature)])


def fit(
    method: str, stack: np.ndarray, answers: np.ndarray, temperature: bool = False, weight_by: str = "log_loss"
) -> Ensemble:
    """The ensemble `method` of `stack` (members, rows, letters), fitted on the answers' indices (rows,)."""
    if len(answers) > MAX_FIT_ROWS:
        drawn = np.random.default_rng(0).choice(len(answers), MAX_FIT_ROWS, replace=False)
        stack, answers = stack[:, drawn], answers[drawn]
    inverse_temperature = np.array([fit_stack(member[None], answers)[0] for member in stack]) if temperature else None
    stack, weights = apply_temperature(stack, inverse_temperature), None
    if method == "weighted":
        scores = [row_log_loss(member, answers).mean() for member in stack]
        if weight_by == "accuracy":
            scores = [(member.argmax(1) == answers).mean() for member in stack]
        weights = score_weights(scores, weight_by)
    elif method in ("greedy", "stack"):
        weights = (fit_greedy if method == "greedy" else fit_stack)(stack, answers)
    return Ensemble(method, weights, inverse_temperature)


def score_weights(scores: Sequence[float] | np.ndarray, by: str) -> np.ndarray:
    """Weights that sum to 1: proportional to accuracies, or to the inverse of log-losses."""
    raw = np.asarray(scores, dtype=float)
    raw = raw if by == "accuracy" else 1 / np.maximum(raw, 1e-9)
    return raw / raw.sum()


def fit_greedy(stack: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """Weights (members,) by greedy selection with replacement (Caruana et al. 2004).

    From nothing, the mean takes in the member that lowers its log-loss most, ROUNDS times, and the best mean on the
    way is kept. A weight is the share of a member's selections, so one that never helps has none.
    """
    right = stack[:, np.arange(len(answers)), answers]  # log-loss depends on nothing else
    total, counts = np.zeros(len(answers)), np.zeros(len(stack))
    best_loss, best_counts = np.inf, counts
    for size in range(1, ROUNDS + 1):
        losses = [-np.log(np.maximum((total + member) / size, EPS)).mean() for member in right]
        pick = int(np.argmin(losses))
        total, counts = total + right[pick], counts + (np.arange(len(stack)) == pick)
        if losses[pick] < best_loss:
            best_loss, best_counts = losses[pick], counts
    return best_counts / best_counts.sum()


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

    start = np.full(len(stack), 1 / len(stack))
    result = minimize(loss_and_gradient, start, jac=True, hess=hessian, method="trust-exact", options={"gtol": 1e-10})
    # A tiny ridge makes the error of a coefficient that two copies share large instead of undefined.
    information = hessian(result.x) + 1e-9 * np.eye(len(stack))
    errors = np.sqrt(np.diag(np.linalg.inv(information)) / len(answers))
    return _Fit(result.x, result.x / errors, float(result.fun))


def nested(
    method: str,
    stack: np.ndarray,
    answers: np.ndarray,
    clusters: Mapping[str, np.ndarray] | None = None,
    temperature: bool = False,
    weight_by: str = "log_loss",
) -> np.ndarray:
    """Probabilities (rows, letters) of rows by ensembles that were fitted without them.

    Rows of one image are held out together, if `clusters` has images.
    """
    groups = (clusters or {}).get("image", np.arange(len(answers)))
    parts = np.random.default_rng(0).permutation(groups.max() + 1)[groups] % PARTS
    result = np.empty(stack.shape[1:])
    for part in range(PARTS):
        held = parts == part
        result[held] = fit(method, stack[:, ~held], answers[~held], temperature, weight_by)(stack[:, held])
    return result


def nested_scores(chosen: Ensemble, oof: OOFPredictions, weight_by: str) -> dict:
    """The scores of an ensemble on out-of-fold rows that it was not fitted on, as `log_run` takes them."""
    method = chosen.method if len(oof.stack) > 1 else "mean"  # of one model, each row has one prediction
    temperature = chosen.inverse_temperature is not None
    values = nested(method, oof.stack, oof.answers, oof.clusters, temperature, weight_by)
    scores = score_with_interval(values, oof.answers, oof.clusters) | {"text_only": oof.reference.text_only}
    if method == "majority":  # shares of votes are not probabilities
        del scores["log_loss"]
    return {"scores": scores, "labels": oof.labels.path, "out_of_fold": (oof.ids, values)}


def ensemble_members(
    models: Mapping[str, Sequence[str]], files: Sequence[str], stack: np.ndarray
) -> tuple[list[str], np.ndarray]:
    """(names, probabilities (members, rows, letters)): each model's mean over its folds, or the files of one model."""
    if len(models) == 1:
        return list(files), stack
    means = [stack[[files.index(file) for file in folds]].mean(0) for folds in models.values()]
    return list(models), np.stack(means)


def choose_ensemble(
    models: Mapping[str, Sequence[str]],
    oof: OOFPredictions | None,
    method: str = "auto",
    temperature: bool = False,
    weight_by: str = "log_loss",
    show: Callable[[str], None] = print,
) -> Ensemble:
    """The ensemble of `models` (name -> prediction files), or of the files of a single model, fitted on `oof`.

    "auto" takes the method with the lowest nested log-loss, or the mean where nothing can be compared. `show` gets the
    table of methods and the reason.
    """
    if len(models) > 1 and oof:
        method = select_method(oof, temperature, weight_by, show) if method == "auto" else method
        return fit(method, oof.stack, oof.answers, temperature, weight_by)
    members: list[Sequence[str]] = list(models.values())
    if len(models) == 1:
        members = [[file] for file in members[0]]
        if method in ("greedy", "stack"):
            raise UserError(
                f"--method {method} needs two models: the folds of one model have no out-of-fold rows in common. Use "
                "--method mean, or add another model's predictions."
            )
        if method == "auto" and len(members) > 1:
            show("mean is used: the folds of one model have no out-of-fold rows in common to tune weights on")
    elif method == "auto":
        show("mean is used: without out-of-fold rows nothing can be tuned or compared")
    weights = inverse_temperature = None
    if method == "weighted":  # by the scores that training measured
        weights = score_weights([float(np.mean(validation_scores(files, weight_by))) for files in members], weight_by)
    if temperature and oof:
        fitted = fit("mean", oof.stack, oof.answers, temperature=True)
        inverse_temperature = np.repeat(np.asarray(fitted.inverse_temperature), len(members))
    return Ensemble("mean" if method == "auto" else method, weights, inverse_temperature)


def select_method(oof: OOFPredictions, temperature: bool, weight_by: str, show: Callable[[str], None] = print) -> str:
    """The method with the lowest nested log-loss. `show` gets a table of all methods and the gain over the mean."""
    losses, table = {}, []
    for method in METHODS:
        values = nested(method, oof.stack, oof.answers, oof.clusters, temperature, weight_by)
        correct = accuracy(values.argmax(1) == oof.answers, oof.clusters)
        table.append({"method": method, "accuracy": correct.value, "low": correct.low, "high": correct.high})
        if method != "majority":  # shares of votes are not probabilities
            losses[method] = row_log_loss(values, oof.answers)
            table[-1]["log_loss"] = losses[method].mean()
    show(f"\nnested scores on {len(oof.answers)} out-of-fold rows of {oof.labels.path}:")
    show(pd.DataFrame(table).to_string(index=False, float_format="{:.4f}".format, na_rep="-") + "\n")
    best = min(losses, key=lambda method: losses[method].mean())
    if best == "mean":
        show("mean is chosen: no other method has a lower log-loss")
        return best
    gain = paired_difference(losses[best], losses["mean"], oof.clusters)
    show(
        f"{best} is chosen: its log-loss is {gain.value:.4f} below that of mean (95 % interval {gain.low:.4f} to "
        f"{gain.high:.4f}), {'beyond' if gain.beyond_noise else 'within'} noise at {len(oof.answers)} rows"
    )
    return best
