"""The one score: a row is answered by one forward pass that reads the logits of the letters it offers."""

from collections.abc import Sequence

import evaluate
import numpy as np
import torch
from accelerate.utils import send_to_device
from datasets import Features, List, Value
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers.integrations.fsdp import is_fsdp_managed_module

from collator import Collator
from vqa.errors import UserError, first_few
from vqa.precision import half_autocast
from vqa.prefix import OrdersCollator, order_logits
from vqa.prompt import LETTERS
from vqa.statistics import letter_scores
from vqa.vision import encode_images

MODEL_KEYS_LEFT_OUT = ("labels", "answer", "offered", "ids", "weight")  # ours; a model swallows them without a word


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


def score_rows(
    model: torch.nn.Module,
    rows: list[dict],
    collate: Collator,
    letter_ids: list[int],
    batch_size: int,
    label: str | None = None,
    workers: int = 0,
) -> np.ndarray:
    """Probabilities, float64 (rows, 10), of each row's choices in the order of the CSV; 0 where none is offered.

    A row with an `order` is shown permuted and its probabilities are mapped back. Rows of like length share a batch,
    whatever their order. `label` names the progress bar; without one there is none.
    """
    shown = _letters(model, rows, collate, _plain_logits, letter_ids, batch_size, label, workers)
    return np.array([_mapped_back(v[0], row.get("order")) for v, row in zip(shown, rows)]).reshape(-1, len(LETTERS))


def score_orders(
    model: torch.nn.Module,
    rows: list[dict],
    collate: Collator,
    letter_ids: list[int],
    batch_size: int,
    label: str | None = None,
    workers: int = 0,
) -> list[np.ndarray]:
    """The same for rows with `orders`, several each: one array (orders, 10) a row. What orders share is read once."""
    shown = _letters(model, rows, OrdersCollator(collate), order_logits, letter_ids, batch_size, label, workers)
    return [np.stack([_mapped_back(*pair) for pair in zip(values, row["orders"])]) for values, row in zip(shown, rows)]


def _plain_logits(model: torch.nn.Module, batch: dict) -> torch.Tensor:
    return answer_logits(model, batch)[:, -1]


def _mapped_back(shown: np.ndarray, order: Sequence[int] | None) -> np.ndarray:
    """Probabilities (10,) of the choices, from those of the letters at which they were shown."""
    order = list(order or range(len(LETTERS)))
    probabilities = np.zeros(len(LETTERS))
    probabilities[order] = shown[: len(order)]
    return probabilities


@torch.inference_mode()
def _letters(model, rows, collate, logits_of, letter_ids, batch_size, label, workers) -> list[np.ndarray]:
    """For each row the probabilities (orders, 10) of the letters it offers, as shown."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]["question"]) + sum(map(len, rows[i]["choices"])))
    loader = DataLoader([rows[i] for i in by_length], batch_size, collate_fn=collate, num_workers=workers)
    shown: list[list[np.ndarray]] = [[] for _ in rows]
    done = 0
    with tqdm(total=len(rows), desc=label, unit=" rows", mininterval=1, leave=False, disable=label is None) as bar:
        for batch in loader:
            batch = send_to_device(batch, device)
            row_of = batch.get("row_of", torch.arange(len(batch["ids"]), device=device))
            with half_autocast(model):
                logits = logits_of(model, batch)
            letters = letter_logits(logits, letter_ids, batch["offered"][row_of]).double().softmax(-1)
            for i, values in zip(row_of.tolist(), letters.cpu().numpy()):
                shown[by_length[done + i]].append(values)
            done += len(batch["ids"])
            bar.update(len(batch["ids"]))
    model.train(was_training)
    if broken := [row["id"] for row, values in zip(rows, shown) if not np.isfinite(values).all()]:
        raise UserError(
            f"{len(broken)} rows have logits that are not finite: {first_few(broken)}; the learning rate was too "
            "high, or the model overflows in fp16: try a GPU with bf16"
        )
    return [np.stack(values) for values in shown]


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
