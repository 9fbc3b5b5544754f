"""A person's mistake ends in one line and exit code 2; a traceback is for our own bugs."""

import sys
from collections.abc import Callable

OUT_OF_MEMORY = (
    "out of GPU memory; in training remove the fold's folder and add --auto_batch false "
    "--per_device_train_batch_size 2 --gradient_accumulation_steps 4; in validation or prediction halve "
    "--per_device_eval_batch_size or --batch_size; or lower image_size"
)


class UserError(Exception):
    """What the user can mend: the message names the value, the place and the remedy, on one line."""


def run_main(main: Callable[[], None]) -> None:
    """Run a script's main(); a UserError, or GPU memory that runs out, becomes one line on stderr and exit code 2."""
    try:
        main()
    except UserError as error:
        print_error(error)
        sys.exit(2)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's; importing torch for it would slow light scripts
            raise
        print_error(UserError(OUT_OF_MEMORY))
        sys.exit(2)


def print_error(error: UserError) -> None:
    """Print the error's one line."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)


def preview(items: list, most: int = 3) -> str:
    """`a, b, c and 7 more`, for messages that count everything and name a few."""
    shown = ", ".join(str(item) for item in items[:most])
    return shown if len(items) <= most else f"{shown} and {len(items) - most} more"


def pluralize(number: int, noun: str) -> str:
    """`1 row`, `2 rows`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
