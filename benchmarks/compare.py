"""Compare this project with a plain Trainer and TRL: rows per second in training and prediction, memory, a full job.

    python benchmarks/compare.py                                            # the tiny model on a CPU: two minutes
    python benchmarks/compare.py --configs QWEN_FOLDER --models 3B 7B       # random weights in real shapes, on a GPU

Each contestant runs in its own process, which may use `--cap_gib` of the GPU's memory, with the same rows, the same
adapter rank and the same effective batches:

    plain   a plain Trainer + PEFT with `prepare_model_for_kbit_training`, at its best micro-batch. With micro-batch 1
            it is the notebook recipe, which predicts with `generate`.
    trl     TRL's SFTTrainer on prompt and completion, in bf16, if TRL is installed
    ours    this project with `auto_batch`; "not stored" uses no stored vision features, "sizes" uses several image
            sizes

All have adapters on the language model only. "plain bare" and "trl bare" name the layers as most notebooks do, by bare
names, which also match the MLPs of the vision tower. Unsloth and ms-swift need other packages: see peers.py, which
appends to the same file.

Every measurement is appended to compare.jsonl in the output folder: rows per second, and what carries over to a slower
GPU, the time of its kernels and the arithmetic. summary.json, summary.md and compare.png are made of them at the end
(`--summary` makes only these).
"""

import argparse
import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the script runs from anywhere
from random_model import write_random_model  # noqa: E402

from vqa.core.errors import run_main  # noqa: E402
from vqa.core.io import write_json  # noqa: E402
from vqa.training.speed import T4_OPERATIONS  # noqa: E402

HERE = Path(__file__).resolve().parent
TINY = HERE.parent / "checkpoints" / "tiny"
WORDS = "빨간 파란 노란 우산 자전거 간판 아이 사람 버스 나무 강아지 건물 신호등 가방 의자 표지판".split()
LARGER = [128]  # rows per step, for this project only: how close it gets to the limit of the GPU
BARE = ", vision MLPs too"  # a contestant whose adapters are not on the language model only
JOB = {"train_rows": 3887, "test_rows": 3887, "folds": 3, "epochs": 3}


