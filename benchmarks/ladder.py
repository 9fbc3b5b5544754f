"""Measure what each technique adds, on a larger demo contest whose test answers are known.

    make ladder                                            # three seeds; the table goes to outputs/ladder/ladder.md
    python benchmarks/ladder.py --seeds 42 --train_rows 60 --test_rows 100 --max_steps 8      # a quick look

Each seed makes its own folds and trains its own models with the documented command lines: train_fold.py for a
baseline, three folds, and three folds with larger images; predict.py for raw, EMA and SWA weights and with TTA. All
seeds predict the same test rows. Each rung is compared with the rung that it builds on, over all seeds at once, with
intervals clustered by row. Run again, the script continues where it stopped.
"""

import argparse
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from vqa.core.errors import UserError, run_main  # noqa: E402
from vqa.core.io import atomic_write, read_json, write_json  # noqa: E402
from vqa.data.predictions import join, validation_scores  # noqa: E402
from vqa.data.table import read_table  # noqa: E402
from vqa.evaluation.ensembling import ensemble, fit, score_weights  # noqa: E402
from vqa.evaluation.labels import Labels  # noqa: E402
from vqa.evaluation.metrics import accuracy, row_log_loss  # noqa: E402
from vqa.evaluation.oof import WEIGHTS, load_oof  # noqa: E402
from vqa.evaluation.significance import WORDS, compare  # noqa: E402

FOLDS = 3
LARGER = 154  # px, against the demo's 126
PERMUTATIONS, SCALES = ["--num_permutations", "4"], ["--scales", "0.9", "1.0", "1.1"]
MAJORITY = "3 folds, majority"  # votes are not probabilities, so it has no log-loss
# Each rung, and the rung that it builds on.
RUNGS = {
    "base model, untrained": None,
    "200 rows, one epoch": "base model, untrained",
    "one fold": "200 rows, one epoch",
    "one fold, EMA": "one fold",
    "one fold, SWA": "one fold",
    MAJORITY: "one fold",
    "3 folds, weighted": "one fold",
    "3 folds, raw + EMA + SWA stacked": "3 folds, weighted",
    "3 folds, + permutations": "3 folds, weighted",
    "3 folds, + permutations + scales": "3 folds, + permutations",
    "3 folds, + permutations + larger images": "3 folds, + permutations",
}
# Every rung against the rung it builds on, and at the end the best cheap one against a single fold.
COMPARED = [*RUNGS.items(), ("3 folds, + permutations", "one fold")]


def main() -> None:
    args, start = parse_args(), time.time()
    places = Places(Path(args.root))
    draw_contest(places, args)
    steps = [(seed, words) for seed in args.seeds for words in commands(places, seed, args)]
    with tqdm(total=len(steps), desc="ladder", unit=" commands") as bar, ThreadPoolExecutor(args.jobs) as pool:

        def run_seed(seed: int) -> None:
            for words in [words for other, words in steps if other == seed]:
                run_command(words, places.outputs / f"{seed}.log", args.jobs)
                bar.update()

        list(pool.map(run_seed, args.seeds))
    table = compare_rungs([read_rungs(places, seed) for seed in args.seeds], Labels(places.data / "test_answers.csv"))
    write_table(places.outputs, table, args, time.time() - start)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44], help="(default: 42 43 44)")
    parser.add_argument("--train_rows", type=int, default=360, help="of the contest (default: 360)")
    parser.add_argument("--test_rows", type=int, default=600, help="of the contest (default: 600)")
    parser.add_argument("--max_steps", type=int, help="optimiser steps of each training (default: as in args/demo)")
    parser.add_argument("--jobs", type=int, default=3, help="seeds that run at the same time (default: 3)")
    parser.add_argument("--root", default=".", help="where data/, checkpoints/ and outputs/ are (default: here)")
    return parser.parse_args()


class Places:
    """The ladder's folders."""

    def __init__(self, root: Path):
        self.data, self.checkpoints, self.outputs = (
            root / name / "ladder" for name in ("data", "checkpoints", "outputs")
        )


