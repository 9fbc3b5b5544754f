"""The layers that this project replaces or keeps in another precision, against those of PEFT and transformers."""

import pytest
import torch
from torch import nn

from .conftest import DEVICE, IN_4BIT

pytestmark = pytest.mark.gpu
ROUNDING = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # a few roundings, relative to the norm
SHAPE = (3, 17, 192)  # rows, tokens, width
in_4bit = pytest.mark.skipif(not IN_4BIT, reason="4 bits need CUDA")


class Dropped(nn.Module):
    """Dropout with a mask that is given."""

    def __init__(self, kept: torch.Tensor, p: float):
        super().__init__()
        self.kept, self.p = kept, p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.kept.view(x.shape) / (1 - self.p)


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def adapted_layer(dtype: torch.dtype, dropout: float) -> nn.Module:
    """PEFT's model around one frozen linear layer, 192 to 480, in 4 bits where there is CUDA; its B is not zero."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    layer = nn.Linear(192, 480, bias=False, dtype=dtype)
    if IN_4BIT:
        from bitsandbytes.nn import Linear4bit, Params4bit

        packed = Linear4bit(192, 480, bias=False, compute_dtype=dtype, quant_type="nf4")
        packed.weight = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True)
        layer = packed
    base = nn.Sequential()
    base.add_module("proj", layer.to(DEVICE))
    base.is_loaded_in_4bit = IN_4BIT  # what PEFT chooses its layer by
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, lora_dropout=dropout, target_modules=["proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return model.train()


def forward_and_backward(model: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The output and the gradients of x, A and B, from the same random numbers each time."""
    model.zero_grad()
    torch.manual_seed(1)
    x = torch.randn(SHAPE, device=DEVICE, dtype=dtype).requires_grad_()
    upstream = torch.randn(*SHAPE[:-1], 480, device=DEVICE, dtype=dtype)
    torch.manual_seed(2)  # of the dropout
    with torch.autocast(DEVICE, dtype):
        y = model(x)
    y.backward(upstream.to(y.dtype))
    gradients = {name.split(".")[-3]: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == {"lora_A", "lora_B"}
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
    return {name: tensor.detach().clone() for name, tensor in {"y": y, "x": x.grad, **gradients}.items()}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_fused_layer_gives_the_output_and_gradients_of_peft(dtype, dropout):
    from vqa.modeling.fused_lora import fuse_adapters

    model = fuse_adapters(adapted_layer(dtype, dropout))
    layer = model.get_submodule("base_model.model.proj")
    assert "forward" in vars(layer), "the layer is fused"
    assert type(layer).__name__ == ("Linear4bit" if IN_4BIT else "Linear")
    fused = forward_and_backward(model, dtype)
    if dropout:  # PEFT may drop in another dtype, for which CUDA draws another mask: give it that of the fused pass
        torch.manual_seed(2)
        rows = torch.ones(SHAPE, device=DEVICE, dtype=dtype).flatten(0, 1)
        layer.lora_dropout["default"] = Dropped(torch.native_dropout(rows, dropout, True)[1], dropout)
    del layer.forward
    plain = forward_and_backward(model, dtype)
    for name, expected in plain.items():
        assert fused[name].dtype == expected.dtype and fused[name].shape == expected.shape, name
        assert relative_error(fused[name], expected) < ROUNDING[dtype], name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_fused_norm_is_that_of_transformers_within_rounding(folder, dtype):
    from vqa.modeling.loading import load_base

    model = load_base(folder, False, dtype)
    norms = [m for name, m in model.named_modules() if "language_model" in name and "forward" in vars(m)]
    norms = [m for m in norms if type(m).__name__.endswith("RMSNorm")]
    assert len(norms) == 2 * model.config.text_config.num_hidden_layers + 1
    torch.manual_seed(0)
    step = torch.finfo(dtype).eps
    for norm in norms:
        hidden = torch.randn(3, 17, len(norm.weight), device=DEVICE, dtype=dtype) * 10
        with torch.no_grad():
            got, expected = norm(hidden), type(norm).forward(norm, hidden)
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, rtol=2 * step, atol=step * 1e-2)


