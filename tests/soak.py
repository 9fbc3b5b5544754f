"""Kill a fold's training at random moments, resume it, and compare it with an uninterrupted run.

    make soak                                        # ten kills of a short fold of the demo
    python tests/soak.py --kills 3 --seed 7 --keep   # other kills; the runs stay in checkpoints/soak/

Each kill is SIGKILL to the whole process group, half of them at a moment drawn from the run's length, half within a
twentieth of a second after a checkpoint or an export begins. Adapters, averages, out-of-fold files and scores have to
be byte-identical to the uninterrupted run's. Exits with 1 where they are not.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHORT = "--max_steps 24 --eval_steps 12 --save_steps 4 --logging_steps 8 --disable_tqdm true".split()


def main() -> None:
    args = parse_args()
    folder = ROOT / "checkpoints" / "soak"
    shutil.rmtree(folder, ignore_errors=True)
    whole, began = folder / "whole", time.time()
    finish(args.args_file, whole)
    seconds = time.time() - began
    print(f"uninterrupted: {seconds:.0f} s", flush=True)

    def soak(number: int) -> bool:
        part = folder / f"kill{number}"
        moment = kill(args.args_file, part, random.Random(f"{args.seed} {number}"), seconds)
        left = sorted(path.parent.name for path in part.glob("checkpoint-*/complete"))
        finish(args.args_file, part)
        different = differences(whole, part)
        print(
            f"kill {number:2} {moment}; it had {', '.join(left) or 'no checkpoint'}: {different or 'identical'}",
            flush=True,
        )
        return not different

    with ThreadPoolExecutor(args.jobs) as pool:
        same = sum(pool.map(soak, range(1, args.kills + 1)))
    if not args.keep:
        shutil.rmtree(folder)
    print(f"{same} of {args.kills} killed runs ended with the bytes of the uninterrupted one")
    sys.exit(same < args.kills)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--args_file", default="args/demo/fold0.json", help="(default: the demo's first fold)")
    parser.add_argument("--kills", type=int, default=10, help="(default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, each on one core (default: 2)")
    parser.add_argument("--keep", action="store_true", help="leave the runs in checkpoints/soak/")
    return parser.parse_args()


def start(args_file: str, output: Path) -> subprocess.Popen:
    output.parent.mkdir(parents=True, exist_ok=True)
    log = open(output.with_suffix(".log"), "a")
    command = [sys.executable, "train_fold.py", args_file, "--output_dir", str(output), *SHORT]
    command += ["--resume_from_checkpoint", "auto"]
    one_core = os.environ | {"OMP_NUM_THREADS": "1"}  # and the same sums in every run
    return subprocess.Popen(command, cwd=ROOT, env=one_core, stdout=log, stderr=log, start_new_session=True)


def finish(args_file: str, output: Path) -> None:
    process = start(args_file, output)
    if process.wait():
        sys.exit(f"{output}: training failed; see {output.with_suffix('.log')}")


def kill(args_file: str, output: Path, rng: random.Random, seconds: float) -> str:
    """Start a run and kill it; returns when that was, in words."""
    process, began = start(args_file, output), time.time()
    if rng.random() < 0.5:
        delay, what = rng.uniform(0.2, 1.0) * seconds, "at a random moment"
    else:
        step = rng.choice([4, 8, 12, 12, 16, 20, 24, 24])
        sign = output / rng.choice([f"checkpoint-{step}", "ema" if step == 12 else f"checkpoint-{step}"])
        while not sign.exists() and process.poll() is None:
            time.sleep(0.001)
        delay, what = rng.uniform(0, 0.05), f"as {sign.name} appears"
    try:
        process.wait(delay)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return f"after {time.time() - began:4.1f} s, {what}"


def differences(whole: Path, part: Path) -> str:
    """The files of the fold's folder that differ, and the scores if they do."""
    names = [f"{place}{name}" for place in ("", "ema/", "swa/") for name in ("adapter_model.safetensors", "oof.csv")]
    names += [f"checkpoint-24/{name}.safetensors" for name in ("adapter_model", "ema", "swa")]
    names += ["best.json", "history.json"]
    found = [name for name in names if (whole / name).read_bytes() != (part / name).read_bytes()]
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (whole, part)]
    found += [key for key in ("weights", "best", "fingerprints", "steps") if metrics[0][key] != metrics[1][key]]
    return f"DIFFERENT: {', '.join(found)}" if found else ""


if __name__ == "__main__":
    main()
