"""Rows with several images, one or none, against transformers' own processor and the tower's own features."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import HEADER, TINY, write_csv
from PIL import Image

from vqa.config.arguments import DataArguments
from vqa.data.collator import Collator
from vqa.data.images import all_images, oriented_sizes
from vqa.data.prompt import build_messages, render_chat
from vqa.data.splits import image_groups, rows_fingerprint, shared_images
from vqa.inference.scoring import answer_logits, choice_probs, permutation_probs
from vqa.inference.tta import make_views
from vqa.modeling.feature_store import open_feature_store
from vqa.training.batching import count_tokens, split_batch
from vqa.training.dataset import TrainDataset

SIZE = 112
# How Qwen2.5-VL's own template numbers images (the model's chat_template.json).
QWEN_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "{% set image_count.value = image_count.value + 1 %}{% if add_vision_id %}Picture {{ image_count.value }}: "
    "{% endif %}<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}"
    "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, rows):
    """Rows with 1, 2, 0, 3 and 0 images. The sizes are within the budget, so nothing is resized."""
    folder, random = tmp_path_factory.mktemp("several"), np.random.default_rng(0)
    paths = []
    for number, (width, height) in enumerate([(56, 84), (112, 56), (84, 84), (56, 56)]):
        paths.append(str(folder / f"{number}.png"))
        Image.fromarray(random.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(paths[-1])
    images = [paths[:1], paths[1:3], [], [paths[3], paths[0], paths[1]], []]
    return [{**row, "images": own} for row, own in zip(rows, images)]


def test_images_come_before_the_text_and_are_numbered_where_there_are_several(processor, mixed):
    one, two, none, three, _ = mixed
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    for row, wanted in (
        (one, image),
        (two, f"Picture 1: {image}Picture 2: {image}"),
        (none, ""),
        (three, f"Picture 1: {image}Picture 2: {image}Picture 3: {image}"),
    ):
        text = render_chat(processor, build_messages(row))
        assert f"<|im_start|>user\n{wanted}{row['question']}\n" in text and text.count(image) == len(row["images"])
        qwen = processor.apply_chat_template(
            build_messages(row), chat_template=QWEN_TEMPLATE, tokenize=False, add_vision_id=len(row["images"]) > 1
        )
        assert text.split("<|im_start|>user\n")[1].startswith(qwen.removeprefix("<|im_start|>user\n"))


def test_a_batch_is_what_the_processor_makes_of_the_same_chats_and_images(processor, mixed):
    for rows in (mixed[:1], mixed[1:2], mixed[2:3], mixed[3:4]):
        (row,) = rows
        text = build_messages(row)[0]["content"][-1]
        pictures = [{"type": "image", "image": Image.open(path)} for path in row["images"]]
        wanted = processor.apply_chat_template(
            [{"role": "user", "content": [*pictures, text]}],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
            add_vision_id=len(pictures) > 1,
        )
        batch = Collator(processor, SIZE)(rows)
        for key in ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw"):
            assert (key in batch) == (key in wanted), key
            assert key not in batch or torch.equal(batch[key], wanted[key]), key


@pytest.fixture(scope="module")
def store(model, processor, mixed, tmp_path_factory):
    data = DataArguments(image_size=SIZE, vision_cache_dir=str(tmp_path_factory.mktemp("cache")))
    return open_feature_store(model, processor, data, [mixed], show=False)


def test_stored_features_give_the_logits_of_pixels_and_of_each_row_alone(model, processor, mixed, store):
    by_pixels, by_store = Collator(processor, SIZE), Collator(processor, SIZE, features=store)
    with torch.no_grad():
        batch = by_store(mixed)
        assert "image_features" in batch and "pixel_values" not in batch
        stored, pixels = answer_logits(model, batch), answer_logits(model, by_pixels(mixed))
        assert (stored - pixels).abs().max() < 1e-5
        for number, row in enumerate(mixed):
            batch = by_pixels([row])
            images = {key: batch[key] for key in ("pixel_values", "image_grid_thw") if key in batch}
            alone = model(input_ids=batch["input_ids"], mm_token_type_ids=batch["mm_token_type_ids"], **images).logits
            assert (alone[0, -1] - pixels[number, 0]).abs().max() < 1e-4
        only_text = [row for row in mixed if not row["images"]]
        assert not {"pixel_values", "image_features", "image_grid_thw"} & by_store(only_text).keys()


def test_permutations_in_one_pass_are_those_scored_alone(model, processor, ids, mixed, store):
    orders = [[0, 1, 2, 3], [2, 3, 0, 1]]
    together = permutation_probs(
        model, [{**row, "permutations": orders} for row in mixed], Collator(processor, SIZE, features=store), ids, 2
    )
    for number, order in enumerate(orders):
        alone = choice_probs(
            model, [{**row, "permutation": order} for row in mixed], Collator(processor, SIZE), ids, 5
        )
        assert np.abs(np.stack([probs[number] for probs in together]) - alone).max() < 1e-5


def test_tokens_are_counted_and_batches_are_split_row_by_row(processor, mixed, store):
    collate = Collator(processor, SIZE, with_answer=True)
    lengths = count_tokens(mixed, collate, oriented_sizes(all_images(mixed)), show=False)
    assert lengths.tokens.tolist() == [collate([row])["input_ids"].shape[1] for row in mixed]
    for features in (None, store):
        collate.features = features
        parts = split_batch(collate(mixed), 2)
        for part, rows in zip(parts, (mixed[:2], mixed[2:4], mixed[4:])):
            alone = collate(rows)
            assert part.keys() == alone.keys() and part["num_images"] == alone["num_images"]
            for key in {"pixel_values", "image_features", "image_grid_thw", "answer"} & alone.keys():
                assert torch.equal(part[key], alone[key]), key


def test_scale_and_flip_change_every_image_of_a_row(processor, mixed):
    views = {view.name: view for view in make_views(mixed, Collator(processor, SIZE), [1.5], flip=True)}
    assert views["scale 1.5"].changed == [0, 1, 3] and 2 not in views["flip"].changed
    collate = Collator(processor, SIZE)
    plain, larger = (collate([row])["image_grid_thw"] for row in (mixed[3], views["scale 1.5"].rows[3]))
    assert len(larger) == 3 and (larger.prod(1) > plain.prod(1)).all()
    mirrored = collate([views["flip"].rows[1]])["pixel_values"]
    for path in mixed[1]["images"]:
        Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path.replace(".png", "_flipped.png"))
    flipped = {**mixed[1], "images": [path.replace(".png", "_flipped.png") for path in mixed[1]["images"]]}
    assert torch.equal(mirrored, collate([flipped])["pixel_values"])


def test_a_step_trains_on_rows_with_several_images_one_and_none(make_trainer, mixed):
    trainer = make_trainer(max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    trainer.train_dataset = TrainDataset((mixed * 2)[:8], True, 42)  # as many as the trainer was made for
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    changed = [not torch.equal(p, before[name]) for name, p in trainer.model.named_parameters() if name in before]
    assert any(changed) and all(np.isfinite(line["loss"]) for line in trainer.state.log_history if "loss" in line)


def test_rows_with_the_same_images_share_a_group_and_one_image_rows_have_the_old_fingerprint(mixed, tmp_path):
    one, two, none, three, other = mixed
    swapped = {**two, "id": "swapped", "images": two["images"][::-1]}
    groups = image_groups([one, two, none, three, other, swapped])
    assert groups[1] == groups[5] and len(set(groups)) == 5
    assert shared_images([swapped, {**none, "id": "x"}, {**one, "images": two["images"][:1]}], mixed) == [
        ("swapped", two["id"])
    ]
    assert rows_fingerprint([two]) != rows_fingerprint([{**two, "images": two["images"][::-1]}])
    sha = hashlib.sha256(Path(one["images"][0]).read_bytes()).hexdigest()
    old = [{key: value for key, value in row.items() if key != "images"} for row in (one, none)]
    old = [[old[0] | {"image": sha}, old[1] | {"image": None}], []]  # a row of an earlier release
    digest = hashlib.sha256(json.dumps(old, sort_keys=True).encode()).hexdigest()
    assert rows_fingerprint([one, none], []) == digest[:16]


@pytest.mark.slow
def test_every_script_takes_a_contest_of_all_three_kinds_in_columns_of_its_own(script, contest, tmp_path, rows):
    """Two images, one and none; a mapping names the columns, since two of them could be the question or the answer."""
    cells = []
    for number, row in enumerate(rows):
        names = [f"pictures/{(number + k) % 24}.jpg" for k in range(2)]
        images = [[names[0], ""], ["", ""], names][number % 3]
        cells.append([row["id"], *images, row["question"], "?", *row["choices"], str(row["answer"]), "a"])
    header = ["id", "image1", "image2", "query", "question", *HEADER[3:7], "gold", "label"]
    mapping = json.dumps({"question": "query", "answer": "gold"})
    train, test = write_csv(tmp_path / "train.csv", cells, header), tmp_path / "test.csv"
    write_csv(test, [row[:-2] + ["", ""] for row in cells], header)
    write_csv(tmp_path / "sample_submission.csv", [[row["id"], "2"] for row in rows], ["id", "gold"])
    (tmp_path / "pictures").symlink_to(contest / "pictures")
    args = {"model": TINY, "train_csv": str(train), "test_csv": str(test), "fold": 0, "image_size": 112}
    args |= {"columns": mapping, "max_steps": 2, "effective_batch_size": 4, "ema_decay": 0.0}
    args |= {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "no", "disable_tqdm": True}
    args |= {"vision_cache_dir": str(tmp_path / "cache"), "output_dir": str(tmp_path / "checkpoints" / "fold0")}
    args |= {"crops": True}
    (tmp_path / "fold0.json").write_text(json.dumps(args))
    fold, outputs = tmp_path / "checkpoints" / "fold0", ["--output_dir", tmp_path / "outputs"]
    views = ["--num_permutations", "2", "--scales", "1.4", "--flip", "--crops"]
    said = {}
    for name, *words in (
        ("make_folds", tmp_path / "fold0.json", "--folds", "2"),
        ("doctor", tmp_path / "fold0.json", "--output_dir", tmp_path / "elsewhere"),
        ("train_fold", tmp_path / "fold0.json"),
        ("predict", fold, *views, *outputs),
        ("predict", fold, *views, *outputs, "--oof"),
        ("ensemble", tmp_path / "outputs" / "fold0.csv"),
        ("explore", train, test, "--columns", mapping, "--output_dir", tmp_path / "explore"),
        ("analyze", fold, "--output_dir", tmp_path / "analyze"),
    ):
        code, said[name], error = script(name, *words)
        assert code == 0, (name, said[name][-500:], error)
    assert "8 rows with several images" in said["make_folds"] and "8 rows without an image" in said["make_folds"]
    assert "unused: question, label" in said["make_folds"]
    submission = pd.read_csv(tmp_path / "outputs" / "submission.csv")
    assert list(submission["id"]) == [row["id"] for row in rows] and set(submission["gold"]) <= {0, 1, 2, 3}
    page = (tmp_path / "explore" / "index.html").read_text()
    assert "cannot be read" not in page and "data:image/jpeg" in page
    log = pd.read_csv(os.environ["EXPERIMENTS_LOG"], dtype=str)
    training, prediction = (
        log[log["output"].str.startswith(str(tmp_path)) & (log["kind"] == kind)]["id"].iloc[-1]
        for kind in ("training", "prediction")
    )
    code, output, error = script("experiments", "--compare", training, prediction)
    assert code == 0 and "on the 12 rows that both scored" in output, error
    files = [tmp_path / "outputs" / "oof" / "fold0.csv", fold / "oof.csv"]
    code, output, error = script("ensemble", "--compare", *files, "--labels", train, "--columns", mapping)
    assert code == 0, error
