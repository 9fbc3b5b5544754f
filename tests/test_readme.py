"""Pages in two languages: the same commands, names and numbers."""

import re
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT
from test_docs import FENCED

PAIRS = [(ROOT / "README.md", ROOT / "README.ko.md")]
PAIRS += [(ROOT / "docs" / page.name, page) for page in sorted(ROOT.glob("docs/ko/*.md"))]


def without_comments(block: str) -> str:
    """A block's lines without what follows a `#`, which is translated."""
    return "\n".join(re.sub(r" *#.*", "", line) for line in block.splitlines())


def parts(page: Path) -> tuple[list[str], Counter, Counter]:
    """(fenced blocks, inline code, numbers in the rest) of a page."""
    text = page.read_text(encoding="utf-8")
    blocks, rest = [without_comments(block) for *_, block in FENCED.findall(text)], FENCED.sub("", text)
    code, rest = re.findall(r"`([^`\n]+)`", rest), re.sub(r"`[^`\n]+`", "", rest)
    rest = re.sub(r"\]\([^)]*\)", "]", rest)
    return blocks, Counter(code), Counter(re.findall(r"\d+(?:[.,]\d+)*", rest))


@pytest.mark.parametrize("english, korean", PAIRS, ids=lambda page: str(page.relative_to(ROOT)))
def test_both_languages_have_the_same_blocks_names_and_numbers(english, korean):
    (blocks, code, numbers), (korean_blocks, korean_code, korean_numbers) = parts(english), parts(korean)
    assert len(blocks) >= 3
    assert korean_blocks == blocks
    assert korean_code == code
    assert korean_numbers == numbers


def test_the_quick_start_and_troubleshooting_are_translated():
    assert {page.name for _, page in PAIRS} >= {"README.ko.md", "quickstart.md", "troubleshooting.md"}
