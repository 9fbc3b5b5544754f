"""Paraphrases of a question by rules, in Korean and English.

A rule is a pattern and the ways to rewrite a question that matches all of it. The rules are few and narrow: a
paraphrase with another meaning would teach a wrong answer. A question that matches no rule gets no paraphrase.
"""

import re
from collections.abc import Callable

ASKED = r"(.*?(?:무엇|어디|누구|언제|얼마|(?:몇|무슨|어떤) .+?))"  # up to the thing asked for
IS = r"(?:인가요|입니까|일까요)\?"
WHERE = "곳|장소|위치"
WHAT = "색|색깔|이름|모양|종류|물건|동물|음식|과일|직업|제목|글자"
KINDS = "색|색깔|모양|종류|물건|동물|음식|과일|날씨|계절|글자|운동|도형|꽃|장소|교통수단"
UNITS = "개|명|마리|대|그루|송이|권"
COLOUR = "(colou?r|shape)"


# A thing, not a clause: "Where is the photo taken?" does not ask for the place of the photo.
THING = r"(the (?!.*(?:ing|ed|taken|made|seen|shown|held|from|to|of|in|on|with)\?$).+)"


def has_final(word: str) -> bool | None:
    """Whether a word ends with a consonant; None where its last character is no Hangul syllable."""
    return (ord(word[-1]) - 0xAC00) % 28 > 0 if "가" <= word[-1] <= "힣" else None


def topic(word: str) -> str | None:
    """The word with its topic particle, 은 or 는; None for a word that does not end in Hangul."""
    return None if has_final(word) is None else word + ("은" if has_final(word) else "는")


def about(ending: str) -> Callable[[re.Match], str | None]:
    """Rewrites a question as the topic of its first group, and `ending`."""
    return lambda match: (subject := topic(match[1])) and f"{subject} {ending}"


def formal(match: re.Match) -> str:
    """하나요 -> 합니까, 있나요 -> 있습니까."""
    stem = match[2]
    with_bieup = chr(ord(stem) + 17)  # ㅂ is the 17th final consonant
    return match[1] + (f"{stem}습니까?" if has_final(stem) else f"{with_bieup}니까?")


def selected(match: re.Match) -> str | None:
    """색을 고르세요 -> 색은 무엇인가요; None if the particle does not fit the noun."""
    noun = match[1]
    if has_final(noun) is not (match[2] == "을") or re.search("(사람|인물|분)$", noun):
        return None
    return f"{topic(noun)} {'어디' if re.search(f'({WHERE})$', noun) else '무엇'}인가요?"


RULES: list[tuple[str, tuple[str | Callable, ...]]] = [
    # Korean: turned around
    (rf"(.+?)[은는] (?:무슨|어떤) 색깔?{IS}", (r"\1의 색깔은 무엇인가요?",)),
    (rf"(.+)의 색깔?은 무엇{IS}", (about("무슨 색인가요?"),)),
    (r"(.+?)[은는] 어디에 (?:있나요|있습니까|있을까요)\?", (r"\1의 위치는 어디인가요?",)),
    (rf"(.+)의 위치는 어디{IS}", (about("어디에 있나요?"),)),
    (rf"(.+(?:{WHAT})[은는])\?", (r"\1 무엇인가요?",)),
    (rf"(.+(?:{WHERE})[은는])\?", (r"\1 어디인가요?",)),
    (r"(.+)([을를]) 고르(?:세요|시오)\.?", (selected,)),
    # Korean: other words
    (rf"(.*)무슨 ((?:{KINDS}).*)", (r"\1어떤 \2",)),
    (rf"(.*)어떤 ((?:{KINDS}).*)", (r"\1무슨 \2",)),
    (rf"(.*[은는이가] )(몇 (?:{UNITS})(?!째).*)", (r"\1모두 \2",)),
    (rf"(.*)모두 (몇 (?:{UNITS}).*)", (r"\1\2",)),
    # Korean: other endings
    (rf"{ASKED}(?:인가요|일까요)\?", (r"\1입니까?",)),
    (rf"{ASKED}입니까\?", (r"\1인가요?",)),
    (rf"{ASKED}{IS}", (r"\1인지 고르세요.",)),
    (r"(.*)([있없했었았였졌겠하되이오리키])나요\?", (formal,)),
    (r"(.*[있없했었았였졌겠])습니까\?", (r"\1나요?",)),
    (r"(.*)고르세요\.?", (r"\1고르시오.",)),
    (r"(.*)고르시오\.?", (r"\1고르세요.",)),
    (r"((?:이 )?)사진((?:에서|에|속|의) .+)", (r"\1이미지\2",)),
    (r"((?:이 )?)이미지((?:에서|에|속|의) .+)", (r"\1사진\2",)),
    # English
    (rf"Wh(?:at|ich) {COLOUR} is {THING}\?", (r"What is the \1 of \2?", r"Which \1 does \2 have?")),
    (rf"Wh(?:at|ich) {COLOUR} are {THING}\?", (r"What is the \1 of \2?", r"Which \1 do \2 have?")),
    (rf"What is the {COLOUR} of (.+)\?", (r"Name the \1 of \2.",)),
    (rf"(?:Name|Pick|Choose) the {COLOUR} of (.+)\.", (r"What is the \1 of \2?",)),
    (
        r"How many (.+?) are there(| (?:in|on) .+)\?",
        (r"What is the number of \1\2?", r"How many \1 can you see\2?"),
    ),
    (r"How many (.+?) (?:can|do) you see(| (?:in|on) .+)\?", (r"How many \1 are there\2?",)),
    (rf"Where (?:is|are) {THING}\?", (r"What is the location of \1?",)),
    (r"What is the location of (.+)\?", (r"At what place can one see \1?",)),
    (rf"What ({COLOUR}|(?:kind|type) of|animal|fruit|sport|number|letter)( .+)", (r"Which \1\3",)),
    (r"(.*\b)kind of (.*)", (r"\1type of \2",)),
    (r"(.*\b)type of (.*)", (r"\1kind of \2",)),
    (r"((?:.*\bi|I)n (?:the|this) )(?:image|photo)([?.]|, .*)", (r"\1picture\2",)),
    (r"((?:.*\bi|I)n (?:the|this) )(?:picture|photo)([?.]|, .*)", (r"\1image\2",)),
    (r"((?:.*\bi|I)n (?:the|this) )(?:picture|image)([?.]|, .*)", (r"\1photo\2",)),
]


def paraphrases(question: str) -> list[str]:
    """Different paraphrases of the question, the most different ones first; empty where no rule matches."""
    question = question.strip()
    texts: dict[str, bool] = {}  # a dict keeps the order and drops duplicates
    for pattern, rewrites in RULES:
        if match := re.fullmatch(pattern, question, re.DOTALL):
            texts |= {rewrite(match) if callable(rewrite) else match.expand(rewrite): True for rewrite in rewrites}
    return [text for text in texts if text and text != question]
