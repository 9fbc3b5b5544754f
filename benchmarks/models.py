"""Speed, memory and largest micro-batch of several models, each limited to the memory of a T4.

    python benchmarks/models.py SHAPES/config_qwen3_vl_4B.json SHAPES/config_qwen3_5_4B.json --vocabulary QWEN_FOLDER
    python benchmarks/models.py checkpoints/tiny --sizes 126 --steps 3              # a dry run; no GPU needed

Each model has random weights in the shape of its config, 4 bits and fp16 on a GPU, rank 16. It trains 20 steps and
predicts, with stored vision features. One JSON line is written for each model, image size and number of rows per step;
`estimate` is the doctor's estimate of the peak, before any weight was loaded, divided by the peak.

    python benchmarks/models.py CONFIG.json --estimate --sizes 384 512 768 1024       # a Markdown row; no GPU needed

writes estimates alone: GiB with one row at once, and with as many of 32 rows as fit, where activations are recomputed.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the script runs from anywhere
from clock import ON_GPU, limit_memory, write_line  # noqa: E402
from compare import write_rows  # noqa: E402
from contestants import Ours  # noqa: E402
from random_model import write_random_model  # noqa: E402

from vqa.config.arguments import ModelArguments  # noqa: E402
from vqa.core.cli import make_parser  # noqa: E402
from vqa.data.images import image_tokens, target_size  # noqa: E402
from vqa.data.rows import read_rows  # noqa: E402
from vqa.training.batching import SLACK  # noqa: E402
from vqa.training.memory import GIB, Batch, Setup, meta_model, training_peak  # noqa: E402

TEXT_TOKENS = 94  # of a row of these measurements


def main() -> None:
    args = parse_args()
    if len(args.models) > 1:  # each in its own process: a failure does not end the others
        own = sys.argv[1:]
        others = [word for word in own if word not in args.models]
        codes = [subprocess.run([sys.executable, __file__, model, *others]).returncode for model in args.models]
        sys.exit(max(codes))
    if args.estimate:
        return print(estimated_row(Path(args.models[0]), args))
    with tempfile.TemporaryDirectory() as temporary:
        measure(args.models[0], args, Path(temporary))


def parse_args():
    parser = make_parser(__doc__)
    parser.add_argument("models", nargs="+", help="config files of the shapes, or model folders")
    parser.add_argument("--vocabulary", type=Path, help="folder of Qwen2's vocabulary")
    parser.add_argument("--sizes", type=int, nargs="+", default=[384, 768], help="image_size (default: 384 768)")
    parser.add_argument("--effective", type=int, nargs="+", default=[16], help="rows per step (default: 16)")
    parser.add_argument("--estimate", action="store_true", help="only print the doctor's estimates")
    parser.add_argument("--only_training", action="store_true", help="no predictions")
    parser.add_argument("--rows", type=int, default=32, help="rows, each with its own image (default: 32)")
    parser.add_argument("--steps", type=int, default=20, help="optimiser steps (default: 20)")
    parser.add_argument("--cap_gib", type=float, default=14.5, help="GPU memory (default: 14.5, as on a T4)")
    parser.add_argument("--output", help="file to which the JSON lines are appended")
    return parser.parse_args()


def measure(name: str, args, temporary: Path) -> None:
    folder, start = name, time.time()
    if not Path(name).is_dir():
        folder = str(temporary / "model")
        write_random_model(Path(name), folder, args.vocabulary)
        print(f"{name}: random weights written in {time.time() - start:.0f} s", file=sys.stderr, flush=True)
    limit_memory(args.cap_gib)
    csv = write_rows(temporary / "rows", args.rows, enlarged=2)  # 720 px would not fill the larger budget
    plan = {"model": folder, "stored": True, "cache": str(temporary / "cache"), "folder": str(temporary)}
    plan |= {"steps": args.steps, "seconds": 0, "workers": 0, "predict_rows": 2 * args.rows}
    plan["predict_batches"] = [] if args.only_training else [16]
    base = None
    shape = {"model": Path(name).stem.removeprefix("config_")}
    device = {"device": torch.cuda.get_device_name() if ON_GPU else "CPU"}
    for size in args.sizes:
        try:
            own = Ours(plan, read_rows(csv, with_answer=True), size, base)
            encoded = {"images_encoded_per_second": round(1 / own.seconds_an_image, 1)}
            for effective in args.effective:
                line = own.trained(effective)
                if line.get("peak_gib"):
                    line["estimate"] = round(estimated_peak(own, line) / GIB / line["peak_gib"], 3)
                write_line(shape | {"image_size": size} | line | encoded | device, args.output)
            for line in own.answered():
                write_line(shape | {"image_size": size} | line | device, args.output)
            base = own.base
        except torch.OutOfMemoryError:
            write_line(shape | {"image_size": size, "failed": "out of memory"} | device, args.output)


def estimated_row(config: Path, args) -> str:
    """`| model | GiB with 1 row; GiB with the most rows (rows) | ... |`, a cell for each image size."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(config, Path(folder, "config.json"))
        model = meta_model(ModelArguments(model=folder), torch.float16)
    setup = Setup(model, load_in_4bit=True, checkpointing=True, averages=0)
    cells, patch = [config.stem.removeprefix("config_")], model.config.vision_config.patch_size
    for size in args.sizes:
        tokens = TEXT_TOKENS + image_tokens(*target_size(size, size, size, patch=patch), patch)
        peaks = {rows: training_peak(setup, Batch(rows, tokens, 0)) / GIB for rows in (1, 2, 4, 8, 16, 32)}
        most = max((rows for rows, peak in peaks.items() if peak <= SLACK * args.cap_gib), default=1)
        cells.append(f"{peaks[1]:.1f}; {peaks[most]:.1f} ({most})")
    return f"| {' | '.join(cells)} |"


def estimated_peak(own: Ours, line: dict) -> int:
    setup = Setup(meta_model(own.model_args, own.dtype), ON_GPU, line["checkpointing"])
    batch = own.lengths.batch(line["micro"])
    return training_peak(setup, replace(batch, patches=0))  # features are stored: no image is encoded


if __name__ == "__main__":
    main()
