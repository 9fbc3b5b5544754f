"""What the scripts' command lines have in common."""

import argparse


def make_parser(doc: str | None, **options) -> argparse.ArgumentParser:
    """A parser whose `--help` shows the script's docstring as it is written."""
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options
    )


def add_hidden_alias(parser: argparse.ArgumentParser, old: str, new: str) -> None:
    """Accept the flag `old` of an earlier release for the flag `new`, without showing it in `--help`."""
    action = parser._option_string_actions[new]
    parser._option_string_actions[old] = action


def non_default_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> dict:
    """The arguments of a script that differ from its defaults."""
    return {name: value for name, value in vars(args).items() if value != parser.get_default(name)}
