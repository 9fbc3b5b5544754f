"""The store of vision features against the tower itself: nothing is encoded twice, mixed up or left incomplete."""

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ENVIRONMENT, ROOT, TINY
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file

import vqa.modeling.feature_store
from vqa.config.arguments import DataArguments
from vqa.core.errors import UserError
from vqa.data.collator import Collator
from vqa.data.images import all_images
from vqa.modeling.feature_store import images_with_features, open_feature_store
from vqa.modeling.loading import load_base
from vqa.modeling.vision import encode_images

SIZE = 112


@pytest.fixture
def encoded(monkeypatch) -> list[str]:
    """The images that the tower encodes for a store, four at once at most."""
    names_encoded, encode = [], vqa.modeling.feature_store.image_features

    def watched(model, batch, names):
        names_encoded.extend(names)
        return encode(model, batch, names)

    monkeypatch.setattr(vqa.modeling.feature_store, "image_features", watched)
    monkeypatch.setattr(vqa.modeling.feature_store, "MOST_IMAGES", 4)
    return names_encoded


@pytest.fixture
def open_store(model, processor, tmp_path):
    def call(*needed, base=model, **fields):
        data = DataArguments(image_size=SIZE, vision_cache_dir=str(tmp_path / "cache"), **fields)
        return open_feature_store(base, processor, data, needed, show=False)

    return call


def shards(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}


def test_a_second_run_encodes_nothing_and_reads_the_same(open_store, processor, encoded, rows):
    first = open_store(rows)
    assert sorted(encoded) == sorted(all_images(rows))
    encoded.clear()
    again = open_store(rows)
    shown = [{**row, "permutation": [1, 2, 3, 0]} for row in rows]  # orders share an image
    assert not encoded and again.holds(shown)
    for store in (again, pickle.loads(pickle.dumps(again))):  # as a worker that is spawned gets it
        assert torch.equal(store.read(shown)[0], first.read(rows)[0])
    assert not list(first.shards.folder.glob("*.lock"))


def test_images_with_features_are_not_checked_again_until_their_bytes_change(open_store, rows, tmp_path):
    root = tmp_path / "cache"
    assert images_with_features(rows, root) == set()
    photo = Path(shutil.copy(rows[0]["images"][0], tmp_path / "photo.jpg"))
    copied, missing = {**rows[0], "images": [str(photo)]}, {**rows[0], "images": [str(tmp_path / "none.jpg")]}
    open_store([rows[0]]).shards.folder.joinpath("cut.safetensors").write_bytes(b"cut")
    assert images_with_features([copied, rows[1], missing], root) == set(copied["images"])
    photo.write_bytes(photo.read_bytes()[:-100])
    assert images_with_features([copied], root) == set()


def test_identical_images_are_encoded_once_and_every_size_separately(open_store, encoded, rows, tmp_path):
    copy = {**rows[0], "images": [str(shutil.copy(rows[0]["images"][0], tmp_path / "copy.jpg"))]}
    open_store([rows[0], copy, rows[0]])
    assert len(encoded) == 1
    larger = {**copy, "scale": 1.5}
    store = open_store([copy], [{**rows[0], "scale": 1.5}])
    assert len(encoded) == 2
    assert store.read([larger])[1].tolist() != store.read([copy])[1].tolist() and store.holds([copy, larger])


def test_a_batch_with_an_image_that_is_not_stored_is_decoded(open_store, model, processor, rows):
    store = open_store(rows[:2])
    collate = Collator(processor, SIZE, features=store)
    assert "image_features" in collate(rows[:2]) and "pixel_values" not in collate(rows[:2])
    assert "pixel_values" in collate(rows[:3]) and "pixel_values" in collate([{**rows[0], "scale": 1.5}])


@pytest.mark.parametrize("harm", ["a byte", "cut short", "empty"])
def test_a_damaged_shard_is_written_again_and_a_line_says_so(open_store, encoded, rows, tmp_path, capsys, harm):
    open_store(rows)
    before = shards(tmp_path)
    path = tmp_path / sorted(before)[0]
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes({"a byte": data, "cut short": data[:-100], "empty": b""}[harm])
    encoded.clear()
    capsys.readouterr()
    open_store(rows)
    output = capsys.readouterr().out
    assert output.count("is damaged") == 1 and str(path) in output and output.count("\n") == 1
    assert shards(tmp_path) == before and 1 <= len(encoded) <= 4


