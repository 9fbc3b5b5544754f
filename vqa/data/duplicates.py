"""Duplicate images: byte-identical, or near-identical after compression, resizing, new tones or a small crop."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import imagehash
import numpy as np
import pandas as pd
from PIL import Image
from tqdm.auto import tqdm

from vqa.core.io import hash_file
from vqa.data.images import error_summary, oriented_size, thumbnail_image

HASH_BITS = 10  # of 64 that may differ between the perceptual hashes of near-identical pictures
CORRELATION = 0.98  # least correlation of their colours on a grid: hashes alone confuse drawings and products
GRID = 16  # cells a side of that grid
BLOCK = 256  # pictures that are compared with all others at once


@dataclass(frozen=True)
class Picture:
    """An image file: its size in pixels and its fingerprints, or the problem that makes it unusable.

    sha: of the file's bytes. phash: uint64, perceptual hash. colours: float32 (GRID * GRID * 3,), mean 0, norm 1.
    """

    width: int = 0
    height: int = 0
    sha: str = ""
    phash: int = 0
    colours: np.ndarray | None = None
    problem: str | None = None


def read_pictures(paths: Sequence[str]) -> dict[str, Picture]:
    """path -> Picture. Each file is decoded once, JPEGs at a fraction of their size."""
    paths = list(dict.fromkeys(paths))
    with ThreadPoolExecutor() as pool:
        return dict(zip(paths, tqdm(pool.map(read_picture, paths), "reading images", len(paths), disable=None)))


def read_picture(path: str) -> Picture:
    try:
        image = thumbnail_image(path, 8 * GRID)
    except Exception as error:  # PIL raises many kinds for damaged files
        return Picture(problem=error_summary(error))
    bits = imagehash.phash(image).hash
    colours = np.asarray(image.resize((GRID, GRID), Image.Resampling.BOX), dtype=np.float32).ravel()
    colours -= colours.mean()
    colours /= max(float(np.linalg.norm(colours)), 1e-6)
    return Picture(*oriented_size(path), hash_file(path), int(np.packbits(bits).view(np.uint64)[0]), colours)


def near_pairs(pictures: Sequence[Picture]) -> np.ndarray:
    """Pairs i < j, int (pairs, 2), of near-identical pictures: similar perceptual hashes and similar colours.

    Compares all pairs in blocks: 10,000 pictures in one second, 50,000 in fifteen, on one core.
    """
    hashes = np.array([picture.phash for picture in pictures], dtype=np.uint64)
    colours = np.array([picture.colours for picture in pictures])
    near = [np.empty((0, 2), dtype=int)]
    for start in range(0, len(hashes), BLOCK):
        distances = np.bitwise_count(hashes[start : start + BLOCK, None] ^ hashes[None, start:])
        pairs = np.argwhere(np.triu(distances <= HASH_BITS, 1)) + start
        for some in np.array_split(pairs, len(pairs) // 10_000 + 1):
            alike = np.einsum("ij,ij->i", colours[some[:, 0]], colours[some[:, 1]]) > CORRELATION
            near.append(some[alike])
    return np.concatenate(near)


def same_pictures(files: pd.DataFrame, pictures: Mapping[str, Picture]) -> pd.DataFrame:
    """Pairs of duplicate image files: columns `kind` ("identical" or "near"), `first` and `second`.

    `files` has a row for each image file of each split, with columns `split` and `image` (its path). `first` and
    `second` are positions in it, `first` < `second`. A picture that occurs many times is paired with its first file in
    each split.
    """
    table = files.assign(place=range(len(files)), sha=[pictures[path].sha for path in files["image"]])
    table = table[table["sha"] != ""]
    firsts = table.drop_duplicates(["sha", "split"])[["sha", "place"]]
    identical = firsts.merge(table[["sha", "place"]], on="sha", suffixes=("_first", ""))
    distinct = table.drop_duplicates("sha")
    near = near_pairs([pictures[path] for path in distinct["image"]])
    near = pd.DataFrame(distinct["sha"].to_numpy()[near], columns=["sha", "other"])
    near = near.merge(firsts.rename(columns={"place": "place_first"}), on="sha")
    near = near.merge(firsts.rename(columns={"sha": "other"}), on="other")
    pairs = pd.concat([identical.assign(kind="identical"), near.assign(kind="near")])
    pairs["first"] = pairs[["place_first", "place"]].min(axis=1)
    pairs["second"] = pairs[["place_first", "place"]].max(axis=1)
    pairs = pairs[pairs["first"] < pairs["second"]].drop_duplicates(["first", "second"])
    return pairs.sort_values(["kind", "first", "second"])[["kind", "first", "second"]].reset_index(drop=True)
