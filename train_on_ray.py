"""Train many runs on a Ray cluster, each as a task with the GPUs that it needs. Ray is optional: `pip install ray`.

    python train_on_ray.py args/fold*.json args/7b/fold*.json             # on this machine's GPUs, one for each run
    python train_on_ray.py args/fold*.json --seeds 42 43 --address auto   # on the cluster that `ray start` made
    python train_on_ray.py args/7b/fold*.json --gpus 2 --num_train_epochs 5   # other flags are those of train_fold.py

All nodes have to share the project's folder at the same path: runs read the data and write checkpoints/ there. With
--seeds a run is in checkpoints/seed42/. A run whose node is lost continues on another one from its latest checkpoint.
A run that fails is reported, and the others go on. Run the same command again to continue: finished runs are skipped.
"""

import argparse
import sys
from pathlib import Path

from vqa.core.cli import die_with_parent, make_parser
from vqa.core.errors import UserError, run_main
from vqa.core.io import swap_root

PROJECT = Path(__file__).resolve().parent
OUTCOMES = {0: "finished", 3: "stopped by max_hours; run the same command again"}


def main() -> None:
    args, flags = parse_args()
    try:
        import ray
    except ImportError:
        raise UserError("Ray is not installed. Run `pip install ray`, or train with `bash run.sh args`.") from None
    ray.init(address=args.address)

    @ray.remote(num_gpus=args.gpus, num_cpus=args.cpus, max_retries=-1)  # again only where a node or a worker is lost
    def train(command: list[str], folder: str) -> int:
        import subprocess

        return subprocess.run(command, cwd=folder).returncode

    runs = {name: train_command(name, args.gpus, flags) for name in run_names(args.args_files, args.seeds)}
    tasks = {train.remote(command, str(PROJECT)): name for name, command in runs.items()}
    failed = 0
    while tasks:
        (task, *_), _ = ray.wait(list(tasks))
        name, code = tasks.pop(task), ray.get(task)
        failed += code != 0
        print(f"{' with seed '.join(filter(None, name))}: {OUTCOMES.get(code, f'failed with exit code {code}')}")
    if failed:
        raise UserError(f"{failed} of {len(runs)} runs are not finished. The lines above say why.")


def parse_args() -> tuple[argparse.Namespace, list[str]]:
    """(arguments of this script, flags for training)."""
    parser = make_parser(__doc__, usage="python train_on_ray.py ARGS.json ... [--gpus N] [--field value ...]")
    parser.add_argument("args_files", nargs="+", metavar="ARGS.json", help="args files, one run each")
    parser.add_argument("--seeds", nargs="+", default=[""], metavar="N", help="train each args file with each seed")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs of a run (default: 1)")
    parser.add_argument("--cpus", type=int, default=1, metavar="N", help="CPU cores of a run (default: 1)")
    parser.add_argument("--address", help="a cluster, or auto (default: this machine alone)")
    return parser.parse_known_args()


def run_names(args_files: list[str], seeds: list[str]) -> list[tuple[str, str]]:
    """(args file, seed) of each run; the seed is blank where the args file decides it."""
    return [(args_file, seed) for args_file in args_files for seed in seeds]


def train_command(name: tuple[str, str], gpus: int, flags: list[str]) -> list[str]:
    """The command that trains a run. It ends when the Ray worker that started it ends: two would share a folder."""
    args_file, seed = name
    launch = [sys.executable]
    if gpus > 1:
        launch += ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(gpus)]
        launch += ["--main_process_port", "0"]  # one that is free
    if seed:
        folder = swap_root(f"checkpoints/seed{seed}", Path(args_file).with_suffix(""), below="args")
        flags = [*flags, "--seed", seed, "--output_dir", str(folder)]
    return die_with_parent([*launch, "train_fold.py", args_file, "--resume_from_checkpoint", "auto", *flags])


if __name__ == "__main__":
    run_main(main)
