"""The type of a question (count, colour, place, ...), by a short table of rules in English and Korean.

Question words decide first: a question is of the type "yes or no" only where it has no such word and its choices are
yes and no. Otherwise the first rule that matches names the type. explore.py shows how many questions match none; add
rules for them here. tests/test_question_types.py measures the rules on labelled questions.
"""

import re
from collections.abc import Sequence

import numpy as np

from vqa.data.answers import clean
from vqa.data.rows import Row

OTHER = "other"
YES_NO = "yes or no"
YES_NO_CHOICE = re.compile(
    r"(yes|no|true|false|네|예|아니오|아니요|아뇨)\b.*|[ox]"
    r"|(맞|아니|아닙|있|없|그렇)(다|니다|습니다)|그렇지 않(다|습니다)",
    re.IGNORECASE,
)
WH_WORD = re.compile(
    r"^(?!(is|are|was|were|do|does|did|has|have|can|could|will|would)\b)(\w+ ){0,3}"
    r"(what|which|who|whose|when|where|why|how)\b|무엇|무슨|뭐|뭘|누구|누가|언제|어디|왜|어떤|어떻게|어느|몇",
    re.IGNORECASE,
)
# type: (English, between word boundaries; Korean)
RULES = {
    "time": (
        r"what time|time (of|is|on)|(what|which) (year|month|day|date|season|part of the day)|o'clock"
        r"|clock (read|say)s?|when",
        r"몇\s?(시|분|월|년)|시각|시간|언제|날짜|요일|계절|[연년]도[는가]?",
    ),
    "reading": (
        r"says?|said|written|writing|text|(what|which) (words?|letters?)|what number (is|can)|spelled|printed|reads?"
        r"|title|digits?|brand|(phone|plate|licen[cs]e|model|jersey|bus|room|street) (number|name)",
        r"글자(?! ?색)|글씨|문구|단어|적힌|적혀|쓰인|쓰여|써\s?있|써\s?진|숫자|번호|상호|제목|상표|브랜드",
    ),
    "count": (
        r"how many|(total )?number of|quantity|count",
        r"몇(?! ?살)|개수|갯수|세어|인원|수량|의\s수[는를가]|(사람|총)\s?수",
    ),
    "colour": (r"colou?rs?|hue", r"(무슨|어떤)\s?색|색깔|색상|색[은을이인]|색\?"),
    "comparison": (
        r"(bigg|larg|small|tall|short|long|heavi|light|clos|near|farth|high|low|wid|old|young|fast)er|more|fewer|compared?"
        r"|(which|who|what)\b.*\b((bigg|larg|small|tall|short|long|heavi|light|clos|near|farth|high|low|wid|old|young"
        r"|fast)est|most(?! (likely|probabl))|least)",
        r"(가장|제일) (?!잘|바깥|앞쪽|뒤쪽)|(^|\s)더 (?!이상)|비교|차이",
    ),
    "person": (
        r"who|whose|(which|what) person|how old|job|profession|occupation|gender|age",
        r"누구|누가|직업|성별|나이|연령|몇\s?살",
    ),
    "material": (
        r"(made|built|constructed) (out )?(of|from)|material|texture|fabric",
        r"재질|재료(?! ?이름)|소재|원단|(무엇|뭐)[으]?로 (만들|되어)",
    ),
    "reason": (r"why|reason|purpose|used for|cause", r"왜|이유|까닭|목적|용도|원인|위해"),
    "place": (
        r"where|(which|what) ((kind|type|sort) of )?(part|side|corner|room|direction|place|city|country|location)"
        r"|located|(position|corner|place|location) of|^find|^locate",
        r"위치|어디|장소|방향|(어느|어떤)\s?(쪽|곳|나라|도시)|무슨\s?방",
    ),
    "action": (
        r"doing|happening|action|activity|(about|ready|trying|going) to|what (do|does|did|will|can|is|are)\b.* do",
        r"하는 (행동|동작|일|운동)|하고 있는 것|행동|동작|자세|활동"
        r"|(무엇|무얼|뭘|뭐|어떻게).*(고 있|중인|하나요|합니까)",
    ),
    "shape": (r"shapes?|figures?|pattern", r"모양|도형|형태|무늬"),
    "statement": (
        r"true|correct|incorrect|statement|(best|accurately) describes?|description|caption|sentence",
        r"옳은|옳지|맞는|맞지|틀린|알맞은 것|적절|설명|내용|문장|일치",
    ),
    "object": (r"what|which|name|identify", r"무엇|무슨|어떤|어느|종류|이름|물건|사물|음식|동물|뭐|것은|옷은|도구"),
}
COMPILED = {name: re.compile(rf"\b({en})\b|{ko}", re.IGNORECASE) for name, (en, ko) in RULES.items()}


def question_type(question: str, choices: Sequence[str]) -> str:
    """The type of a question with these choices: YES_NO, one of RULES or OTHER. Unicode forms do not matter."""
    question = clean(question)
    if not WH_WORD.search(question) and sum(map(is_yes_or_no, choices)) > 1:
        return YES_NO
    return next((name for name, rule in COMPILED.items() if rule.search(question)), OTHER)


def question_types(rows: Sequence[Row]) -> np.ndarray:
    """The type of each row's question, str (rows,)."""
    return np.array([question_type(row["question"], row["choices"]) for row in rows])


def is_yes_or_no(choice: str) -> bool:
    return bool(YES_NO_CHOICE.fullmatch(clean(choice).rstrip(".!")))
