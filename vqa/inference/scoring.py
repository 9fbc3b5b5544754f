"""Score rows: the logits of the offered letters, or each choice's own score, after one forward pass.

Nothing is generated or parsed. The collator decides which score it is (`vqa.modeling.suffix_score.COLLATORS`).
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import send_to_device
from tqdm.auto import tqdm

from vqa.core.dtypes import half_autocast
from vqa.core.errors import UserError, preview
from vqa.core.workers import make_loader
from vqa.data.collator import Collator
from vqa.data.rows import LETTERS, Row
from vqa.modeling.families import family_of
from vqa.modeling.positions import PositionCollator
from vqa.modeling.shared_prefix import PermutationCollator, permutation_logits
from vqa.modeling.suffix_score import suffix_scores
from vqa.modeling.tree_attention import TreeCollator, tree_permutation_logits
from vqa.modeling.vision import encode_images, unwrap_base_model

# Keys of a batch that are not the model's, which would ignore them silently.
NON_MODEL_KEYS = (
    "labels",
    "answer_start",
    "answer",
    "target",
    "weight",
    "offered",
    "ids",
    "num_images",
    "pixel_rows",
    "positions",
)


def answer_logits(model: torch.nn.Module, batch: dict[str, torch.Tensor], keep: int = 1) -> torch.Tensor:
    """Logits (rows, keep, vocabulary), float32, at the last `keep` positions of a left-padded batch."""
    if "pixel_values" in batch or "image_features" in batch:
        batch = encode_images(model, batch)
    inputs = {key: value for key, value in batch.items() if key not in NON_MODEL_KEYS}
    if "positions" in batch:
        inputs["position_ids"] = batch["positions"].transpose(0, 1)
    return model(**inputs, logits_to_keep=keep, use_cache=False).logits.float()


def letter_logits(logits: torch.Tensor, letter_ids: list[int] | torch.Tensor, offered: torch.Tensor) -> torch.Tensor:
    """Logits (rows, 10) of the letters out of logits (rows, vocabulary); -inf at letters that a row does not offer."""
    return logits[:, letter_ids].masked_fill(~offered, float("-inf"))


def score_rows(
    model: torch.nn.Module, rows: Sequence[Row], collate: Collator, letter_ids: list[int], batch_size: int, **options
) -> np.ndarray:
    """Probabilities, float64 (rows, 10), of each row's choices in the order of the CSV; 0 where none is offered.

    Args:
        collate: the Collator of prompts, or the SuffixCollator.
        letter_ids: the token id of each letter.
        batch_size: rows that go through the model at once.
        options: `label`, the progress bar's name (None: no bar), and `workers`, processes that decode images.
    """
    return normalize(choice_probs(model, rows, collate, letter_ids, batch_size, **options))


def normalize(probs: np.ndarray) -> np.ndarray:
    """`choice_probs` (..., 10) scaled to sum to 1 over the letters that a row offers."""
    return probs / probs.sum(-1, keepdims=True)


def choice_probs(
    model: torch.nn.Module, rows: Sequence[Row], collate: Collator, letter_ids: list[int], batch_size: int, **options
) -> np.ndarray:
    """Probability of each choice among the whole vocabulary, float64 (rows, 10), in the order of the CSV.

    0 where no choice is offered. A row's sum is the probability that the model gives to the offered letters. With a
    SuffixCollator the probabilities are among the choices, and their sum is 1.
    A row with a `permutation` is shown permuted, and its probabilities are mapped back. Rows of similar length share
    a batch. The arguments are those of `score_rows`.
    """
    shown = _letter_probs(model, rows, collate, _last_logits, letter_ids, batch_size, **options)
    probs = [unpermute(values[0], row.get("permutation")) for values, row in zip(shown, rows)]
    return np.array(probs).reshape(-1, len(LETTERS))


def permutation_probs(
    model: torch.nn.Module, rows: Sequence[Row], collate: Collator, letter_ids: list[int], batch_size: int, **options
) -> list[np.ndarray]:
    """`choice_probs` of rows with `permutations`: an array (permutations, 10) for each row.

    The part of the prompt that a row's permutations share goes through the model once: in one sequence with the rest
    of each, or in a pass of its own where the model's attention cannot keep them apart.
    """
    collate_all: Callable[[list[Row]], dict] = PermutationCollator(collate)
    logits_of = permutation_logits
    if family_of(unwrap_base_model(model)).tree_attention:
        collate_all, logits_of = TreeCollator(collate), tree_permutation_logits
    shown = _letter_probs(model, rows, collate_all, logits_of, letter_ids, batch_size, **options)
    return [np.stack(list(map(unpermute, values, row["permutations"]))) for values, row in zip(shown, rows)]


def _last_logits(model: torch.nn.Module, batch: dict) -> torch.Tensor:
    return answer_logits(model, batch)[:, -1]


def unpermute(shown: np.ndarray, permutation: Sequence[int] | None) -> np.ndarray:
    """Probabilities (10,) of the choices, given those of the letters at which they were shown."""
    permutation = list(permutation or range(len(LETTERS)))
    probs = np.zeros(len(LETTERS))
    probs[permutation] = shown[: len(permutation)]
    return probs


@torch.inference_mode()
def _letter_probs(
    model: torch.nn.Module,
    rows: Sequence[Row],
    collate: Callable[[list[Row]], dict],
    logits_of: Callable[[torch.nn.Module, dict], torch.Tensor],
    letter_ids: list[int],
    batch_size: int,
    label: str | None = None,
    workers: int = 0,
) -> list[np.ndarray]:
    """For each row the probabilities (permutations, 10) of the letters that it offers, as shown."""
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]["question"]) + sum(map(len, rows[i]["choices"])))
    loader = make_loader([rows[i] for i in by_length], batch_size, PositionCollator(collate, model), workers)
    shown: list[list[np.ndarray]] = [[] for _ in rows]
    done, processes = 0, PartialState().num_processes
    scale = processes > 1 and processes  # every process has scored as many rows as this one
    hidden = label is None or None  # None: tqdm shows a bar only where stderr is a terminal
    with tqdm(
        total=len(rows), desc=label, unit=" rows", unit_scale=scale, mininterval=1, leave=False, disable=hidden
    ) as bar:
        for batch in loader:
            batch = send_to_device(batch, device)
            row_index = batch.get("row_index", torch.arange(len(batch["ids"]), device=device))
            is_suffix = "choice_end" in batch
            with half_autocast(model):
                logits = suffix_scores(model, batch) if is_suffix else logits_of(model, batch)
            if is_suffix:
                probs = logits.double().softmax(-1)
            else:
                letters = letter_logits(logits, letter_ids, batch["offered"][row_index]).double()
                mass = (letters.logsumexp(-1, keepdim=True) - logits.logsumexp(-1, keepdim=True)).exp()
                # A mass of 0 would make all letters 0, and rounding can make it larger than 1.
                probs = letters.softmax(-1) * mass.clamp(1e-300, 1)
            for i, values in zip(row_index.tolist(), probs.cpu().numpy()):
                shown[by_length[done + i]].append(values)
            done += len(batch["ids"])
            bar.update(len(batch["ids"]))
    model.train(was_training)
    if broken := [row["id"] for row, values in zip(rows, shown) if not np.isfinite(values).all()]:
        raise UserError(
            f"{len(broken)} rows have logits that are not finite: {preview(broken)}. Lower the learning rate; if the "
            "model overflows in fp16, use a GPU with bf16."
        )
    return [np.stack(values) for values in shown]


@torch.inference_mode()
def first_generated(model: torch.nn.Module, rows: Sequence[Row], collate: Collator, batch_size: int) -> list[int]:
    """Id of the first token that `generate` writes for each row, by greedy search."""
    device, first = next(model.parameters()).device, []
    for batch in make_loader(rows, batch_size, collate):
        inputs = {key: value for key, value in batch.items() if key not in NON_MODEL_KEYS}
        with half_autocast(model):
            tokens = cast(Any, model).generate(
                **send_to_device(inputs, device),
                max_new_tokens=1,
                do_sample=False,
                repetition_penalty=1.0,  # the model folder's own settings may sample and penalise
                temperature=None,
                top_p=None,
                top_k=None,
            )
        first += tokens[:, -1].tolist()
    return first
