"""One loader: orientation, transparency, every mode, bounds; and the pixel budget."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from vqa.core.errors import UserError
from vqa.data.collator import Collator
from vqa.data.images import check_images, find_bad_images, open_image, oriented_size, target_size


def test_exif_orientation_is_applied_and_known_from_the_header(tmp_path):
    image = Image.new("RGB", (60, 30), "white")
    image.paste("red", (0, 0, 10, 30))  # red on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be seen turned a quarter clockwise: red on top
    image.save(tmp_path / "x.png", exif=exif)
    seen = open_image(tmp_path / "x.png")
    assert seen.size == oriented_size(tmp_path / "x.png") == (30, 60)
    assert seen.convert("RGB").getpixel((15, 2)) == (255, 0, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.webp", "x.tif"])
def test_the_size_from_the_header_is_that_of_the_pixels_in_every_format_and_orientation(tmp_path, name, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (60, 30), "white").save(tmp_path / name, exif=exif)
    size = (30, 60) if orientation >= 5 else (60, 30)
    assert oriented_size(tmp_path / name) == open_image(tmp_path / name).size == size


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"])
def test_every_mode_arrives_as_colour(tmp_path, mode):
    grey = Image.fromarray(np.full((40, 50), 128, np.uint8))
    if mode in ("I;16", "I", "F"):
        array = np.full((40, 50), 128 * 257 if mode == "I;16" else 128)
        image = Image.fromarray(array.astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]))
    else:
        image = grey.convert(mode)
    path = tmp_path / "x.tiff"
    image.save(path)
    seen = open_image(path)
    assert seen.mode in ("RGB", "RGBA") and seen.size == (50, 40)
    if mode != "1":
        assert abs(np.asarray(seen.convert("RGB")).mean() - 128) < 3


def test_what_is_transparent_is_white_in_the_models_input(tmp_path, processor):
    from qwen_vl_utils import process_vision_info

    Image.new("RGBA", (56, 56), (255, 0, 0, 0)).save(tmp_path / "x.png")
    item = {"type": "image", "image": open_image(tmp_path / "x.png"), "resized_width": 56, "resized_height": 56}
    images, _ = process_vision_info([{"role": "user", "content": [item]}])
    assert np.asarray(images[0]).min() == 255


def test_palette_transparency_is_white_too(tmp_path):
    image = Image.new("P", (8, 8), 0)
    image.putpalette([255, 0, 0] * 256)
    image.save(tmp_path / "x.gif", transparency=0)
    assert open_image(tmp_path / "x.gif").getpixel((0, 0))[3] == 0


@pytest.mark.parametrize("size", [(720, 540), (540, 720), (100, 80), (3000, 40), (57, 3000)])
@pytest.mark.parametrize("image_size", [112, 384, 768])
def test_the_target_is_within_the_budget_and_a_multiple_of_28(size, image_size):
    width, height = target_size(*size, image_size)
    assert width % 28 == 0 and height % 28 == 0
    assert width * height <= max(image_size**2, 4 * 28 * 28)


def test_a_smaller_image_keeps_its_size_and_the_aspect_is_kept():
    assert target_size(280, 196, 768) == (280, 196)
    width, height = target_size(1600, 1200, 384)
    assert abs(width / height - 4 / 3) < 0.15


@pytest.mark.parametrize("size", [(720, 540), (208, 208), (280, 196), (2000, 300)])
@pytest.mark.parametrize("image_size", [140, 384, 512, 768])
def test_a_scale_changes_the_grid_also_of_images_below_the_budget(size, image_size):
    plain = target_size(*size, image_size)
    smaller, larger = (np.prod(target_size(*size, image_size, scale)) for scale in (0.9, 1.1))
    assert smaller < np.prod(plain) < larger


PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 255, (4, 6, 3), dtype=np.uint8)).resize((60, 40))


def encoded(form: str, **options) -> bytes:
    buffer = io.BytesIO()
    PHOTO.save(buffer, form, **options)
    return buffer.getvalue()


def chunk(name: bytes, content: bytes, checksum: int | None = None) -> bytes:
    """A PNG chunk."""
    checksum = zlib.crc32(name + content) if checksum is None else checksum
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)


def exif(*tags: tuple[int, int, int, int]) -> bytes:
    """An EXIF block of (tag, type, count, value)."""
    entries = b"".join(struct.pack("<HHIi", *tag) for tag in tags)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(tags)) + entries + b"\0" * 4


def png(*chunks: bytes, after: bool = False) -> bytes:
    """PHOTO with chunks before or after its pixels."""
    data = encoded("PNG")
    place = len(data) - 12 if after else 33
    return data[:place] + b"".join(chunks) + data[place:]


TURN, NEGATIVE = (0x0112, 3, 1, 6), (0x0106, 4, 1, -5)  # a quarter turn, and a number that PIL cannot write back
PROFILE = b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n   5\nno hex\n")
BROKEN_METADATA = {
    "a turn and a tag that cannot be written back": (encoded("JPEG", quality=100, exif=exif(TURN, NEGATIVE)), True),
    "a turn and a tag of no type": (encoded("WEBP", lossless=True, exif=exif(TURN, (0x0107, 99, 1, 0))), True),
    "jpeg, garbage": (encoded("JPEG", quality=100, exif=b"Exif\0\0garbage"), False),
    "jpeg, half a tag": (encoded("JPEG", quality=100, exif=exif(TURN)[:-9]), False),
    "webp, garbage": (encoded("WEBP", lossless=True, exif=b"garbage!"), False),
    "png, garbage": (png(chunk(b"eXIf", b"\0\10garbage")), False),
    "png, raw profile": (png(chunk(b"zTXt", PROFILE)), False),
    "png, a wrong checksum": (png(chunk(b"tEXt", b"a\0b", checksum=7)), False),
    "png, half a chunk": (png(chunk(b"pHYs", b"12")), False),
    "png, a bomb of text": (png(chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * 3_000_000))), False),
    "png, half a chunk behind the pixels": (png(chunk(b"gAMA", b"1"), after=True), False),
    "png, a turn, and half a chunk behind the pixels": (
        png(chunk(b"eXIf", exif(TURN)[6:]))[:-12] + chunk(b"gAMA", b"1") + chunk(b"IEND", b""),
        True,
    ),
}


@pytest.mark.parametrize("name", BROKEN_METADATA)
def test_broken_metadata_beside_sound_pixels_does_not_matter(name, tmp_path):
    data, turned = BROKEN_METADATA[name]
    path = tmp_path / "image"
    path.write_bytes(data)
    row = {"id": "x", "images": [str(path)], "question": "?", "choices": ["a", "b"]}
    wanted = PHOTO.transpose(Image.Transpose.ROTATE_270) if turned else PHOTO
    seen = open_image(path)
    assert not find_bad_images([row], "test.csv") and oriented_size(path) == seen.size == wanted.size
    difference = np.abs(np.asarray(seen, dtype=int) - np.asarray(wanted, dtype=int))
    assert difference.max() == 0 or data.startswith(b"\xff\xd8") and difference.mean() < 5  # JPEG is not exact


@pytest.mark.parametrize(
    "data", [png()[:-60], png(chunk(b"tEXt", b"a\0b", checksum=7))[:200], png(chunk(b"tRNS", b"1"))]
)
def test_an_image_whose_pixels_are_damaged_is_refused_whatever_its_metadata(data, tmp_path):
    (tmp_path / "x.png").write_bytes(data)
    assert find_bad_images([{"images": [str(tmp_path / "x.png")]}], "test.csv")


@pytest.mark.parametrize(("top", "seen"), [(1.0, 255), (0.5, 128), (255.0, 255), (1000.0, 255)])
def test_floats_up_to_1_are_fractions_of_white(tmp_path, top, seen):
    ramp = np.linspace(0, top, 200, dtype=np.float32).reshape(10, 20)
    ramp[0, 0] = np.nan
    Image.fromarray(ramp).save(tmp_path / "x.tif")
    values = np.asarray(open_image(tmp_path / "x.tif"))
    assert values.min() == 0 and abs(int(values.max()) - seen) <= 1


def test_heic_is_read_where_pillow_heif_is_installed_and_its_name_is_said_where_it_is_not(tmp_path):
    path = tmp_path / "x.heic"
    path.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    row = {"images": [str(path)]}
    try:
        import pillow_heif
    except ImportError:
        assert "install pillow-heif" in find_bad_images([row], "test.csv")[str(path)]
        return
    pillow_heif.from_pillow(PHOTO).save(path)
    assert not find_bad_images([row], "test.csv") and open_image(path).size == oriented_size(path) == PHOTO.size


@pytest.mark.parametrize("patch", [14, 16])
@pytest.mark.parametrize("size", [(3, 600), (400, 40), (1, 200), (4000, 20), (80, 60), (50, 90), (9, 9)])
def test_a_long_or_small_image_keeps_a_legal_grid_within_every_budget_and_scale(size, patch):
    token = 2 * patch
    for image_size in (28, 56, 112, 224, 384, 1036):
        for scale in (0.3, 0.7, 0.9, 1.0, 1.2, 2.0):
            width, height = target_size(*size, image_size, scale, patch)
            assert min(width, height) >= token and width % token == height % token == 0
            assert width * height >= 4 * token**2 and max(width, height) <= 200 * min(width, height)
            assert scale > 1 or width * height <= max(4 * token**2, image_size**2)
            assert width == height or (width > height) == (size[0] > size[1])


@pytest.mark.parametrize("size", [(3, 600), (400, 40), (80, 60), (50, 90)])
@pytest.mark.parametrize("image_size", [56, 112])
def test_the_model_gets_the_grid_of_a_long_or_small_image(processor, tmp_path, size, image_size):
    Image.new("RGB", size, "red").save(tmp_path / "x.png")
    for scale in (1.0, 0.7):
        row = {"id": "x", "images": [str(tmp_path / "x.png")], "question": "?", "choices": ["a", "b"], "scale": scale}
        width, height = target_size(*size, image_size, scale)
        assert Collator(processor, image_size)([row])["image_grid_thw"].tolist() == [[1, height // 14, width // 14]]


def test_all_broken_images_are_counted_and_a_few_named(tmp_path):
    Image.effect_noise((400, 300), 60).save(tmp_path / "good.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "good.jpg").read_bytes()[:-4000])
    (tmp_path / "text.jpg").write_text("no image")
    Image.new("1", (20000, 20000)).save(tmp_path / "bomb.png")
    Image.new("L", (2, 900)).save(tmp_path / "thread.png")
    names = ["good.jpg", "cut.jpg", "text.jpg", "bomb.png", "thread.png", "gone.jpg"]
    with pytest.raises(
        UserError, match="5 of 6 images cannot be used.*cut.jpg.*text.jpg.*bomb.png.*and 2 more"
    ) as error:
        check_images([{"images": [str(tmp_path / name)]} for name in names], "train.csv")
    assert "good.jpg" not in str(error.value)
    with pytest.raises(UserError, match="gone.jpg .no such file"):
        check_images([{"images": [str(tmp_path / "gone.jpg")]}], "train.csv")
    with pytest.raises(UserError, match="200 to 1"):
        check_images([{"images": [str(tmp_path / "thread.png")]}], "train.csv")
    check_images([{"images": [str(tmp_path / "good.jpg")]}], "train.csv")
