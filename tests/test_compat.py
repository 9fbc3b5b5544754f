"""What this project expects of the internals in vqa/core/compat.py: a test per item, named after what it expects."""

import argparse
import ast
import inspect
from types import SimpleNamespace

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from accelerate.utils import broadcast_object_list, gather_object
from conftest import ROOT
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import nn
from torch.utils.data import BatchSampler, SequentialSampler
from transformers import (
    AutoConfig,
    DynamicCache,
    HfArgumentParser,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_cosine_schedule_with_warmup,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5RMSNormGated

from vqa.core import compat
from vqa.data.collator import Collator
from vqa.modeling.vision import image_features, stack_features


@pytest.mark.parametrize("name", compat.TRAINER_METHODS)
def test_trainer_has_the_method_that_we_override_with_these_parameters(name):
    expected = compat.TRAINER_METHODS[name].split()
    parameters = [str(p).split(":")[0] for p in inspect.signature(getattr(Trainer, name)).parameters.values()][1:]
    assert [parameter.split(" ")[0].split("=")[0] for parameter in parameters] == expected


@pytest.mark.slow
def test_trainer_takes_sampler_scaler_arguments_epochs_and_checkpoints_from_the_overridden_methods(tmp_path):
    """Also that `_run_epoch` is called with keywords alone, once an epoch."""
    calls = []

    class Recorder(Trainer):
        def _build_accelerator_args(self, **kwargs):
            built = super()._build_accelerator_args(**kwargs)
            assert isinstance(built["kwargs_handlers"], list)
            calls.append("_build_accelerator_args")
            return built

        def _get_train_sampler(self, train_dataset=None):
            calls.append("_get_train_sampler")
            return SequentialSampler(self.train_dataset)

        def _run_epoch(self, **kwargs):
            calls.append("_run_epoch")
            super()._run_epoch(**kwargs)

        def _save_checkpoint(self, model, trial):
            calls.append("_save_checkpoint")
            super()._save_checkpoint(model, trial)
            assert (tmp_path / f"checkpoint-{self.state.global_step}" / "trainer_state.json").is_file()

        def get_batch_samples(self, epoch_iterator, num_batches, device):
            batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
            assert len(batches) == num_batches == 2
            calls.append("get_batch_samples")
            return batches, 7

        def training_step(self, model, inputs, num_items_in_batch=None):
            assert num_items_in_batch == 7
            return super().training_step(model, inputs, num_items_in_batch)

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(inputs["x"]).square().mean()

    arguments = TrainingArguments(
        str(tmp_path),
        use_cpu=True,
        disable_tqdm=True,
        num_train_epochs=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        save_strategy="epoch",
        remove_unused_columns=False,
    )
    rows = [{"x": torch.ones(3) * i} for i in range(4)]
    trainer = Recorder(nn.Linear(3, 1), arguments, train_dataset=rows)
    trainer.train()
    assert compat.initial_global_step(trainer) == 0 and trainer.state.global_step == 2
    epoch = ["_run_epoch", "get_batch_samples", "_save_checkpoint"]
    assert calls == ["_build_accelerator_args", "_get_train_sampler", *epoch, *epoch]
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert compat.initial_global_step(trainer) == 1


def test_a_run_epoch_that_only_sets_should_training_stop_ends_training(tmp_path):
    class Stopped(Trainer):
        def _run_epoch(self, **kwargs):
            self.control.should_training_stop = True

    arguments = TrainingArguments(str(tmp_path), use_cpu=True, disable_tqdm=True)
    trainer = Stopped(nn.Linear(3, 1), arguments, train_dataset=[{"x": torch.ones(3)}], callbacks=[TrainerCallback()])
    trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("rows", range(1, 20))
@pytest.mark.parametrize(("batch_size", "processes"), [(1, 2), (2, 2), (4, 1), (3, 4)])
def test_accelerate_fills_the_last_batches_with_an_epochs_first_rows_in_rank_order(rows, batch_size, processes):
    sampler = BatchSampler(SequentialSampler(range(rows)), batch_size, drop_last=False)
    real = []
    for rank in range(processes):
        batches = list(BatchSamplerShard(sampler, processes, rank))
        if processes == 1:  # accelerate leaves the last batch short
            batches = list(sampler)
        first = compat.first_repeated_row(rows, batch_size, processes, rank)
        real += [row for batch in batches[:-1] for row in batch] + batches[-1][:first]
    assert sorted(real) == list(range(rows)), "each row once, when the repeated ones are left out"


def test_one_process_broadcasts_and_gathers_its_own_objects():
    assert broadcast_object_list(["answer", False]) == ["answer", False]
    assert gather_object([{"rank": 0}]) == [{"rank": 0}]


def test_the_model_comes_out_of_ddps_wrapper():
    model = nn.Linear(2, 2)
    assert compat.unwrap_parallel(model) is model
    assert compat.unwrap_parallel(nn.DataParallel(model)) is model


def test_the_parsers_flags_can_be_hidden_and_renamed():
    parser = HfArgumentParser(TrainingArguments)
    actions = {action.dest: action for action in compat.parser_actions(parser)}
    assert {"help", "learning_rate", "fp16"} <= actions.keys()
    actions["learning_rate"].help = argparse.SUPPRESS
    assert "--learning_rate" not in parser.format_help().split("--help")[1].replace("[--learning_rate", "")
    assert "--learning-rate" in actions["learning_rate"].option_strings


def test_string_to_bool_reads_true_and_false_and_refuses_the_rest():
    assert compat.string_to_bool("true") is True and compat.string_to_bool("false") is False
    with pytest.raises(argparse.ArgumentTypeError):
        compat.string_to_bool("maybe")


def test_report_to_names_are_the_keys_of_the_integrations():
    assert {"tensorboard", "wandb", "trackio"} <= compat.INTEGRATION_TO_CALLBACK.keys()
    assert set(compat.get_available_reporting_integrations()) <= compat.INTEGRATION_TO_CALLBACK.keys()


def test_repeat_kv_repeats_each_head_in_place():
    heads = torch.arange(2.0).view(1, 2, 1, 1)
    assert compat.repeat_kv(heads, 3).flatten().tolist() == [0, 0, 0, 1, 1, 1]


def test_sdpa_attention_forward_is_causal_by_the_modules_word_and_returns_heads_last():
    query, key, value = torch.randn(3, 1, 2, 5, 4).unbind(0)
    for is_causal in (True, False):
        module = SimpleNamespace(is_causal=is_causal, training=False)
        output, weights = compat.sdpa_attention_forward(module, query, key, value, None, scaling=0.5)
        expected = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=is_causal, scale=0.5)
        assert weights is None and torch.equal(output, expected.transpose(1, 2))


