"""The frozen vision tower's features: computed once per image and size, and kept on disk for every later run.

    checkpoints/vision_cache/vision-<hash of tower, preprocessing and dtype>-<dtype>/<shard>.safetensors

A shard (feature_shards.py) holds the features of some images. The key of each is `<SHA-256 of the image
file>_<width>x<height>`, with `_flipped` where the image is mirrored, and with the box of a crop in pixels.
"""

import hashlib
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from qwen_vl_utils import fetch_image
from safetensors import SafetensorError, safe_open
from torch import nn
from tqdm.auto import tqdm

from vqa.config.arguments import DataArguments
from vqa.core.errors import UserError
from vqa.core.hashing import fingerprint
from vqa.core.io import hash_files
from vqa.data.image_inputs import ImageInputs
from vqa.data.images import (
    ShownImage,
    all_images,
    image_item,
    image_tokens,
    oriented_sizes,
    shown_images,
)
from vqa.data.rows import Row
from vqa.modeling.families import vision_tower
from vqa.modeling.feature_shards import FeatureShards, shard_files
from vqa.modeling.vision import image_features, is_vision_frozen, stack_features, unwrap_base_model

FORMAT = "1"  # part of every store's name: raise it when images are prepared or features are laid out differently

# Images that go through the tower together, and into one shard: enough to keep a GPU busy beside a loaded model.
MOST_IMAGES, MOST_TOKENS = 32, 2**12

_fingerprints: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def open_feature_store(
    model: nn.Module, processor, data: DataArguments, needed: Sequence[Sequence[Row]], show: bool = True
) -> "FeatureStore | None":
    """The store with the features of `needed`, lists of rows in order of importance; what is missing is computed.

    Lists beyond the limit are left out: the collator decodes their images in every epoch, as without a store.
    `show`: a progress bar. None where nothing can be stored: `vision_cache` is false, the vision tower is trained or
    adapted, or the processor resizes images by its own rule.
    """
    resized_here = ImageInputs(processor, data.image_size).resized_here
    if not data.vision_cache or not resized_here or not is_vision_frozen(model):
        return None
    store = FeatureStore(model, processor, data.image_size, data.vision_cache_dir, data.vision_cache_gb)
    for rows in needed:
        store.add(model, rows, show)
    return store