def draw_contest(places: Places, args: argparse.Namespace) -> None:
    wanted, answers = (args.train_rows, args.test_rows), places.data / "test_answers.csv"
    if answers.is_file():  # it is written last
        found = tuple(len(read_table(places.data / name, ("id",))) for name in ("train.csv", answers.name))
        if found != wanted:
            raise UserError(f"{places.data} has {found} rows (train, test) instead of {wanted}; delete that folder")
        return
    rows = ["--train_rows", str(args.train_rows), "--test_rows", str(args.test_rows)]
    run_command(["data/make_demo.py", *rows, "--output_dir", str(places.data)], places.outputs / "contest.log", 1)


def commands(places: Places, seed: int, args: argparse.Namespace) -> list[list[str]]:
    """The command lines of one seed, in order. Writes the args files that they name."""
    checkpoints, outputs = places.checkpoints / str(seed), places.outputs / str(seed)
    folds, larger = ([f"{kind}fold{i}" for i in range(FOLDS)] for kind in ("", "larger/"))
    runs = {name: {"fold": i} for i, name in enumerate(folds)}
    runs |= {name: {"fold": i, "image_size": LARGER} for i, name in enumerate(larger)}
    runs["baseline"] = {"fold": 0, "max_train_rows": 200, "num_train_epochs": 1}
    files = {name: outputs / "args" / f"{name}.json" for name in runs}
    for name, fields in runs.items():
        shared = {
            "extends": os.path.relpath(ROOT / "args" / "demo" / "base.json", files[name].parent),
            "train_csv": str(places.data / "train.csv"),
            "test_csv": str(places.data / "test.csv"),
            "folds_csv": str(places.data / f"folds_{seed}.csv"),
            "vision_cache_dir": str(places.checkpoints / "vision_cache"),
            "output_dir": str(checkpoints / name),
            "seed": seed,
        }
        write_json(files[name], shared | fields | ({"max_steps": args.max_steps} if args.max_steps else {}))

    def predict(output: str, names: list[str], *flags: str) -> list[str]:
        checked = ["--check_generation", "0", "--output_dir", str(outputs / output)]
        return ["predict.py", *(str(checkpoints / name) for name in names), *flags, *checked]

    return [
        ["make_folds.py", str(files["fold0"]), "--folds", str(FOLDS), "--seed", str(seed)],
        *(["train_fold.py", str(file), "--resume_from_checkpoint", "auto"] for file in files.values()),
        predict("raw", ["baseline", *folds], "--weights", "raw", "--base", str(files["fold0"])),
        predict("ema", folds, "--weights", "ema"),
        predict("swa", folds, "--weights", "swa"),
        predict("permutations", folds, *PERMUTATIONS),
        predict("scales", folds, *PERMUTATIONS, *SCALES),
        predict("larger", larger, *PERMUTATIONS),
    ]


def run_command(words: list[str], log: Path, jobs: int) -> None:
    """Run one of the project's scripts; its output is appended to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
    one_gpu = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")}
    with open(log, "a", encoding="utf-8") as file:
        done = subprocess.run(
            [sys.executable, *words],
            cwd=ROOT,
            env=os.environ | threads | one_gpu,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    if done.returncode:
        raise UserError(f"`python {' '.join(words)}` failed with exit code {done.returncode}; see {log}")


def read_rungs(places: Places, seed: int) -> list[tuple[list[str], np.ndarray]]:
    """(ids, probabilities (rows, letters)) of one seed's rungs, in the order of RUNGS."""
    outputs, names = places.outputs / str(seed), [f"fold{i}.csv" for i in range(FOLDS)]
    sets = {name: [outputs / name / file for file in names] for name in (*WEIGHTS, "permutations", "scales", "larger")}
    best = [read_json(places.checkpoints / str(seed) / Path(name).stem / "metrics.json")["best"] for name in names]
    chosen = [outputs / weights / name for weights, name in zip(best, names)]

    def alone(file: Path) -> tuple[list[str], np.ndarray]:
        ids, stack = join([file])
        return ids, stack[0]

    def weighted(files: list[Path]) -> tuple[list[str], np.ndarray]:
        ids, stack = join(files)
        return ids, ensemble(stack, "weighted", score_weights(validation_scores(files, "log_loss"), "log_loss"))

    def stacked(models: dict[str, list[Path]]) -> tuple[list[str], np.ndarray]:
        oof = load_oof({name: [str(file) for file in files] for name, files in models.items()})
        ids, stack = join([file for files in models.values() for file in files])
        members = stack.reshape(len(models), FOLDS, *stack.shape[1:]).mean(1)
        return ids, fit("stack", oof.stack, oof.answers)(members)

    ids, stack = join(chosen)
    return [
        alone(outputs / "raw" / "base" / "base.csv"),
        alone(outputs / "raw" / "baseline.csv"),
        *(alone(sets[weights][0]) for weights in WEIGHTS),
        (ids, ensemble(stack, "majority")),
        weighted(chosen),
        stacked({weights: sets[weights] for weights in WEIGHTS}),
        *(weighted(sets[name]) for name in ("permutations", "scales", "larger")),
    ]


