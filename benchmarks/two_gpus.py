"""Time the ways to use two GPUs, and compare their results: a fold on each, one fold on both (DDP), and prediction.

    python benchmarks/two_gpus.py --configs QWEN_FOLDER --output benchmarks/results/two_gpus.jsonl
    python benchmarks/two_gpus.py --model checkpoints/tiny          # a dry run on two CPU processes

The model has random weights in the shape of `config_3B.json` in QWEN_FOLDER (which also has Qwen's vocabulary).
Seconds are those of the command with its start. DDP is compared with the fold on the first GPU, which runs beside the
other fold; prediction on both GPUs is compared with prediction on one.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that the script runs from anywhere
from clock import write_line  # noqa: E402
from compare import write_rows  # noqa: E402
from random_model import write_random_model  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from vqa.core.cli import make_parser  # noqa: E402
from vqa.core.io import read_json, write_json  # noqa: E402
from vqa.data.predictions import read_predictions  # noqa: E402

ON_GPU = torch.cuda.is_available()
RECIPE = {
    "load_in_4bit": ON_GPU,
    "fp16": ON_GPU,
    "image_size": 384 if ON_GPU else 126,
    "effective_batch_size": 16,
    "max_steps": 20 if ON_GPU else 3,
    "learning_rate": 1e-4,
    "adam_epsilon": 1e-3,  # with the usual one, a weight whose gradient is rounding noise moves as far as any other
    "lora_dropout": 0.0,  # two processes draw other random numbers than one
    "ema_decay": 0.9,
    "save_strategy": "no",
    "disable_tqdm": True,
}


def main() -> None:
    args = parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = args.model or make_model(args.configs / "config_3B.json", folder / "model")
        folds = prepare_contest(folder, model, args.rows)
        train_each(folder, folds, args.output)
        train_both(folder, folds, args.output)
        predict(folder, args.output)


def parse_args():
    parser = make_parser(__doc__)
    parser.add_argument("--configs", type=Path, help="folder of config_3B.json and Qwen's vocabulary")
    parser.add_argument("--model", help="a model folder, in place of random weights")
    parser.add_argument("--rows", type=int, default=480 if ON_GPU else 48, help="rows of the contest (default: 480)")
    parser.add_argument("--output", type=Path, help="file to which the JSON lines are appended")
    args = parser.parse_args()
    if not args.model and not args.configs:
        parser.error("give --configs or --model")
    return args


def make_model(config: Path, folder: Path) -> str:
    write_random_model(config, folder)
    torch.cuda.empty_cache()
    return str(folder)


def prepare_contest(folder: Path, model: str, rows: int) -> list[Path]:
    """Draw a contest and its folds file; returns the args files of two folds."""
    csv = write_rows(folder / "rows", rows)
    base = RECIPE | {"model": model, "train_csv": str(csv), "test_csv": str(csv)}
    base |= {"folds_csv": str(folder / "folds.csv"), "vision_cache_dir": str(folder / "vision_cache")}
    files = [folder / f"fold{number}.json" for number in (0, 1)]
    for number, path in enumerate(files):
        write_json(path, base | {"fold": number})
    run([sys.executable, "make_folds.py", files[0]])
    return files


def train_each(folder: Path, folds: list[Path], output: Path | None) -> None:
    start = time.time()
    jobs = [
        launch([sys.executable, "train_fold.py", path, "--output_dir", folder / path.stem], gpu=number)
        for number, path in enumerate(folds)
    ]
    wait(jobs)
    metrics = [read_json(folder / path.stem / "metrics.json") for path in folds]
    rate = sum(m["rows_per_second"] for m in metrics)
    write_way("train, a fold on each", time.time() - start, rate, metrics[0]["peak_gpu_gib"], {"folds": 2}, output)


def train_both(folder: Path, folds: list[Path], output: Path | None) -> None:
    start = time.time()
    run([*on_both(), "train_fold.py", folds[0], "--output_dir", folder / "ddp"])
    seconds = time.time() - start
    metrics = read_json(folder / "ddp" / "metrics.json")
    one, both = ([*lora_b(folder / name)] for name in ("fold0", "ddp"))
    agreement = {
        "cosine_of_lora_b": torch.nn.functional.cosine_similarity(torch.cat(one), torch.cat(both), dim=0).item(),
        "out_of_fold_probability": largest_difference(folder / "fold0" / "oof.csv", folder / "ddp" / "oof.csv"),
    }
    write_way(
        "train, one fold on both (DDP)",
        seconds,
        metrics["rows_per_second"],
        metrics["peak_gpu_gib"],
        {"folds": 1, "agreement": agreement},
        output,
    )


def predict(folder: Path, output: Path | None) -> None:
    for name, launcher, gpu in (("one GPU", [sys.executable], 0), ("both GPUs", on_both(), None)):
        start, outputs = time.time(), folder / name.replace(" ", "_")
        command = [*launcher, "predict.py", folder / "fold0", "--num_permutations", 4, "--output_dir", outputs]
        wait([launch(command, gpu)])
        seconds, card = time.time() - start, read_json(outputs / "fold0.json")
        extra = {}
        if gpu is None:
            difference = largest_difference(folder / "one_GPU" / "fold0.csv", outputs / "fold0.csv")
            extra = {"agreement": {"probability": difference}}
        rows = len(read_predictions(outputs / "fold0.csv")[0])
        write_way(f"predict four permutations, {name}", seconds, rows / card["seconds"], None, extra, output)


def lora_b(adapter: Path) -> list[torch.Tensor]:
    weights = load_file(adapter / "adapter_model.safetensors")
    return [weights[name].flatten() for name in sorted(weights) if "lora_B" in name]


def largest_difference(one: Path, other: Path) -> float:
    """The largest difference of a probability between two prediction files of the same rows."""
    (ids, first), (other_ids, second) = read_predictions(one), read_predictions(other)
    assert ids == other_ids
    return float(abs(first - second).max())


def on_both() -> list[str]:
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    if ON_GPU:
        return [*command, "--config_file", "args/accelerate/two_gpus.yaml"]
    return [*command, "--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]


def launch(command: list, gpu: int | None = None) -> subprocess.Popen:
    visible = {"CUDA_VISIBLE_DEVICES": str(gpu)} if ON_GPU and gpu is not None else {}
    return subprocess.Popen(list(map(str, command)), cwd=ROOT, env=os.environ | visible, stdout=sys.stderr)


def wait(jobs: list[subprocess.Popen]) -> None:
    for job in jobs:
        if job.wait():
            raise SystemExit(f"{' '.join(job.args)} ended with code {job.returncode}")


def run(command: list) -> None:
    wait([launch(command)])


def write_way(way: str, seconds: float, rate: float, peak: float | None, extra: dict, output: Path | None) -> None:
    line = {"way": way, "seconds": round(seconds, 1), "rows_per_second": round(rate, 1), "peak_gib": peak} | extra
    line["device"] = torch.cuda.get_device_name() if ON_GPU else "CPU"
    write_line(line, output)


if __name__ == "__main__":
    main()