def test_sdpa_mask_is_true_where_attention_is_allowed_and_our_attention_uses_it():
    mask = compat.sdpa_mask(1, 3, 3, attention_mask=torch.tensor([[0, 1, 1]]).bool())
    assert mask.shape == (1, 1, 3, 3) and mask.dtype == torch.bool
    assert mask[0, 0].tolist()[1:] == [[False, True, False], [False, True, True]]
    import vqa.modeling.loading  # noqa: F401  # registers it

    assert compat.AttentionMaskInterface()["sdpa_expanded"] is compat.sdpa_mask
    assert "sdpa_expanded" in ALL_ATTENTION_FUNCTIONS


def test_forward_takes_encoder_outputs_in_place_of_pixels(model, processor, rows):
    assert compat.accepts_encoder_outputs(model) and not compat.accepts_encoder_outputs(nn.Linear(2, 2))
    batch = Collator(processor, 112)(rows[:2])
    features = stack_features(image_features(model, batch, batch["ids"]))
    names = ("input_ids", "attention_mask", "mm_token_type_ids", "image_grid_thw")
    inputs = {name: batch[name] for name in names}
    with torch.no_grad():
        given = model(**inputs, **compat.as_encoder_outputs(features)).logits
        zero = model(**inputs, **compat.as_encoder_outputs(features * 0)).logits
        expected = model(**inputs, pixel_values=batch["pixel_values"]).logits
    assert torch.equal(given, expected) and not torch.equal(zero, expected)


def test_rope_positions_give_text_three_equal_coordinates_and_an_image_its_grid(model, processor, rows):
    batch = Collator(processor, 112)(rows[:1])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "mm_token_type_ids", "image_grid_thw")}
    positions = compat.rope_positions(model, inputs)
    is_image = batch["input_ids"][0] == model.config.image_token_id
    time, height, width = positions[:, 0]
    assert positions.shape == (3, *batch["input_ids"].shape)
    assert torch.equal(time[~is_image], height[~is_image]) and torch.equal(time[~is_image], width[~is_image])
    assert len(time[is_image].unique()) == 1
    assert len(height[is_image].unique()) * len(width[is_image].unique()) == is_image.sum()


