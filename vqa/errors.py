"""A person's mistake ends in one line and exit code 2; a traceback is for our own bugs."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """What the user can mend: the message names the value, the place and the remedy, on one line."""


def run(main: Callable[[], None]) -> None:
    """Run a script's main(); a UserError becomes one line on stderr and exit code 2."""
    try:
        main()
    except UserError as error:
        tell(error)
        sys.exit(2)


def tell(error: UserError) -> None:
    """Print the error's one line."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)


def first_few(items: list, most: int = 3) -> str:
    """`a, b, c and 7 more`, for messages that count everything and name a few."""
    shown = ", ".join(str(item) for item in items[:most])
    return shown if len(items) <= most else f"{shown} and {len(items) - most} more"
