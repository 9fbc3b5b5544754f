"""The documentation: every command that it shows can be typed, every link and every named file or test exists."""

import argparse
import contextlib
import io
import re
import runpy
import shlex
import sys
from functools import cache
from itertools import takewhile
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from conftest import ROOT

from vqa.config.parser import field_names, parse_arguments
from vqa.core.errors import UserError

PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("[a-z]*/README.md"), *ROOT.glob(".github/**/*.md")]
)
HISTORY = {"EXPERIMENTS.md", "CHANGELOG.md"}  # what they name may be gone
CURRENT = [page for page in PAGES if page.name not in HISTORY]
FENCED = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
LANGUAGES = {"bash", "text", "csv", "json", "python"}
SHELL = {"cp", "pip", "cd", "git", ".", "source"}  # commands that are not ours
WRITTEN_BY_USERS = {"args/tuned", "answers.csv"}  # examples that the project does not hold
TAKES_FIELDS = ("train_fold.py", "doctor.py")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def words_of(line: str) -> list[str]:
    """The words of a command without its comment and its environment variables."""
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    return words


def commands(page: Path) -> list[str]:
    """Commands of a page: the lines of its bash blocks, and inline code that starts like a command."""
    text = page.read_text(encoding="utf-8")
    lines = []
    for _, language, block in FENCED.findall(text):
        if language == "bash":
            lines += block.replace("\\\n", " ").splitlines()
    for code in re.findall(r"`([^`\n]+)`", FENCED.sub("", text)):
        words = code.split()
        script = words[0].endswith((".py", ".sh")) and len(words) > 1
        if words[0] in ("python", "bash", "accelerate", "make") and len(words) > 1 or script:
            lines.append(code if not script else f"python {code}")
    return [line.strip() for line in lines if words_of(line)]


class ArgumentsAccepted(Exception):
    pass


@cache
def help_of(script: str) -> str:
    """What `python script --help` prints."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", [script, "--help"])
        patch.setattr(sys, "path", [str((ROOT / script).parent), *sys.path])
        with pytest.raises(SystemExit):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    return printed.getvalue()


def check_python(script: str, args: list[str]) -> None:
    """Let the script's own parser read the arguments."""
    assert (ROOT / script).is_file(), f"{script} does not exist"
    if script in TAKES_FIELDS:
        files = [word for word in args if word.endswith(".json") and word.startswith("args/")]
        for file in files:
            flags = [word for word in args if word not in files]
            parse_arguments([str(ROOT / file), *flags], "", trains=False)
        return
    flags = [word.split("=")[0] for word in args if word.startswith("--")]
    hidden = [flag for flag in flags if not re.search(rf"{flag}\b", help_of(script))]
    assert not hidden, f"{script} --help does not list {hidden}"
    if len(args) == len(flags) == 1:
        return  # inline code that names a flag without its value
    let_parser_read(script, args)


def let_parser_read(script: str, args: list[str]) -> None:
    """Start the script, and stop it as soon as its parser has accepted `args`."""

    def accept(parser, argv=None, namespace=None):
        found, rest = parse(parser, argv, namespace)
        if rest and script == "tune.py":  # it passes fields on to the training
            parse_arguments([found.args_file, *rest], "", trains=False)
        elif rest:
            parser.error(f"unrecognized arguments: {rest}")
        raise ArgumentsAccepted

    parse = argparse.ArgumentParser.parse_known_args
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ArgumentsAccepted):
        patch.setattr(argparse.ArgumentParser, "parse_known_args", accept)
        patch.setattr(sys, "argv", [script, *args])
        patch.setattr(sys, "path", [str((ROOT / script).parent), *sys.path])
        runpy.run_path(str(ROOT / script), run_name="__main__")


def check_files(words: list[str]) -> None:
    """Whatever a command names below args/, tests/ and so on is in the project."""
    for word in words:
        if re.match(r"(args|tests|benchmarks|docs|notebooks|vqa)/|args$|requirements", word):
            if not any(word.startswith(example) for example in WRITTEN_BY_USERS):
                assert list(ROOT.glob(word)), f"{word} does not exist"


def check_command(line: str) -> None:
    program, *rest = words_of(line)
    check_files(rest)
    if program == "python":
        if rest[0] != "-c":
            check_python(rest[0], rest[1:])
    elif program == "accelerate":
        assert rest[0] == "launch"
        if len(rest) == 1:
            return
        launch = launch_command_parser().parse_args(rest[1:])
        check_python(launch.training_script, launch.training_script_args)
    elif program == "bash":
        assert (ROOT / rest[0]).is_file()
        if rest[0] == "run.sh":
            folders = list(takewhile(lambda word: word.split("/")[0] == "args", rest[1:]))
            for folder in set(folders) - WRITTEN_BY_USERS:
                first = min((ROOT / folder).glob("[fs]*[0-9].json"))  # fold0.json or seed42.json
                parse_arguments([str(first), *rest[1 + len(folders) :]], "", trains=False)
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        wanted = [word for word in rest if "=" not in word]
        assert set(wanted) <= set(targets), f"no such target: {wanted}"
    else:
        assert program in SHELL, f"unknown command {program}"


