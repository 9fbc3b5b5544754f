"""Which layers get an adapter, and which options of PEFT reach it."""

from collections import Counter

import pytest
import torch
from conftest import TINY

from vqa.config.arguments import ModelArguments, adapter_options
from vqa.core.errors import UserError
from vqa.modeling.families import language_model
from vqa.modeling.loading import add_adapter, load_base
from vqa.training.memory import Batch, Setup, layers_in_backward, resident_bytes, training_peak
from vqa.training.speed import operations


def adapted(**fields):
    base = load_base(TINY, False, torch.float32)
    return add_adapter(base, **adapter_options(ModelArguments(model=TINY, lora_dropout=0.0, **fields)))


def layers_of(model) -> set[str]:
    return {name.split(".lora_")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_from_the_first_layer_on_every_layer_has_an_adapter_and_none_below():
    names = layers_of(adapted(lora_first_layer=4))
    assert {int(name.split(".layers.")[1].split(".")[0]) for name in names} == {4, 5} and len(names) == 2 * 7
    assert all("language_model" in name for name in names)
    with pytest.raises(UserError, match="lora_first_layer is 6. The model has layers 0 to 5."):
        adapted(lora_first_layer=6)


def test_below_the_first_layer_nothing_is_kept_for_the_backward_pass():
    model, seen = adapted(lora_first_layer=4), []
    for layer in language_model(model.get_base_model()).layers:
        layer.register_forward_hook(lambda layer, inputs, output: seen.append(output.requires_grad))
    model(input_ids=torch.arange(10, 20)[None])
    assert seen == [False] * 4 + [True] * 2


def test_checkpointing_runs_no_frozen_layer_again(make_trainer):
    """transformers asks for gradients of the embeddings, and with them every layer would run again."""
    trainer, calls = make_trainer(max_steps=1, gradient_checkpointing=True), []
    base = trainer.model.unload()
    trainer.model = trainer.model_wrapped = add_adapter(base, 4, 8, 0.0, first_layer=4)
    for layer in language_model(base).layers:
        layer.self_attn.k_proj.register_forward_hook(lambda layer, inputs, output: calls.append(layer))
    trainer.train()
    counts = [calls.count(layer.self_attn.k_proj) for layer in language_model(base).layers]
    assert counts == [1] * 4 + [2] * 2


def test_options_reach_peft():
    model = adapted(lora_options='{"use_rslora": true, "rank_pattern": {"q_proj": 8}}')
    layer = model.get_base_model().model.language_model.layers[0].self_attn
    assert layer.k_proj.scaling["default"] == 32 / 16**0.5 and layer.q_proj.r["default"] == 8
    tokens, dora = torch.arange(10, 20)[None], adapted(lora_options={"use_dora": True})
    for name, parameter in dora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    logits = dora(input_ids=tokens).logits
    for module in dora.modules():
        if "lora" in type(module).__module__:
            module.__dict__.pop("forward", None)
    assert torch.equal(logits, dora(input_ids=tokens).logits), "DoRA keeps the forward pass of PEFT"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"r": 4}, "r cannot be set: the fields lora_rank"),
        ({"target_modules": ["q_proj"]}, "lora_first_layer and lora_vision choose the layers"),
        ({"bias": "all"}, "the base model stays frozen"),
        ({"init_lora_weights": "pissa"}, "'pissa' changes the base model, or needs data"),
        ({"use_rslorra": True}, "lora_options: .*use_rslorra"),
        ("[1]", "write an object of names and values"),
        ("{", "not valid JSON"),
    ],
)
def test_options_that_cannot_be_used_are_refused_in_one_line(options, problem):
    with pytest.raises(UserError, match=problem) as error:
        adapted(lora_options=options)
    assert "\n" not in str(error.value)


def test_the_vision_towers_adapter_has_its_own_learning_rate(make_trainer):
    trainer = make_trainer(learning_rate=1e-3, vision_learning_rate=1e-5, swa_start=0.5, swa_lr=5e-4, max_steps=4)
    trainer.model = adapted(lora_vision=True)
    rates: Counter = Counter()
    for group in trainer.create_optimizer().param_groups:
        rates[group["lr"]] += len(group["params"])
    names = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    vision = sum("visual" in name for name in names)
    assert rates == {1e-3: len(names) - vision, 1e-5: vision} and vision > 0
    assert {factor(3) for factor in trainer.create_scheduler(4, trainer.optimizer).lr_lambdas} == {0.5}


def test_the_estimates_count_the_layers_that_have_a_backward_pass():
    setups = [Setup(adapted(**fields), False, False) for fields in ({}, {"lora_first_layer": 3})]
    assert [layers_in_backward(setup) for setup in setups] == [6, 3]
    assert layers_in_backward(Setup(adapted(lora_first_layer=3, lora_vision=True), False, False)) == 6
    batch = Batch(rows=4, tokens=100, patches=0)
    all_layers, half = [operations(setup, batch) for setup in setups]
    assert half == pytest.approx(all_layers * (1 + 0.5) / 2)
    all_layers, half = (training_peak(setup, batch) - resident_bytes(setup) for setup in setups)
    assert 0.45 < half / all_layers < 0.7
