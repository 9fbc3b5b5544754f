"""Crops: a second look at the parts of an image, against images that PIL has cut by hand."""

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from qwen_vl_utils.vision_process import smart_resize
from tiny_families import make_unlike_processor

from vqa.config.arguments import DataArguments
from vqa.data.collator import Collator
from vqa.data.images import all_images, oriented_sizes, shown_images, with_crops
from vqa.data.predictions import read_card, read_predictions
from vqa.inference import predictor
from vqa.inference.scoring import choice_probs, permutation_probs
from vqa.inference.tta import group_by_image, make_views
from vqa.modeling.feature_store import open_feature_store
from vqa.training.batching import count_tokens, split_batch
from vqa.training.dataset import TrainDataset

SIZE = 112


@pytest.fixture(scope="module")
def large(tmp_path_factory, rows):
    """Rows with an image beyond the budget, one within it, none, and one of each kind."""
    folder, random = tmp_path_factory.mktemp("large"), np.random.default_rng(0)
    paths = [str(folder / f"{name}.png") for name in ("beyond", "within")]
    for path, (width, height) in zip(paths, [(190, 122), (84, 56)]):
        Image.fromarray(random.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(path)
    return [{**row, "images": own} for row, own in zip(rows, [paths[:1], paths[1:], [], paths[::-1]])]


def cut(path, flip=False) -> list[str]:
    """The four parts of an image as files of the size that the model sees: boxes by hand, size by Qwen's own rule."""
    image, files = Image.open(path), []
    image = ImageOps.mirror(image) if flip else image
    width, height = math.ceil(0.55 * image.width), math.ceil(0.55 * image.height)
    for number, corner in enumerate([(0, 0), (image.width - width, 0), (0, image.height - height)]):
        files.append((number, corner))
    files.append((3, (image.width - width, image.height - height)))
    result = []
    for number, (left, top) in files:
        part = image.crop((left, top, left + width, top + height))
        factor = max(1, SIZE / math.sqrt(width * height))
        size = smart_resize(round(height * factor), round(width * factor), 28, 4 * 28**2, SIZE**2)
        result.append(f"{path[:-4]}_{number}{'_flipped' * flip}.png")
        part.resize(size[::-1]).save(result[-1])
    return result


@pytest.fixture(scope="module")
def by_hand(large) -> list[dict]:
    """The same rows with their crops as further images."""
    parts = cut(large[0]["images"][0])
    return [row | {"images": row["images"] + parts * (number in (0, 3))} for number, row in enumerate(large)]


@pytest.fixture(scope="module")
def store(model, processor, large, tmp_path_factory):
    data = DataArguments(image_size=SIZE, vision_cache_dir=str(tmp_path_factory.mktemp("cache")))
    return open_feature_store(model, processor, data, [with_crops(large, SIZE)], show=False)


def test_only_images_that_the_budget_shrinks_are_cropped_after_all_images(large):
    assert [row["crops"] for row in with_crops(large, SIZE)] == [[0], [], [], [1]]
    shown = shown_images(with_crops(large, SIZE)[3])
    assert [image.path for image in shown] == large[3]["images"] + large[3]["images"][1:] * 4
    assert [image.crop for image in shown] == [None, None, 0, 1, 2, 3]
    assert not any(row["crops"] for row in with_crops(large, 1024))


def test_crops_are_images_that_were_cut_by_hand_from_pixels_and_from_the_store(
    model, processor, ids, large, by_hand, store
):
    cropped, collate = with_crops(large, SIZE), Collator(processor, SIZE)
    wanted = choice_probs(model, by_hand, collate, ids, 4)
    stored = Collator(processor, SIZE, features=store)
    assert "image_features" in stored(cropped)
    for own in (collate, stored):
        assert np.abs(choice_probs(model, cropped, own, ids, 4) - wanted).max() < 1e-5
    assert np.abs(choice_probs(model, large, collate, ids, 4) - wanted)[[0, 3]].max() > 1e-5, "the crops matter"
    orders = [[0, 1, 2, 3], [2, 3, 0, 1]]
    together = permutation_probs(model, [row | {"permutations": orders} for row in cropped], stored, ids, 4)
    assert np.abs(np.stack([probs[0] for probs in together]) - wanted).max() < 1e-5


def test_of_a_mirrored_image_the_mirrored_picture_is_cut(processor, large, store, model):
    row = with_crops(large, SIZE)[0] | {"flip": True}
    wanted = {**large[0], "images": cut(large[0]["images"][0], flip=True)}
    pixels, own = (Collator(processor, SIZE)([r])["pixel_values"] for r in (wanted, row))
    assert torch.equal(own[-len(pixels) :], pixels)
    keys = [store.key(image) for image in shown_images(row)]
    assert len(set(keys)) == 5 and keys[1].endswith("_flipped_crop0-0-105-68")


def test_tokens_are_counted_and_batches_are_split_with_crops(processor, large, by_hand, store):
    cropped = with_crops(large, SIZE)
    collate = Collator(processor, SIZE, with_answer=True, features=store)
    lengths = count_tokens(cropped, collate, oriented_sizes(all_images(large)), show=False)
    assert lengths.tokens.tolist() == [
        Collator(processor, SIZE, with_answer=True)([row])["input_ids"].shape[1] for row in by_hand
    ]
    for part, rows in zip(split_batch(collate(cropped), 2), (cropped[:2], cropped[2:])):
        alone = collate(rows)
        assert all(torch.equal(part[key], alone[key]) for key in ("image_features", "image_grid_thw"))


@pytest.mark.parametrize("kind", ["internvl", "idefics3"])
def test_processors_with_a_rule_of_their_own_get_the_enlarged_parts(kind, processor, large):
    other = make_unlike_processor(kind, processor)
    collate = Collator(other, SIZE)
    row = with_crops(large, SIZE)[0]
    conversation = collate.conversation(row)[0]["content"]
    image = Image.open(row["images"][0]).convert("RGB")
    for item, corner in zip(conversation[1:5], [(0, 0), (85, 0), (0, 54), (85, 54)]):
        part = image.crop((*corner, corner[0] + 105, corner[1] + 68))
        factor = SIZE / math.sqrt(105 * 68)
        assert np.array_equal(
            np.asarray(item["image"]), np.asarray(part.resize((round(105 * factor), round(68 * factor))))
        )


def test_an_epoch_shows_the_crops_of_half_of_the_rows_and_draws_the_rest_as_without(rows):
    many = [{**rows[0], "id": str(number)} for number in range(200)]
    plain, cropped = TrainDataset(many, True, 0), TrainDataset([row | {"crops": [0]} for row in many], True, 0)
    drawn = [cropped[i] for i in range(200)]
    assert 70 < sum(bool(row["crops"]) for row in drawn) < 130
    assert [row["permutation"] for row in drawn] == [plain[i]["permutation"] for i in range(200)]
    cropped.epoch.fill_(1)
    assert [row["crops"] for row in drawn] != [cropped[i]["crops"] for i in range(200)]
    assert cropped.rows[0]["crops"] == [0] and "crops" not in plain[0]


def test_crops_are_a_view_of_their_own(processor, large):
    views = make_views(large[1:], Collator(processor, SIZE), num_permutations=2, crops=True)
    assert [(view.name, view.changed) for view in views] == [
        ("plain", [0, 1, 2]),
        ("rotation 1", [0, 1, 2]),
        ("crops", [2]),
    ]
    assert [len(group) for group in group_by_image(views)] == [2, 1]


def test_the_gate_decides_which_rows_get_a_second_look(script, trained, tmp_path, monkeypatch):
    """The fold's images have more than 56 x 56 pixels."""
    scored, score = [], predictor.choice_probs
    monkeypatch.setattr(
        predictor,
        "choice_probs",
        lambda model, rows, *args, **kw: scored.append(rows) or score(model, rows, *args, **kw),
    )
    fold, flags = trained / "checkpoints" / "fold0", ["--image_sizes", "56", "--check_generation", "0", "--output_dir"]
    assert script("predict", fold, *flags, tmp_path / "plain")[0] == 0
    ids, plain = read_predictions(tmp_path / "plain" / "fold0.csv")
    top = np.sort(plain)[:, ::-1]
    margins = top[:, 0] - top[:, 1]
    gate = float(np.median(margins))
    code, output, error = script("predict", fold, *flags, tmp_path / "gated", "--crops", "--gate", gate)
    assert code == 0 and "crops: 24 of 24 rows have an image with more pixels than image size 56 shows" in output, (
        error
    )
    unsure = margins < gate
    assert [row["id"] for row in scored[-1]] == [row_id for row_id, second in zip(ids, unsure) if second]
    assert read_card(tmp_path / "gated" / "fold0.csv")["views"] == ["plain", "crops"]
    gated = read_predictions(tmp_path / "gated" / "fold0.csv")[1]
    assert np.array_equal(gated[~unsure], plain[~unsure]) and (gated[unsure] != plain[unsure]).any(1).all()
    code, output, error = script("predict", fold, *flags, tmp_path / "gated", "--crops", "--oof")
    assert code == 0 and "+ crops" in output, error
