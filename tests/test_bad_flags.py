"""Flags that cannot work are one line when they are parsed, before a model is loaded."""

import pytest

from vqa.config.parser import parse_arguments
from vqa.core.errors import UserError

PARSED = [
    ("--use_liger_kernel true", "use_liger_kernel does not work with this recipe"),
    ("--optim galore_adamw", "galore_adamw is for full fine-tuning"),
    ("--optim apollo_adamw_layerwise", "is for full fine-tuning"),
    ("--optim lomo", "is for full fine-tuning"),
    ("--optim adamw_torch_4bit", "pip install torchao"),
    ("--optim grokadamw", "grokadamw"),
    ("--optim schedule_free_adamw", "pip install schedulefree"),
    ("--optim stable_adamw", "torch-optimi"),
    ("--optim adamw_anyprecision", "torchdistx"),
    ("--optim adamw_torch_xla", "torch_xla"),
    ("--optim adamw_torch_npu_fused", "torch_npu"),
    ("--optim nonsense", "invalid choice: 'nonsense'"),
    ("--optim_args x", "optim_args"),
    ("--adam_beta1 2", "adam_beta1"),
    ("--adam_epsilon -1", "adam_epsilon"),
    ("--lr_scheduler_type nonsense", "nonsense is not a valid SchedulerType"),
    ("--lr_scheduler_type cosine_with_min_lr", "min_lr.*lr_scheduler_kwargs"),
    ("--lr_scheduler_type warmup_stable_decay", "num_decay_steps"),
    ("--lr_scheduler_kwargs x", "lr_scheduler_kwargs"),
    ('--lr_scheduler_kwargs {"x":1}', "unexpected keyword argument 'x'"),
    ("--push_to_hub true", "push_to_hub cannot log in.*hf auth login"),
    ("--attn_implementation flash_attention_2", "unknown field 'attn_implementation'"),
    ("--deepspeed ds.json", "deepspeed does not work with this recipe.*accelerate launch"),
    ('--deepspeed {"a":1}', "deepspeed does not work with this recipe"),
    ("--fsdp full_shard", "fsdp does not work with this recipe.*docs/multi_gpu.md"),
    ("--fsdp_config x.json", "fsdp_config does not work with this recipe"),
    ("--accelerator_config x.json", "No such file.*x.json"),
    ("--remove_unused_columns true", "the collator reads the columns"),
    ("--train_sampling_strategy nonsense", "Set group_by_length or random"),
    ("--eval_strategy nonsense", "nonsense is not a valid"),
    ("--num_train_epochs nan", "num_train_epochs is nan. Set it to 0 or more."),
    ("--learning_rate -1", "learning_rate is -1.0. Set it to 0 or more."),
    ("--per_device_train_batch_size 0", "per_device_train_batch_size is 0. Set it to 1 or more."),
    ("--gradient_accumulation_steps 0", "Set it to 1 or more."),
    ("--dataloader_num_workers -1", "Set it to 0 or more."),
    ("--lora_dropout 1", "lora_dropout is 1.0. Set it below 1"),
    ("--ema_decay nan", "ema_decay is nan"),
    ("--seed -1", "seed is -1"),
    ("--output_dir=", "no --output_dir"),
]


@pytest.mark.parametrize(("flags", "expected"), PARSED, ids=[flags for flags, _ in PARSED])
def test_a_flag_that_cannot_work_is_one_line_when_parsed(tmp_path, flags, expected):
    with pytest.raises(UserError, match=expected) as raised:
        parse_arguments(["args/demo/fold0.json", "--output_dir", str(tmp_path), *flags.split(" ", 1)], "")
    assert "\n" not in str(raised.value).strip()


@pytest.mark.parametrize(
    "flags",
    [
        "--optim adafactor",
        "--optim sgd",
        "--lr_scheduler_type constant_with_warmup",
        "--lr_scheduler_type polynomial",
        '--lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs {"min_lr":1e-5}',
        "--lr_scheduler_type reduce_lr_on_plateau",
        "--optim_args=",
    ],
)
def test_flags_that_work_are_accepted(tmp_path, flags):
    parse_arguments(["args/demo/fold0.json", "--output_dir", str(tmp_path), *flags.split()], "")