def test_other_weights_dtypes_and_preprocessing_never_read_each_others_features(
    open_store, model, processor, encoded, rows, monkeypatch
):
    def other(dtype):
        return load_base(TINY, load_in_4bit=False, dtype=dtype).eval()

    first = open_store(rows[:2])
    changed = other(torch.float32)
    next(vqa.modeling.feature_store.vision_tower(changed).parameters()).data[0] += 1e-3
    stores = [open_store(rows[:2], base=changed), open_store(rows[:2], base=other(torch.bfloat16))]
    monkeypatch.setattr(processor.image_processor, "image_mean", [0.4, 0.5, 0.5])
    stores.append(open_store(rows[:2]))
    assert len(encoded) == 8 and len({store.shards.folder for store in [first, *stores]}) == 4
    assert not any(torch.equal(store.read(rows[:2])[0].float(), first.read(rows[:2])[0]) for store in stores)


def test_features_are_those_of_the_tower_in_the_models_dtype(open_store, processor, rows):
    model = load_base(TINY, load_in_4bit=False, dtype=torch.bfloat16).eval()
    features, grids = open_store(rows[:1], base=model).read(rows[:1])
    batch = Collator(processor, SIZE)(rows[:1])
    wanted = encode_images(model, batch)["mm_encoder_outputs"]["image"].pooler_output[0]
    assert features.dtype == torch.bfloat16 and torch.equal(features[0], wanted)
    assert torch.equal(grids, batch["image_grid_thw"])


JOB = """
import sys, time
from pathlib import Path
import torch
import vqa.modeling.feature_shards as shards
import vqa.modeling.feature_store as features
from vqa.config.arguments import DataArguments
from vqa.data.rows import read_rows
from vqa.modeling.loading import load_base, load_processor
tiny, csv, cache, record, size, kind = sys.argv[1:]
torch.set_num_threads(1)
features.MOST_IMAGES = 4
encoded, encode, save = [], features.image_features, shards.save_file
def watched(model, batch, names):
    time.sleep(0.1)  # long enough for the other process to come by
    encoded.extend(names)
    return encode(model, batch, names)
def killed(tensors, path, metadata):
    if len(encoded) > 8:
        save(tensors, path, metadata)
        Path(path).write_bytes(Path(path).read_bytes()[:500])
        import os, signal
        os.kill(os.getpid(), signal.SIGKILL)
    save(tensors, path, metadata)
features.image_features = watched
if kind == "killed":
    shards.save_file = killed
model, processor = load_base(tiny, False, torch.float32).eval(), load_processor(tiny)
rows = read_rows(csv, with_answer=True)
Path(record).touch()
while kind == "beside" and len(list(Path(record).parent.glob("ready*"))) < 2:
    time.sleep(0.01)
data = DataArguments(image_size=int(size), vision_cache_dir=cache)
store = features.open_feature_store(model, processor, data, [rows])
assert store.holds(rows)
Path(record).write_text("\\n".join(encoded))
"""