@pytest.fixture
def overflowing(folder, rows, tmp_path) -> tuple[str, dict[str, torch.Tensor]]:
    """(a model folder in float16, a batch of images) for which the last vision block writes values beyond 65,504."""
    from transformers import AutoModelForImageTextToText

    from vqa.data.collator import Collator
    from vqa.modeling.loading import load_processor

    processor = load_processor(folder)
    batch = {k: v for k, v in Collator(processor, 140)(rows[:4]).items() if k in ("pixel_values", "image_grid_thw")}
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    mlp, written = model.model.visual.blocks[-1].mlp, []
    hook = mlp.register_forward_hook(lambda module, args, output: written.append(output.abs().max().item()))
    with torch.no_grad():
        model.get_image_features(batch["pixel_values"], batch["image_grid_thw"])
        hook.remove()
        for layer in (mlp.up_proj, mlp.down_proj):  # half of the factor each, so that every weight fits float16
            layer.weight.mul_((2e5 / written[0]) ** 0.5)
        for parameter in (mlp.up_proj.bias, mlp.down_proj.bias):
            parameter.zero_()
    model.half()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    model.save_pretrained(tmp_path / "overflowing")
    processor.save_pretrained(tmp_path / "overflowing")
    return str(tmp_path / "overflowing"), {name: tensor.to(DEVICE) for name, tensor in batch.items()}


def features(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    from vqa.core.dtypes import half_autocast

    with torch.no_grad(), half_autocast(model):
        return torch.cat(model.get_image_features(**batch).pooler_output)


def test_an_overflow_in_the_last_vision_block_stays_finite_and_right_in_fp16(overflowing):
    from transformers import AutoModelForImageTextToText

    from vqa.modeling.loading import load_base

    path, batch = overflowing
    bare = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float16).eval().to(DEVICE)
    assert not features(bare, batch).isfinite().all(), "without the guard it overflows"
    exact = features(load_base(path, False, torch.float32).eval(), batch)
    model, seen = load_base(path, False, torch.float16).eval(), []
    projection = model.model.visual.blocks[-1].mlp.down_proj
    projection.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    guarded = features(model, batch)
    (hidden, output), weight = seen[0], projection.weight
    assert output.abs().max() > torch.finfo(torch.float16).max
    assert relative_error(output, hidden.double() @ weight.double().T + projection.bias.double()) < 1e-3
    assert guarded.isfinite().all()
    assert relative_error(guarded, exact) < 2e-3, "the roundings of the other fp16 layers, half of this, and no more"


@in_4bit
@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_a_base_that_was_saved_in_4_bits_in_bf16_runs_in_fp16(folder, rows, ids, tmp_path, load_in_4bit):
    """Forward and backward, against the same base quantised while loading."""
    from vqa.core.dtypes import half_autocast
    from vqa.data.collator import Collator
    from vqa.inference.scoring import answer_logits
    from vqa.modeling.loading import add_adapter, load_base, load_processor

    load_base(folder, True, torch.bfloat16).save_pretrained(tmp_path)
    processor = load_processor(folder)
    processor.save_pretrained(tmp_path)
    batch = Collator(processor, 112)(rows[:6])
    batch = {key: value.to(DEVICE) if torch.is_tensor(value) else value for key, value in batch.items()}
    probs = {}
    for path, packed in ((str(tmp_path), load_in_4bit), (folder, True)):
        torch.manual_seed(0)
        model = add_adapter(load_base(path, packed, torch.float16), 8, 16, 0.0).train()
        assert model.get_base_model().is_loaded_in_4bit
        for name, parameter in sorted(model.named_parameters()):
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.02)
        with half_autocast(model):
            logits = answer_logits(model, batch)[:, -1, ids]
        (256 * logits.logsumexp(-1).sum()).backward()  # as the loss scaler does: small gradients are 0 in fp16
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        assert all(g.dtype == torch.float32 and g.isfinite().all() and g.any() for g in gradients)
        probs[path] = logits.detach().softmax(-1)
    assert (probs[str(tmp_path)] - probs[folder]).abs().max() < 0.01
