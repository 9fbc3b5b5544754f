"""The loss of training: cross-entropy at the answer's tokens, as pure functions of logits and a batch."""

from collections.abc import Mapping

import torch
from torch.nn.functional import cross_entropy, kl_div

from vqa.core.errors import UserError, preview
from vqa.data.collator import IGNORE
from vqa.inference.scoring import letter_logits

MAX_NON_FINITE = 5


def answer_loss(
    logits: torch.Tensor, batch: Mapping[str, torch.Tensor], letter_ids: torch.Tensor, kind: str
) -> torch.Tensor:
    """Loss of each row, float32 (rows,).

    Args:
        logits: float32 (rows, answer tokens, vocabulary); column i predicts the i-th token of the answer.
        batch: what the collator returns for rows with answers.
        letter_ids: int64 (10,), the token id of each letter, on the device of the logits.
        kind: "token" or "letter", as the recipe's field `loss`.
    """
    if kind == "letter":
        scores = letter_logits(logits[:, 0], letter_ids, batch["offered"])
        return choice_loss(scores, batch["answer"], batch.get("target"))
    return token_loss(logits, batch["labels"][:, -logits.shape[1] :], letter_ids, batch.get("target"))


def permutation_loss(
    logits: torch.Tensor,
    batch: Mapping[str, torch.Tensor],
    letter_ids: torch.Tensor,
    kind: str,
    consistency_weight: float = 0.0,
) -> torch.Tensor:
    """Mean of `answer_loss` over a row's permutations, float32 (rows,), for a batch of the TreeCollator.

    `logits` are float32 (rows, permutations, answer tokens, vocabulary). `consistency_weight` times the `disagreement`
    of the permutations is added.
    """
    shown = batch["suffix_end"] >= 0
    offered = batch["offered"][:, None].expand(-1, shown.shape[1], -1)
    names = [name for name in ("labels", "answer", "target") if name in batch]
    each = {name: batch[name].flatten(0, 1) for name in names} | {"offered": offered.flatten(0, 1)}
    losses = answer_loss(logits.flatten(0, 1), each, letter_ids, kind).view(shown.shape)
    mean = losses.masked_fill(~shown, 0).sum(1) / shown.sum(1)
    if not consistency_weight:
        return mean
    letters = letter_logits(logits[:, :, 0].flatten(0, 1), letter_ids, each["offered"]).view(offered.shape)
    choices = letters.gather(-1, batch["letter_of"])
    return mean + consistency_weight * disagreement(choices, offered, shown)


def disagreement(scores: torch.Tensor, offered: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
    """KL divergence between the probabilities of two permutations, as the mean (rows,) over all ordered pairs.

    `scores` and `offered` are (rows, permutations, choices), `shown` is (rows, permutations).
    """
    log_probs = scores.log_softmax(-1).masked_fill(~offered, 0)
    divergence = kl_div(log_probs[:, None], log_probs[:, :, None], reduction="none", log_target=True).sum(-1)
    pairs, count = shown[:, None] & shown[:, :, None], shown.sum(1)
    return divergence.masked_fill(~pairs, 0).sum((1, 2)) / (count * (count - 1)).clamp(min=1)


def choice_loss(scores: torch.Tensor, answer: torch.Tensor, target: torch.Tensor | None = None) -> torch.Tensor:
    """Cross-entropy (rows,) of scores (rows, letters), -inf where a row offers no choice.

    `answer` (rows,) is the index of the right one; a soft `target` (rows, letters) takes its place.
    """
    if target is None:
        return cross_entropy(scores, answer, reduction="none")
    scores = scores.clamp(min=torch.finfo(scores.dtype).min)  # 0 * log(0) has to be 0, not NaN
    return cross_entropy(scores, target, reduction="none")


def token_loss(
    logits: torch.Tensor, labels: torch.Tensor, letter_ids: torch.Tensor, target: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean cross-entropy (rows,) over the vocabulary at the labels (rows, tokens), as in language modelling.

    With a soft `target` (rows, 10), the first token's label is that distribution over the letters.
    """
    losses = cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORE, reduction="none")
    if target is not None:
        vocabulary = torch.zeros_like(logits[:, 0]).index_copy(1, letter_ids, target)
        letter = cross_entropy(logits[:, 0], vocabulary, reduction="none")
        losses = torch.cat([letter[:, None], losses[:, 1:]], dim=1)
    return losses.sum(1) / (labels != IGNORE).sum(1)


class FiniteLossCheck:
    """Stops a run whose loss is not finite several times in a row; the fp16 scaler skips such steps silently.

    Losses stay on the GPU until `check`, which waits for it: call it once an optimiser step, not once a batch.
    """

    def __init__(self) -> None:
        self.pending: list[tuple[torch.Tensor, list[str]]] = []
        self.in_a_row = 0

    def add(self, loss: torch.Tensor, ids: list[str]) -> None:
        """Note the loss, a scalar, of the rows `ids`."""
        self.pending.append((loss.detach().isfinite(), ids))

    def check(self, step: int) -> None:
        """Raise UserError where MAX_NON_FINITE losses in a row, up to those of this step, were not finite."""
        finite = torch.stack([flag for flag, _ in self.pending]).tolist() if self.pending else []
        for is_finite, (_, ids) in zip(finite, self.pending):
            self.in_a_row = 0 if is_finite else self.in_a_row + 1
            if self.in_a_row == MAX_NON_FINITE:
                raise UserError(
                    f"step {step}: the loss was not finite {MAX_NON_FINITE} times in a row, the last time for "
                    f"{preview(ids)}. Lower the learning rate, resume an earlier checkpoint, or use bf16."
                )
        self.pending.clear()