def compare_rungs(seeds: list[list[tuple[list[str], np.ndarray]]], labels: Labels) -> list[dict]:
    """One line for each of COMPARED, over the rows of all seeds: a rung's scores, and its difference to another rung.

    All seeds predict the same test rows, so the intervals are clustered by row.
    """
    ids = seeds[0][0][0]
    answers = np.tile(labels.answers(ids), len(seeds))
    clusters = {"row": np.tile(np.arange(len(ids)), len(seeds))}
    values = {name: np.concatenate([rungs[i][1] for rungs in seeds]) for i, name in enumerate(RUNGS)}
    table = []
    for name, before in COMPARED:
        right = accuracy(values[name].argmax(1) == answers, clusters)
        line = {"rung": name, "accuracy": right.value, "low": right.low, "high": right.high}
        line["log_loss"] = None if name == MAJORITY else float(row_log_loss(values[name], answers).mean())
        line["seeds"] = (values[name].argmax(1) == answers).reshape(len(seeds), -1).mean(1).tolist()
        if before:
            result = compare(values[before], values[name], answers, clusters)
            verdict = WORDS[result.signs[0]] if name == MAJORITY else result.words
            line |= {"against": before, "p": result.p_value, "verdict": verdict}
            line |= {"change": result.accuracy.value, "from": result.accuracy.low, "to": result.accuracy.high}
        table.append(line)
    return table


def write_table(outputs: Path, table: list[dict], args: argparse.Namespace, seconds: float) -> None:
    """Print the table, and write it to ladder.md and ladder.json."""
    lines = [["what", "accuracy", "log-loss", "against", "change of accuracy", "verdict"], ["---"] * 6]
    for line in table:
        loss = "" if line["log_loss"] is None else f"{line['log_loss']:.3f}"
        own = [line["rung"], f"{line['accuracy']:.1%} ({line['low']:.1%} to {line['high']:.1%})", loss]
        change = [f"{100 * line[name]:+.1f}" for name in ("change", "from", "to")] if "against" in line else None
        lines.append(
            [*own, line["against"], "{} ({} to {})".format(*change), line["verdict"]] if change else [*own, "", "", ""]
        )
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    made = {
        "command": " ".join(["python benchmarks/ladder.py", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "seconds": round(seconds),
        "seeds": args.seeds,
        "rows": {"train": args.train_rows, "test": args.test_rows},
    }
    seeds = f"{len(args.seeds)} seeds, {args.train_rows} training and {args.test_rows} test rows"
    notes = (
        f"`{made['command']}`, {made['machine']}: {made['seconds']} s. {seeds}; intervals of 95 %, clustered by row."
    )
    print(f"\n{text}\n\n{notes}")
    with atomic_write(outputs / "ladder.md") as temporary:
        temporary.write_text(f"{text}\n\n{notes}\n", encoding="utf-8")
    write_json(outputs / "ladder.json", made | {"rungs": table})


if __name__ == "__main__":
    run_main(main)
