"""From an image file to the pixels that the model sees: one way for training and prediction."""

import io
import math
import struct
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError
from tqdm.auto import tqdm

from vqa.core.errors import UserError, pluralize, preview
from vqa.core.io import once_a_version
from vqa.data.image_paths import suggest_image_root
from vqa.data.rows import Row

MAX_PIXELS = 100_000_000  # a photo has ten million; a decompression bomb has billions in a few kilobytes
MAX_ASPECT = 200  # qwen_vl_utils refuses anything longer
MIN_TOKENS = 4  # Qwen's lower bound
PARTS = ((0, 0), (1, 0), (0, 1), (1, 1))  # column and line of the crops of an image
PART_SIDE = 0.55  # of the image's side: neighbours overlap by a tenth, so that a cut letter is complete in one of them
NO_IMAGE = "image unreadable, answered from the text alone"
LESS_IMAGES = "image unreadable, answered from the other images"
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # EXIF orientation -> what makes the image upright
Image.MAX_IMAGE_PIXELS = None  # PIL would only warn; MAX_PIXELS is stricter, and its error names the file
with suppress(ImportError):  # optional: HEIC, the format of iPhones
    import pillow_heif

    pillow_heif.register_heif_opener()


def open_image(path: str | Path, min_side: int | None = None) -> Image.Image:
    """Decode one image file as people see it: EXIF orientation applied, transparency on white.

    Accepts every PIL mode, and broken metadata beside sound pixels. Returns mode RGB, or RGBA, which `qwen_vl_utils`
    composites on white. With `min_side`, a JPEG may be decoded at a fraction of its size, with sides of at least that
    many pixels: many times faster. Raises ValueError, OSError and other errors of PIL where the file is not a usable
    image.
    """
    with _open(path) as image:
        orientation = _orientation(image)  # before the pixels are read, as in oriented_size
        if min_side:
            image.draft("RGB", (min_side, min_side))
        promised = image.size
        try:
            image.load()
        except (SyntaxError, ValueError, struct.error):
            if image.format != "PNG":
                raise
            image = _open_png_pixels(path)
            image.load()
    if image.size != promised:
        raise ValueError(f"the header promises {promised[0]} x {promised[1]}, the pixels are {image.size}")
    if orientation in UPRIGHT:
        image = image.transpose(UPRIGHT[orientation])  # type: ignore[assignment]  # an ImageFile is an Image
    if image.mode.startswith(("I", "F")):  # 16 and 32 bit greys: PIL's convert() would clip them at 255
        return _grey_image(image)
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def _grey_image(image: Image.Image) -> Image.Image:
    """A grey image of 16 or 32 bits as RGB. Floats up to 1, as scientific tools write them, are fractions of white."""
    grey = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0, neginf=0)
    top = max(255.0, float(grey.max(initial=0)))
    if image.mode == "F" and grey.max(initial=0) <= 1:
        top = 1.0
    if image.mode.startswith("I;16"):
        top = 65535.0
    return Image.fromarray((grey.clip(0) * (255.0 / top)).round().astype(np.uint8)).convert("RGB")


def _open(path: str | Path) -> ImageFile.ImageFile:
    """The file with its header read. Raises ValueError or OSError, and SyntaxError, where that is not possible."""
    try:
        image = Image.open(path)
    except (SyntaxError, ValueError, UnidentifiedImageError) as error:
        with open(path, "rb") as file:
            start = file.read(12)
        if start[4:8] == b"ftyp" and start[8:] in HEIC_BRANDS:
            raise ValueError("a HEIC image: install pillow-heif to read it") from None
        if start.startswith(b"\x89PNG"):
            image = _open_png_pixels(path)
        elif isinstance(error, UnidentifiedImageError):
            raise ValueError("not an image that Pillow can read") from None
        else:
            raise
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} is over {MAX_PIXELS:,} pixels")
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise ValueError(f"{image.width} x {image.height} is longer than {MAX_ASPECT} to 1")
    return image


