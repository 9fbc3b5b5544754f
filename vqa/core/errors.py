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

# What to do -> what the system, safetensors, SQLite and torch.save (its file writer) say.
DISK_PROBLEMS = {
    "The disk is full: delete old checkpoints or the vision cache, or set --output_dir or --vision_cache_dir to "
    "another disk. Then run the same command again: what is finished is complete.": (
        *("No space left on device", "Disk quota exceeded", "disk is full"),
        *("unexpected pos", "PytorchStreamWriter failed"),
    ),
    "Set --output_dir, --vision_cache_dir or folds_csv to a place that you can write to.": (
        *("Read-only file system", "Permission denied", "unable to open database file", "readonly database"),
    ),
}


class UserError(Exception):
    """An error that the user can fix. The message names the value, the place and the remedy, on one line."""


def run_main(main: Callable[[], None]) -> None:
    """Run a script's main(). A UserError, or one that `explain` knows, becomes one line on stderr and exit code 2."""
    try:
        main()
    except UserError as error:
        print_error(error)
        sys.exit(2)
    except Exception as error:
        if (message := explain(error)) is None:
            raise
        print_error(UserError(message))
        sys.exit(2)


def explain(error: Exception) -> str | None:
    """The line for an error of the machine and not of the code: memory, worker processes, disks. None for others.

    Goes by names and messages, since each library has its own exceptions for a failed write.
    """
    text = str(error)
    if type(error).__name__ == "OutOfMemoryError":  # torch's; scripts that need no torch should not import it
        return OUT_OF_MEMORY
    if isinstance(error, RuntimeError) and text.startswith("DataLoader "):  # "... timed out", "... worker (pid 7) ..."
        return f"{text}. {WORKER_FAILED}"
    for remedy, marks in DISK_PROBLEMS.items():
        if any(mark in text for mark in marks):
            return f"cannot write a file: {text}. {remedy}"
    return None


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
