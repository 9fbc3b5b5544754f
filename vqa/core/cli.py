"""Command lines of the scripts: parsers, aliases of old flags, and the arguments that a person set."""

import argparse


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
