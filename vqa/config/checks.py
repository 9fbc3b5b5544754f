"""Checks of the arguments before anything is read or loaded: contradictions, missing packages, impossible values."""

from typing import Any

import torch
from huggingface_hub import whoami
from transformers import Trainer, get_scheduler

from vqa.config.recipe import RecipeArguments
from vqa.core.compat import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from vqa.core.errors import UserError

LOWEST = {
    "swa_start": 0,
    "swa_every": 1,
    "ema_decay": 0,
    "max_hours": 0,
    "lora_rank": 1,
    "lora_alpha": 1,
    "ddp_timeout": 1,
    "ddp_bucket_cap_mb": 1,
    "lora_dropout": 0,
    "lora_first_layer": 0,
    "vision_learning_rate": 0,
    "image_size": 28,
    "num_train_epochs": 0,
    "learning_rate": 0,
    "swa_lr": 0,
    "weight_decay": 0,
    "warmup_steps": 0,
    "max_grad_norm": 0,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "effective_batch_size": 1,
    "dataloader_num_workers": 0,
    "seed": 0,
    "vision_cache_gb": 0,
    "max_train_rows": 1,
    "max_valid_rows": 1,
    "early_stopping_patience": 1,
    "pseudo_min_confidence": 0,
    "permutations_per_step": 1,
    "consistency_weight": 0,
    "extra_weight": 0,
    "teacher_weight": 0,
}
BELOW_ONE = {"ema_decay": "such as 0.99, or to 0 for no EMA", "lora_dropout": "such as 0.05, or to 0 for no dropout"}
CHOICES = {
    "score": ("letter", "suffix"),
    "loss": ("token", "letter"),
    "metric_for_best_model": ("log_loss", "accuracy"),
    "train_sampling_strategy": ("group_by_length", "random"),
}
# Fields of transformers that would do nothing or harm here, and why.
REFUSED = {
    "auto_find_batch_size": "averages and best adapters of the failed attempt would stay; auto_batch does this",
    "label_smoothing_factor": "the loss is over the answer's tokens alone",
    "load_best_model_at_end": "the best adapters, raw and averaged, are saved separately",
    "save_only_model": "no run can resume from such a checkpoint",
    "use_liger_kernel": "its kernels would replace the fused layers of vqa/modeling/fused_lora.py",
    "deepspeed": "several GPUs train with DDP: accelerate launch --config_file args/accelerate/two_gpus.yaml",
    "fsdp": "each GPU needs the complete model (docs/multi_gpu.md): accelerate launch without FSDP",
    "fsdp_config": "each GPU needs the complete model (docs/multi_gpu.md)",
    "remove_unused_columns": "the collator reads the columns of the rows",
}
# Optimisers of transformers that work on full weight matrices, not on an adapter's parameters.
FULL_WEIGHT_OPTIMIZERS = ("galore", "apollo", "lomo", "adalomo")


def check_recipe(values: dict) -> None:
    """Raise UserError where fields contradict each other or this recipe."""
    for name, choices in CHOICES.items():
        if values[name] not in choices:
            raise UserError(f"{name} {values[name]!r} does not exist. Set {' or '.join(choices)}.")
    for name, low in LOWEST.items():
        if values.get(name) is not None and not values[name] >= low:  # also where it is not a number
            raise UserError(f"{name} is {values[name]}. Set it to {low} or more.")
    for name in ("logging_steps", "eval_steps", "save_steps"):
        if values[name] is not None and not 0 < values[name] < float("inf"):
            raise UserError(f"{name} is {values[name]}. Set it to 1 or more steps, or to a fraction of the run.")
    if values["max_steps"] == 0:
        raise UserError("max_steps is 0. Set it to 1 or more, or leave it out to train num_train_epochs.")
    if values["greater_is_better"] not in (None, values["metric_for_best_model"] == "accuracy"):
        raise UserError("greater_is_better contradicts metric_for_best_model, from which it follows. Leave it out.")
    for name, example in BELOW_ONE.items():
        if values[name] >= 1:
            raise UserError(f"{name} is {values[name]}. Set it below 1, {example}.")
    if not values["teacher_weight"] <= 1:
        raise UserError(f"teacher_weight is {values['teacher_weight']}. Set it from 0 to 1.")
    for name, why in REFUSED.items():
        if values[name]:
            raise UserError(f"{name} does not work with this recipe: {why}. Leave it out.")
    if values["vision_learning_rate"] is not None and not values["lora_vision"]:
        raise UserError("vision_learning_rate is set but lora_vision is false. Set lora_vision, or leave it out.")
    check_permutations(values)
    check_reports(values["report_to"])
    if values["effective_batch_size"] and values["gradient_accumulation_steps"]:
        raise UserError(
            "gradient_accumulation_steps follows from effective_batch_size and the number of GPUs. Leave it out."
        )
    if values["save_total_limit"] == 1:
        raise UserError(
            "save_total_limit 1 deletes the last checkpoint before the next one is complete. Set it to 2 or more."
        )
    if values["swa_lr"] is not None and values["swa_start"] is None:
        raise UserError("swa_lr is set but swa_start is null. Set swa_start, or leave swa_lr out.")
    if values["swa_lr"] is not None and values["lr_scheduler_type"] in ("reduce_lr_on_plateau", "greedy"):
        raise UserError(f"swa_lr needs a schedule by steps, not {values['lr_scheduler_type']}. Use cosine.")


