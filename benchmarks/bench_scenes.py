"""Pictures and questions of the bench: several figures on a board, a tag with a small code, a tiny figure on a disc.

Two domains share the shapes and differ in words, templates and looks. The bench's base model learns `HOME`; the bench
contest is drawn from `CONTEST`, which is new to it.
"""

import functools
import math
import random
from collections import Counter
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "black", "brown")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "bar")
SIDES = ("left", "right", "above", "below")
STEPS = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}
ALPHABET = "ACEHKLPRTX2479"  # far apart in form: a code is hard where it is small, not where it is large
KINDS = ("text", "small", "count", "relation", "colour", "shape", "no_image")
SIZES = ((252, 252), (280, 224), (224, 280))  # width, height in pixels
MAX_COUNT = 8


@dataclass(frozen=True)
class Domain:
    """Words, question templates and looks.

    words: language -> colour, shape or side -> canonical name -> word. questions: language -> kind -> templates.
    rgb: colour -> its RGB. printed: grain, light from one side, outlines, slanted codes on dark tags.
    """

    words: dict[str, dict[str, dict[str, str]]]
    questions: dict[str, dict[str, tuple[str, ...]]]
    rgb: dict[str, tuple[int, int, int]]
    printed: bool


def _words(colours: str, shapes: str, sides: str) -> dict[str, dict[str, str]]:
    names = {"colour": (COLOURS, colours), "shape": (SHAPES, shapes), "side": (SIDES, sides)}
    return {part: dict(zip(keys, words.split("/"), strict=True)) for part, (keys, words) in names.items()}


def _rgb(*values: int) -> dict[str, tuple[int, int, int]]:
    return {name: (v >> 16, v >> 8 & 255, v & 255) for name, v in zip(COLOURS, values, strict=True)}


HOME = Domain(
    words={
        "en": _words("/".join(COLOURS), "/".join(SHAPES), "to the left of/to the right of/above/below"),
        "ko": _words(
            "빨강/주황/노랑/초록/파랑/보라/검정/갈색", "원/네모/세모/별/십자/고리/마름모/막대", "왼쪽/오른쪽/위/아래"
        ),
    },
    questions={
        "en": {
            "text": ("What is written on the tag?", "What does the tag say?"),
            "small": ("What shape is on the disc?", "Which shape is on the small disc?"),
            "small colour": ("What colour is the shape on the disc?", "What colour is on the small disc?"),
            "count": ("How many shapes are there?", "How many shapes do you see?"),
            "relation": ("What is {side} the {shape}?", "Which shape is {side} the {shape}?"),
            "colour": ("What colour is the {shape}?", "What is the colour of the {shape}?"),
            "shape": ("Which shape is {colour}?", "What shape is the {colour} one?"),
            "sum": ("How much is {a} + {b}?", "What is {a} plus {b}?"),
            "word": ("Which word means {colour}?", "What is {colour} in Korean?"),
        },
        "ko": {
            "text": ("표에 무엇이 적혀 있나요?", "표의 글자는 무엇인가요?"),
            "small": ("작은 판에 있는 모양은 무엇인가요?", "판에는 어떤 모양이 있나요?"),
            "small colour": ("작은 판에 있는 모양은 무슨 색인가요?", "판의 모양은 무슨 색인가요?"),
            "count": ("도형은 모두 몇 개인가요?", "도형이 몇 개 있나요?"),
            "relation": ("{shape}의 {side}에 있는 모양은 무엇인가요?", "{shape} {side}에는 무엇이 있나요?"),
            "colour": ("{shape}의 색은 무엇인가요?", "{shape} 모양은 무슨 색인가요?"),
            "shape": ("{colour} 도형은 어떤 모양인가요?", "{colour} 모양은 무엇인가요?"),
            "sum": ("{a} + {b}는 얼마인가요?", "{a} 더하기 {b}는?"),
            "word": ("{colour}은 영어로 무엇인가요?", "{colour}을 뜻하는 영어는?"),
        },
    },
    rgb=_rgb(0xD62828, 0xF58C14, 0xFADC32, 0x28963C, 0x285AD2, 0x8C3CAA, 0x191919, 0x7D4B23),
    printed=False,
)

