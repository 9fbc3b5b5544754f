"""Measure what each technique adds, on the drawn contest of bench_contest.py, whose test answers are known.

    make bench                                # the rungs that take about an hour on two cores
    make ladder                               # every rung: minutes on a few GPUs
    python benchmarks/ladder.py --rungs EMA "3 folds" --seeds 42 --train_rows 300 --test_rows 200     # a quick look

rungs.py says what is trained and compared. Each seed makes its own folds and trains its own models by the documented
command lines, and all seeds predict the same test rows. Each rung is compared with the rung that it builds on. Run
again, the script continues where it stopped.

The test takes both the rows and the seeds as drawn at random: the variance of a difference is that over rows plus that
over seeds, without what both contain. Three seeds alone measure that variance badly, so it is drawn towards that of
the other rungs (Smyth 2004).

`--check_seeds 9` trains one fold with nine more seeds and checks the test itself. Ten times it compares three of these
twelve models with three others: as they are (no effect), and with one point planted in the second three.
"""

import argparse
import itertools
import multiprocessing
import os
import platform
import runpy
import shlex
import shutil
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq
from scipy.special import digamma, fdtrc, polygamma, stdtr, stdtrit
from tqdm.auto import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from rungs import ONE, RUNGS, RUNS, VIEWS, Run  # noqa: E402

from vqa.core.cli import make_parser  # noqa: E402
from vqa.core.errors import UserError, preview, run_main  # noqa: E402
from vqa.core.io import atomic_write, read_json, write_json  # noqa: E402
from vqa.data.predictions import join  # noqa: E402
from vqa.data.table import read_table  # noqa: E402
from vqa.evaluation.labels import Labels  # noqa: E402
from vqa.evaluation.metrics import NOISE, row_log_loss  # noqa: E402
from vqa.evaluation.significance import WORDS  # noqa: E402

BASE = ROOT / "args" / "bench" / "base.json"
REPETITIONS, PLANTED = 10, 0.01  # of the check of the test
OUTLIER = 0.01  # p-value of a variance that is not like the others
(CHECKED,) = RUNGS[ONE].files
CHECKED_SEEDS = 3  # models on each side


def main() -> None:
    args, start = parse_args(), time.time()
    root = Path(args.root)
    data, outputs = root / "data" / "bench", root / "outputs" / "ladder"
    result_file = outputs / "ladder.json"
    wanted = list(itertools.chain.from_iterable(RUNGS[name].files for name in args.rungs))
    seeds = [Seed(seed, root, args, wanted) for seed in args.seeds]
    extra = [Seed(1000 + number, root, args, [CHECKED]) for number in range(args.check_seeds)]
    commands = [command for seed in [*seeds, *extra] for command in seed.commands()]
    todo = [command for command in commands if not all(map(Path.exists, command.makes))]
    draw_contest(data, args)
    failed = run_commands(todo, args)
    labels = Labels(data / "test_answers.csv")
    calls = read_json(result_file).get("calls", []) if result_file.is_file() else []
    result: dict = {
        "calls": calls + ([describe(args, time.time() - start)] if todo or not calls else []),
        "seeds": args.seeds,
        "rows": {"train": args.train_rows, "test": args.test_rows},
        "failed": failed,
        "rungs": compare_rungs({name: read_rung(name, seeds) for name in args.rungs}, labels, seeds),
    }
    checked = [seed for seed in [*seeds, *extra] if seed.file(CHECKED).is_file()]
    if extra and len(checked) >= 2 * CHECKED_SEEDS:
        result["check"] = check_test([seed.right(CHECKED, labels) for seed in checked])
    write_json(result_file, result)
    text = markdown(result)
    print(f"\n{text}")
    with atomic_write(outputs / "ladder.md") as temporary:
        temporary.write_text(f"{text}\n", encoding="utf-8")
    if failed:
        raise UserError(f"{len(failed)} commands failed: {preview(failed)}. Their rungs are not in the table.")


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--rungs", nargs="+", metavar="RUNG", default=list(RUNGS), help="(default: all; their own bases are added)")
    add("--seeds", type=int, nargs="+", default=[42, 43, 44], help="(default: 42 43 44)")
    add("--check_seeds", type=int, default=0, metavar="N", help="more seeds, to check the test itself (default: 0)")
    add("--train_rows", type=int, default=20_000, help="of the contest (default: 20000)")
    add("--test_rows", type=int, default=10_000, help="of the contest (default: 10000)")
    add("--model", help="folder of the base model (default: as in args/bench)")
    add("--max_steps", type=int, help="optimiser steps of each training (default: as in args/bench)")
    add("--jobs", type=int, default=2, help="processes at the same time (default: 2)")
    add("--gpus", type=int, help="share no more than so many GPUs among them (default: all)")
    add("--max_minutes", type=float, help="begin no further command after so many minutes")
    add("--root", default=".", help="where data/, checkpoints/ and outputs/ are (default: here)")
    args = parser.parse_args()
    args.gpus = visible_gpus(args.gpus)
    if unknown := [name for name in args.rungs if name not in RUNGS]:
        raise UserError(f"no rung {preview(unknown)}. The rungs are: {', '.join(RUNGS)}.")
    chosen = set(args.rungs)
    while bases := {RUNGS[name].before for name in chosen} - chosen - {None}:
        chosen |= bases
    args.rungs = [name for name in RUNGS if name in chosen]
    return args