def _open_png_pixels(path: str | Path) -> ImageFile.ImageFile:
    """A PNG without its metadata: PIL gives up at a chunk of text, time or colours that is broken."""
    data = Path(path).read_bytes()
    kept, start = bytearray(data[:8]), 8
    while start < len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4])  # length, name, content, checksum
        name = data[start + 4 : start + 8]
        if name[:1].isupper() or name == b"tRNS":  # what the pixels need
            kept += data[start:end]
        start = end
    return Image.open(io.BytesIO(kept))


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation; 1, upright, where there is none or it cannot be read, and for TIFF: PIL applies that."""
    try:
        orientation = 1 if image.format == "TIFF" else image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # of many kinds; the pixels may be sound
        orientation = 1
    return orientation if orientation in UPRIGHT else 1


def thumbnail_image(path: str | Path, side: int) -> Image.Image:
    """A small picture for people: mode RGB, no side longer than `side` pixels."""
    image = open_image(path, min_side=side)
    image.thumbnail((side, side))
    return on_white(image)


def on_white(image: Image.Image, flip: bool = False) -> Image.Image:
    """An image of `open_image` in mode RGB, transparency on white; with `flip`, mirrored."""
    paper = Image.new("RGB", image.size, "white")
    paper.paste(image, mask=image if image.mode == "RGBA" else None)
    return ImageOps.mirror(paper) if flip else paper


class ShownImage(NamedTuple):
    """An image file as a row shows it: its side relative to the pixel budget's, and whether it is mirrored.

    crop: which of its PARTS is shown, enlarged to the pixel budget; None: all of it.
    """

    path: str
    scale: float
    flip: bool
    crop: int | None = None

    def box(self, width: int, height: int) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) in pixels of what is shown of an upright image, mirrored if `flip` says so."""
        if self.crop is None:
            return 0, 0, width, height
        column, line = PARTS[self.crop]
        part = math.ceil(width * PART_SIDE), math.ceil(height * PART_SIDE)
        left, top = column * (width - part[0]), line * (height - part[1])
        return left, top, left + part[0], top + part[1]

    def size(self, width: int, height: int, image_size: int, patch: int) -> tuple[int, int]:
        """`target_size` of what is shown of an upright image: of a part, after it was enlarged to the pixel budget."""
        left, top, right, bottom = self.box(width, height)
        width, height = right - left, bottom - top
        if self.crop is not None:
            factor = max(1.0, image_size / math.sqrt(width * height))
            width, height = round(width * factor), round(height * factor)
        return target_size(width, height, image_size, self.scale, patch)


def shown_images(row: Row) -> list[ShownImage]:
    """The images of a row, in order, and then the parts of those that are cropped."""
    images = [ShownImage(path, row.get("scale", 1.0), row.get("flip", False)) for path in row["images"]]
    return images + [images[i]._replace(crop=crop) for i in row.get("crops", ()) for crop in range(len(PARTS))]


def with_crops(rows: Sequence[Row], image_size: int) -> list[Row]:
    """The rows with `crops`: the images that the pixel budget shrinks. The parts of others would show nothing new."""
    sizes = oriented_sizes(all_images(rows))
    shrunk = {path for path, (width, height) in sizes.items() if width * height > image_size**2}
    return [row | Row(crops=[i for i, path in enumerate(row["images"]) if path in shrunk]) for row in rows]


def all_images(rows: Iterable[Row]) -> list[str]:
    """The path of each image of the rows, once."""
    return list(dict.fromkeys(path for row in rows for path in row["images"]))


def image_item(shown: ShownImage, image_size: int, patch: int) -> dict:
    """The decoded image and its target size, as an item of a chat in the form of `qwen_vl_utils`."""
    image = open_image(shown.path)
    if shown.flip:
        image = ImageOps.mirror(image)
    width, height = shown.size(*image.size, image_size, patch)
    if shown.crop is not None:
        image = image.crop(shown.box(*image.size))
    return {"type": "image", "image": image, "resized_width": width, "resized_height": height}