CONTEST = Domain(
    words={
        "en": _words(
            "crimson/amber/yellow/emerald/blue/violet/black/brown",
            "disc/box/triangle/spark/cross/hoop/diamond/plank",
            "on the left side of/on the right side of/over/under",
        ),
        "ko": _words(
            "진홍/귤색/노랑/풀색/파랑/포도색/검정/갈색",
            "동그라미/상자/세모/불꽃/십자/굴렁쇠/마름모/널빤지",
            "왼편/오른편/위/아래",
        ),
    },
    questions={
        "en": {
            "text": ("Read the label in the picture.", "Which code is printed on the label?"),
            "small": ("Name the tiny figure on the badge.", "What does the badge show?"),
            "small colour": (
                "Pick the colour of the tiny figure on the badge.",
                "In which colour is the badge printed?",
            ),
            "count": ("Count the figures on the sheet.", "How many large figures were printed?"),
            "relation": ("Name the figure {side} the {shape}.", "On this sheet, which figure is {side} the {shape}?"),
            "colour": ("Pick the colour of the {shape}.", "In this picture, what is the colour of the {shape}?"),
            "shape": ("Name the {colour} figure.", "Which figure was printed in {colour}?"),
            "sum": ("Add {a} and {b}.", "If you have {a} and get {b} more, how many is it?"),
            "word": ("Translate into Korean: {colour}.", "How do you say {colour} in Korean?"),
        },
        "ko": {
            "text": ("사진 속 라벨을 읽어 보세요.", "라벨에 인쇄된 코드를 고르세요."),
            "small": ("배지에 그려진 작은 그림의 이름은?", "배지에 있는 그림을 고르세요."),
            "small colour": ("배지에 그려진 작은 그림의 색깔은?", "배지의 그림은 어떤 색으로 인쇄되었나요?"),
            "count": ("종이에 인쇄된 큰 그림을 모두 세어 보세요.", "사진에 큰 그림이 몇 개 있나요?"),
            "relation": (
                "사진에서 {shape} {side}에 놓인 그림을 고르세요.",
                "{shape}를 기준으로 {side}에 있는 그림은?",
            ),
            "colour": ("{shape}에 칠한 색을 고르세요.", "사진 속 {shape}의 색깔은?"),
            "shape": ("{colour}으로 칠한 그림을 고르세요.", "사진에서 {colour} 그림의 이름은?"),
            "sum": ("{a}에 {b}를 더하세요.", "사탕 {a}개에 {b}개를 더하면 몇 개인가요?"),
            "word": ("다음 색을 영어로 옮기세요: {colour}", "{colour}에 맞는 영어 낱말을 고르세요."),
        },
    },
    rgb=_rgb(0xB4143C, 0xE6A028, 0xE6D250, 0x1E8C64, 0x3C6EBE, 0x6E3C8C, 0x2D2D32, 0x6E4628),
    printed=True,
)


@dataclass(frozen=True)
class Figure:
    shape: str
    colour: str
    cell: tuple[int, int]  # column and row of the board
    at: tuple[float, float]  # x and y of its middle, in pixels
    radius: float


