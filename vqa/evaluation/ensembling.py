"""Ensembles of choice probabilities, and the choice of a method without overfitting.

A `stack` is float64 (members, rows, letters). A letter that a row does not offer has probability 0 in every member.
Whatever has parameters is fitted on out-of-fold rows. Its score is nested: fitted on four fifths of these rows,
measured on the fifth.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from vqa.core.errors import UserError
from vqa.data.predictions import validation_scores
from vqa.evaluation.metrics import EPS, accuracy, row_log_loss, score_with_interval
from vqa.evaluation.oof import OOFPredictions
from vqa.evaluation.significance import paired_difference
from vqa.evaluation.stacking import PARTS, fit_stack, fit_stack_by_type, log_opinion_pool, weights_of_rows

METHODS = ("mean", "geometric", "weighted", "greedy", "stack", "majority")  # among which "auto" chooses
BY_TYPE = "stack_by_type"
TUNED = ("greedy", "stack", BY_TYPE)  # on out-of-fold rows of several models
NO_WEIGHT = 0.01
ROUNDS = 50  # of greedy selection: weights in steps of 2 %
MAX_FIT_ROWS = 100_000  # a few weights do not change with more


def ensemble(stack: np.ndarray, method: str, weights: Sequence[float] | np.ndarray | None = None) -> np.ndarray:
    """Probabilities (rows, letters) of an ensemble of `stack` (members, rows, letters).

    mean: of the probabilities. geometric: of their logarithms. weighted, greedy: mean with `weights` (members,).
    stack, stack_by_type: softmax of the sum of log-probabilities times `weights`; the latter's are (members, rows).
    majority: the share of the members' votes; ties go to the letter of the larger mean probability.
    """
    if method == "majority":
        votes = (stack.argmax(-1)[..., None] == np.arange(stack.shape[-1])).mean(0)
        # Votes are multiples of 1 / members, so a share this small only breaks ties.
        share = 1e-3 / len(stack)
        return (1 - share) * votes + share * stack.mean(0)
    if method in ("geometric", "stack", BY_TYPE):
        equal = np.full(len(stack), 1 / len(stack))
        return log_opinion_pool(stack, equal if method == "geometric" or weights is None else weights)
    return np.average(stack, axis=0, weights=None if method == "mean" else weights)


@dataclass(frozen=True)
class Ensemble:
    """A method with its weights (members,) and, if members are scaled first, their 1 / temperature (members,).

    by_type: question type -> weights (members,), for BY_TYPE.
    """

    method: str
    weights: np.ndarray | None = None
    inverse_temperature: np.ndarray | None = None
    by_type: Mapping[str, np.ndarray] | None = None

    def __call__(self, stack: np.ndarray, types: np.ndarray | None = None) -> np.ndarray:
        """Probabilities (rows, letters) of `stack` (members, rows, letters); BY_TYPE needs their question types."""
        weights = self.weights
        if types is not None and weights is not None and self.by_type is not None:
            weights = weights_of_rows(types, weights, self.by_type)
        return ensemble(apply_temperature(stack, self.inverse_temperature), self.method, weights)

    def describe(self, names: Sequence[str]) -> str:
        """Lines with the method, the members `names`, their weights and their temperatures."""
        weights = [1.0] * len(names) if self.weights is None else self.weights
        shown = [f"{name} (weight {x:.3f})" if self.weights is not None else name for name, x in zip(names, weights)]
        lines = [f"{self.method} of {', '.join(shown)}"]
        if self.inverse_temperature is not None:
            temperatures = 1 / np.maximum(self.inverse_temperature, 1e-9)
            lines.append("temperatures: " + ", ".join(f"{name} {x:.3g}" for name, x in zip(names, temperatures)))
        kinds = self.by_type or {}
        lines += [f"{kind}: weights {', '.join(f'{x:.3f}' for x in own)}" for kind, own in kinds.items()]
        if self.by_type is not None and not kinds:
            lines.append(
                "all question types get these weights: in cross-validation, others did not lower the log-loss"
            )
        most = np.max(np.stack([weights, *kinds.values()]), axis=0)
        useless = [name for name, weight in zip(names, most) if weight <= NO_WEIGHT]
        lines += [f"{name} gets no weight: it does not improve the out-of-fold score" for name in useless]
        return "\n".join(lines)


def apply_temperature(stack: np.ndarray, inverse_temperature: np.ndarray | None) -> np.ndarray:
    """Each member's probabilities to the power 1 / temperature, scaled to sum to 1; None changes nothing."""
    if inverse_temperature is None:
        return stack
    return np.stack([log_opinion_pool(member[None], [power]) for member, power in zip(stack, inverse_temperature)])


