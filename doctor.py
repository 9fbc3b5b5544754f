"""Check a run before it costs GPU hours: its args, its data and its model's shape, without loading weights.

    python doctor.py args/fold0.json
    python doctor.py args/fold0.json --image_size 512 --per_device_train_batch_size 4

It takes the arguments of train_fold.py and needs no GPU. It ends with `ready` (exit code 0), or with a numbered list
of what to fix before training (exit code 1). Warnings do not change the exit code. What cannot be read at all is one
line, with exit code 2.
"""

import sys

from vqa.config.parser import parse_arguments
from vqa.core.dtypes import model_dtype
from vqa.core.errors import run_main
from vqa.modeling.loading import load_processor
from vqa.modeling.suffix_score import COLLATORS
from vqa.training import doctor
from vqa.training.batching import make_setup
from vqa.training.dataset import TrainDataset
from vqa.training.earlier_runs import check_init_adapter
from vqa.training.memory import meta_model


def main() -> None:
    model_args, data, recipe, _ = parse_arguments(sys.argv[1:], __doc__, trains=False)
    report = doctor.Report()
    contest = doctor.read_contest(report, data, recipe.seed)
    if model_args.init_adapter:
        check_init_adapter(model_args, contest.valid)
    processor = load_processor(model_args.model, model_args.trust_remote_code)
    collate = COLLATORS[model_args.score](processor, data.image_size, data.instruction, with_answer=True)
    model = meta_model(model_args, model_dtype(recipe.fp16, recipe.bf16))
    doctor.check_labels(report, collate, TrainDataset(contest.train, data.shuffle_choices, recipe.seed))
    doctor.check_model(report, model_args, model, recipe.permutations_per_step)
    train, valid = doctor.check_tokens(report, collate, contest, recipe.permutations_per_step)
    doctor.check_rows(report, contest, data)
    doctor.check_cost(report, make_setup(model_args, recipe, model), recipe, data, train, valid)
    report.conclude()


if __name__ == "__main__":
    run_main(main)
