"""Duplicate images: byte-identical, or near-identical after compression, resizing, new tones or a small crop."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import imagehash
import numpy as np
import pandas as pd
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from tqdm.auto import tqdm

from vqa.core.io import hash_file
from vqa.data.images import error_summary, oriented_size, thumbnail_image

HASH_BITS = 10  # of 64 that may differ between the perceptual hashes of near-identical pictures
CORRELATION = 0.98  # least correlation of their colours on a grid: hashes alone confuse drawings and products
GRID = 16  # cells a side of that grid
DETAIL, TILES = 48, 3  # cells a side of the gray picture, and its tiles a side, in which the details are compared
LEAST_TILE = 0.85  # least correlation of two pictures in every tile, each tile moved by up to one cell
LEAST_DRAWN_TILE = 0.93  # where the picture has a canvas: pages and diagrams on one canvas differ in details only
CANVAS = 0.3  # share of cells of one gray value that make a canvas
CONTRAST = 6  # least standard deviation of gray values, of 255, in a tile that is compared
BLOCK = 256  # pictures that are compared with all others at once


@dataclass(frozen=True)
class Picture:
    """An image file: its size in pixels and its fingerprints, or the problem that makes it unusable.

    sha: of the file's bytes. phash: uint64, perceptual hash. colours: float32 (GRID * GRID * 3,), mean 0, norm 1.
    gray: uint8 (DETAIL, DETAIL).
    """

    width: int = 0
    height: int = 0
    sha: str = ""
    phash: int = 0
    colours: np.ndarray | None = None
    gray: np.ndarray | None = None
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
    gray = np.asarray(image.convert("L").resize((DETAIL, DETAIL), Image.Resampling.BOX))
    return Picture(*oriented_size(path), hash_file(path), int(np.packbits(bits).view(np.uint64)[0]), colours, gray)


def near_pairs(pictures: Sequence[Picture]) -> np.ndarray:
    """Pairs i < j, int (pairs, 2), of near-identical pictures: similar perceptual hashes, colours and details.

    Compares all pairs in blocks: 10,000 pictures in one second, 50,000 in fifteen, on one core.
    """
    hashes = np.array([picture.phash for picture in pictures], dtype=np.uint64)
    colours = np.array([picture.colours for picture in pictures])
    gray = np.array([picture.gray for picture in pictures])
    near = [np.empty((0, 2), dtype=int)]
    for start in range(0, len(hashes), BLOCK):
        distances = np.bitwise_count(hashes[start : start + BLOCK, None] ^ hashes[None, start:])
        pairs = np.argwhere(np.triu(distances <= HASH_BITS, 1)) + start
        for some in batches(pairs):
            alike = np.einsum("ij,ij->i", colours[some[:, 0]], colours[some[:, 1]]) > CORRELATION
            near += [few[same_details(gray[few[:, 0]], gray[few[:, 1]])] for few in batches(some[alike])]
    return np.concatenate(near)


def near_duplicate_keys(paths: Sequence[str]) -> dict[str, str]:
    """path -> a key that near-duplicates share, also in a chain: the SHA-256 of one of them."""
    pictures = read_pictures(paths)
    distinct = {picture.sha: picture for picture in pictures.values()}
    pairs, hashes = near_pairs(list(distinct.values())), list(distinct)
    graph = coo_array((np.ones(len(pairs)), pairs.T), shape=(len(hashes), len(hashes)))
    first_of: dict[int, str] = {}
    keys = {sha: first_of.setdefault(label, sha) for sha, label in zip(hashes, connected_components(graph)[1])}
    return {path: keys[picture.sha] for path, picture in pictures.items()}


def batches(pairs: np.ndarray) -> list[np.ndarray]:
    """`pairs` in parts of at most 4,000, whose fingerprints fit into memory."""
    return np.array_split(pairs, len(pairs) // 4000 + 1)


def same_details(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Whether each tile with contrast of a gray picture correlates with that of another one, bool (pairs,).

    Both are uint8 (pairs, DETAIL, DETAIL). A tile may have moved by a cell, as in a crop.
    """

    def tiles(pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(gray values less their mean (pairs, tiles, cells), their standard deviation (pairs, tiles))."""
        side = DETAIL // TILES
        values = pictures.reshape(-1, TILES, side, TILES, side).swapaxes(2, 3).reshape(-1, TILES**2, side**2)
        values = values - values.mean(2, keepdims=True, dtype=np.float32)
        return values, values.std(2)

    values, spread = tiles(first)
    has_contrast = np.maximum(spread, tiles(second)[1]) >= CONTRAST
    padded = np.pad(second, ((0, 0), (1, 1), (1, 1)), mode="edge")
    best = np.full(spread.shape, -1.0)
    for y, x in np.ndindex(3, 3):
        moved, moved_spread = tiles(padded[:, y : y + DETAIL, x : x + DETAIL])
        best = np.maximum(best, (values * moved).mean(2) / np.maximum(spread * moved_spread, 0.5))
    sorted_cells = np.sort(first.reshape(-1, DETAIL**2), axis=1).astype(int)
    width = int(CANVAS * DETAIL**2)
    drawn = (sorted_cells[:, width:] - sorted_cells[:, :-width] <= 2).any(1)
    least = np.where(drawn, LEAST_DRAWN_TILE, LEAST_TILE)[:, None]
    return (~has_contrast | (best >= least)).all(1)


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
