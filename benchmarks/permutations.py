"""What several permutations of a row cost beside one: a training step, and prediction by a KV cache and by a tree.

Also what a training step costs with adapters on the top layers alone (`--first_layers 18 24`).

    python benchmarks/permutations.py --configs QWEN_FOLDER --model 3B --output permutations.jsonl
    python benchmarks/permutations.py --model checkpoints/tiny --sizes 112 --train_sizes 112 --steps 2   # a dry run

Random weights in the shape of a real model (see memory.py), 4 bits and fp16 on a GPU, rank 16, stored vision features,
gradient checkpointing, a batch of `--rows` rows. One JSON line for each measurement; kernel time is how long the GPU
works.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from clock import ON_GPU, Clock, busy_seconds, kernels, limit_memory, measured, timed, write_line
from compare import write_rows
from contestants import ADAPTER, Ours
from memory import model_folder
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the script runs from anywhere
from vqa.config.recipe import RecipeArguments  # noqa: E402
from vqa.core.errors import run_main  # noqa: E402
from vqa.data.images import all_images, oriented_sizes  # noqa: E402
from vqa.data.rows import read_rows  # noqa: E402
from vqa.inference import scoring  # noqa: E402
from vqa.modeling.loading import add_adapter  # noqa: E402
from vqa.modeling.positions import PositionCollator  # noqa: E402
from vqa.modeling.shared_prefix import PermutationCollator, permutation_logits  # noqa: E402
from vqa.modeling.tree_attention import TreeCollator, tree_permutation_logits  # noqa: E402
from vqa.training.batching import count_tokens  # noqa: E402
from vqa.training.dataset import SetEpochCallback, TrainDataset, rotations  # noqa: E402
from vqa.training.memory import GIB, Setup, meta_model, training_peak  # noqa: E402
from vqa.training.trainer import FoldTrainer  # noqa: E402

MANY = 4  # permutations


def main() -> None:
    args = parse_args()
    limit_memory(args.cap_gib)
    with (
        tempfile.TemporaryDirectory(dir=args.folder) as temporary,
        model_folder(args.model, args.configs, args.folder) as folder,
    ):
        # 720 px would not fill the larger budgets.
        rows = read_rows(write_rows(Path(temporary, "rows"), args.rows, enlarged=2), with_answer=True)
        plan = {"model": folder, "cache": f"{temporary}/cache", "stored": True}
        base = None
        for size in args.sizes:
            own = Ours(plan, rows, size, base)
            shape = {"model": Path(args.model).name, "image_size": size, "rows": args.rows}
            shape["device"] = torch.cuda.get_device_name() if ON_GPU else "CPU"
            runs = [(1, 0), (MANY, 0), *((1, layer) for layer in args.first_layers)]
            for permutations, layer in runs if size in args.train_sizes else ():
                line = {"what": "training", "permutations": permutations, "lora_first_layer": layer}
                write_line(shape | line | trained(own, permutations, layer, args.steps, temporary), args.output)
            for line in predicted(own):
                write_line(shape | line, args.output)
            base = own.base


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", type=Path, help="folder of config_3B.json, ... and Qwen's vocabulary")
    parser.add_argument("--model", default="3B", help="name in it, or a model folder (default: 3B)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[384, 768, 1024], help="default: 384 768 1024")
    parser.add_argument(
        "--train_sizes", type=int, nargs="+", default=[384, 768], help="those to train at (default: 384 768)"
    )
    parser.add_argument("--first_layers", type=int, nargs="*", default=[], help="of adapters on the top layers alone")
    parser.add_argument("--rows", type=int, default=16, help="rows of a batch, each with its own image (default: 16)")
    parser.add_argument("--steps", type=int, default=5, help="timed training steps (default: 5)")
    parser.add_argument("--cap_gib", type=float, default=40, help="GPU memory (default: 40)")
    parser.add_argument("--folder", help="for the temporary weights (default: the system's)")
    parser.add_argument("--output", help="file to which the JSON lines are appended")
    return parser.parse_args()


def trained(own: Ours, permutations: int, first_layer: int, steps: int, folder: str) -> dict:
    """Wall time, kernel time and arithmetic of a row in training, tokens of a row, and the estimate over the peak."""
    model = add_adapter(own.base, ADAPTER["r"], ADAPTER["lora_alpha"], ADAPTER["lora_dropout"], first_layer)
    count = len(own.rows)
    sizes = oriented_sizes(all_images(own.rows))
    lengths = replace(count_tokens(own.rows, own.collate, sizes, False, permutations), patches=0)
    shape = meta_model(replace(own.model_args, lora_first_layer=first_layer), own.dtype)
    setup = Setup(shape, ON_GPU, checkpointing=True, averages=0)
    recipe = RecipeArguments(
        output_dir=f"{folder}/run",
        permutations_per_step=permutations,
        effective_batch_size=count,
        gradient_checkpointing=True,
        num_train_epochs=1,
        fp16=ON_GPU,
        **dict.fromkeys(("eval_strategy", "save_strategy", "logging_strategy"), "no"),
        disable_tqdm=True,
    )
    train_rows = TrainDataset(own.rows * (steps + 4), True, 42, permutations)
    collate, clock = TreeCollator(own.collate) if permutations > 1 else own.collate, Clock(steps, 0)
    trainer = FoldTrainer(
        model,
        recipe,
        data_collator=PositionCollator(collate, model),
        train_dataset=train_rows,
        eval_dataset=[],
        callbacks=[SetEpochCallback(train_rows), clock],
        weight_averages=[],
        letter_ids=own.ids,
        prompts=own.prompts,
    )
    line = measured(trainer.train, clock, count)
    own.base = model.unload()
    own.base.gradient_checkpointing_disable()
    if line.get("peak_gib"):
        line["estimate"] = round(training_peak(setup, lengths.batch(count)) / GIB / line["peak_gib"], 3)
    return {"tokens": round(float(lengths.tokens.mean()), 1)} | line


def predicted(own: Ours) -> Iterator[dict]:
    """Wall time and kernel time of a row in prediction: one permutation, and several in both ways."""
    model = add_adapter(own.base, ADAPTER["r"], ADAPTER["lora_alpha"], 0.0)
    count = len(own.rows)
    rows = [{**row, "permutations": rotations([*range(len(row["choices"]))], MANY)} for row in own.rows * 2]
    score_by = partial(scoring._letter_probs, model, rows)
    ways = {
        (1, "one pass"): partial(scoring.score_rows, model, rows, own.prompts),
        (MANY, "KV cache"): partial(score_by, PermutationCollator(own.prompts), permutation_logits),
        (MANY, "tree"): partial(score_by, TreeCollator(own.prompts), tree_permutation_logits),
    }
    for (permutations, how), score in ways.items():
        work = partial(score, own.ids, count)
        work()
        seconds = min(timed(work) for _ in range(3))
        line = {"what": "prediction", "permutations": permutations, "how": how}
        line["rows_per_second"] = round(len(rows) / seconds, 2)
        if ON_GPU:
            with profile(activities=[ProfilerActivity.CUDA]) as profiler:
                work()
                torch.cuda.synchronize()
            line["kernel_ms_per_row"] = round(1000 * busy_seconds(kernels(profiler)) / len(rows), 3)
        yield line
    own.base = model.unload()


if __name__ == "__main__":
    run_main(main)
