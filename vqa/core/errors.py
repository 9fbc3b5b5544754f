"""User errors: one line and exit code 2. A traceback means a bug."""

import sys
from collections.abc import Callable, Sequence

OUT_OF_MEMORY = (
    "out of GPU memory. In training, add --per_device_train_batch_size 2 --gradient_checkpointing true and resume. In "
    "validation or prediction, halve --per_device_eval_batch_size or --batch_size. Or lower image_size."
)


WORKER_FAILED = (
    "Such a process prepares batches; often the memory of the host ran out. Set dataloader_num_workers (predict.py: "
    "--workers) to 0 and run the same command again. What is finished stays."
)


class UserError(Exception):
    """An error that the user can fix. The message names the value, the place and the remedy, on one line."""


def run_main(main: Callable[[], None]) -> None:
    """Run a script's main(). A UserError or out-of-memory error becomes one line on stderr and exit code 2."""
    try:
        main()
    except UserError as error:
        print_error(error)
        sys.exit(2)
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's; scripts that need no torch should not import it
            print_error(UserError(OUT_OF_MEMORY))
        elif str(error).startswith("DataLoader "):  # "... timed out", "... worker (pid 7) is killed by signal"
            print_error(UserError(f"{error}. {WORKER_FAILED}"))
        else:
            raise
        sys.exit(2)


def print_error(error: UserError) -> None:
    """Print the error on stderr, in one line. One that a worker process raised comes with its traceback: without."""
    message = str(error)
    if message.startswith("Caught UserError in DataLoader worker"):
        message = message.rpartition("UserError: ")[2]
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)


def preview(items: Sequence, most: int = 3) -> str:
    """`a, b, c and 7 more`, for messages."""
    shown = ", ".join(str(item) for item in items[:most])
    return shown if len(items) <= most else f"{shown} and {len(items) - most} more"


def pluralize(number: int, noun: str) -> str:
    """`1 row`, `2 rows`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