def main() -> None:
    args = parse_args()
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    if not args.summary:
        with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
            for name in args.models:
                measure(name, args, Path(temporary), folder / "compare.jsonl")
    lines = [json.loads(line) for line in (folder / "compare.jsonl").read_text().splitlines()]
    summary = summarise(lines)
    write_json(folder / "summary.json", summary)
    (folder / "summary.md").write_text(markdown(summary), encoding="utf-8")
    plot(summary, folder / "compare.png")
    print(markdown(summary))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", type=Path, help="folder of config_3B.json, ... and Qwen's vocabulary")
    parser.add_argument("--models", nargs="+", help="names in it, or model folders (default: the tiny model)")
    usual = ["plain", "trl", "ours", "not stored", "sizes", "plain bare", "trl bare"]
    parser.add_argument("--contestants", nargs="+", default=usual, choices=usual, help="(default: all)")
    parser.add_argument("--effective", type=int, nargs="+", help="rows per step (default: 4 32, on a CPU 4 16)")
    parser.add_argument("--micro", type=int, nargs="+", default=[1, 4, 8, 16, 32], help="(default: 1 4 8 16 32)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[384, 512, 768, 1024], help="for the memory table")
    parser.add_argument("--rows", type=int, help="rows, each with its own image (default: 128, on a CPU 32)")
    parser.add_argument("--steps", type=int, default=3, help="minimum of optimiser steps (default: 3)")
    parser.add_argument("--seconds", type=float, help="and of seconds after the first (default: 8, on a CPU 1)")
    parser.add_argument("--workers", type=int, default=2, help="processes that decode images (default: 2)")
    parser.add_argument("--cap_gib", type=float, default=14.5, help="GPU memory for each (default: 14.5, as on a T4)")
    parser.add_argument("--folder", help="for temporary weights and images (default: the system's)")
    parser.add_argument("--output", default="outputs/compare", help="folder of the results (default: outputs/compare)")
    parser.add_argument("--only_training", action="store_true", help="no predictions")
    parser.add_argument("--summary", action="store_true", help="only make summary and plot of earlier measurements")
    args = parser.parse_args()
    args.models = args.models or [str(TINY)]
    on_gpu = torch.cuda.is_available()
    args.effective = args.effective or ([4, 32] if on_gpu else [4, 16])
    args.rows = args.rows or (128 if on_gpu else 32)
    args.seconds = args.seconds or (8 if on_gpu else 1)
    return args


def write_rows(folder: Path, count: int, enlarged: int = 1) -> Path:
    """Questions as long as in a contest, and images of 720 px times `enlarged`, with several aspect ratios."""
    folder.mkdir(exist_ok=True)
    rng, lines = random.Random(0), ["id,path,question,a,b,c,d,answer"]
    for i in range(count):
        size = rng.choice([(720, 540), (720, 480), (540, 720), (720, 720)])
        size = (size[0] * enlarged, size[1] * enlarged)
        Image.effect_noise(size, 80).convert("RGB").save(folder / f"{i}.jpg", quality=85)
        phrase = lambda words: " ".join(rng.choices(WORDS, k=words))  # noqa: E731
        choices = ",".join(f"{phrase(rng.randint(2, 4))} {letter}" for letter in "가나다라")
        lines.append(
            f"row_{i},{i}.jpg,사진에서 {phrase(rng.randint(3, 9))} 옆에 무엇이 있나요?,{choices},{rng.choice('abcd')}"
        )
    (folder / "rows.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "rows.csv"


def measure(name: str, args: argparse.Namespace, temporary: Path, output: Path) -> None:
    tiny, ready = Path(name).resolve() == TINY, Path(name, "config.json").is_file()
    model = Path(name) if ready else temporary / name
    if not ready:
        write_random_model(args.configs / f"config_{name}.json", model)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    plan = {
        "name": Path(name).name,
        "model": str(model),
        "csv": str(write_rows(temporary / "rows", args.rows)),
        "image_size": 126 if tiny else 384,
        "effective": args.effective,
        "larger": [] if tiny else LARGER,
        "micro": args.micro,
        "steps": args.steps,
        "seconds": args.seconds,
        "workers": args.workers,
        "cap_gib": args.cap_gib,
        "stored": True,
        "bare_names": False,
        "cache": str(temporary / "cache"),
        "folder": str(temporary),
        "predict_rows": 2 * args.rows if tiny else 6 * args.rows,  # a GPU is soon waiting for the workers to start
        "predict_batches": [] if args.only_training else [32] if tiny else [32, 64],
        "output": str(output),
    }
    for contestant in args.contestants:
        if contestant == "not stored":
            start(
                "ours",
                plan
                | {"stored": False, "effective": args.effective[-1:], "larger": [], "predict_rows": 2 * args.rows},
            )
        elif contestant == "sizes":
            if not tiny:  # its positions end at 384 px
                large = write_rows(temporary / "large", 32, enlarged=2)  # 720 px would not fill the larger budgets
                start(contestant, plan | {"csv": str(large), "sizes": args.sizes, "seconds": 3})
        elif "trl" not in contestant or importlib.util.find_spec("trl"):
            start(contestant.removesuffix(" bare"), plan | {"bare_names": contestant.endswith(" bare")})


def start(contestant: str, plan: dict) -> None:
    """Run one contestant in its own process. Measurements before a failure are kept."""
    with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as file:
        json.dump(plan, file)
    threads = {} if torch.cuda.is_available() else {"OMP_NUM_THREADS": "1"}  # threads do not help a tiny model
    command = [sys.executable, str(HERE / "contestants.py"), contestant, file.name]
    done = subprocess.run(command, env=os.environ | threads)
    os.unlink(file.name)
    if done.returncode:
        print(f"{contestant} on {plan['name']} ended with code {done.returncode}", file=sys.stderr, flush=True)


def summarise(lines: list[dict]) -> dict:
    """Per model and effective batch: the best rate of each contestant, and how many times faster ours is."""
    summary = {}
    for model in dict.fromkeys(line["model"] for line in lines):
        of_model = [line for line in lines if line["model"] == model]
        main = [line for line in of_model if line["contestant"] != "sizes"]
        steps = {}
        for effective in sorted(
            {line["effective"] for line in main if "rows_per_second" in line and line["effective"] > 1}
        ):
            steps[effective] = compared(best_rows(main, effective))
        summary[model] = {"training": steps, "answering": answering(main)}
        summary[model]["memory"] = [
            line for line in of_model if line.get("stored") and "peak_gib" in line and "micro" in line
        ]
        if steps:
            summary[model]["whole job, kernel hours"] = kernel_job(list(steps.values()))
        if together := [table for table in steps.values() if {"a: notebook recipe", "d: ours"} <= table.keys()]:
            summary[model]["whole job, hours"] = whole_job(together[-1], summary[model]["answering"])
    return summary


def best_rows(lines: list[dict], effective: int) -> dict[str, dict]:
    """Contestant -> its fastest measurement with this effective batch."""
    named: dict[str, list[dict]] = {}
    for line in (line for line in lines if "rows_per_second" in line):
        recipe = line["contestant"] == "plain" and line["micro"] == 1  # the same at every effective batch
        if recipe and effective not in LARGER:
            named.setdefault("a: notebook recipe", []).append(line)
        if line["effective"] == effective:
            named.setdefault(name_of(line), []).append(line)
    return {name: max(those, key=lambda line: line["rows_per_second"]) for name, those in sorted(named.items())}


def name_of(line: dict) -> str:
    names = {"plain": "b: plain Trainer + PEFT", "trl": "c: TRL SFTTrainer, bf16", "ours": "d: ours"}
    name = names.get(line["contestant"], f"c: {line['contestant']}")
    if line.get("bare_names"):
        name += BARE
    return name if line.get("stored", True) else f"{name}, features not stored"


def compared(best: dict[str, dict]) -> dict[str, dict]:
    """What the tables show of each contestant's best line; for ours, also how many times faster it is than others.

    `share_of_rate`: the arithmetic that a row needs, without recomputation and the same for all, over wall time, as a
    share of the rate of one large fp16 product. `kernel_share_of_rate`: over kernel time.
    """
    kept = ("rows_per_second", "micro", "checkpointing", "peak_gib", "tokens", "kernel_ms_per_row", "kernels_per_step")
    kept += ("tflop_per_row", "tflop_with_recomputation", "matrix_tflops")
    table = {name: {key: line[key] for key in kept if key in line} for name, line in best.items()}
    needed = [line["tflop_per_row"] for line in table.values() if "tflop_per_row" in line]
    for line in (line for line in table.values() if needed and "kernel_ms_per_row" in line):
        line["share_of_rate"] = round(needed[0] * line["rows_per_second"] / line["matrix_tflops"], 3)
        line["kernel_share_of_rate"] = round(1000 * needed[0] / line["kernel_ms_per_row"] / line["matrix_tflops"], 3)
    for line in (line for name, line in table.items() if name.startswith("d")):
        others = {name: other for name, other in table.items() if name[0] in "abc"}
        line["times"] = {
            name: round(line["rows_per_second"] / other["rows_per_second"], 1) for name, other in others.items()
        }
        if kernel := line.get("kernel_ms_per_row"):
            line["kernel_times"] = {
                name: round(other["kernel_ms_per_row"] / kernel, 1)
                for name, other in others.items()
                if "kernel_ms_per_row" in other
            }
    return table


def markdown(summary: dict) -> str:
    """Per model and rows per step a table of the contestants, then the whole job."""
    text = ""
    for model, found in summary.items():
        for effective, table in found["training"].items():
            heads = ("trainer", "rows per second", "ours", "kernel ms per row", "ours", "kernels per step")
            heads += ("share of fp16 rate, wall", "kernel", "rows at once", "GiB")
            ours = table.get("d: ours", {})
            lines = [
                (
                    name[3:],
                    line["rows_per_second"],
                    times(ours.get("times", {}).get(name)),
                    line.get("kernel_ms_per_row"),
                    times(ours.get("kernel_times", {}).get(name)),
                    line.get("kernels_per_step"),
                    line.get("share_of_rate"),
                    line.get("kernel_share_of_rate"),
                    line["micro"],
                    line.get("peak_gib"),
                )
                for name, line in table.items()
            ]
            text += f"{model}, {effective} rows per step:\n\n"
            for cells in (heads, ("---",) * len(heads), *lines):
                text += "| " + " | ".join("" if cell is None else str(cell) for cell in cells) + " |\n"
            text += "\n"
        if job := found.get("whole job, kernel hours"):
            text += f"{model}, whole job, kernel hours: {json.dumps(job)}\n\n"
    return text


def times(ratio: float | None) -> str | None:
    return None if ratio is None else f"{ratio} x"


def answering(lines: list[dict]) -> dict:
    """Predicted rows per second: `generate` of the recipe, and ours."""
    answers = [line for line in lines if "answers_per_second" in line]
    rates = {line["how"]: line["answers_per_second"] for line in answers}
    table = {"rows_per_second": rates}
    encoded = [line["images_encoded_per_second"] for line in lines if "images_encoded_per_second" in line]
    if encoded:
        table["images_encoded_per_second"] = encoded[0]
    if recipe := rates.get("generate, batch 1"):
        table["times"] = {how: round(rate / recipe, 1) for how, rate in rates.items() if how != "generate, batch 1"}
    return table


def kernel_job(tables: list[dict]) -> dict:
    """Hours that the GPU works for the training of a contest: 3,887 rows, three folds, three epochs, no validation.

    At the largest step that a peer was measured with. Ours: the training, and every image encoded once, which takes as
    long as a row without stored features takes more. `T4`: hours * this GPU's rate for fp16 products / 65 TFLOP/s,
    the T4's rate in NVIDIA's data sheet. A real T4 is slower, so it is a lower bound, good for the ratio.
    """
    measured = [
        {name: line for name, line in table.items() if "kernel_ms_per_row" in line and not name.endswith(BARE)}
        for table in tables
    ]
    peers = [table for table in measured if "d: ours" in table and any(name[0] == "c" for name in table)]
    if not peers:
        return {}
    table, rows = peers[-1], JOB["folds"] * JOB["epochs"] * JOB["train_rows"] * (JOB["folds"] - 1) / JOB["folds"]
    peer = min((name for name in table if name[0] == "c"), key=lambda name: table[name]["kernel_ms_per_row"])
    seconds = {name: rows * table[name]["kernel_ms_per_row"] / 1000 for name in (peer, "d: ours")}
    if not_stored := table.get("d: ours, features not stored"):
        encoding = not_stored["kernel_ms_per_row"] - table["d: ours"]["kernel_ms_per_row"]
        seconds["d: ours"] += JOB["train_rows"] * encoding / 1000
    found = {name[3:]: round(value / 3600, 3) for name, value in seconds.items()}
    found["times"] = round(seconds[peer] / seconds["d: ours"], 1)
    if rate := table["d: ours"].get("matrix_tflops"):
        slower = rate * 1e12 / T4_OPERATIONS
        found |= {f"{name[3:]}, T4": round(value * slower / 3600, 2) for name, value in seconds.items()}
    return found


def whole_job(steps: dict, answers: dict) -> dict:
    """Hours of a contest of 3,887 + 3,887 rows, three folds, three epochs, from the rates above.

    The recipe: folds * epochs * rows of two folds / training rate + folds * test rows / answering rate, and no
    validation at all. Ours: every image encoded once, the same training, after each epoch a validation of the third
    fold, and folds * test rows answered.
    """
    trained = JOB["folds"] * JOB["epochs"] * JOB["train_rows"] * (JOB["folds"] - 1) / JOB["folds"]
    validated = JOB["epochs"] * JOB["train_rows"]
    tested = JOB["folds"] * JOB["test_rows"]
    rates = answers["rows_per_second"]
    ours = [rate for how, rate in rates.items() if how.startswith("letters, batch") and "encoded" not in how]
    if "generate, batch 1" not in rates or not ours:
        return {}
    recipe = trained / steps["a: notebook recipe"]["rows_per_second"] + tested / rates["generate, batch 1"]
    encoding = (JOB["train_rows"] + JOB["test_rows"]) / answers["images_encoded_per_second"]
    own = encoding + trained / steps["d: ours"]["rows_per_second"] + (validated + tested) / max(ours)
    return {"recipe": round(recipe / 3600, 2), "ours": round(own / 3600, 2), "times": round(recipe / own, 1)}


def plot(summary: dict, path: Path) -> None:
    bars_of = {
        model: [
            (f"{name}, {effective} rows per step", line["rows_per_second"])
            for effective, table in found["training"].items()
            for name, line in table.items()
        ]
        for model, found in summary.items()
    }
    heights = [len(bars) + 2 for bars in bars_of.values()]
    figure = Figure(figsize=(8, 0.35 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(summary), 1, squeeze=False, height_ratios=heights)
    for axis, (model, bars) in zip(axes[:, 0], bars_of.items()):
        shown = axis.barh([label for label, _ in bars][::-1], [value for _, value in bars][::-1])
        axis.bar_label(shown, fmt="%.1f", padding=3)
        axis.set(title=f"{model}: training rows per second", xmargin=0.1)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    run_main(main)