def fit(
    method: str,
    stack: np.ndarray,
    answers: np.ndarray,
    temperature: bool = False,
    weight_by: str = "log_loss",
    types: np.ndarray | None = None,
) -> Ensemble:
    """The ensemble `method` of `stack` (members, rows, letters), fitted on the answers' indices (rows,).

    `types`: the question type of each row (rows,), for BY_TYPE.
    """
    if len(answers) > MAX_FIT_ROWS:
        drawn = np.random.default_rng(0).choice(len(answers), MAX_FIT_ROWS, replace=False)
        stack, answers, types = stack[:, drawn], answers[drawn], None if types is None else types[drawn]
    inverse_temperature = np.array([fit_stack(member[None], answers)[0] for member in stack]) if temperature else None
    stack, weights, by_type = apply_temperature(stack, inverse_temperature), None, None
    if method == "weighted":
        scores = [row_log_loss(member, answers).mean() for member in stack]
        if weight_by == "accuracy":
            scores = [(member.argmax(1) == answers).mean() for member in stack]
        weights = score_weights(scores, weight_by)
    elif method in ("greedy", "stack"):
        weights = (fit_greedy if method == "greedy" else fit_stack)(stack, answers)
    elif method == BY_TYPE and types is not None:
        weights, by_type = fit_stack_by_type(stack, answers, types)
    return Ensemble(method, weights, inverse_temperature, by_type)


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


def nested(
    method: str,
    stack: np.ndarray,
    answers: np.ndarray,
    clusters: Mapping[str, np.ndarray] | None = None,
    temperature: bool = False,
    weight_by: str = "log_loss",
    types: np.ndarray | None = None,
) -> np.ndarray:
    """Probabilities (rows, letters) of rows by ensembles that were fitted without them.

    Rows of one image are held out together, if `clusters` has images.
    """
    groups = (clusters or {}).get("image", np.arange(len(answers)))
    parts = np.random.default_rng(0).permutation(groups.max() + 1)[groups] % PARTS
    result = np.empty(stack.shape[1:])
    for part in range(PARTS):
        held = parts == part
        own, others = (None, None) if types is None else (types[held], types[~held])
        result[held] = fit(method, stack[:, ~held], answers[~held], temperature, weight_by, others)(
            stack[:, held], own
        )
    return result


def nested_scores(chosen: Ensemble, oof: OOFPredictions, weight_by: str) -> dict:
    """The scores of an ensemble on out-of-fold rows that it was not fitted on, as `log_run` takes them."""
    method = chosen.method if len(oof.stack) > 1 else "mean"  # of one model, each row has one prediction
    temperature = chosen.inverse_temperature is not None
    values = nested(method, oof.stack, oof.answers, oof.clusters, temperature, weight_by, oof_types(method, oof))
    scores = score_with_interval(values, oof.answers, oof.clusters) | {"text_only": oof.reference.text_only}
    if method == "majority":  # shares of votes are not probabilities
        del scores["log_loss"]
    return {"scores": scores, "labels": oof.labels.path, "out_of_fold": (oof.ids, values)}