def target_size(width: int, height: int, image_size: int, scale: float = 1.0, patch: int = 14) -> tuple[int, int]:
    """(width, height) in pixels of an image after its only resize: multiples of `2 * patch`, aspect ratio kept.

    `image_size` is a pixel budget: at most `image_size ** 2` pixels. A smaller image keeps its size. `scale`
    (test-time augmentation) is relative to the result, so 1.1 also enlarges images below the budget. The rule is
    Qwen's `qwen_vl_utils.smart_resize`, except where that rounds the shorter side of a long image to 0, or down to
    fewer tokens than the model takes: such an image gets the nearest legal grid within the budget.
    """
    from qwen_vl_utils.vision_process import smart_resize  # imports torch, which takes seconds

    factor = 2 * patch
    lowest = MIN_TOKENS * factor**2

    def resize(width: int, height: int, least: int, most: int) -> tuple[int, int]:
        rows, columns = smart_resize(height, width, factor, min_pixels=least, max_pixels=most)
        if rows * columns >= lowest:
            return columns, rows
        if 0 in (rows, columns):
            sides = most // factor**2 * factor, factor
        else:
            is_long = max(width, height) >= 2 * min(width, height)
            sides = (4 * factor, factor) if is_long else (2 * factor, 2 * factor)
        return sides if width >= height else sides[::-1]

    width, height = resize(width, height, lowest, max(lowest, image_size**2))
    if scale != 1.0:
        budget = max(lowest, round(width * height * scale**2))
        width, height = resize(width, height, budget, budget)
    return width, height


def image_tokens(width: int, height: int, patch: int = 14) -> int:
    """Tokens of an image of `target_size`: one for each two by two patches."""
    return width * height // (2 * patch) ** 2


@once_a_version
def oriented_size(path: str | Path) -> tuple[int, int]:
    """(width, height) of the image that `open_image` returns, read from the file's header alone."""
    with _open(path) as image:
        return image.size[::-1] if _orientation(image) >= 5 else image.size


def oriented_sizes(paths: Iterable[str]) -> dict[str, tuple[int, int]]:
    """path -> `oriented_size`, each path read once."""
    paths = list(dict.fromkeys(paths))
    with ThreadPoolExecutor() as pool:
        return dict(zip(paths, pool.map(oriented_size, paths)))


def check_images(
    rows: Sequence[Row],
    label: str,
    remedy: str = "Replace the files, or delete their rows.",
    checked: Collection[str] = (),
) -> None:
    """Decode every image once, but those in `checked`.

    Raises UserError, with the number and the first few names, if any cannot be used.
    """
    if broken := find_bad_images(rows, label, checked):
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


def find_bad_images(rows: Sequence[Row], label: str, checked: Collection[str] = ()) -> dict[str, str]:
    """path -> problem, for every image that `open_image` cannot open; those in `checked` are left out.

    JPEGs are decoded at an eighth of their size: fast, and the file is still read to its end.
    """
    paths = [path for path in all_images(rows) if path not in checked]
    with ThreadPoolExecutor() as pool:
        checks = tqdm(
            pool.map(_problem, paths), total=len(paths), desc=f"checking images of {label}", leave=False, disable=None
        )
        return {path: problem for path, problem in zip(paths, checks) if problem}


def _problem(path: str) -> str | None:
    """Why the image at `path` cannot be used; None if it can."""
    try:
        open_image(path, min_side=1)
    except Exception as error:  # PIL raises many kinds for damaged files
        return error_summary(error)
    return None


def without_bad_images(rows: Sequence[Row], broken: Mapping[str, str]) -> list[Row]:
    """The rows without their images in `broken`, and with a `note` that says so."""
    readable = [[path for path in row["images"] if path not in broken] for row in rows]
    return [
        row | Row(images=left, note=LESS_IMAGES if left else NO_IMAGE) if len(left) < len(row["images"]) else row
        for row, left in zip(rows, readable)
    ]


def bad_images_warning(broken: Mapping[str, str], csv: str) -> str:
    """What to do about the unusable images of a test file, which can be replaced while the folds are trained."""
    return (
        f"{csv}: {pluralize(len(broken), 'image')} cannot be used: {preview_bad_images(broken)}. predict.py stops at "
        "them: replace the files, or answer their rows from the text alone with `predict.py --skip_bad_images`."
    )


def preview_bad_images(broken: Mapping[str, str]) -> str:
    """The first few of `find_bad_images`, each with its problem."""
    return preview([f"{path} ({problem})" for path, problem in broken.items()])


def error_summary(error: Exception) -> str:
    """Why a file cannot be opened as an image, in at most 80 characters."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    return " ".join(str(error).split())[:80] or type(error).__name__