class Command(NamedTuple):
    """One of the project's command lines. It can begin when the files `needs` are there."""

    words: list[str]
    needs: list[Path]
    makes: list[Path]
    log: Path
    rank: float  # those with a low one begin first


class Seed:
    """What the ladder trains and predicts with one seed: command lines, folders and prediction files."""

    def __init__(self, seed: int, root: Path, args: argparse.Namespace, wanted: Sequence[str]):
        self.seed, self.args, self.data = seed, args, root / "data" / "bench"
        self.cache = root / "checkpoints" / "ladder" / "vision_cache"
        self.models, self.outputs = (root / name / "ladder" / str(seed) for name in ("checkpoints", "outputs"))
        self.folds_csv = self.data / f"folds_{seed}.csv"
        self.workers = 2 if args.gpus != [""] else 0  # a GPU would wait for one process
        self.wanted = list(dict.fromkeys(name.replace("permutations/plain/", "permutations/") for name in wanted))

    def commands(self) -> list[Command]:
        """In no order: each says what it needs. Writes the args files that they name."""
        rank: dict[str, int] = {}
        for number, file in enumerate(self.wanted):
            for run in self.with_needs(file.split("/")[1]):
                rank.setdefault(run, number)
        first = self.write_args("base", Run())
        flags = ["--folds", "3", "--seed", str(self.seed)]
        commands = [self.command(["make_folds.py", str(first), *flags], [], [self.folds_csv], -1)]
        for name in rank.keys() - {"base"}:
            run = RUNS[name]
            words = ["train_fold.py", str(self.write_args(name, run)), "--resume_from_checkpoint", "auto"]
            needs = [self.folds_csv, *map(self.finished, run.needs)]
            commands.append(self.command(words, needs, [self.finished(name)], rank[name]))
        for view, names in grouped([name.split("/") for name in self.wanted]):
            words = ["predict.py", *(["--base", str(first)] if names == ["base"] else map(self.folder, names))]
            words += [*VIEWS[view], "--output_dir", str(self.outputs / view), "--check_generation", "0"]
            words += ["--workers", str(self.workers)]
            needs = [self.folds_csv] if names == ["base"] else [self.finished(name) for name in names]
            made = [self.file(f"{view}/{name}") for name in names]
            commands.append(self.command(words, needs, made, rank[names[0]] - 0.5))
        return commands

    def command(self, words: list[str], needs: list[Path], makes: list[Path], rank: float) -> Command:
        log = self.outputs / "logs" / f"{makes[0].parent.name}_{makes[0].stem}.log"
        return Command(words, needs, makes, log, rank)

    def with_needs(self, run: str) -> list[str]:
        return [*(RUNS[run].needs if run in RUNS else ()), run]

    def write_args(self, name: str, run: Run) -> Path:
        path = self.outputs / "args" / f"{name}.json"
        fields = {
            "extends": os.path.relpath(BASE, path.parent),
            "train_csv": str(self.data / "train.csv"),
            "test_csv": str(self.data / "test.csv"),
            "folds_csv": str(self.folds_csv),
            "vision_cache_dir": str(self.cache),
            "output_dir": self.folder(name),
            "seed": self.seed,
        } | {key: self.filled(value) for key, value in run.fields.items()}
        fields |= {key: value for key in ("model", "max_steps") if (value := getattr(self.args, key))}
        fields["dataloader_num_workers"] = self.workers
        write_json(path, fields)
        return path

    def filled(self, value):
        if isinstance(value, list):
            return [self.filled(item) for item in value]
        return value.format(seed=self.seed, folder=self.models, data=self.data) if isinstance(value, str) else value

    def folder(self, run: str) -> str:
        return str(self.models / run)

    def finished(self, run: str) -> Path:
        return self.models / run / "metrics.json"

    def file(self, name: str) -> Path:
        """The prediction file `folder/run`."""
        return self.outputs / (f"{name}/base.csv" if name.endswith("/base") else f"{name}.csv")

    def seconds(self, names: Sequence[str]) -> float:
        """Of training the models of the files `view/run`, without those that they needed."""
        runs = {name.split("/")[-1] for name in names} - {"base"}
        return sum(read_json(self.finished(run))["seconds"] for run in runs)

    def right(self, name: str, labels: Labels) -> np.ndarray:
        """Which rows the file `view/run` has right, bool (rows,)."""
        ids, (probs,) = join([self.file(name)])
        return probs.argmax(1) == labels.answers(ids)


