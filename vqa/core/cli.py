"""Command lines: parsers, aliases of old flags, the arguments that a person set, and commands that end with us."""

import argparse
import shutil


def make_parser(doc: str | None, **options) -> argparse.ArgumentParser:
    """A parser whose `--help` shows the script's docstring unchanged."""
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options
    )


def add_hidden_alias(parser: argparse.ArgumentParser, old: str, new: str) -> None:
    """Accept the flag `old` of an earlier release for the flag `new`. `--help` does not show it."""
    parser._option_string_actions[old] = parser._option_string_actions[new]


def non_default_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> dict:
    """The arguments that differ from the parser's defaults, as it parses them."""
    defaults = vars(parser.parse_args([]))
    return {name: value for name, value in vars(args).items() if value != defaults.get(name)}


def die_with_parent(command: list[str]) -> list[str]:
    """The command, killed by the system when this process is killed; otherwise it would continue and keep the GPU."""
    return ["setpriv", "--pdeathsig", "KILL", *command] if shutil.which("setpriv") else command
