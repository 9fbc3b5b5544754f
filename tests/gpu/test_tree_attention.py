"""Permutations of a row as one sequence on a GPU: in fp16, in 4 bits, and by the kernel that a T4 has for its mask."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from .conftest import DEVICE, IN_4BIT

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_and_gradients_are_those_of_separate_rows_within_fp16(folder, rows, ids, checkpointing):
    from vqa.core.dtypes import half_autocast
    from vqa.data.collator import Collator
    from vqa.inference.scoring import answer_logits
    from vqa.modeling.loading import add_adapter, load_base, load_processor
    from vqa.modeling.tree_attention import TreeCollator, tree_logits
    from vqa.training.dataset import rotations
    from vqa.training.loss import answer_loss, permutation_loss

    collate = Collator(load_processor(folder), 112, with_answer=True)
    rows = [{**row, "permutations": rotations([2, 0, 3, 1], 4)} for row in rows[:4]]
    views = [{**row, "permutation": permutation} for row in rows for permutation in row["permutations"]]
    model = add_adapter(load_base(folder, IN_4BIT, torch.float16), 8, 16, 0.0).train()
    torch.manual_seed(0)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    if checkpointing:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    tokens, letters = collate(views[:1]), torch.tensor(ids, device=DEVICE)
    keep = tokens["labels"].shape[1] - tokens["answer_start"] + 1

    def on_device(batch: dict) -> dict:
        return {key: value.to(DEVICE) if torch.is_tensor(value) else value for key, value in batch.items()}

    def gradients(loss: torch.Tensor) -> torch.Tensor:
        model.zero_grad()
        (256 * loss).backward()  # as the loss scaler does
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])

    together, separate = on_device(TreeCollator(collate)(rows)), on_device(collate(views))
    backend = SDPBackend.EFFICIENT_ATTENTION if DEVICE == "cuda" else SDPBackend.MATH
    with half_autocast(model), sdpa_kernel(backend):
        logits = tree_logits(model, together, together["read"].flatten(1)).unflatten(1, together["read"].shape[1:])
        got = permutation_loss(logits, together, letters, "token")
        one = gradients(got.mean())
        logits = answer_logits(model, separate, keep=keep)[:, :-1]
        wanted = answer_loss(logits, separate, letters, "token").view(4, 4).mean(1)
        other = gradients(wanted.mean())
    torch.testing.assert_close(got, wanted, rtol=5e-3, atol=5e-3)
    assert (one - other).norm() < 0.02 * other.norm()