def grouped(predicted: Sequence[Sequence[str]]) -> Iterator[tuple[str, list[str]]]:
    """(view, runs) that one command can predict: neighbours with the same prompts and image size, at most three."""

    def key(item: Sequence[str]) -> tuple:
        fields = RUNS[item[1]].fields if item[1] != "base" else {"base": 1}
        return item[0], *(str(fields.get(name)) for name in ("base", "image_size", "score", "crops"))

    for _, items in itertools.groupby(sorted(predicted, key=key), key=key):
        group = list(items)
        for start in range(0, len(group), 3):
            yield group[0][0], [run for _, run in group[start : start + 3]]


def draw_contest(data: Path, args: argparse.Namespace) -> None:
    """Draw the contest and, for the rungs that need it, a data set in the style of the base model's own training."""
    rows = ["--train_rows", str(args.train_rows), "--test_rows", str(args.test_rows)]
    runs = {file.split("/")[-1] for name in args.rungs for file in RUNGS[name].files}
    further = [(data / "home", ["--domain", "home"])] if runs & {"extra", "extra_then_target"} else []
    for folder, flags in [(data, []), *further]:
        answers = folder / "test_answers.csv"
        if not answers.is_file():  # it is written last
            words = [str(ROOT / "benchmarks" / "bench_contest.py"), "--output_dir", str(folder), *rows, *flags]
            subprocess.run([sys.executable, *words], check=True)
        found = [len(read_table(folder / name, ("id",))) for name in ("train.csv", answers.name)]
        if found != [args.train_rows, args.test_rows]:
            raise UserError(f"{folder} has {found} rows (train, test), not those asked for. Delete that folder.")