def test_processors_count_an_images_tokens_by_its_size(processor):
    sizes = [(112, 84), (280, 140)]
    images = [Image.new("RGB", size) for size in sizes]
    text = processor(text=[processor.image_token] * 2, images=images, padding=True, return_tensors="pt")
    expected = (text["input_ids"] == processor.image_token_id).sum(1).tolist()
    assert compat.count_image_tokens(processor, sizes, {}) == expected and expected[0] < expected[1]


def test_positions_of_a_model_without_multimodal_rope_count_the_tokens_behind_the_padding():
    base = SimpleNamespace(model=nn.Module())
    positions = compat.rope_positions(base, {"attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])})
    assert positions.tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]


def test_cache_rows_can_be_repeated_and_reordered(model):
    cache = DynamicCache(config=model.config.get_text_config())
    tokens = torch.tensor([[20, 21, 22], [30, 31, 32]])
    with torch.no_grad():
        model(input_ids=tokens, past_key_values=cache, use_cache=True)
        before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
        compat.select_cache_rows(cache, torch.tensor([1, 0, 1]))
    for layer, (keys, values) in zip(cache.layers, before):
        assert torch.equal(layer.keys, keys[[1, 0, 1]]) and torch.equal(layer.values, values[[1, 0, 1]])


def test_states_of_linear_attention_can_be_repeated_too():
    layers = {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2}
    cache = DynamicCache(config=AutoConfig.for_model("qwen3_5_text", **layers))
    states = torch.arange(2.0).view(2, 1, 1)
    cache.update_conv_state(states.expand(2, 3, 4), 0, conv_kernel_size=4)
    cache.update_recurrent_state(states, 0)
    compat.select_cache_rows(cache, torch.tensor([1, 0, 1]))
    for state in (cache.layers[0].conv_states[0], cache.layers[0].recurrent_states[0]):
        assert state[:, 0, 0].tolist() == [1, 0, 1]


def test_a_norm_with_a_gate_has_no_epsilon_for_the_fused_norm():
    assert Qwen3_5RMSNormGated(4).variance_epsilon and compat.rms_norm_epsilon(Qwen3_5RMSNormGated(4)) is None


def test_rms_norms_keep_their_epsilon_as_variance_epsilon(model):
    epsilons = [compat.rms_norm_epsilon(module) for module in model.model.language_model.modules()]
    layers = model.config.get_text_config().num_hidden_layers
    assert [value for value in epsilons if value is not None] == [1e-6] * (2 * layers + 1)


def test_the_vision_attention_of_qwen2_5_vl_has_one_projection_for_queries_keys_and_values(model):
    attentions = [m for m in model.modules() if isinstance(m, compat.Qwen2_5_VLVisionAttention)]
    assert len(attentions) == len(model.model.visual.blocks)
    for attention in attentions:
        width = attention.proj.in_features
        assert attention.qkv.out_features == 3 * width
        assert attention.scaling == (width // attention.num_heads) ** -0.5
    parameters = inspect.signature(compat.Qwen2_5_VLVisionAttention.forward).parameters
    assert list(parameters)[1:4] == ["hidden_states", "cu_seqlens", "position_embeddings"]


def test_the_rotary_function_of_the_vision_tower_rotates_by_angle():
    query = torch.randn(5, 2, 4)
    angles = torch.rand(5, 2).repeat(1, 2)
    rotated, _ = compat.apply_rotary_pos_emb_vision(query, query, angles.cos(), angles.sin())
    pairs = torch.complex(query[..., :2], query[..., 2:]) * torch.polar(torch.ones(5, 1, 2), angles[:, None, :2])
    torch.testing.assert_close(rotated, torch.cat([pairs.real, pairs.imag], dim=-1))


def test_the_gradient_of_native_dropout_scales_what_was_kept():
    x = torch.randn(100)
    dropped, kept = torch.native_dropout(x, 0.25, True)
    torch.testing.assert_close(dropped, x * kept / 0.75)
    torch.testing.assert_close(compat.native_dropout_backward(x, kept, 1 / 0.75), dropped)


def adapted(**options) -> tuple[nn.Module, compat.LoraLayer]:
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=6, target_modules=["0"], **options))
    return model, base[0]


