"""Prediction CSVs -> a submission.

    python ensemble.py outputs/*.csv                                  # outputs/submission.csv, mean of the files
    python ensemble.py outputs/*.csv --method majority
    python ensemble.py outputs/*.csv --method weighted --weight_by accuracy

Files are joined by id. `weighted` weighs each file by how its fold validated, out of fold. The submission has the ids
and order of the sample submission: the one given, or the one that lies beside the test CSV.
"""

import argparse
from collections import Counter
from pathlib import Path

from vqa.errors import UserError, run
from vqa.predictions import (
    METHODS,
    ensemble,
    is_submission,
    join,
    letters,
    read_card,
    validation_weights,
    write_submission,
)


def main() -> None:
    args = parse_args()
    files = prediction_files(args.predictions)
    ids, stack = join(files)
    weights = validation_weights(files, args.weight_by) if args.method == "weighted" else None
    probabilities = ensemble(stack, args.method, weights)
    output = Path(args.output or Path(files[0]).parent / "submission.csv")
    sample = args.sample or sample_beside_test(files[0])
    write_submission(output, ids, probabilities, sample)
    named = zip(files, [f" (weight {weight:.3f})" for weight in weights] if weights else [""] * len(files))
    print(f"{args.method} of {', '.join(f'{file}{weight}' for file, weight in named)}")
    print(f"letters: {', '.join(f'{a} {n}' for a, n in sorted(Counter(letters(probabilities)).items()))}")
    print(
        f"{output}: {len(ids)} rows, " + (f"ids and order of {sample}" if sample else "order not checked: no sample")
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "predictions", nargs="+", help="files that predict.py wrote; earlier submissions are passed over"
    )
    parser.add_argument("--method", choices=METHODS, default="mean", help="(default: mean, of the probabilities)")
    parser.add_argument(
        "--weight_by", choices=("log_loss", "accuracy"), default="log_loss", help="(default: log_loss)"
    )
    parser.add_argument("--sample", help="sample submission (default: sample_submission.csv beside the test CSV)")
    parser.add_argument("--output", help="(default: submission.csv beside the first file)")
    return parser.parse_args()


def prediction_files(paths: list[str]) -> list[str]:
    """The prediction files among `paths`, sorted; submissions, which a glob may catch as well, are left out."""
    for path in paths:
        if not Path(path).is_file():
            raise UserError(f"{path}: no such file; write predictions with predict.py first")
    files = sorted({path for path in paths if not is_submission(path)})
    if not files:
        raise UserError(f"none of the {len(paths)} files holds probabilities; give those that predict.py wrote")
    return files


def sample_beside_test(file: str) -> Path | None:
    test_csv = read_card(file).get("test_csv")
    sample = Path(test_csv).with_name("sample_submission.csv") if test_csv else None
    return sample if sample and sample.is_file() else None


if __name__ == "__main__":
    run(main)
