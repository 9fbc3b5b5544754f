"""The one score: a row is answered by one forward pass that reads the logits of the letters it offers."""

from collections.abc import Callable, Sequence

import evaluate
import numpy as np
import torch
from accelerate.utils import send_to_device
from datasets import Features, List, Value
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers.integrations.fsdp import is_fsdp_managed_module

from vqa.errors import UserError, first_few
from vqa.precision import half_autocast
from vqa.prompt import LETTERS
from vqa.statistics import letter_scores
from vqa.vision import encode_images

# Ours; a model swallows them without a word.
MODEL_KEYS_LEFT_OUT = ("labels", "answer", "offered", "ids", "weight", "target")


def answer_logits(model: torch.nn.Module, batch: dict[str, torch.Tensor], keep: int = 1) -> torch.Tensor:
    """Logits (rows, keep, vocabulary), float32, at the last `keep` positions of a left-padded batch."""
    own = "pixel_values" in batch and not is_fsdp_managed_module(model)  # FSDP's parts are whole in its forward only
    if own or "image_features" in batch:
        batch = encode_images(model, batch)
    inputs = {key: value for key, value in batch.items() if key not in MODEL_KEYS_LEFT_OUT}
    return model(**inputs, logits_to_keep=keep, use_cache=False).logits.float()  # nothing is generated


def letter_logits(logits: torch.Tensor, letter_ids: list[int], offered: torch.Tensor) -> torch.Tensor:
    """Logits (rows, 10) of the letters out of logits (rows, vocabulary); -inf at letters that a row does not offer."""
    return logits[:, letter_ids].masked_fill(~offered, float("-inf"))


@torch.inference_mode()
def score_rows(
    model: torch.nn.Module,
    rows: list[dict],
    collate: Callable,
    letter_ids: list[int],
    batch_size: int,
    label: str | None = None,
    workers: int = 0,
) -> np.ndarray:
    """Probabilities, float64 (rows, 10), of each row's choices in the order of the CSV; 0 where none is offered.

    A row with an `order` is shown permuted and its probabilities are mapped back. Rows of like length share a batch,
    whatever their order. `label` names the progress bar; without one there is none.
    """
    if not rows:
        return np.zeros((0, len(LETTERS)))
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]["question"]) + sum(map(len, rows[i]["choices"])))
    loader = DataLoader([rows[i] for i in by_length], batch_size, collate_fn=collate, num_workers=workers)
    shown = []
    with tqdm(total=len(rows), desc=label, unit=" rows", mininterval=1, leave=False, disable=label is None) as bar:
        for batch in loader:
            batch = send_to_device(batch, device)
            with half_autocast(model):
                logits = answer_logits(model, batch)[:, -1]
            letters = letter_logits(logits, letter_ids, batch["offered"]).double().softmax(-1)
            shown.append(letters.cpu().numpy())
            bar.update(len(letters))
    model.train(was_training)
    values_shown = np.concatenate(shown)
    if broken := [rows[i]["id"] for i, values in zip(by_length, values_shown) if not np.isfinite(values).all()]:
        raise UserError(
            f"{len(broken)} rows have logits that are not finite: {first_few(broken)}; the learning rate was too "
            "high, or the model overflows in fp16: try a GPU with bf16"
        )
    probabilities = np.zeros((len(rows), len(LETTERS)))
    for i, values in zip(by_length, values_shown):
        order = rows[i].get("order") or range(len(LETTERS))
        probabilities[i, list(order)] = values[: len(order)]
    return probabilities


class LetterScore(evaluate.Metric):
    """Letter accuracy, in [0, 1], and letter log-loss, in nats. Needs no network."""

    def _info(self) -> evaluate.MetricInfo:
        features = Features({"predictions": List(Value("float64")), "references": Value("int64")})
        return evaluate.MetricInfo(description=self.__doc__, citation="", features=features)

    def _compute(self, predictions, references) -> dict[str, float]:
        return letter_scores(np.asarray(predictions), references)


def letter_metrics(probabilities: np.ndarray, answers: Sequence[int]) -> dict[str, float]:
    """{"accuracy", "log_loss"} of probabilities (rows, letters) against the answers' indices (rows,)."""
    return LetterScore(keep_in_memory=True).compute(predictions=probabilities, references=answers)