def start(csv: Path, cache: Path, record: Path, kind: str) -> subprocess.Popen:
    words = [sys.executable, "-c", JOB, TINY, csv, cache, record, SIZE, kind]
    words = [str(word) for word in words]
    environment = ENVIRONMENT | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_killed_build_continues_to_the_same_bytes(open_store, contest, encoded, rows, tmp_path):
    process = start(contest / "train.csv", tmp_path / "cache", tmp_path / "ready", "killed")
    process.communicate(timeout=120)
    assert process.returncode == -9
    part = shards(tmp_path / "cache")
    half = [path for path in (tmp_path / "cache").rglob(".*safetensors.*")]
    assert len(part) == 2 and len(half) == 1, "two shards are complete, one is not"
    store = open_store(rows)
    assert len(encoded) == len(rows) - sum(len(load_file(tmp_path / "cache" / name)) for name in part)
    assert store.holds(rows) and not half[0].exists()
    resumed = shards(tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache")
    open_store(rows)
    assert shards(tmp_path / "cache") == resumed


@pytest.mark.slow
def test_two_processes_at_once_divide_the_work(open_store, contest, encoded, rows, tmp_path):
    records = [tmp_path / "ready1", tmp_path / "ready2"]
    started = [start(contest / "train.csv", tmp_path / "cache", record, "beside") for record in records]
    for process in started:
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0, error[-2000:]
    first, second = (record.read_text().split() for record in records)
    assert sorted(first + second) == sorted(all_images(rows)) and first and second
    built = shards(tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache")
    open_store(rows)
    assert shards(tmp_path / "cache") == built


def test_beyond_the_limit_the_least_recently_used_shards_are_deleted(open_store, encoded, rows, tmp_path):
    mine = tmp_path / "cache" / "mine" / "adapter.safetensors"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"x" * 10_000)
    old, kept, new = rows[:4], rows[4:8], rows[8:12]
    first = open_store(old)
    (path,) = first.shards.handles
    a_shard = path.stat().st_size
    open_store(kept)
    for number, (file,) in enumerate(([mine], open_store(old).shards.handles, open_store(kept).shards.handles)):
        os.utime(file, (number, number))
    limit = 2.5 * a_shard / 1e9
    store = open_store(new, vision_cache_gb=limit)
    assert store.holds(new) and len(shards(store.shards.folder)) == 2 and not path.exists()
    assert first.read(old)[0].isfinite().all(), "an open one stays readable"
    encoded.clear()
    assert open_store(kept).holds(kept) and not encoded and mine.exists()


def test_images_beyond_the_limit_are_left_out_and_a_line_says_so(open_store, processor, encoded, rows, capsys):
    (path,) = open_store(rows[:4]).shards.handles
    limit = 1.5 * path.stat().st_size / 1e9
    capsys.readouterr()
    store = open_store(rows[:4], rows[4:8], vision_cache_gb=limit)
    output = capsys.readouterr().out
    assert store.holds(rows[:4]) and not store.holds(rows[4:8]) and len(encoded) == 4
    assert output.count("\n") == 1 and "no room" in output and "vision_cache_gb" in output
    assert "pixel_values" in Collator(processor, SIZE, features=store)(rows[4:8])


def test_there_is_no_store_where_the_tower_is_trained(open_store, rows):
    assert open_store(rows[:1], vision_cache=False) is None
    model = load_base(TINY, load_in_4bit=False, dtype=torch.float32)
    next(vqa.modeling.feature_store.vision_tower(model).parameters()).requires_grad_(True)
    assert open_store(rows[:1], base=model) is None
    adapted = get_peft_model(load_base(TINY, False, torch.float32), LoraConfig(target_modules=r".*visual.*\.qkv"))
    assert open_store(rows[:1], base=adapted.requires_grad_(False)) is None


def test_a_folder_that_cannot_be_written_is_an_error_with_a_remedy(open_store, rows, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match="vision_cache_dir .*Give another one"):
        open_store(rows[:1])


def test_a_grid_other_than_the_headers_is_an_error_that_names_the_image(
    open_store, encoded, rows, tmp_path, monkeypatch
):
    """As with a TIFF file, whose size Pillow swaps by itself, and whose size was then swapped back."""
    image = tmp_path / "wide.png"
    Image.new("RGB", (112, 56)).save(image)
    monkeypatch.setattr(vqa.modeling.feature_store, "oriented_sizes", lambda paths: dict.fromkeys(paths, (56, 112)))
    with pytest.raises(UserError, match=f"{image}: the decoded image has 4 x 8 patches, its header promises 8 x 4"):
        open_store([{**rows[0], "images": [str(image)]}])
    assert not encoded


def test_the_tower_is_hashed_once_however_often_a_store_is_opened(open_store, rows, monkeypatch):
    model, hashed, fingerprint = load_base(TINY, False, torch.float32), [], vqa.modeling.feature_store.fingerprint

    def counted(tensors):
        hashed.append(1)
        return fingerprint(tensors)

    monkeypatch.setattr(vqa.modeling.feature_store, "fingerprint", counted)
    first, second = open_store(rows[:1], base=model), open_store(rows[1:2], base=model)
    assert hashed == [1] and first.shards.folder == second.shards.folder


def test_training_and_prediction_run_on_stored_features_and_give_what_pixels_give(
    trained, script, tmp_path, monkeypatch
):
    args = [trained / "args" / "fold0.json", "--output_dir"]
    predict = ["--csv", trained / "data" / "test.csv", "--scales", "1.0", "1.4", "--num_permutations", "2"]
    code, _, error = script("train_fold", *args, tmp_path / "pixels", "--vision_cache", "false")
    assert code == 0, error
    code, _, error = script("predict", tmp_path / "pixels", *predict, "--output_dir", tmp_path / "by_pixels")
    assert code == 0, error

    def refused(*args):
        raise AssertionError("the tower was run outside of the store")

    monkeypatch.setattr("vqa.modeling.vision.image_features", refused)
    code, _, error = script("train_fold", *args, tmp_path / "stored")
    assert code == 0, error
    flags = ["--vision_cache", "true", "--vision_cache_dir", tmp_path / "own", "--output_dir", tmp_path / "by_store"]
    code, _, error = script("predict", tmp_path / "pixels", *predict, *flags)
    assert code == 0 and shards(tmp_path / "own"), error
    again = ["--resume_from_checkpoint", "auto", "--vision_cache", "false"]  # changes nothing of what is trained
    code, output, error = script("train_fold", *args, tmp_path / "stored", *again)
    assert code == 0 and "is finished" in output, error

    weights = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("pixels", "stored")]
    assert max((weights[0][name] - weights[1][name]).abs().max() for name in weights[0]) < 1e-5
    files = [tmp_path / folder / "pixels.csv" for folder in ("by_pixels", "by_store")]
    files = [pd.read_csv(path).filter(like="p_").to_numpy() for path in files]
    assert np.abs(files[0] - files[1]).max() < 1e-6
