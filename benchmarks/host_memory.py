"""Measure the host memory of training as the number of rows grows, with the tiny model.

    python benchmarks/host_memory.py --rows 1000 10000 100000

All contests share the same 200 drawn images. Training takes --steps steps of 16 rows. Each one gives a JSON line:
the peak resident memory of the training process in MiB, and its seconds.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 10000, 100000])
    parser.add_argument("--steps", type=int, default=20, help="(default: 20)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "data")
        draw = [sys.executable, str(ROOT / "data/make_demo.py"), "--train_rows", "200", "--test_rows", "1"]
        subprocess.run([*draw, "--output_dir", str(data)], check=True, capture_output=True)
        for rows in args.rows:
            print(json.dumps({"rows": rows} | train(data, rows, args.steps)), flush=True)


def train(data: Path, rows: int, steps: int) -> dict:
    with open(data / "train.csv", encoding="utf-8", newline="") as file:
        header, *drawn = csv.reader(file)
    with open(data / f"train_{rows}.csv", "w", encoding="utf-8", newline="") as file:
        more = ([f"row_{i}", *drawn[i % len(drawn)][1:]] for i in range(rows))
        csv.writer(file).writerows([header, *more])
    command = [sys.executable, str(ROOT / "train_fold.py"), "--model", str(ROOT / "checkpoints/tiny")]
    command += ["--train_csv", str(data / f"train_{rows}.csv"), "--fold", "null", "--max_steps", str(steps)]
    command += ["--image_size", "126", "--output_dir", str(data / f"run_{rows}"), "--save_strategy", "no"]
    command += ["--vision_cache_dir", str(data / "cache"), "--disable_tqdm", "true"]
    measure = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); "
    measure += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    start = time.time()
    done = subprocess.run([sys.executable, "-c", measure, *command], check=True, capture_output=True, text=True)
    return {"peak_mib": int(done.stdout) // 1024, "seconds": round(time.time() - start, 1)}


if __name__ == "__main__":
    main()
