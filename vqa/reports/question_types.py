"""The type of a question (count, colour, place, ...), by a short table of rules in English and Korean.

The first rule that matches names the type. explore.py shows how many questions match none; add rules for them here.
"""

import re

OTHER = "other"

# type: (English, between word boundaries; Korean)
RULES = {
    "reading": (
        r"say|says|said|written|writing|text|words?|letters?|spelled|printed|reads?|title|digits?"
        r"|(phone|plate|licen[cs]e|model|jersey|bus|room) number",
        r"글자|글씨|문구|문자|적힌|적혀|쓰인|쓰여|써\s?있|써\s?진|숫자|번호|상호|제목|읽",
    ),
    "time": (
        r"what (time|year|month|day|date|season)|o'clock|when",
        r"몇\s?시|몇\s?분|몇\s?월|몇\s?년|시각|시간|언제|날짜|요일|계절",
    ),
    "count": (r"how many|number of|count", r"몇|개수|갯수|세어|인원|수량|[는은의]\s수[는를]|총\s?수"),
    "colour": (r"colou?rs?", r"무슨\s?색|어떤\s?색|색깔|색상|색은|색을|색이|색인"),
    "person": (r"who|whose|(man|woman|boy|girl|person|people)('s)? (job|age|gender)", r"누구|누가|직업|성별|나이"),
    "action": (r"doing|happening|action|activity", r"하고 있|하는 (행동|동작|일)|행동|동작|자세|운동|활동"),
    "place": (
        r"where|(in|on|to|at) (which|what) (part|side|corner|room|direction|place|city|country)|located"
        r"|(position|corner|place) of|^find|^locate",
        r"위치|어디|장소|방향|어느\s?(쪽|방향|곳|나라|도시)|무슨\s?방",
    ),
    "reason": (r"why|reason|purpose|used for", r"왜|이유|까닭|목적|용도|위해"),
    "material": (r"made (of|from|out of)|material|texture", r"재질|재료|소재|만들어"),
    "comparison": (
        r"biggest|largest|smallest|tallest|shortest|longest|most|least|bigger|larger|smaller|taller|more|fewer|same"
        r"|different|compared?",
        r"가장|제일|더 (큰|작은|많은|적은|높은|긴)|비교|차이",
    ),
    "shape": (r"shapes?|figures?|pattern", r"모양|도형|형태|무늬"),
    "statement": (
        r"true|false|correct|incorrect|statement|describes?|description|caption",
        r"옳은|옳지|맞는|틀린|알맞은|올바른|적절한|설명|해당하",
    ),
    "yes or no": (
        r"^(is|are|was|were|does|do|did|can|could|has|have|will)",
        r"(있|없|맞|보이)(나요|습니까|는가|을까요)\??$",
    ),
    "object": (r"what|which|name", r"무엇|무슨|어떤|어느|종류|이름|물건|사물|음식|동물|뭐|것은"),
}
COMPILED = {name: re.compile(rf"\b({en})\b|{ko}", re.IGNORECASE) for name, (en, ko) in RULES.items()}


def question_type(question: str) -> str:
    """The name of the first rule that the question matches, or "other"."""
    question = " ".join(question.split())
    return next((name for name, rule in COMPILED.items() if rule.search(question)), OTHER)
