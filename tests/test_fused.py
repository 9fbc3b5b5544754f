"""The fused forward passes against those of PEFT and transformers, on the tiny model."""

from types import SimpleNamespace

import pytest
import torch
from conftest import TINY
from peft import LoraConfig, get_peft_model
from torch import nn

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
    """The same model with the forward passes of its classes."""
    for module in model.modules():
        module.__dict__.pop("forward", None)
    return model


def trained_adapter(dropout: float, dtype=torch.float32):
    """A model whose adapter changes the logits: a new one's B is zero."""
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


def test_in_16_bits_the_fused_pass_is_as_accurate_as_pefts():
    exact_logits, exact = outcome(trained_adapter(0.0))
    model = trained_adapter(0.0, torch.bfloat16)
    logits, gradients = outcome(model, torch.bfloat16)
    plain_logits, plain_gradients = outcome(unfused(model), torch.bfloat16)

    def error(logits, gradients):
        return torch.stack([(logits - exact_logits).norm(), *((gradients[n] - exact[n]).norm() for n in exact)])

    ours, theirs = error(logits, gradients), error(plain_logits, plain_gradients)
    assert ours[0] < 1.1 * theirs[0] and ours[1:].square().sum() < 1.1 * theirs[1:].square().sum()


def test_gradients_are_the_numerical_ones():
    base = torch.nn.Linear(5, 4, dtype=torch.float64).requires_grad_(False)
    x, a, b = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 5), (2, 5), (4, 2)))
    assert torch.autograd.gradcheck(lambda *inputs: FusedLoraLinear.apply(*inputs, base, 1.7, 0.0), (x, a, b))


def test_a_disabled_or_a_second_adapter_uses_pefts_forward():
    model = trained_adapter(0.0)
    logits, _ = outcome(model)
    with model.disable_adapter():
        bare = model(input_ids=torch.arange(10, 20)[None]).logits
    base = load_base(TINY, False, torch.float32)
    torch.testing.assert_close(bare, base(input_ids=torch.arange(10, 20)[None]).logits)
    model.add_adapter("second", model.peft_config["default"])
    fuse_adapters(model).base_model.set_adapter(["default", "second"])  # the second one's B is zero: it adds nothing
    torch.testing.assert_close(outcome(model)[0], logits, rtol=1e-5, atol=1e-5)


def small_adapter(**options) -> nn.Module:
    """A PEFT model of one linear layer with a bias, whose adapter's parameters are random."""
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(16, 12)), LoraConfig(r=4, target_modules=["0"], **options))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def test_an_adapter_with_lora_bias_keeps_its_bias():
    x, model = torch.randn(5, 16), small_adapter(lora_bias=True)
    fused = fuse_adapters(model)(x)
    plain = unfused(model)(x)
    assert torch.equal(fused, plain)
    model.base_model.model[0].lora_B["default"].bias.data.zero_()
    assert not torch.allclose(plain, model(x)), "the bias matters"


@pytest.mark.parametrize("compute_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("x_dtype", [torch.float16, torch.float32])
def test_a_base_saved_in_4_bits_as_bf16_computes_in_the_layers_compute_dtype(monkeypatch, compute_dtype, x_dtype):
    """With a layer that looks like one of bitsandbytes: packed weight, `quant_state`, `compute_dtype`."""
    model = small_adapter()
    layer = model.base_model.model[0].get_base_layer()
    unpacked = layer.weight.data.bfloat16()
    layer.weight = nn.Parameter(torch.zeros(96, 1, dtype=torch.uint8), requires_grad=False)
    layer.weight.quant_state = SimpleNamespace(dtype=torch.bfloat16)
    layer.compute_dtype, layer.bias.data = compute_dtype, layer.bias.data.to(compute_dtype)
    monkeypatch.setattr("bitsandbytes.functional.dequantize_4bit", lambda weight, state: unpacked)

    x = torch.randn(5, 16).to(x_dtype).requires_grad_()
    y = fuse_adapters(model)(x)
    assert y.dtype == x_dtype, "as bitsandbytes returns it"
    y.float().square().sum().backward()

    a, b = (getattr(model.base_model.model[0], name)["default"].weight for name in ("lora_A", "lora_B"))
    exact_x, exact_a, exact_b = (tensor.detach().double().requires_grad_() for tensor in (x, a, b))
    scaling = model.base_model.model[0].scaling["default"]
    exact = exact_x @ unpacked.double().T + layer.bias.double() + scaling * exact_x @ exact_a.T @ exact_b.T
    exact.square().sum().backward()
    tolerance = 1e-5 if compute_dtype == x_dtype == torch.float32 else 1e-2
    for value, wanted in ((y, exact), (x.grad, exact_x.grad), (a.grad, exact_a.grad), (b.grad, exact_b.grad)):
        assert (value.double() - wanted).norm() < tolerance * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fused_norms_differ_from_transformers_by_rounding_alone(dtype):
    norm = load_base(TINY, False, dtype).model.language_model.norm
    torch.manual_seed(0)
    nn.init.normal_(norm.weight, mean=1.0, std=0.3)
    hidden = 3 * torch.randn(500, norm.weight.shape[0]).to(dtype)
    fused, plain = norm(hidden), type(norm).forward(norm, hidden)
    scale = hidden.double().square().mean(-1, keepdim=True).add(norm.variance_epsilon).rsqrt()
    exact = norm.weight.double() * hidden.double() * scale
    rounding = torch.finfo(dtype).eps * exact.abs() + torch.finfo(dtype).tiny
    assert fused.dtype == plain.dtype == dtype and 0.1 < (fused != plain).float().mean() < 0.5
    assert ((fused.double() - plain.double()).abs() <= 2 * rounding).all()
    assert ((fused.double() - exact).abs() <= 0.51 * rounding).all(), "one rounding, at the end"