def check_permutations(values: dict) -> None:
    """Raise UserError where permutations_per_step or consistency_weight would do nothing."""
    if values["permutations_per_step"] > 1 and not values["shuffle_choices"]:
        raise UserError("permutations_per_step permutes the choices, but shuffle_choices is false. Set it to true.")
    if values["permutations_per_step"] > 1 and values["score"] == "suffix":
        raise UserError("score suffix does not depend on the order of the choices. Leave permutations_per_step out.")
    if values["consistency_weight"] and values["permutations_per_step"] == 1:
        raise UserError("consistency_weight compares permutations of a step. Set permutations_per_step to 2 or more.")


def check_reports(report_to: str | list[str]) -> None:
    """Raise UserError where `report_to` names a package that is unknown or not installed."""
    for name in [report_to] if isinstance(report_to, str) else report_to:
        if name in ("none", "all"):
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            raise UserError(
                f"report_to {name!r} does not exist. Set none, all or {', '.join(INTEGRATION_TO_CALLBACK)}."
            )
        if name not in get_available_reporting_integrations():
            raise UserError(f"report_to {name} needs a package that is not installed. Run `pip install {name}`.")


def check_optimizer(recipe: RecipeArguments) -> None:
    """Raise UserError where `optim` or `lr_scheduler_type` cannot be made: a package or a further field is missing.

    Both are made as the Trainer makes them, for one parameter.
    """
    name = recipe.optim.value  # type: ignore[attr-defined]  # TrainingArguments makes enums of both names
    schedule = recipe.lr_scheduler_type.value  # type: ignore[attr-defined]
    if name.startswith(FULL_WEIGHT_OPTIMIZERS):
        raise UserError(f"optim {name} is for full fine-tuning, and this recipe trains an adapter. Use adamw_torch.")
    try:
        model: Any = torch.nn.Module()
        kind, options = Trainer.get_optimizer_cls_and_kwargs(recipe, model)
        optimizer = kind([torch.nn.Parameter(torch.zeros(1))], **options)
    except (ImportError, RuntimeError, ValueError, TypeError) as error:  # any of them where a package is missing
        fields = "learning_rate, adam_beta1, adam_beta2, adam_epsilon and optim_args"
        remedy = f"Install what it needs, correct {fields}, or use adamw_torch."
        raise unusable(f"optim {name}", error, remedy) from None
    try:
        options = recipe.lr_scheduler_kwargs
        get_scheduler(schedule, optimizer, 1, 100, scheduler_specific_kwargs=options)  # type: ignore[arg-type]
    except (ImportError, ValueError, TypeError) as error:
        remedy = "Correct lr_scheduler_kwargs, or use cosine."
        raise unusable(f"lr_scheduler_type {schedule}", error, remedy) from None


def check_compile(recipe: RecipeArguments) -> None:
    """Raise UserError where torch.compile has no such backend or mode. Nothing is compiled for it."""
    try:
        backend = recipe.torch_compile_backend or "inductor"
        torch.compile(torch.nn.Identity(), backend=backend, mode=recipe.torch_compile_mode)
    except Exception as error:  # torch raises its own for a backend, and RuntimeError for a mode
        raise unusable("torch_compile", error, "Leave torch_compile_backend and torch_compile_mode out.") from None


def unusable(field: str, error: Exception, remedy: str) -> UserError:
    return UserError(f"{field} cannot be used: {str(error).strip().rstrip('.')}. {remedy}")


def check_hub(recipe: RecipeArguments) -> None:
    """Raise UserError where `push_to_hub` cannot reach the model hub, or is not logged in."""
    try:
        whoami(recipe.hub_token)
    except Exception as error:  # many kinds: no token, a wrong one, no network, offline mode
        raise UserError(
            f"push_to_hub cannot log in to the model hub ({type(error).__name__}). Run `hf auth login` where the hub "
            "is reachable, or leave push_to_hub out and upload the adapter later."
        ) from None