@dataclass(frozen=True)
class Scene:
    """What a picture shows: one to eight figures, a tag with a code, a disc with a tiny figure."""

    size: tuple[int, int]
    figures: tuple[Figure, ...]
    badge: Figure | None
    code: str  # "": no tag
    tag_at: tuple[float, float]
    noise: float  # standard deviation of the grain, of 255 levels

    def neighbour(self, figure: Figure, side: str) -> Figure | None:
        """The figure in the next cell of the board."""
        cell = tuple(a + b for a, b in zip(figure.cell, STEPS[side]))
        return next((other for other in self.figures if other.cell == cell), None)

    def unique(self, part: str) -> list[Figure]:
        """The figures that no other equals in `part`, shape or colour."""
        counts = Counter(getattr(figure, part) for figure in self.figures)
        return [figure for figure in self.figures if counts[getattr(figure, part)] == 1]

    def relations(self) -> list[tuple[Figure, str, Figure]]:
        """(a figure of a unique shape, a side, its neighbour there)."""
        pairs = [(figure, side, self.neighbour(figure, side)) for figure in self.unique("shape") for side in SIDES]
        return [(figure, side, other) for figure, side, other in pairs if other]

    def allows(self, kind: str) -> bool:
        """Whether a question of this kind has one answer."""
        return {
            "text": bool(self.code),
            "small": self.badge is not None,
            "relation": bool(self.relations()),
            "colour": bool(self.unique("shape")),
            "shape": bool(self.unique("colour")),
        }.get(kind, True)


@dataclass(frozen=True)
class Question:
    """A question with four choices. `looks_at`: the middle of what it asks about, in pixels of the picture."""

    text: str
    choices: tuple[str, ...]
    answer: int
    looks_at: tuple[float, float] | None


def make_scene(rng: random.Random, domain: Domain, kind: str) -> Scene:
    """A scene that allows a question of this kind."""
    while not (scene := _any_scene(rng, domain, kind)).allows(kind):
        pass
    return scene


def _any_scene(rng: random.Random, domain: Domain, kind: str) -> Scene:
    width, height = size = rng.choice(SIZES)
    columns, rows = (4, 3) if width >= height else (3, 4)
    cells = [(column, row) for column in range(columns) for row in range(rows)]
    rng.shuffle(cells)

    def figure(radius: float) -> Figure:
        cell = cells.pop()
        at = tuple((c + 0.5 + rng.uniform(-0.08, 0.08)) * s / n for c, s, n in zip(cell, size, (columns, rows)))
        return Figure(rng.choice(SHAPES), rng.choice(COLOURS), cell, at, radius)

    count = rng.randint(1, 5) + rng.randint(0, 3)  # so that a window of four numbers says nothing about the count
    figures = tuple(figure(rng.uniform(17, 23)) for _ in range(count))
    badge, tag = figure(6.5), figure(0)
    heavy = kind in ("colour", "shape")
    return Scene(
        size=size,
        figures=figures,
        badge=badge if rng.random() < 0.6 else None,
        code="".join(rng.choices(ALPHABET, k=rng.choice((2, 2, 3)))) if rng.random() < 0.6 else "",
        tag_at=tag.at,
        noise=rng.uniform(25, 50) if heavy else rng.uniform(3, 9) if domain.printed else rng.uniform(0, 12),
    )


def ask(rng: random.Random, scene: Scene, domain: Domain, kind: str) -> Question:
    """A question of a kind that the scene allows, in Korean or English."""
    language = rng.choice(("ko", "en"))
    words, names, looks_at = domain.words[language], {}, None
    template = kind
    if kind == "text":
        choices, answer, looks_at = *_similar_codes(rng, scene.code), scene.tag_at
    elif kind == "count":
        choices, answer = _window(rng, len(scene.figures), range(1, MAX_COUNT + 1))
    elif kind == "no_image" and rng.random() < 0.5:
        a, b = rng.randint(1, 6), rng.randint(1, 6)
        template, names = "sum", {"a": a, "b": b}
        choices, answer = _window(rng, a + b, range(max(1, a + b - 3), a + b + 4))
    elif kind == "no_image":
        colour = rng.choice(COLOURS)
        template, names = "word", {"colour": words["colour"][colour]}
        other = domain.words["en" if language == "ko" else "ko"]["colour"]
        choices, answer = _names(rng, other, colour, COLOURS)
    else:
        part = "colour" if kind == "colour" or (kind == "small" and rng.random() < 0.3) else "shape"
        if kind == "small":
            assert scene.badge
            template, target, shown = "small colour" if part == "colour" else "small", scene.badge, scene.badge
        elif kind == "relation":
            shown, side, target = rng.choice(scene.relations())
            names = {"side": words["side"][side]}
        else:
            target = shown = rng.choice(scene.unique("shape" if kind == "colour" else "colour"))
        looks_at = shown.at
        names |= {key: words[key][getattr(shown, key)] for key in ("shape", "colour")}
        present = [getattr(figure, part) for figure in scene.figures]
        every = COLOURS if part == "colour" else SHAPES
        if kind == "relation":  # nobody picks the figure that the question names
            every = tuple(name for name in every if name != shown.shape)
        choices, answer = _names(rng, words[part], getattr(target, part), every, present)
    text = rng.choice(domain.questions[language][template]).format(**names)
    return Question(text, tuple(choices), answer, looks_at)