def run_commands(commands: list[Command], args: argparse.Namespace) -> list[str]:
    """Run them in the table's order, `jobs` at a time; returns the logs of what is left."""
    todo = sorted(commands, key=lambda command: command.rank)
    if not todo:
        return []
    end = time.time() + 60 * (args.max_minutes or 1e9)
    context, failed, running = multiprocessing.get_context("spawn"), [], {}
    jobs = min(args.jobs, len(todo))
    with (
        ProcessPoolExecutor(jobs, context, set_environment, (context.Value("i", 0), jobs, args.gpus)) as pool,
        tqdm(total=len(todo), desc="ladder", unit=" commands") as bar,
    ):
        while todo or running:
            ready = [command for command in todo if all(map(Path.exists, command.needs))]
            for command in ready[: jobs - len(running)] if time.time() < end else []:
                todo.remove(command)
                running[pool.submit(run_command, command)] = command
            if not running:  # what is left needs a command that failed, or the time is over
                return failed + [str(command.log) for command in todo]
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                command = running.pop(future)
                failed += [] if future.result() == 0 else [str(command.log)]
                bar.update()
    return failed


def visible_gpus(most: int | None) -> list[str]:
    """Names of the GPUs to use, `most` at most, as for CUDA_VISIBLE_DEVICES; one empty name where there is none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None and shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
        lines = subprocess.run(query, capture_output=True, text=True).stdout.split()
        visible = ",".join(filter(str.isdigit, lines))  # a driver that fails writes words there
    return (visible or "").split(",")[:most]


def set_environment(counter, jobs: int, devices: list[str]) -> None:
    """Give this process one of the GPUs and its share of the cores, before torch is imported."""
    with counter.get_lock():
        number, counter.value = counter.value, counter.value + 1
    os.environ |= {"CUDA_VISIBLE_DEVICES": devices[number % len(devices)], "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
    os.chdir(ROOT)
    threading.Thread(target=end_with_parent, daemon=True).start()
    multiprocessing.set_start_method("fork", force=True)  # as for scripts that are run alone: workers start at once


def end_with_parent() -> None:
    """Otherwise a ladder that is killed would leave its trainings behind, and its next call run them again."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def run_command(command: Command) -> int:
    """Run a script as `python` would, in this process, which keeps the libraries; returns its exit code."""
    command.log.parent.mkdir(parents=True, exist_ok=True)
    before = os.dup(1), os.dup(2), sys.argv
    with open(command.log, "a", encoding="utf-8") as log:
        print("$ python", *command.words, file=log, flush=True)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        sys.argv = [str(ROOT / command.words[0]), *command.words[1:]]
        code: object = 0
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(before[0], 1)
            os.dup2(before[1], 2)
            sys.argv = before[2]
            for handle in before[:2]:
                os.close(handle)
    return code if isinstance(code, int) else 1


def read_rung(name: str, seeds: Sequence[Seed]) -> tuple[list[str], list[np.ndarray]] | None:
    """(ids, each seed's probabilities (rows, letters)) of a rung; None where a command of it failed."""
    rung, values, ids = RUNGS[name], [], []
    for seed in seeds:
        paths = [seed.file(file) for file in rung.files]
        if not all(map(Path.is_file, paths)):
            return None
        ids, stack = join(paths)
        names = list(map(str, paths))
        values.append(rung.combine(names, stack, str(seed.data / "test.csv")) if rung.combine else stack.mean(0))
    return ids, values


class Gap(NamedTuple):
    """A mean difference over seeds and rows, its standard error and degrees of freedom."""

    value: float
    error: float
    freedom: float

    @property
    def p_value(self) -> float:
        return float(2 * stdtr(self.freedom, -abs(self.value) / self.error)) if self.error else 1.0

    @property
    def interval(self) -> tuple[float, float]:
        margin = float(stdtrit(self.freedom, 1 - NOISE / 2)) * self.error
        return self.value - margin, self.value + margin

    @property
    def sign(self) -> int:
        return int(np.sign(self.value)) if self.p_value < NOISE else 0


