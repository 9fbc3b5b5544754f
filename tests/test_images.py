"""One loader: orientation, transparency, every mode, bounds; and the pixel budget."""

import numpy as np
import pytest
from PIL import Image

from vqa.core.errors import UserError
from vqa.data.images import check_images, open_image, oriented_size, target_size


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
