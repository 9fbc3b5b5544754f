"""The fused passes against PEFT's and transformers' own, on the tiny model."""

import pytest
import torch
from conftest import TINY

from vqa.modeling.fused_lora import FusedLoraLinear, fuse_adapters
from vqa.modeling.loading import add_adapter, load_base


def outcome(model, dtype=torch.float32) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits and the adapter's gradients, from the same random numbers each time."""
    model.zero_grad()
    torch.manual_seed(1)
    tokens = torch.randint(10, 200, (3, 17))
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits.float()
    logits.square().mean().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def unfused(model):
    """The same model with the passes that its classes have."""
    for module in model.modules():
        module.__dict__.pop("forward", None)
    return model


def trained_adapter(dropout: float, dtype=torch.float32):
    """A model whose adapter does something: a fresh one's B is zero."""
    model = add_adapter(load_base(TINY, False, dtype), 4, 8, dropout).train()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_logits_and_gradients_are_those_of_peft(dropout, checkpointing):
    model = trained_adapter(dropout)
    if checkpointing:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    logits, gradients = outcome(model)
    plain_logits, plain_gradients = outcome(unfused(model))
    torch.testing.assert_close(logits, plain_logits, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == plain_gradients.keys() and len(gradients) == 2 * 7 * 6
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, plain_gradients[name], rtol=1e-4, atol=1e-5 * gradient.abs().max().item())


def test_in_16_bits_the_fused_pass_is_as_near_to_the_truth_as_pefts():
    truth, exact = outcome(trained_adapter(0.0))
    model = trained_adapter(0.0, torch.bfloat16)
    logits, gradients = outcome(model, torch.bfloat16)
    plain_logits, plain_gradients = outcome(unfused(model), torch.bfloat16)

    def error(logits, gradients):
        return torch.stack([(logits - truth).norm(), *((gradients[n] - exact[n]).norm() for n in exact)])

    ours, theirs = error(logits, gradients), error(plain_logits, plain_gradients)
    assert ours[0] < 1.1 * theirs[0] and ours[1:].square().sum() < 1.1 * theirs[1:].square().sum()


def test_gradients_are_the_numerical_ones():
    base = torch.nn.Linear(5, 4, dtype=torch.float64).requires_grad_(False)
    x, a, b = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 5), (2, 5), (4, 2)))
    assert torch.autograd.gradcheck(lambda *inputs: FusedLoraLinear.apply(*inputs, base, 1.7, 0.0), (x, a, b))


def test_a_disabled_or_a_second_adapter_is_pefts_own_business():
    model = trained_adapter(0.0)
    logits, _ = outcome(model)
    with model.disable_adapter():
        bare = model(input_ids=torch.arange(10, 20)[None]).logits
    base = load_base(TINY, False, torch.float32)
    torch.testing.assert_close(bare, base(input_ids=torch.arange(10, 20)[None]).logits)
    model.add_adapter("second", model.peft_config["default"])
    fuse_adapters(model).base_model.set_adapter(["default", "second"])  # the second one's B is zero: it adds nothing
    torch.testing.assert_close(outcome(model)[0], logits, rtol=1e-5, atol=1e-5)