def _names(rng: random.Random, words: dict[str, str], right: str, every, present=()) -> tuple[list[str], int]:
    """Four words and the index of the right one. Two of the wrong ones name things in the picture, if it has them."""
    seen = sorted({name for name in present if name in every} - {right})
    wrong = rng.sample(seen, min(2, len(seen)))
    wrong += rng.sample([name for name in every if name != right and name not in wrong], 3 - len(wrong))
    chosen = [right, *wrong]
    rng.shuffle(chosen)
    return [words[name] for name in chosen], chosen.index(right)


def _window(rng: random.Random, right: int, numbers: range) -> tuple[list[str], int]:
    """Four numbers in a row, shuffled, and the index of the right one."""
    starts = [start for start in numbers[:-3] if start <= right <= start + 3]
    start = rng.choice(starts)
    chosen = list(range(start, start + 4))
    rng.shuffle(chosen)
    return [str(number) for number in chosen], chosen.index(right)


def _similar_codes(rng: random.Random, code: str) -> tuple[list[str], int]:
    """Four codes and the index of the right one: all combinations of two characters at two places.

    Each code has as much in common with the others as the next, so that the text gives nothing away.
    """
    first, second = rng.sample(range(len(code)), 2)
    others = {place: rng.choice([c for c in ALPHABET if c != code[place]]) for place in (first, second)}
    chosen = []
    for a in (code[first], others[first]):
        for b in (code[second], others[second]):
            letters = list(code)
            letters[first], letters[second] = a, b
            chosen.append("".join(letters))
    rng.shuffle(chosen)
    return chosen, chosen.index(code)