def oof_types(method: str, oof: OOFPredictions) -> np.ndarray | None:
    """The question types of the out-of-fold rows (rows,), for a method that needs them."""
    return oof.labels.question_types(oof.ids) if method == BY_TYPE else None


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
    method: str,
    temperature: bool,
    weight_by: str,
) -> Ensemble:
    """The ensemble of `models` (name -> prediction files), or of the files of a single model, fitted on `oof`.

    "auto" takes the method with the lowest nested log-loss, or the mean where nothing can be compared, and prints the
    table of methods and the reason.
    """
    if len(models) > 1 and oof:
        if method == BY_TYPE:
            show_gain_by_type(oof, temperature, weight_by)
        method = select_method(oof, temperature, weight_by) if method == "auto" else method
        return fit(method, oof.stack, oof.answers, temperature, weight_by, oof_types(method, oof))
    members: list[Sequence[str]] = list(models.values())
    if len(models) == 1:
        members = [[file] for file in members[0]]
        if method in TUNED:
            raise UserError(
                f"--method {method} needs two models: the folds of one model have no out-of-fold rows in common. Use "
                "--method mean, or add another model's predictions."
            )
        if method == "auto" and len(members) > 1:
            print("mean is used: the folds of one model have no out-of-fold rows in common to tune weights on")
    elif method == "auto":
        print("mean is used: without out-of-fold rows nothing can be tuned or compared")
    weights = inverse_temperature = None
    if method == "weighted":  # by the scores that training measured
        weights = score_weights([float(np.mean(validation_scores(files, weight_by))) for files in members], weight_by)
    if temperature and oof:
        fitted = fit("mean", oof.stack, oof.answers, temperature=True)
        inverse_temperature = np.repeat(np.asarray(fitted.inverse_temperature), len(members))
    return Ensemble("mean" if method == "auto" else method, weights, inverse_temperature)


def select_method(oof: OOFPredictions, temperature: bool, weight_by: str) -> str:
    """The method with the lowest nested log-loss. Prints a table of all methods and the gain over the mean."""
    losses = nested_losses(METHODS, oof, temperature, weight_by)
    best = min(losses, key=lambda method: losses[method].mean())
    if best == "mean":
        print("mean is chosen: no other method has a lower log-loss")
        return best
    gain = paired_difference(losses[best], losses["mean"], oof.clusters)
    print(
        f"{best} is chosen: its log-loss is {gain.value:.4f} below that of mean (95 % interval {gain.low:.4f} to "
        f"{gain.high:.4f}), {'beyond' if gain.beyond_noise else 'within'} noise at {len(oof.answers)} rows"
    )
    return best


def show_gain_by_type(oof: OOFPredictions, temperature: bool, weight_by: str) -> None:
    """Print how BY_TYPE compares with the same weights for all types, by nested scores."""
    losses = nested_losses(("mean", "stack", BY_TYPE), oof, temperature, weight_by)
    gap = paired_difference(losses["stack"], losses[BY_TYPE], oof.clusters)
    print(
        f"log-loss of {BY_TYPE} minus that of stack: {gap.value:+.4f} (95 % interval {gap.low:+.4f} to "
        f"{gap.high:+.4f}), {'beyond' if gap.beyond_noise else 'within'} noise at {len(oof.answers)} rows"
    )


def nested_losses(
    methods: Sequence[str], oof: OOFPredictions, temperature: bool, weight_by: str
) -> dict[str, np.ndarray]:
    """Method -> nested log-loss of each row (rows,), without majority's. Prints a table of all methods."""
    losses, table = {}, []
    for method in methods:
        types = oof_types(method, oof)
        values = nested(method, oof.stack, oof.answers, oof.clusters, temperature, weight_by, types)
        correct = accuracy(values.argmax(1) == oof.answers, oof.clusters)
        table.append({"method": method, "accuracy": correct.value, "low": correct.low, "high": correct.high})
        if method != "majority":  # shares of votes are not probabilities
            losses[method] = row_log_loss(values, oof.answers)
            table[-1]["log_loss"] = losses[method].mean()
    print(f"\nnested scores on {len(oof.answers)} out-of-fold rows of {oof.labels.path}:")
    print(pd.DataFrame(table).to_string(index=False, float_format="{:.4f}".format, na_rep="-") + "\n")
    return losses
