"""The one score: a row is answered by one forward pass that reads the logits of the letters it offers."""

from collections.abc import Sequence

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from vqa.core.compat import is_fsdp_managed_module
from vqa.core.dtypes import half_autocast
from vqa.core.errors import UserError, preview
from vqa.data.collator import Collator
from vqa.data.prompt import LETTERS
from vqa.modeling.shared_prefix import PermutationCollator, permutation_logits
from vqa.modeling.vision import encode_images

# Ours; a model swallows them without a word.
NON_MODEL_KEYS = ("labels", "answer", "offered", "ids", "weight", "target")


def answer_logits(model: torch.nn.Module, batch: dict[str, torch.Tensor], keep: int = 1) -> torch.Tensor:
    """Logits (rows, keep, vocabulary), float32, at the last `keep` positions of a left-padded batch."""
    own = "pixel_values" in batch and not is_fsdp_managed_module(model)  # FSDP's parts are whole in its forward only
    if own or "image_features" in batch:
        batch = encode_images(model, batch)
    inputs = {key: value for key, value in batch.items() if key not in NON_MODEL_KEYS}
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
    """Probabilities, float64 (rows, 10), of each row's choices in the order of the CSV; 0 where none is offered."""
    return normalize(choice_probs(model, rows, collate, letter_ids, batch_size, label, workers))


def normalize(shares: np.ndarray) -> np.ndarray:
    """Shares (..., 10) of the letters as probabilities, which sum to 1 over the letters that a row offers."""
    return shares / shares.sum(-1, keepdims=True)


def choice_probs(
    model: torch.nn.Module,
    rows: list[dict],
    collate: Collator,
    letter_ids: list[int],
    batch_size: int,
    label: str | None = None,
    workers: int = 0,
) -> np.ndarray:
    """Each row's choices, in the order of the CSV, as shares float64 (rows, 10) of the whole vocabulary's probability.

    0 where none is offered. A row's sum is the mass that the model puts on the letters which it may answer.
    A row with an `order` is shown permuted and its shares are mapped back. Rows of like length share a batch,
    whatever their order. `label` names the progress bar; without one there is none.
    """
    shown = _letter_probs(model, rows, collate, _plain_logits, letter_ids, batch_size, label, workers)
    return np.array([unpermute(v[0], row.get("permutation")) for v, row in zip(shown, rows)]).reshape(-1, len(LETTERS))


def permutation_probs(
    model: torch.nn.Module,
    rows: list[dict],
    collate: Collator,
    letter_ids: list[int],
    batch_size: int,
    label: str | None = None,
    workers: int = 0,
) -> list[np.ndarray]:
    """As letter_shares, for rows with `orders`: one array (orders, 10) a row. What orders share is read once."""
    shown = _letter_probs(
        model, rows, PermutationCollator(collate), permutation_logits, letter_ids, batch_size, label, workers
    )
    return [
        np.stack([unpermute(*pair) for pair in zip(values, row["permutations"])]) for values, row in zip(shown, rows)
    ]


def _plain_logits(model: torch.nn.Module, batch: dict) -> torch.Tensor:
    return answer_logits(model, batch)[:, -1]


def unpermute(shown: np.ndarray, order: Sequence[int] | None) -> np.ndarray:
    """Shares (10,) of the choices, from those of the letters at which they were shown."""
    order = list(order or range(len(LETTERS)))
    shares = np.zeros(len(LETTERS))
    shares[order] = shown[: len(order)]
    return shares


@torch.inference_mode()
def _letter_probs(model, rows, collate, logits_of, letter_ids, batch_size, label, workers) -> list[np.ndarray]:
    """For each row the shares (orders, 10) of the letters it offers, as shown."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]["question"]) + sum(map(len, rows[i]["choices"])))
    loader = DataLoader([rows[i] for i in by_length], batch_size, collate_fn=collate, num_workers=workers)
    shown: list[list[np.ndarray]] = [[] for _ in rows]
    done, processes = 0, PartialState().num_processes
    told = {"desc": label, "unit": " rows", "mininterval": 1, "leave": False, "disable": label is None}
    with tqdm(total=len(rows), unit_scale=processes > 1 and processes, **told) as bar:  # the others are as far
        for batch in loader:
            batch = send_to_device(batch, device)
            row_index = batch.get("row_index", torch.arange(len(batch["ids"]), device=device))
            with half_autocast(model):
                logits = logits_of(model, batch)
            letters = letter_logits(logits, letter_ids, batch["offered"][row_index]).double()
            mass = (letters.logsumexp(-1, keepdim=True) - logits.logsumexp(-1, keepdim=True)).exp()
            # A mass of 0 would take the letters' probabilities along; rounded up, it cannot be over 1.
            shares = (letters.softmax(-1) * mass.clamp(1e-300, 1)).cpu().numpy()
            for i, values in zip(row_index.tolist(), shares):
                shown[by_length[done + i]].append(values)
            done += len(batch["ids"])
            bar.update(len(batch["ids"]))
    model.train(was_training)
    if broken := [row["id"] for row, values in zip(rows, shown) if not np.isfinite(values).all()]:
        raise UserError(
            f"{len(broken)} rows have logits that are not finite: {preview(broken)}; the learning rate was too "
            "high, or the model overflows in fp16: try a GPU with bf16"
        )
    return [np.stack(values) for values in shown]


@torch.inference_mode()
def generate_letters(model: torch.nn.Module, rows: Sequence[dict], collate: Collator, batch_size: int) -> list[str]:
    """The text of two tokens, by greedy search from the pixels, for each row: room for a letter and the turn's end."""
    device, texts = next(model.parameters()).device, []
    for batch in DataLoader(list(rows), batch_size, collate_fn=collate):
        inputs = {key: value for key, value in batch.items() if key not in NON_MODEL_KEYS}
        with half_autocast(model):
            tokens = model.generate(
                **send_to_device(inputs, device),
                max_new_tokens=2,
                do_sample=False,
                repetition_penalty=1.0,  # the model folder's own settings may sample and penalise
                temperature=None,
                top_p=None,
                top_k=None,
            )
        texts += collate.processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]
