"""The rule table against questions whose type is known: those that the demo draws, and some of a contest's kind."""

import pytest

from vqa.data.synthetic import CONTEST, HOME
from vqa.reports.question_types import question_type

KNOWN = {
    "reading": ["What does the sign say?", "What is the phone number on the truck?", "간판에 적힌 글자는 무엇인가요?",
                "버스의 번호는 무엇인가요?", "표지판에 쓰여 있는 숫자는?"],
    "time": ["What time does the clock show?", "시계는 몇 시를 가리키나요?", "사진 속 계절은?"],
    "count": ["How many people are on the bench?", "What is the number of cups?", "사람은 모두 몇 명인가요?",
              "테이블 위 컵의 개수는?", "자동차가 몇 대 있나요?"],
    "colour": ["What color is the car?", "우산은 무슨 색인가요?", "여자의 신발 색깔은?"],
    "person": ["Who is holding the ball?", "사진 속 사람의 직업은 무엇인가요?"],
    "action": ["What is the boy doing?", "남자는 무엇을 하고 있나요?"],
    "place": ["Where is the dog?", "고양이는 어디에 있나요?", "이 사진을 찍은 장소는?"],
    "reason": ["Why is she smiling?", "이 물건의 용도는 무엇인가요?"],
    "material": ["What is the table made of?", "의자의 재질은 무엇인가요?"],
    "comparison": ["Which animal is the largest?", "가장 큰 상자는 무엇인가요?"],
    "statement": ["Which statement is correct?", "사진에 대한 설명으로 옳은 것은?"],
    "yes or no": ["Is there a cat?", "사진에 고양이가 있나요?"],
    "object": ["What is on the table?", "접시 위에 놓인 음식은 무엇인가요?", "이 동물의 이름은?"],
    "other": ["Pizza?", "정답을 고르세요"],
}  # fmt: skip


@pytest.mark.parametrize("domain", [HOME, CONTEST])
def test_every_question_that_the_demo_can_ask_is_of_the_kind_that_it_was_drawn_for(domain):
    asked = [
        (kind, template.format(colour=colour, shape=shape))
        for language, kinds in domain.questions.items()
        for kind, templates in kinds.items()
        for template in templates
        for colours in domain.words[language]["colour"].values()
        for colour in colours
        for shapes in domain.words[language]["shape"].values()
        for shape in shapes
    ]
    assert len(asked) > 200
    assert [
        (kind, question, question_type(question)) for kind, question in asked if question_type(question) != kind
    ] == []


@pytest.mark.parametrize("kind", KNOWN)
def test_questions_of_a_contests_kind(kind):
    assert {question: question_type(question) for question in KNOWN[kind]} == dict.fromkeys(KNOWN[kind], kind)
