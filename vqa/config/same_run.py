"""Whether two runs have the same settings, by their args.json, whichever release wrote them."""

from vqa.config.parser import field_names, non_default_fields
from vqa.config.recipe import rows_of_step

# Fields that may differ when a run is resumed: they change where and how fast it runs, not its result.
RESUME_SAFE_FIELDS = {
    "activation_checkpointing",
    "auto_batch",
    "disable_tqdm",
    "dataloader_num_workers",
    "dataloader_persistent_workers",
    "dataloader_pin_memory",
    "dataloader_prefetch_factor",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "logging_steps",
    "max_hours",
    "output_dir",
    "per_device_eval_batch_size",
    "per_device_train_batch_size",
    "report_to",
    "resume_from_checkpoint",
    "save_total_limit",
    "test_csv",
    "vision_cache",
    "vision_cache_dir",
    "vision_cache_gb",
}
# What releases before a field existed did, where that is not the field's default. Add to it with such a field.
OLD_DEFAULTS: dict = {}


def changed_fields(before: dict, config: dict) -> list[str]:
    """Names of the fields that differ between two configs, except those of RESUME_SAFE_FIELDS.

    Either may come from an earlier release. A field that it lacks counts as OLD_DEFAULTS says, or as the default;
    fields that do not exist any more are left out.
    """
    known = field_names() - RESUME_SAFE_FIELDS
    configs = [OLD_DEFAULTS | c | {"effective_batch_size": rows_of_step(c)} for c in (before, config)]
    configs = [{key: value for key, value in c.items() if key in known} for c in configs]
    old, new = (non_default_fields(c) for c in configs)
    return sorted(key for key in old.keys() | new.keys() if (key in old, old.get(key)) != (key in new, new.get(key)))
