"""Flags that cannot work are one line when they are parsed, before a model is loaded."""

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vqa.config.parser import field_names, parse_arguments
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
    ("--save_steps 0", "save_steps is 0.0. Set it to 1 or more steps, or to a fraction of the run."),
    ("--eval_steps nan", "eval_steps is nan"),
    ("--eval_steps inf", "eval_steps is inf"),
    ("--logging_steps -1", "logging_steps is -1"),
    ("--max_steps 0", "max_steps is 0. Set it to 1 or more, or leave it out"),
    ("--lora_alpha 0", "Set it to 1 or more"),
    ("--torch_compile_backend nonsense", "torch_compile cannot be used: .*nonsense"),
    ("--torch_compile_mode nonsense", "torch_compile cannot be used: .*nonsense"),
    ("--greater_is_better true", "greater_is_better contradicts metric_for_best_model"),
    ('--accelerator_config {"split_batches":true}', "split_batches would change the rows of a step"),
    ("--max_valid_rows 0", "Set it to 1 or more"),
    ("--effective_batch_size 0", "Set it to 1 or more"),
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


ODD = ["", "0", "-1", "1.5", "nan", "1e400", "null", "true", "x", "[]", "{}", '{"a":1}', "9" * 20, "\0", "가", "x y"]
FLAG = st.tuples(st.sampled_from(sorted(field_names())), st.sampled_from(ODD) | st.text(max_size=3))


@settings(max_examples=int(os.environ.get("FUZZ_EXAMPLES", 60)), deadline=None, derandomize=True)
@given(st.lists(FLAG, min_size=1, max_size=3))
def test_any_flags_are_accepted_or_one_line(flags):
    words = [f"--{name}={value}" for name, value in flags]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", os.environ.copy())  # TrainingArguments sets variables for torch.compile
        try:
            parse_arguments(["args/demo/fold0.json", "--output_dir", "x", *words], "")
        except UserError as error:
            assert str(error).strip()
