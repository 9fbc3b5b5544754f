"""The README in both languages: the same commands, names and numbers."""

import re
from collections import Counter

from conftest import ROOT

FENCED = re.compile(r"^```\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def parts(name: str) -> tuple[list[str], Counter, Counter]:
    """(fenced blocks, inline code, numbers in the rest) of a page."""
    text = (ROOT / name).read_text(encoding="utf-8")
    blocks, rest = FENCED.findall(text), FENCED.sub("", text)
    code, rest = re.findall(r"`([^`\n]+)`", rest), re.sub(r"`[^`\n]+`", "", rest)
    rest = re.sub(r"\]\([^)]*\)", "]", rest)
    return blocks, Counter(code), Counter(re.findall(r"\d+(?:[.,]\d+)*", rest))


def test_both_languages_have_the_same_blocks_names_and_numbers():
    (blocks, code, numbers), (korean, korean_code, korean_numbers) = parts("README.md"), parts("README.ko.md")
    assert len(blocks) >= 8 and sum(numbers.values()) > 40
    assert korean == blocks
    assert korean_code == code
    assert korean_numbers == numbers
