"""One way from an image file to the pixels that the model sees, for training and prediction alike."""

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps
from tqdm.auto import tqdm

from vqa.core.errors import UserError, preview

# A photo has some ten million pixels; a decompression bomb has billions in a file of a few kilobytes.
MAX_PIXELS = 100_000_000


MAX_ASPECT = 200  # qwen_vl_utils refuses anything longer


MIN_TOKENS = 4  # Qwen's own lower bound: an image is at least four tokens


# Ours is the stricter bound and names the file; PIL's own would only warn.
Image.MAX_IMAGE_PIXELS = None


def open_image(path: str | Path, enough: int | None = None) -> Image.Image:
    """Decode one image file as people see it: EXIF orientation applied, transparency on white.

    Any PIL mode is taken. Returns mode RGB (or RGBA, which `qwen_vl_utils` composites on white). Where sides of
    `enough` pixels will do, a JPEG is decoded at a fraction of its size, which is many times faster.
    Raises ValueError or OSError where the file is not an image that can be used.
    """
    with Image.open(path) as image:
        _check_size(image)
        if enough:
            image.draft("RGB", (enough, enough))
        image.load()
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # 16 and 32 bit greys: PIL's convert() would clip them at 255
        grey = np.asarray(image, dtype=np.float64)
        top = max(255.0, 65535.0 if image.mode.startswith("I;16") else float(grey.max(initial=0)))
        return Image.fromarray((grey.clip(0) * (255.0 / top)).round().astype(np.uint8)).convert("RGB")
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def thumbnail_image(path: str | Path, side: int) -> Image.Image:
    """A picture to look at: mode RGB, no side longer than `side` pixels."""
    image = open_image(path, enough=side)
    image.thumbnail((side, side))
    paper = Image.new("RGB", image.size, "white")
    paper.paste(image, mask=image if image.mode == "RGBA" else None)
    return paper


def resized_image_item(row: dict, image_size: int, patch: int) -> dict:
    """A row's decoded image, mirrored where it says `flip`, and the size to give it, as `qwen_vl_utils` takes them."""
    image = open_image(row["image"])
    if row.get("flip"):
        image = ImageOps.mirror(image)
    width, height = target_size(*image.size, image_size, row.get("scale", 1.0), patch)
    return {"image": image, "resized_width": width, "resized_height": height}


def target_size(width: int, height: int, image_size: int, scale: float = 1.0, patch: int = 14) -> tuple[int, int]:
    """(width, height) in pixels of an image after the one resize, multiples of `2 * patch`, aspect kept.

    `image_size` is a pixel budget: at most `image_size ** 2` pixels; a smaller image keeps its own size. `scale`
    (test-time augmentation) is relative to that size, so 1.1 also changes images smaller than the budget.
    The rule is Qwen's own, `qwen_vl_utils.smart_resize`.
    """
    from qwen_vl_utils.vision_process import smart_resize  # brings torch, which takes seconds to import

    factor = 2 * patch
    lowest = MIN_TOKENS * factor**2
    height, width = smart_resize(height, width, factor, min_pixels=lowest, max_pixels=max(lowest, image_size**2))
    if scale != 1.0:
        budget = max(lowest, round(width * height * scale**2))
        height, width = smart_resize(height, width, factor, min_pixels=budget, max_pixels=budget)
    return width, height


def image_tokens(width: int, height: int, patch: int = 14) -> int:
    """Tokens of an image of `target_size`: each stands for two by two patches."""
    return width * height // (2 * patch) ** 2


def oriented_size(path: str | Path) -> tuple[int, int]:
    """(width, height) that `open_image` will give, from the file's header alone."""
    with Image.open(path) as image:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        return (image.height, image.width) if turned else image.size


def oriented_sizes(paths: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Path -> `upright_size`, of each path once."""
    paths = list(dict.fromkeys(paths))
    with ThreadPoolExecutor() as pool:
        return dict(zip(paths, pool.map(oriented_size, paths)))


def check_images(rows: list[dict], label: str, remedy: str = "mend or replace the files, or drop their rows") -> None:
    """Decode every image once and stop if any cannot be used: all of them are counted, the first few named."""
    if broken := find_bad_images(rows, label):
        count = len({row["image"] for row in rows})
        raise UserError(
            f"{label}: {len(broken)} of {count} images cannot be used: {preview_bad_images(broken)}; {remedy}"
        )


def find_bad_images(rows: list[dict], label: str) -> dict[str, str]:
    """Path -> what is wrong with it, of every image that cannot be used.

    Decoding is cheap beside training: JPEGs are read at an eighth of their size, which still reads the whole file.
    """
    paths = list(dict.fromkeys(row["image"] for row in rows))
    with ThreadPoolExecutor() as pool:
        checks = tqdm(
            pool.map(_problem, paths), total=len(paths), desc=f"checking images of {label}", leave=False, disable=None
        )
        return {path: problem for path, problem in zip(paths, checks) if problem}


def preview_bad_images(broken: Mapping[str, str]) -> str:
    """The first few of `unusable_images`, each with what is wrong with it."""
    return preview([f"{path} ({problem})" for path, problem in broken.items()])


def _problem(path: str) -> str | None:
    """Why the image at `path` cannot be used, or None."""
    try:
        with Image.open(path) as image:
            _check_size(image)
            image.draft("RGB", (image.width // 8, image.height // 8))
            image.load()
    except Exception as error:  # PIL raises many kinds for damaged files; each of them means unusable
        return error_summary(error)
    return None


def error_summary(error: Exception) -> str:
    """Why a file could not be opened as an image, in a few words."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    return " ".join(str(error).split())[:80] or type(error).__name__


def _check_size(image: Image.Image) -> None:
    """Refuse a header that promises more than we are willing to decode."""
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} is over {MAX_PIXELS:,} pixels")
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise ValueError(f"{image.width} x {image.height} is longer than {MAX_ASPECT} to 1")