@pytest.mark.parametrize("page", CURRENT, ids=name)
def test_every_command_is_accepted_by_its_parser(page):
    wrong = []
    for line in commands(page):
        try:
            check_command(line)
        except (AssertionError, UserError, SystemExit, pytest.fail.Exception) as error:
            wrong.append(f"{line}: {error}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("line", [
    "python predict.py checkpoints/fold0 --num_permutation 4",
    "python predict.py checkpoints/fold0 --orders 4",
    "python predict.py checkpoints/fold0 --permutation_set none",
    "python train_fold.py args/fold0.json --lerning_rate 1",
    "accelerate launch train_fold.py args/fold9.json",
    "accelerate launch --config_fil x train_fold.py args/fold0.json",
    "bash run.sh args --epochs 5",
    "python no_such_script.py",
    "make no-such-target",
])  # fmt: skip
def test_a_wrong_command_is_found(line):
    with pytest.raises((AssertionError, UserError, SystemExit, pytest.fail.Exception)):
        check_command(line)


def test_every_flag_in_inline_code_exists():
    scripts = [*ROOT.glob("*.py"), *ROOT.glob("data/*.py"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("docs/*.py")]
    known = set(field_names())
    for script in (name(path) for path in scripts):
        if "argparse" in (text := (ROOT / script).read_text()) or "make_parser" in text:
            known |= set(re.findall(r"--(\w+)", help_of(script)))
    known |= {option.lstrip("-") for option in launch_command_parser()._option_string_actions} | {"help"}
    for page in CURRENT:
        inline = re.findall(r"`([^`\n]+)`", FENCED.sub("", page.read_text(encoding="utf-8")))
        flags = {flag for code in inline if "pip" not in code for flag in re.findall(r"(?:^| )--(\w+)", code)}
        assert flags <= known, f"{name(page)}: {flags - known}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_code_block_names_its_language(page):
    unknown = {language for _, language, _ in FENCED.findall(page.read_text(encoding="utf-8"))} - LANGUAGES
    if ".github" in page.parts:
        unknown -= {""}  # to be filled in
    assert not unknown, unknown


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_relative_link_resolves(page):
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{name(page)}: {target}"
        if anchor:
            titles = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", t).lower().replace(" ", "-") for t in titles}, target


@pytest.mark.parametrize("page", CURRENT, ids=name)
def test_every_file_that_is_named_exists(page):
    for code in re.findall(r"`([\w./-]+\.\w+|[\w./-]+/)`", FENCED.sub("", page.read_text(encoding="utf-8"))):
        top = code.split("/")[0]
        if top in ("vqa", "tests", "benchmarks", "notebooks", "docs") or re.fullmatch(r"\w+\.(py|sh)", code):
            found = list(ROOT.glob(code)) + list(ROOT.glob(f"*/{code}")) + list(page.parent.glob(code))
            assert found, f"{name(page)}: {code}"


def test_the_table_of_contents_lists_every_page():
    text = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for page in ROOT.glob("docs/**/*.md"):
        link = str(page.relative_to(ROOT / "docs"))
        assert link == "README.md" or f"({link})" in text, link


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_pages_are_short(page):
    limit = {
        "README.md": 900,
        "README.ko.md": 900,
        "CHANGELOG.md": 3000,
        "EXPERIMENTS.md": 8000,
        "tests/README.md": 4000,
    }
    assert len(page.read_text(encoding="utf-8").split()) <= limit.get(name(page), 1000)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_no_page_names_a_folder_of_somebodys_machine(page):
    assert not re.search(r"(?<![\w.])/(work|root|home|tmp/(?!vision_cache))\b", page.read_text(encoding="utf-8"))


def test_the_table_of_claims_names_existing_tests():
    text, missing = (ROOT / "tests" / "README.md").read_text(encoding="utf-8"), []
    for line in text.splitlines():
        module = None
        for code in re.findall(r"`(test_[\w*]+)`", line.rpartition("| ")[0].rpartition("| ")[2]):
            if (ROOT / "tests" / f"{code}.py").is_file():
                module = code
                continue
            source = (ROOT / "tests" / f"{module}.py").read_text(encoding="utf-8") if module else ""
            pattern = code.replace("*", r"\w*")
            if not re.search(rf"^def {pattern}\(", source, re.MULTILINE):
                missing.append(f"{module}: {code}")
    assert text.count("`test_") > 100 and not missing, missing


def test_what_contributing_says_is_where_it_says():
    rows = re.findall(
        r"^\| .+ \| `([\w/.]+\.py)`(?: `([\w.]+)`)? \|$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE
    )
    assert len(rows) >= 12
    for file, symbol in rows:
        source = (ROOT / file).read_text(encoding="utf-8")
        for name in filter(None, symbol.split(".")):
            assert re.search(rf"^ *(def|class) {name}\b", source, re.MULTILINE), f"{file}: {symbol}"


CHANGES = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
RENAMED = re.findall(r"^\| `(\w+\.py)` \| `(--\w+)` \| `(--\w+)` \|$", CHANGES, re.MULTILINE)
OLD_COMMANDS = {
    "--orders": "predict.py checkpoints/fold0 --orders 4",
    "--order_set": "predict.py checkpoints/fold0 --order_set latin",
    "--wordings": "predict.py checkpoints/fold0 --wordings 3",
    "--truth": "ensemble.py --compare a.csv b.csv --truth answers.csv",
    "--again": "make_folds.py args/fold0.json --again",
}


@pytest.mark.parametrize("script, old, new", RENAMED)
def test_a_renamed_flag_is_still_accepted_but_not_shown(script, old, new):
    assert f"{new} " in help_of(script) or f"{new}\n" in help_of(script)
    assert f"{old} " not in help_of(script)
    let_parser_read(script, shlex.split(OLD_COMMANDS[old])[1:])