def compare_all(gaps: Mapping[str, np.ndarray]) -> dict[str, Gap]:
    """Tests of differences (seeds, rows), where both are drawn at random (crossed random effects).

    With one seed only the rows count. With more, the variance between seeds is moderated over all `gaps`.
    """
    seeds, rows = next(iter(gaps.values())).shape
    means = {name: float(gap.mean()) for name, gap in gaps.items()}
    if seeds == 1:
        return {name: Gap(means[name], gap[0].std(ddof=1) / rows**0.5, rows - 1) for name, gap in gaps.items()}
    own = np.array([gap.mean(1).var(ddof=1) for gap in gaps.values()])
    moderated, freedom = moderate(own, seeds - 1)
    tested = {}
    for (name, gap), between, known in zip(gaps.items(), moderated, freedom):
        rest = gap - gap.mean(0) - gap.mean(1, keepdims=True) + gap.mean()
        both = (rest**2).sum() / ((seeds - 1) * (rows - 1)) / rows  # it is in the variance of the rows' means, too
        of_rows, of_seeds = gap.mean(0).var(ddof=1) / rows, max(0.0, between - both) / seeds
        total = of_rows + of_seeds
        share = of_seeds / total if total else 0.0
        # Satterthwaite: the variance over the rows is known well, that over the seeds is not.
        tested[name] = Gap(means[name], total**0.5, known / share**2 if share else rows - 1)
    return tested


def moderate(variances: np.ndarray, freedom: int) -> tuple[np.ndarray, np.ndarray]:
    """Variances drawn towards their common value, and the degrees of freedom of each.

    Smyth (2004), doi 10.2202/1544-6115.1027, as in limma. `freedom`: of each variance. The more the variances differ,
    the less they are changed. One that is far larger than the others stays as it is, and so does one of 0, of models
    that are the same; the others learn nothing from them.
    """
    alike = variances > 0
    for _ in range(2):
        if alike.sum() < 3:
            return variances, np.full(len(variances), float(freedom))
        common, prior = common_variance(variances[alike], freedom)
        alike &= fdtrc(freedom, prior, variances / common) > OUTLIER
    moderated = (prior * common + freedom * variances) / (prior + freedom)
    return np.where(alike, moderated, variances), np.where(alike, prior + freedom, freedom)


def common_variance(variances: np.ndarray, freedom: int) -> tuple[float, float]:
    """The value that `variances`, all above 0, scatter about, and what it is worth in degrees of freedom."""
    logs = np.log(variances) - digamma(freedom / 2) + np.log(freedom / 2)
    spread = float(logs.var(ddof=1) - polygamma(1, freedom / 2))
    if spread < 1e-4:  # no more than chance alone makes
        return float(variances.mean()), float(freedom * len(variances))
    prior = 2 * brentq(lambda half: float(polygamma(1, half)) - spread, 1e-3, 1e5)
    return float(np.exp(logs.mean() + digamma(prior / 2) - np.log(prior / 2))), prior


def compare_rungs(rungs: Mapping[str, tuple | None], labels: Labels, seeds: Sequence[Seed]) -> list[dict]:
    """One line for each rung that could be read: its scores, and its difference to the rung that it builds on."""
    read = {name: found for name, found in rungs.items() if found}
    answers = labels.answers(next(iter(read.values()))[0]) if read else np.array([])
    right = {name: np.stack([probs.argmax(1) == answers for probs in values]) for name, (_, values) in read.items()}
    losses = {name: np.stack([row_log_loss(probs, answers) for probs in values]) for name, (_, values) in read.items()}
    pairs = [(name, before) for name in read if (before := RUNGS[name].before) in read]
    accuracies, log_losses = (
        compare_all({name: table[name].astype(float) - table[before] for name, before in pairs}) if pairs else {}
        for table in (right, losses)
    )
    lines = []
    for name in read:
        line = {
            "rung": name,
            "accuracy": float(right[name].mean()),
            "seeds": right[name].mean(1).tolist(),
            "log_loss": float(losses[name].mean()),
            "seconds": round(float(np.mean([seed.seconds(RUNGS[name].files) for seed in seeds]))),
        }
        if name in accuracies:
            gap, loss = accuracies[name], log_losses[name]
            line |= {"against": RUNGS[name].before, "change": gap.value, "p": gap.p_value, "sign": gap.sign}
            line |= {"from": gap.interval[0], "to": gap.interval[1], "log_loss_change": loss.value}
            line |= {"log_loss_p": loss.p_value, "log_loss_sign": -loss.sign}
        lines.append(line)
    return lines