def draw(rng: random.Random, scene: Scene, domain: Domain) -> Image.Image:
    """The picture, in mode RGB."""
    width, height = scene.size
    paper = tuple(rng.randint(222, 250) for _ in range(3))
    large = Image.new("RGB", (2 * width, 2 * height), paper)  # drawn at twice the size: smooth edges
    canvas = ImageDraw.Draw(large)
    for figure in scene.figures:
        _draw_figure(canvas, rng, figure, domain)
    if scene.badge:
        x, y = (2 * value for value in scene.badge.at)
        line = (90, 90, 90) if domain.printed else (150, 150, 150)
        canvas.ellipse((x - 27, y - 27, x + 27, y + 27), fill=(255, 255, 255), outline=line, width=3)
        _draw_figure(canvas, rng, scene.badge, domain)
    if scene.code:
        _draw_tag(large, rng, scene, domain.printed)
    pixels = np.asarray(large.reduce(2), dtype=np.float32)
    grain = np.random.default_rng(rng.getrandbits(32)).standard_normal((height, width, 1), dtype=np.float32)
    pixels = pixels + scene.noise * grain
    if domain.printed:
        angle, depth = rng.uniform(0, 2 * math.pi), rng.uniform(5, 20)
        x, y = np.linspace(-depth, depth, width), np.linspace(-depth, depth, height)
        pixels += (x[None] * math.cos(angle) + y[:, None] * math.sin(angle)).astype(np.float32)[..., None]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _draw_figure(canvas: ImageDraw.ImageDraw, rng: random.Random, figure: Figure, domain: Domain) -> None:
    (x, y), radius = (2 * value for value in figure.at), 2 * figure.radius
    fill = tuple(max(0, min(255, part + rng.randint(-14, 14))) for part in domain.rgb[figure.colour])
    turn = math.radians(rng.uniform(-8, 8)) if domain.printed else 0.0
    is_outlined = domain.printed and figure.radius > 10 and rng.random() < 0.4
    line = {"outline": (60, 60, 60), "width": 3} if is_outlined else {}

    def points(*polar: tuple[float, float]) -> list[tuple[float, float]]:
        return [(x + radius * r * math.sin(a + turn), y - radius * r * math.cos(a + turn)) for a, r in polar]

    box = (x - radius, y - radius, x + radius, y + radius)
    if figure.shape == "circle":
        canvas.ellipse(box, fill=fill, **line)
    elif figure.shape == "ring":
        canvas.ellipse(box, outline=fill, width=round(radius * 0.4))
    elif figure.shape == "square":
        canvas.polygon(points(*[(math.pi * (0.25 + k / 2), 1.2) for k in range(4)]), fill=fill, **line)
    elif figure.shape == "diamond":
        canvas.polygon(points(*[(math.pi * k / 2, (1.25, 0.75)[k % 2]) for k in range(4)]), fill=fill, **line)
    elif figure.shape == "bar":
        canvas.polygon(points(*[(a, 1.2) for a in (1.2, 1.94, 4.34, 5.08)]), fill=fill, **line)
    elif figure.shape == "triangle":
        canvas.polygon(points(*[(math.pi * 2 * k / 3, 1.2) for k in range(3)]), fill=fill, **line)
    elif figure.shape == "star":
        canvas.polygon(points(*[(math.pi * k / 5, 0.5 if k % 2 else 1.25) for k in range(10)]), fill=fill, **line)
    else:  # cross: two outer corners an arm, a third as wide as the cross
        arms = [(math.pi * k / 2 + side * 0.32, 1.1) for k in range(4) for side in (-1, 1)]
        inner = [(math.pi * (k / 2 + 0.25), 0.49) for k in range(4)]
        corners = [corner for k in range(4) for corner in (arms[2 * k], arms[2 * k + 1], inner[k])]
        canvas.polygon(points(*corners), fill=fill, **line)


@functools.lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)  # Pillow's own, so that every machine draws the same


def _draw_tag(large: Image.Image, rng: random.Random, scene: Scene, printed: bool) -> None:
    """The code on a plate. `large` is twice as large as the picture, where capitals are about 10 pixels high."""
    width, height = 34 + 22 * len(scene.code), 44
    dark, light = tuple(rng.randint(10, 60) for _ in range(3)), tuple(rng.randint(225, 255) for _ in range(3))
    ground, ink = (dark, light) if printed else (light, dark)
    plate = Image.new("RGB", (width, height), ground)
    bold = 1 if printed else rng.choice((0, 0, 1))
    ImageDraw.Draw(plate).text(
        (width / 2, height / 2), scene.code, ink, _font(rng.randint(28, 32)), anchor="mm", stroke_width=bold
    )
    slant = rng.uniform(0.12, 0.28) if printed else rng.uniform(-0.05, 0.05)
    plate = plate.transform(
        plate.size,
        Image.Transform.AFFINE,
        (1, slant, -slant * height / 2, 0, 1, 0),
        Image.Resampling.BILINEAR,
        fillcolor=ground,
    )
    x, y = (round(2 * value) for value in scene.tag_at)
    large.paste(plate, (x - width // 2, y - height // 2))
    if not printed:
        box = (x - width // 2, y - height // 2, x + width // 2, y + height // 2)
        ImageDraw.Draw(large).rectangle(box, outline=(120, 120, 120), width=2)
