"""Pictures that are the same, byte for byte or nearly, among many that are not."""

import shutil

import imagehash
import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageDraw, ImageEnhance

from vqa.data import duplicates as duplicates
from vqa.data.duplicates import near_duplicate_keys, near_pairs, read_picture, read_pictures, same_pictures
from vqa.data.splits import image_groups

COUNT = 60


def picture(seed: int) -> Image.Image:
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((240, 180), Image.BICUBIC)
    return Image.fromarray(
        (np.asarray(coarse) * 0.9 + random.normal(12, 6, (180, 240, 3))).clip(0, 255).astype("uint8")
    )


CHANGES = {
    "compressed": lambda image, path: image.save(path, quality=35),
    "smaller": lambda image, path: image.resize((120, 90)).save(path),
    "darker": lambda image, path: ImageEnhance.Brightness(image).enhance(0.85).save(path),
    "harder": lambda image, path: ImageEnhance.Contrast(image).enhance(1.2).save(path),
    "cropped": lambda image, path: image.crop((2, 2, 238, 178)).save(path),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(COUNT):
        picture(number).save(folder / f"{number:03d}.jpg", quality=90)
    for number, change in enumerate(CHANGES.values()):
        change(picture(number), folder / f"near_{number}.jpg")
    shutil.copy(folder / "010.jpg", folder / "copy.jpg")
    Image.new("RGB", (50, 40), "white").save(folder / "white.png")
    Image.new("RGB", (50, 40), "black").save(folder / "zblack.png")
    return folder


def test_near_pictures_are_found_and_others_are_not(folder):
    paths = sorted(str(path) for path in folder.iterdir() if path.name != "copy.jpg")
    pictures = read_pictures(paths)
    found = {(paths[i][-7:-4], paths[j][-10:-4]) for i, j in near_pairs([pictures[path] for path in paths])}
    assert found == {(f"{number:03d}", f"near_{number}") for number in range(len(CHANGES))}


def page(seed: int) -> Image.Image:
    """Lines of random words below a heading that all pages share."""
    random, image = np.random.default_rng(seed), Image.new("RGB", (400, 300), "white")
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, 400, 50), fill="#223344")
    for line in range(8):
        draw.text((20, 70 + line * 26), "".join(random.choice(list("abcdefghij  "), 50)), fill="black")
    return image


def test_pages_that_share_a_canvas_are_different_and_a_copy_of_one_is_found(tmp_path, monkeypatch):
    """Their hashes and colours are alike: only the details tell them apart."""
    for number in range(12):
        page(number).save(tmp_path / f"{number:02d}.png")
    changes = ("compressed", "smaller", "darker", "harder")
    for number, change in enumerate(changes):
        CHANGES[change](page(number), tmp_path / f"near_{number}.jpg")
    paths = sorted(map(str, tmp_path.iterdir()))
    pictures = read_pictures(paths)
    found = {(paths[i][-6:-4], paths[j][-10:-4]) for i, j in near_pairs([pictures[path] for path in paths])}
    assert found == {(f"{number:02d}", f"near_{number}") for number in range(len(changes))}
    monkeypatch.setattr(duplicates, "same_details", lambda first, second: np.full(len(first), True))
    assert len(near_pairs([pictures[path] for path in paths])) > 50


def test_hashes_are_compared_as_imagehash_compares_them(folder, monkeypatch):
    """All pairs, in blocks that do not divide evenly, by the hash alone."""
    monkeypatch.setattr(duplicates, "BLOCK", 7)
    monkeypatch.setattr(duplicates, "CORRELATION", -2)
    monkeypatch.setattr(duplicates, "LEAST_TILE", -2)
    monkeypatch.setattr(duplicates, "HASH_BITS", 26)
    paths = sorted(str(path) for path in folder.glob("0*.jpg"))
    hashes = [imagehash.phash(duplicates.thumbnail_image(path, 8 * duplicates.GRID)) for path in paths]
    wanted = {(i, j) for j in range(len(paths)) for i in range(j) if hashes[i] - hashes[j] <= 26}
    found = [tuple(pair) for pair in near_pairs([read_picture(path) for path in paths]).tolist()]
    assert set(found) == wanted and len(found) == len(wanted) and 20 < len(wanted) < len(paths) ** 2 / 4


def test_a_file_is_paired_with_the_first_of_each_split(folder):
    """a, b, c in train show one picture, the first near to a fourth; d and e in test are copies of it."""
    names = ["000", "copy", "010", "near_0", "010", "copy"]
    for number in (4, 5):  # files of test, under names of their own
        shutil.copy(folder / "010.jpg", folder / f"test_{number}.jpg")
    paths = [str(folder / f"{name}.jpg") for name in names[:4]] + [str(folder / f"test_{n}.jpg") for n in (4, 5)]
    files = pd.DataFrame({"split": ["train"] * 4 + ["test"] * 2, "image": paths})
    got = same_pictures(files, read_pictures(paths))
    identical = {(a, b) for kind, a, b in got.itertuples(index=False) if kind == "identical"}
    assert identical == {(1, 2), (1, 4), (2, 4), (1, 5), (4, 5)}
    assert {(a, b) for kind, a, b in got.itertuples(index=False) if kind == "near"} == {(0, 3)}


def test_near_duplicates_share_a_key_and_so_a_fold(folder):
    names = ["000", "near_0", "001", "010", "copy", "011"]
    keys = near_duplicate_keys([str(folder / f"{name}.jpg") for name in names])
    zero, near, one, ten, copy, eleven = keys.values()
    assert zero == near and ten == copy and len({zero, one, ten, eleven}) == 4
    rows = [{"id": name, "images": [str(folder / f"{name}.jpg")]} for name in names]
    rows += [{"id": text, "images": [], "question": text[0], "choices": ["1", "2"]} for text in ("a", "again", "b")]
    exact, groups = image_groups(rows), image_groups(rows, near=True)
    assert exact[0] != exact[1] and exact[3] == exact[4]
    assert groups[:6] == [zero, near, one, ten, copy, eleven]
    assert groups[6] == groups[7] != groups[8], "without an image, the text is what is repeated"


def test_a_file_that_is_no_image_is_told_and_is_like_nothing(folder, tmp_path):
    path = tmp_path / "broken.jpg"
    path.write_bytes((folder / "000.jpg").read_bytes()[:900])
    pictures = read_pictures([str(path), str(tmp_path / "none.jpg"), str(folder / "000.jpg")])
    assert [bool(picture.problem) for picture in pictures.values()] == [True, True, False]
    assert pictures[str(tmp_path / "none.jpg")].problem == "no such file"
    files = pd.DataFrame({"split": "train", "image": list(pictures)})
    assert same_pictures(files, pictures).empty