class FeatureStore:
    """Features of the images of rows.

    Args:
        model: the base model, or PEFT's around it; the store keeps no reference.
        processor: the model's `AutoProcessor`.
        image_size: pixel budget, the same as the collator's.
        root: folder of all stores. This one is a folder in it, named after everything that its features depend on.
        limit_gb: limit of `root` in GB (10^9 bytes).
    """

    def __init__(self, model: nn.Module, processor, image_size: int, root: str | Path, limit_gb: float):
        base = unwrap_base_model(model)
        tower, embeddings = vision_tower(base), base.get_input_embeddings().weight
        self.processor, self.image_size = processor, image_size
        self.patch = processor.image_processor.patch_size
        self.dtype = embeddings.dtype  # the language model casts features to it
        layers = 1 + len(getattr(tower, "deepstack_visual_indexes", ()))
        self.bytes_per_token = layers * embeddings.shape[1] * embeddings.element_size()
        depends_on = [FORMAT, tower_fingerprint(tower), processor.image_processor.to_json_string(), str(self.dtype)]
        name = hashlib.sha256("\n".join(depends_on).encode()).hexdigest()[:16]
        self.shards = FeatureShards(Path(root) / f"vision-{name}-{str(self.dtype).split('.')[1]}", limit_gb * 1e9)
        self.images: dict[str, tuple[str, tuple[int, int]]] = {}  # path -> SHA-256, upright (width, height)

    def size(self, image: ShownImage) -> tuple[int, int]:
        """(width, height) in pixels that the image is resized to."""
        return image.size(*self.images[image.path][1], self.image_size, self.patch)

    def key(self, image: ShownImage) -> str:
        """What identifies the features of the image in this store."""
        width, height = self.size(image)
        sha, natural = self.images[image.path]
        crop = "" if image.crop is None else "_crop{}-{}-{}-{}".format(*image.box(*natural))
        return f"{sha}_{width}x{height}{'_flipped' if image.flip else ''}{crop}"

    def grids(self, images: Sequence[ShownImage]) -> torch.Tensor:
        """int64 (images, 3): frames, rows and columns of patches of each image, from its file's header."""
        sizes = [self.size(image) for image in images]
        return torch.tensor([[1, height // self.patch, width // self.patch] for width, height in sizes])

    def holds(self, rows: Sequence[Row]) -> bool:
        """Whether the images of all `rows` are stored, at their sizes."""
        images = (image for row in rows for image in shown_images(row))
        return all(image.path in self.images and self.key(image) in self.shards for image in images)

    def read(self, rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (1 + deepstack layers, image tokens of all rows, hidden) and int64 grids (images, 3).

        Images are in the order of the rows. At least one row has an image.
        """
        images = [image for row in rows for image in shown_images(row)]
        return torch.cat([self.shards.read(self.key(image)) for image in images], dim=1), self.grids(images)

    def add(self, model: nn.Module, rows: Sequence[Row], show: bool = True) -> bool:
        """Compute the features of `rows` that are not stored yet. False, and a line, beyond the limit.

        Raises UserError where an image's features are not finite, its pixels do not fit its header, or the folder
        cannot be written.
        """
        paths = [path for path in all_images(rows) if path not in self.images]
        self.images |= zip(paths, zip(hash_files(paths), oriented_sizes(paths).values()))
        wanted = {self.key(image): image for row in rows for image in shown_images(row)}
        tokens = {key: image_tokens(*self.size(image), self.patch) for key, image in wanted.items()}
        self.shards.open(wanted.keys())
        size = sum(tokens[key] for key in wanted if key not in self.shards) * self.bytes_per_token
        if size == 0:
            return True
        # Grouped before the stored keys are left out: so a build that was killed ends with the same groups, and the
        # same rounding, as one that was not.
        groups = group_keys(sorted(wanted, key=lambda key: (tokens[key], key)), tokens)
        missing = [[key for key in group if key not in self.shards] for group in groups]
        try:
            if not self.shards.make_room(size):
                return False
            self._encode(model, wanted, [group for group in missing if group], show)
        except (OSError, SafetensorError) as error:  # read-only, full, or unmounted
            raise UserError(
                f"vision_cache_dir {self.shards.folder.parent}: {error}. Give another one with free space, or set "
                "--vision_cache false."
            ) from None
        self.shards.open(wanted.keys())
        return True

    def _encode(self, model: nn.Module, images: dict[str, ShownImage], groups: list[list[str]], show: bool) -> None:
        """Write a shard for each group of the keys of `images`."""
        count, start = sum(map(len, groups)), time.time()
        with tqdm(
            total=count, desc=f"encoding {count} images", unit=" images", leave=False, disable=None if show else True
        ) as bar:
            encode = partial(self._encode_group, model, images)
            for keys in self.shards.write(groups, encode):
                bar.update(len(keys))
        if show:
            print(f"{count} images encoded in {time.time() - start:.1f} s, features in {self.shards.folder}")

    def _encode_group(
        self, model: nn.Module, images: dict[str, ShownImage], keys: list[str]
    ) -> dict[str, torch.Tensor]:
        """Key -> features (1 + deepstack layers, image tokens, hidden), on the CPU, of the images with these keys."""
        shown = [images[key] for key in keys]
        with ThreadPoolExecutor() as pool:
            pixels = list(pool.map(self._load_image, shown))
        inputs = self.processor.image_processor(images=pixels, do_resize=False, return_tensors="pt")
        for image, grid, expected in zip(shown, inputs["image_grid_thw"].tolist(), self.grids(shown).tolist()):
            if grid != expected:
                raise UserError(
                    f"{image.path}: the decoded image has {grid[1]} x {grid[2]} patches, its header promises "
                    f"{expected[1]} x {expected[2]}. Save the image again, upright and without EXIF data, or set "
                    "--vision_cache false."
                )
        device = next(vision_tower(unwrap_base_model(model)).parameters()).device
        output = image_features(model, inputs.to(device), [image.path for image in shown])
        features = stack_features(output)
        tokens = [image_tokens(*self.size(image), self.patch) for image in shown]
        parts = features.to("cpu", self.dtype).split(tokens, dim=1)
        return {key: part.clone(memory_format=torch.contiguous_format) for key, part in zip(keys, parts)}

    def _load_image(self, image: ShownImage):
        return fetch_image(image_item(image, self.image_size, self.patch), image_patch_size=self.patch)


def images_with_features(rows: Sequence[Row], root: str | Path) -> set[str]:
    """The images of `rows` that have features in any store in the folder `root`.

    They need no check: known by their SHA-256, they were decoded when the features were computed.
    """
    stored = set()
    for path in shard_files(Path(root)):
        with suppress(OSError, SafetensorError), safe_open(path, "pt") as file:  # incomplete, or deleted just now
            stored |= {key.partition("_")[0] for key in file.keys()}
    paths = [path for path in all_images(rows) if Path(path).is_file()] if stored else []
    return {path for path, sha in zip(paths, hash_files(paths)) if sha in stored}


def tower_fingerprint(tower: nn.Module) -> str:
    """The fingerprint of a frozen tower's weights, computed once per process: a 7B's takes seconds."""
    if tower not in _fingerprints:
        _fingerprints[tower] = fingerprint(tower.state_dict().items())
    return _fingerprints[tower]


def group_keys(keys: list[str], tokens: dict[str, int]) -> list[list[str]]:
    """`keys` in order, in groups of at most MOST_IMAGES keys and MOST_TOKENS tokens, but at least one key each."""
    groups: list[list[str]] = []
    total = 0
    for key in keys:
        total += tokens[key]
        if not groups or len(groups[-1]) == MOST_IMAGES or total > MOST_TOKENS:
            groups.append([])
            total = tokens[key]
        groups[-1].append(key)
    return groups
