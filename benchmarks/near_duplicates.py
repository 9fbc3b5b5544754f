"""How many near-duplicate images explore.py finds, and how many different drawings it takes for near-duplicates.

    python benchmarks/near_duplicates.py          # a table, 2 minutes on one core

Each kind has 400 different images and 60 of them in five changed forms.
"""

import random
import sys
import tempfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageEnhance

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from vqa.data import duplicates  # noqa: E402
from vqa.data.synthetic import CONTEST, HOME, draw_row  # noqa: E402

COUNT, CHANGED = 400, 60


def main() -> None:
    table = pd.DataFrame([measure(name, draw) for name, draw in KINDS.items()])
    print(table.to_string(index=False))


def measure(name: str, draw) -> dict:
    """Pairs of different images that match by hash and colours, those that are left, and changed images found."""
    with tempfile.TemporaryDirectory() as folder:
        names = [(number, "") for number in range(COUNT)]
        for number, _ in names:
            draw(number).save(f"{folder}/{number}_.png")
        for number in range(CHANGED):
            for change, apply in CHANGES.items():
                apply(draw(number)).save(f"{folder}/{number}_{change}.png")
                names.append((number, change))
        pictures = [duplicates.read_picture(f"{folder}/{number}_{change}.png") for number, change in names]
    pairs = duplicates.near_pairs(pictures)
    different = [(i, j) for i, j in pairs if j < COUNT and pictures[i].sha != pictures[j].sha]
    found = pd.Series([names[j][1] for i, j in pairs if i < COUNT <= j and names[i][0] == names[j][0]], dtype=object)
    rates = {change: f"{(found == change).sum() / CHANGED:.0%}" for change in CHANGES}
    return {
        "kind": name,
        "without details": count_without_details(pictures[:COUNT]),
        "left": len(different),
    } | rates


def count_without_details(pictures: list) -> int:
    same_details = duplicates.same_details
    duplicates.same_details = lambda first, second: np.full(len(first), True)
    pairs = duplicates.near_pairs(pictures)
    duplicates.same_details = same_details
    return sum(pictures[i].sha != pictures[j].sha for i, j in pairs)


def photo(seed: int) -> Image.Image:
    """Coloured noise whose power falls with the frequency, as a photo's does."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(240)[:, None], np.fft.rfftfreq(320)[None])
    frequency[0, 0] = 1
    layers = [np.fft.irfft2(np.fft.rfft2(rng.normal(size=(240, 320))) / frequency**1.2) for _ in range(4)]
    layers = [layer / layer.std() for layer in layers]
    pixels = 125 + 50 * np.stack([layers[0] + layer / 2 for layer in layers[1:]], -1)
    return Image.fromarray(pixels.clip(0, 255).astype("uint8"))


def page(seed: int) -> Image.Image:
    """Lines of text below one heading."""
    rng, image = random.Random(seed), Image.new("RGB", (400, 300), "white")
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, 400, 50), fill="#223344")
    draw.text((20, 15), "QUESTION PAPER", fill="white")
    for line in range(8):
        draw.text((20, 70 + line * 26), "".join(rng.choice("abcdefghij  ") for _ in range(50)), fill="black")
    return image


def chart(seed: int) -> Image.Image:
    """Six bars in one frame."""
    rng, image = random.Random(seed), Image.new("RGB", (480, 360), "white")
    draw = ImageDraw.Draw(image)
    draw.rectangle((60, 30, 450, 310), outline="black")
    for bar in range(6):
        height = rng.randrange(20, 260)
        draw.rectangle((80 + bar * 62, 310 - height, 120 + bar * 62, 310), fill="#4472c4")
        draw.text((85 + bar * 62, 315), "ABCDEF"[bar], fill="black")
    return image


def shape(seed: int) -> Image.Image:
    """One shape on a canvas of 64 pixels."""
    rng, image = random.Random(seed), Image.new("RGB", (64, 64), "white")
    x, y, side = rng.randrange(5, 35), rng.randrange(5, 35), rng.randrange(12, 26)
    fill = rng.choice(["red", "green", "blue", "black", "gray", "teal", "brown", "yellow"])
    draw = ImageDraw.Draw(image)
    rng.choice([draw.ellipse, draw.rectangle])((x, y, x + side, y + side), fill=fill)
    return image


def recompress(image: Image.Image) -> Image.Image:
    buffer = BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=35)
    return Image.open(buffer)


def crop(image: Image.Image) -> Image.Image:
    width, height = image.size
    return image.crop((round(width * 0.01), round(height * 0.01), round(width * 0.99), round(height * 0.99)))


KINDS = {
    "photo-like noise": photo,
    "demo, everyday": lambda seed: draw_row(random.Random(seed), HOME)[0],
    "demo, contest": lambda seed: draw_row(random.Random(seed), CONTEST)[0],
    "pages": page,
    "bar charts": chart,
    "one shape, 64 px": shape,
}
CHANGES = {
    "JPEG 35": recompress,
    "half size": lambda image: image.resize((image.width // 2, image.height // 2)),
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.85),
    "contrast": lambda image: ImageEnhance.Contrast(image).enhance(1.2),
    "crop 1 %": crop,
}

if __name__ == "__main__":
    main()