def test_peft_names_the_adapted_layers_and_keeps_scaling_and_weights_by_adapter():
    model, layer = adapted()
    assert compat.adapted_module_names(model) == ["0"]
    assert isinstance(layer, compat.LoraLayer) and isinstance(layer, compat.BaseTunerLayer)
    assert layer.scaling == {"default": 3.0} and layer.lora_A["default"].weight.shape == (2, 4)
    x = torch.randn(3, 4)
    nn.init.normal_(layer.lora_B["default"].weight)
    branch = layer.lora_B["default"](layer.lora_A["default"](layer.lora_dropout["default"](x)))
    torch.testing.assert_close(layer(x), layer.get_base_layer()(x) + 3.0 * branch)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}])
def test_an_adapter_that_computes_more_than_plain_lora_is_not_plain(options):
    assert compat.plain_adapter(adapted()[1]) == "default"
    assert compat.plain_adapter(adapted(**options)[1]) is None


def test_a_disabled_merged_or_second_adapter_is_not_plain():
    model, layer = adapted()
    with model.disable_adapter():
        assert compat.plain_adapter(layer) is None
    assert compat.plain_adapter(layer) == "default"
    model.add_adapter("second", model.peft_config["default"])
    model.base_model.set_adapter(["default", "second"])
    assert compat.plain_adapter(layer) is None
    model.set_adapter("second")
    assert compat.plain_adapter(layer) == "second"
    model.merge_adapter()
    assert compat.plain_adapter(layer) is None


def test_bitsandbytes_keeps_4_bit_weights_with_a_state_that_unpacks_to_its_dtype():
    """Packing and unpacking run on a CPU; the 4-bit layer's forward pass does not, on every CPU."""
    from bitsandbytes.functional import quantize_4bit

    weight = torch.randn(64, 64, dtype=torch.bfloat16)
    packed, state = quantize_4bit(weight, quant_type="nf4")
    layer = nn.Linear(64, 64)
    layer.weight = nn.Parameter(packed, requires_grad=False)
    layer.weight.quant_state = state
    assert compat.is_4bit(layer) and not compat.is_4bit(nn.Linear(2, 2))
    unpacked = compat.dequantized_weight(layer)
    assert unpacked.dtype == state.dtype == torch.bfloat16
    assert (unpacked - weight).norm() / weight.norm() < 0.15
    compat.set_compute_dtype(layer, torch.float16)
    assert compat.dequantized_weight(layer).dtype == torch.float16


def test_a_4_bit_layer_of_bitsandbytes_is_a_linear_layer_with_a_compute_dtype():
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(8, 8, compute_dtype=torch.float16)
    assert isinstance(layer, nn.Linear) and layer.compute_dtype == torch.float16 and not compat.is_4bit(layer)


def test_foreach_lerp_moves_each_tensor_of_a_list_in_place():
    averages, current = [torch.zeros(2), torch.ones(3)], [torch.ones(2), torch.zeros(3)]
    compat.foreach_lerp_(averages, current, 0.25)
    assert torch.equal(averages[0], torch.full((2,), 0.25)) and torch.equal(averages[1], torch.full((3,), 0.75))


def test_a_schedule_of_transformers_takes_the_rates_from_its_lr_lambdas():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = get_cosine_schedule_with_warmup(optimizer, 0, 10)
    assert scheduler.base_lrs == [2.0] and len(scheduler.lr_lambdas) == 1
    scheduler.lr_lambdas = [lambda step: 0.25 * step]
    optimizer.step()
    scheduler.step()
    assert scheduler.last_epoch == 1 and scheduler.get_last_lr() == [0.5]


PRIVATE = (
    *("bitsandbytes.", "peft.tuners", "transformers.hf_argparser", "transformers.integrations"),
    *("transformers.masking_utils", "transformers.modeling_outputs", "transformers.models."),
)


def test_no_other_module_imports_internals():
    wrong = []
    for path in [*(ROOT / "vqa").rglob("*.py"), *ROOT.glob("*.py")]:
        if path.name == "compat.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PRIVATE):
                wrong.append(f"{path.relative_to(ROOT)}: {node.module}")
            if isinstance(node, ast.Attribute) and ast.unparse(node).startswith(("torch._", "torch.ops.")):
                wrong.append(f"{path.relative_to(ROOT)}: {ast.unparse(node)}")
    assert not wrong, wrong
