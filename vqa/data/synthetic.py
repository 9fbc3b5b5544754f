"""Synthetic rows: drawn pictures and questions about them, for the tiny model and the demo contest.

Two domains share the shapes and differ in words and style. The tiny model is trained on `HOME`. The demo is `CONTEST`,
with other names for most colours and shapes, other question templates, grainy paper, outlines and tilted shapes. So
the untrained tiny model answers a part of the demo, and fine-tuning improves it.
"""

import math
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from vqa.data.rows import Row

COLOURS = {
    "red": (214, 40, 40),
    "orange": (245, 140, 20),
    "yellow": (250, 220, 50),
    "green": (40, 150, 60),
    "blue": (40, 90, 210),
    "purple": (140, 60, 170),
    "black": (25, 25, 25),
    "brown": (125, 75, 35),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
CORNERS = {"top left": (0, 0), "top right": (1, 0), "bottom left": (0, 1), "bottom right": (1, 1)}
SIZES = ((240, 180), (180, 240), (208, 208))


@dataclass(frozen=True)
class Domain:
    """Vocabulary, question templates and style of a set of synthetic rows.

    words: language -> kind -> canonical name -> the words for it. questions: language -> kind -> templates.
    colours, shapes: those that are drawn; wrong choices are any that have words. paper: grain, outlines, tilt.
    """

    words: dict[str, dict[str, dict[str, tuple[str, ...]]]]
    questions: dict[str, dict[str, tuple[str, ...]]]
    colours: tuple[str, ...]
    shapes: tuple[str, ...]
    paper: bool


def _names(kind: dict[str, str]) -> dict[str, tuple[str, ...]]:
    return {name: tuple(words.split("/")) for name, words in kind.items()}


HOME = Domain(
    words={
        "en": {
            "colour": _names({c: c for c in COLOURS}),
            "shape": _names({s: s for s in SHAPES}),
            "place": _names({p: p for p in CORNERS}),
            "count": _names({str(n): str(n) for n in range(1, 5)}),
        },
        "ko": {
            "colour": _names(dict(zip(COLOURS, "빨강 주황 노랑 초록 파랑 보라 검정 갈색".split()))),
            "shape": _names(dict(zip(SHAPES, "원 네모 세모 별 십자 고리".split()))),
            "place": _names(dict(zip(CORNERS, "왼쪽 위/오른쪽 위/왼쪽 아래/오른쪽 아래".split("/")))),
            "count": _names({str(n): f"{n}개" for n in range(1, 5)}),
        },
    },
    questions={
        "en": {
            "colour": ("What colour is it?", "What colour is the {shape}?"),
            "shape": ("What shape is it?", "Which shape is {colour}?"),
            "place": ("Where is the {shape}?", "Where is it?"),
            "count": ("How many shapes are there?", "How many shapes do you see?"),
        },
        "ko": {
            "colour": ("무슨 색인가요?", "{shape}의 색은 무엇인가요?"),
            "shape": ("무슨 모양인가요?", "{colour} 도형은 어떤 모양인가요?"),
            "place": ("어디에 있나요?", "{shape} 모양은 어디에 있나요?"),
            "count": ("도형은 모두 몇 개인가요?", "도형이 몇 개 있나요?"),
        },
    },
    colours=tuple(COLOURS),
    shapes=SHAPES,
    paper=False,
)


CONTEST = Domain(
    words={
        "en": HOME.words["en"]
        | {
            "colour": {"red": ("red",), "orange": ("amber",), "green": ("emerald",), "purple": ("violet",)},
            "shape": {"circle": ("disc",), "square": ("box",), "star": ("spark",), "cross": ("cross",)},
        },
        "ko": HOME.words["ko"]
        | {
            "colour": {"red": ("빨강",), "orange": ("귤색",), "green": ("풀색",), "purple": ("포도색",)},
            "shape": {"circle": ("동그라미",), "square": ("상자",), "star": ("불꽃",), "cross": ("십자",)},
        },
    },
    questions={
        "en": {
            "colour": ("Pick the colour of the {shape}.", "In this picture, what is the colour of the {shape}?"),
            "shape": ("Name the {colour} figure.", "Which figure was painted {colour}?"),
            "place": ("In which part of the sheet is the {shape}?", "Find the {colour} {shape} on the sheet."),
            "count": ("How many figures are there?", "Count the figures on the sheet."),
        },
        "ko": {
            "colour": ("{shape}에 칠한 색을 고르세요.", "사진 속 {shape}의 색깔은?"),
            "shape": ("{colour}으로 칠한 도형을 고르세요.", "사진에서 {colour} 도형의 이름은?"),
            "place": ("{shape} 모양이 있는 위치를 고르세요.", "사진에서 {colour} {shape}의 위치는?"),
            "count": ("도형이 몇 개 그려져 있나요?", "종이에 그린 도형을 모두 세어 보세요."),
        },
    },
    colours=("orange", "green", "purple"),
    shapes=("circle", "square", "star", "cross"),
    paper=True,
)


@dataclass(frozen=True)
class Scene:
    """One to four copies of one shape in one colour, each in a corner of its own."""

    shape: str
    colour: str
    corners: tuple[str, ...]


def draw_scene(rng: random.Random, domain: Domain, size: tuple[int, int] | None = None) -> tuple[Image.Image, Scene]:
    """(a picture, what it shows)."""
    corners = tuple(rng.sample(list(CORNERS), rng.choice((1, 1, 2, 3, 4))))
    scene = Scene(rng.choice(domain.shapes), rng.choice(domain.colours), corners)
    size = size or rng.choice(SIZES)
    image = (
        _paper(rng, size) if domain.paper else Image.new("RGB", size, tuple(rng.randint(222, 255) for _ in range(3)))
    )
    for corner in corners:
        _draw(ImageDraw.Draw(image), rng, scene, corner, size, domain.paper)
    return (image.filter(ImageFilter.GaussianBlur(0.6)) if domain.paper else image), scene


def ask(rng: random.Random, scene: Scene, domain: Domain) -> tuple[str, str, list[str]]:
    """(question, right answer, every wrong answer) about a scene, in Korean or English."""
    language = rng.choice(("ko", "en"))
    words = domain.words[language]
    kind = rng.choice(["colour", "shape", "count", *["place"] * (len(scene.corners) == 1)])
    name_of = {
        "colour": scene.colour,
        "shape": scene.shape,
        "count": str(len(scene.corners)),
        "place": scene.corners[0],
    }
    right = name_of[kind]
    names = {part: rng.choice(words[part][getattr(scene, part)]) for part in ("colour", "shape")}
    question = rng.choice(domain.questions[language][kind]).format(**names)
    wrong = [rng.choice(synonyms) for name, synonyms in words[kind].items() if name != right]
    return question, rng.choice(words[kind][right]), wrong


def four_choices(rng: random.Random, right: str, wrong: list[str]) -> tuple[list[str], int]:
    """Four choices in random order and the index of the right one."""
    choices = rng.sample(wrong, 3) + [right]
    rng.shuffle(choices)
    return choices, choices.index(right)


def draw_row(rng: random.Random, domain: Domain) -> tuple[Image.Image, Row]:
    """A picture and a row about it, with `question`, `choices` (four) and `answer`; the caller adds id and image."""
    image, scene = draw_scene(rng, domain)
    question, right, wrong = ask(rng, scene, domain)
    choices, answer = four_choices(rng, right, wrong)
    return image, Row(question=question, choices=choices, answer=answer)


def _paper(rng: random.Random, size: tuple[int, int]) -> Image.Image:
    """Tinted paper with grain, lit from one side."""
    width, height = size
    grain = np.random.default_rng(rng.getrandbits(32))
    tint = np.array([rng.randint(215, 250) for _ in range(3)], dtype=float)
    angle, depth = rng.uniform(0, 2 * math.pi), rng.uniform(5, 20)
    x, y = np.meshgrid(np.linspace(-1, 1, width), np.linspace(-1, 1, height))
    light = (x * math.cos(angle) + y * math.sin(angle)) * depth
    pixels = tint + light[..., None] + grain.normal(0, rng.uniform(2, 6), (height, width, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _draw(
    canvas: ImageDraw.ImageDraw, rng: random.Random, scene: Scene, corner: str, size: tuple[int, int], paper: bool
) -> None:
    """Draw one copy near the middle of its quarter of the picture."""
    width, height = size[0] / 2, size[1] / 2
    column, row = CORNERS[corner]
    radius = min(width, height) * rng.uniform(0.26, 0.38)
    x = (column + 0.5) * width + rng.uniform(-0.1, 0.1) * width
    y = (row + 0.5) * height + rng.uniform(-0.1, 0.1) * height
    spread = 20 if paper else 14
    fill = tuple(max(0, min(255, part + rng.randint(-spread, spread))) for part in COLOURS[scene.colour])
    turn = math.radians(rng.uniform(-6, 6)) if paper else 0.0
    line: dict[str, Any] = {"outline": (60, 60, 60), "width": 2} if paper and rng.random() < 0.4 else {}

    def points(*polar: tuple[float, float]) -> list[tuple[float, float]]:
        return [(x + radius * r * math.sin(a + turn), y - radius * r * math.cos(a + turn)) for a, r in polar]

    box = (x - radius, y - radius, x + radius, y + radius)
    if scene.shape == "circle":
        canvas.ellipse(box, fill=fill, **line)
    elif scene.shape == "ring":
        canvas.ellipse(box, outline=fill, width=max(4, round(radius * 0.38)))
    elif scene.shape == "square":
        canvas.polygon(points(*[(math.pi * (0.25 + k / 2), 1.15) for k in range(4)]), fill=fill, **line)
    elif scene.shape == "triangle":
        canvas.polygon(points(*[(math.pi * 2 * k / 3, 1.15) for k in range(3)]), fill=fill, **line)
    elif scene.shape == "star":
        canvas.polygon(points(*[(math.pi * k / 5, 1.2 if k % 2 == 0 else 0.5) for k in range(10)]), fill=fill, **line)
    else:  # cross: two outer corners an arm, a third as wide as the cross
        arms = [(math.pi * k / 2 + side * 0.32, 1.06) for k in range(4) for side in (-1, 1)]
        inner = [(math.pi * (k / 2 + 0.25), 0.47) for k in range(4)]
        corners = [corner for k in range(4) for corner in (arms[2 * k], arms[2 * k + 1], inner[k])]
        canvas.polygon(points(*corners), fill=fill, **line)
