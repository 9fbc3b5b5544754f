"""From an image file to the pixels that the model sees: one way for training and prediction."""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps
from tqdm.auto import tqdm

from vqa.core.errors import UserError, preview
from vqa.data.image_paths import suggest_image_root
from vqa.data.rows import Row

MAX_PIXELS = 100_000_000  # a photo has ten million; a decompression bomb has billions in a few kilobytes
MAX_ASPECT = 200  # qwen_vl_utils refuses anything longer
MIN_TOKENS = 4  # Qwen's lower bound
Image.MAX_IMAGE_PIXELS = None  # PIL would only warn; MAX_PIXELS is stricter, and its error names the file


def open_image(path: str | Path, min_side: int | None = None) -> Image.Image:
    """Decode one image file as people see it: EXIF orientation applied, transparency on white.

    Accepts every PIL mode. Returns mode RGB, or RGBA, which `qwen_vl_utils` composites on white. With `min_side`, a
    JPEG may be decoded at a fraction of its size, with sides of at least that many pixels: many times faster.
    Raises ValueError or OSError where the file is not a usable image.
    """
    with Image.open(path) as image:
        _check_size(image)
        if min_side:
            image.draft("RGB", (min_side, min_side))
        image.load()
        image = ImageOps.exif_transpose(image)  # type: ignore[assignment]  # an ImageFile is an Image
    if image.mode.startswith(("I", "F")):  # 16 and 32 bit greys: PIL's convert() would clip them at 255
        grey = np.asarray(image, dtype=np.float64)
        top = max(255.0, 65535.0 if image.mode.startswith("I;16") else float(grey.max(initial=0)))
        return Image.fromarray((grey.clip(0) * (255.0 / top)).round().astype(np.uint8)).convert("RGB")
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def thumbnail_image(path: str | Path, side: int) -> Image.Image:
    """A small picture for people: mode RGB, no side longer than `side` pixels."""
    image = open_image(path, min_side=side)
    image.thumbnail((side, side))
    paper = Image.new("RGB", image.size, "white")
    paper.paste(image, mask=image if image.mode == "RGBA" else None)
    return paper


class ShownImage(NamedTuple):
    """An image file as a row shows it: its side relative to the pixel budget's, and whether it is mirrored."""

    path: str
    scale: float
    flip: bool


def shown_images(row: Row) -> list[ShownImage]:
    """The images of a row, in order."""
    return [ShownImage(path, row.get("scale", 1.0), row.get("flip", False)) for path in row["images"]]


def all_images(rows: Iterable[Row]) -> list[str]:
    """The path of each image of the rows, once."""
    return list(dict.fromkeys(path for row in rows for path in row["images"]))


def image_item(shown: ShownImage, image_size: int, patch: int) -> dict:
    """The decoded image and its target size, as an item of a chat in the form of `qwen_vl_utils`."""
    image = open_image(shown.path)
    if shown.flip:
        image = ImageOps.mirror(image)
    width, height = target_size(*image.size, image_size, shown.scale, patch)
    return {"type": "image", "image": image, "resized_width": width, "resized_height": height}


def target_size(width: int, height: int, image_size: int, scale: float = 1.0, patch: int = 14) -> tuple[int, int]:
    """(width, height) in pixels of an image after its only resize: multiples of `2 * patch`, aspect ratio kept.

    `image_size` is a pixel budget: at most `image_size ** 2` pixels. A smaller image keeps its size. `scale`
    (test-time augmentation) is relative to the result, so 1.1 also enlarges images below the budget. The rule is
    Qwen's `qwen_vl_utils.smart_resize`.
    """
    from qwen_vl_utils.vision_process import smart_resize  # imports torch, which takes seconds

    factor = 2 * patch
    lowest = MIN_TOKENS * factor**2
    height, width = smart_resize(height, width, factor, min_pixels=lowest, max_pixels=max(lowest, image_size**2))
    if scale != 1.0:
        budget = max(lowest, round(width * height * scale**2))
        height, width = smart_resize(height, width, factor, min_pixels=budget, max_pixels=budget)
    return width, height


def image_tokens(width: int, height: int, patch: int = 14) -> int:
    """Tokens of an image of `target_size`: one for each two by two patches."""
    return width * height // (2 * patch) ** 2


def oriented_size(path: str | Path) -> tuple[int, int]:
    """(width, height) of the image that `open_image` returns, read from the file's header alone."""
    with Image.open(path) as image:
        if image.format == "TIFF":  # Pillow has already swapped the sides
            return image.size
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        return (image.height, image.width) if turned else image.size


def oriented_sizes(paths: Iterable[str]) -> dict[str, tuple[int, int]]:
    """path -> `oriented_size`, each path read once."""
    paths = list(dict.fromkeys(paths))
    with ThreadPoolExecutor() as pool:
        return dict(zip(paths, pool.map(oriented_size, paths)))


def check_images(rows: Sequence[Row], label: str, remedy: str = "Replace the files, or delete their rows.") -> None:
    """Decode every image once. Raises UserError, with the number and the first few names, if any cannot be used."""
    if broken := find_bad_images(rows, label):
        total = len(all_images(rows))
        if len(broken) == total:
            remedy = _suggest_root(label, next(iter(broken))) or remedy
        raise UserError(
            f"{label}: {len(broken)} of {total} images cannot be used: {preview_bad_images(broken)}. {remedy}"
        )


def _suggest_root(label: str, image: str) -> str | None:
    """The remedy where every image is missing and another folder near the CSV has the first one."""
    folder = Path(label).parent
    path = Path(image).relative_to(folder) if Path(image).is_relative_to(folder) else Path(Path(image).name)
    root = suggest_image_root(folder, str(path))
    return f"Add --image_root {root}." if root else None


def find_bad_images(rows: Sequence[Row], label: str) -> dict[str, str]:
    """path -> problem, for every image that cannot be used.

    JPEGs are decoded at an eighth of their size: fast, and the file is still read to its end.
    """
    paths = all_images(rows)
    with ThreadPoolExecutor() as pool:
        checks = tqdm(
            pool.map(_problem, paths), total=len(paths), desc=f"checking images of {label}", leave=False, disable=None
        )
        return {path: problem for path, problem in zip(paths, checks) if problem}


def preview_bad_images(broken: Mapping[str, str]) -> str:
    """The first few of `find_bad_images`, each with its problem."""
    return preview([f"{path} ({problem})" for path, problem in broken.items()])


def _problem(path: str) -> str | None:
    """Why the image at `path` cannot be used; None if it can."""
    try:
        with Image.open(path) as image:
            _check_size(image)
            image.draft("RGB", (image.width // 8, image.height // 8))
            image.load()
    except Exception as error:  # PIL raises many kinds for damaged files
        return error_summary(error)
    return None


def error_summary(error: Exception) -> str:
    """Why a file cannot be opened as an image, in at most 80 characters."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    return " ".join(str(error).split())[:80] or type(error).__name__


def _check_size(image: Image.Image) -> None:
    """Raise ValueError for a header with more pixels, or a longer shape, than we decode."""
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} is over {MAX_PIXELS:,} pixels")
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise ValueError(f"{image.width} x {image.height} is longer than {MAX_ASPECT} to 1")