def check_test(right: Sequence[np.ndarray]) -> dict:
    """How often the test finds a planted effect, and one that is not there.

    `right`: bool (rows,) of models that differ in their seed only. Each repetition draws CHECKED_SEEDS of them and as
    many others. In the second comparison, one point of the rows that the others have wrong are made right, drawn for
    each model.
    """
    rng, null, planted = np.random.default_rng(0), {}, {}
    for repetition in range(REPETITIONS):
        drawn = [right[i].astype(float) for i in rng.permutation(len(right))[: 2 * CHECKED_SEEDS]]
        first, second = np.stack(drawn[:CHECKED_SEEDS]), np.stack(drawn[CHECKED_SEEDS:])
        null[str(repetition)] = second - first
        better = second.copy()
        for model in better:
            model[rng.choice(np.flatnonzero(model == 0), round(PLANTED * len(model)), replace=False)] = 1
        planted[str(repetition)] = better - first
    found = {"null": compare_all(null), "planted": compare_all(planted)}
    return {
        name: [{"change": gap.value, "p": gap.p_value} for gap in gaps.values()] for name, gaps in found.items()
    } | {
        "found": sum(gap.sign > 0 for gap in found["planted"].values()),
        "rejected": sum(gap.sign != 0 for gap in found["null"].values()),
        "repetitions": REPETITIONS,
        "models": len(right),
    }


def describe(args: argparse.Namespace, seconds: float) -> dict:
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    if "torch" in sys.modules or any(args.gpus):
        import torch

        machine += f", {len(args.gpus)} x {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return {
        "command": shlex.join(["python", "benchmarks/ladder.py", *sys.argv[1:]]),
        "machine": machine,
        "seconds": round(seconds),
    }


def markdown(result: dict) -> str:
    """The table, the check of the test, and the command."""
    lines = [["what", "accuracy, %", "log-loss", "seconds", "against", "change, points", "p", "verdict"], ["---"] * 8]
    for line in result["rungs"]:
        own = [line["rung"], f"{100 * line['accuracy']:.1f}", f"{line['log_loss']:.3f}", str(line["seconds"])]
        if "against" not in line:
            lines.append([*own, "", "", "", ""])
            continue
        change = "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * line[key] for key in ("change", "from", "to")))
        verdict = WORDS[line["sign"]]
        if line["log_loss_sign"] != line["sign"]:
            verdict += f", {WORDS[line['log_loss_sign']]} in log-loss"
        lines.append([*own, line["against"], change, f"{line['p']:.2g}", verdict])
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    rows = result["rows"]
    calls = "; then ".join(f"`{call['command']}`, {call['machine']}: {call['seconds']} s" for call in result["calls"])
    notes = (
        f"{calls}. {len(result['seeds'])} seeds, {rows['train']} training and {rows['test']} test rows; intervals of "
        "95 %; seconds of training, of one seed, beside other processes."
    )
    if check := result.get("check"):
        notes += (
            f"\n\nThe test itself, on {check['models']} models of one fold: a planted point was found in "
            f"{check['found']} of {check['repetitions']} repetitions, an effect that is not there in "
            f"{check['rejected']}."
        )
    return f"{table}\n\n{notes}"


if __name__ == "__main__":
    run_main(main)
