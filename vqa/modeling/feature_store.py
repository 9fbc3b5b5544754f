"""The frozen vision tower's features, computed once an image and size and kept on disk for every run that needs them.

    checkpoints/vision_cache/vision-<fingerprint of tower, preprocessing and dtype>-<dtype>/<shard>.safetensors

A shard holds the features of some images, each under `<SHA-256 of the image file>_<width>x<height>`, with `_flipped`
where the image is mirrored. It is written whole or not at all and never changed, so any number of processes may read
and write side by side, and a run that was killed goes on with the shards that are there. The folder may be removed at
any time when nothing runs.
"""

import hashlib
import os
import shutil
import time
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from qwen_vl_utils import fetch_image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from vqa.core.errors import UserError
from vqa.core.hashing import fingerprint, hash_files
from vqa.core.io import atomic_write
from vqa.data.images import image_tokens, oriented_sizes, resized_image_item, target_size
from vqa.modeling.families import vision_tower
from vqa.modeling.vision import image_features, is_vision_frozen, unwrap_base_model

FORMAT = "1"  # part of every store's name: raise it when images are prepared or features laid out in another way


# Images that go through the tower together, and into one shard: enough to fill a GPU, and they fit beside a model.
MOST_IMAGES, MOST_TOKENS = 32, 2**12


SPARE_DISK = 2**30  # bytes of the disk that checkpoints and outputs may still need


def open_feature_store(model: torch.nn.Module, processor, data, needed: list[list[dict]], show: bool = True):
    """The store with the features of `needed`, lists of rows in order of importance; what is missing is computed.

    Lists that do not fit the bound go without: the collator decodes their images in every pass, as without a store.
    `data` are the DataArguments; `show` a progress bar. None where there is nothing to store: `vision_cache` is false,
    the vision tower is trained or adapted, or FSDP is to split it.
    """
    if not data.vision_cache or not is_vision_frozen(model) or os.environ.get("ACCELERATE_USE_FSDP") == "true":
        return None
    store = FeatureStore(model, processor, data.image_size, data.vision_cache_dir, data.vision_cache_gb)
    for rows in needed:
        store.add(model, rows, show)
    return store


class FeatureStore:
    """Features of images on disk, read through memory maps.

    Args:
        model: the base model, be it within PEFT's; it is not kept.
        processor: the model's `AutoProcessor`.
        image_size: pixel budget, as the collator's.
        root: folder of all stores; this one is a folder in it, named after what its features depend on.
        limit_gb: bound of `root` in GB (10^9 bytes); least recently used shards give way, those in use here do not.
    """

    def __init__(self, model: torch.nn.Module, processor, image_size: int, root: str | Path, limit_gb: float):
        base = unwrap_base_model(model)
        tower, embeddings = vision_tower(base), base.get_input_embeddings().weight
        self.processor, self.image_size = processor, image_size
        self.patch = processor.image_processor.patch_size
        self.dtype = embeddings.dtype  # what the language model makes of them
        layers = 1 + len(getattr(tower, "deepstack_visual_indexes", ()))
        self.bytes_a_token = layers * embeddings.shape[1] * embeddings.element_size()
        self.root, self.limit = Path(root), limit_gb * 1e9
        depends = [FORMAT, fingerprint(tower.state_dict().items()), processor.image_processor.to_json_string()]
        name = hashlib.sha256("\n".join([*depends, str(self.dtype)]).encode()).hexdigest()[:16]
        self.folder = self.root / f"vision-{name}-{str(self.dtype).removeprefix('torch.')}"
        self.images: dict[str, tuple[str, tuple[int, int]]] = {}  # path -> SHA-256, upright (width, height)
        self.shards: dict[str, Path] = {}  # key -> the shard that holds it
        self.handles: dict[Path, safe_open] = {}  # kept open: what another process evicts stays readable here

    def __getstate__(self) -> dict:
        return self.__dict__ | {"handles": {}}  # memory maps do not travel to a process that is spawned

    def size(self, row: dict) -> tuple[int, int]:
        """(width, height) in pixels that the row's image is given."""
        upright = self.images[row["image"]][1]
        return target_size(*upright, self.image_size, row.get("scale", 1.0), self.patch)

    def key(self, row: dict) -> str:
        key = "{}_{}x{}".format(self.images[row["image"]][0], *self.size(row))
        return f"{key}_flipped" if row.get("flip") else key

    def holds(self, rows: list[dict]) -> bool:
        return all(row["image"] in self.images and self.key(row) in self.shards for row in rows)

    def read(self, rows: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (1 + deepstack layers, image tokens of all rows, hidden) and int64 grids (rows, 3), `thw`."""
        sizes = [self.size(row) for row in rows]
        grids = torch.tensor([[1, height // self.patch, width // self.patch] for width, height in sizes])
        return torch.cat([self._read(self.key(row)) for row in rows], dim=1), grids

    def _read(self, key: str) -> torch.Tensor:
        path = self.shards[key]
        if path not in self.handles:
            self.handles[path] = safe_open(path, "pt")
        return self.handles[path].get_tensor(key)

    def add(self, model: torch.nn.Module, rows: list[dict], show: bool = True) -> bool:
        """Compute the features of `rows` that are not there yet. False, and a line, where the bound leaves no room.

        Raises UserError where an image's features are not finite, or the folder cannot be written.
        """
        paths = list({row["image"] for row in rows} - self.images.keys())
        self.images |= zip(paths, zip(hash_files(paths), oriented_sizes(paths).values()))
        wanted = {self.key(row): row for row in rows}
        tokens = {key: image_tokens(*self.size(row), self.patch) for key, row in wanted.items()}
        self._open_shards(wanted.keys())
        size = sum(tokens[key] for key in wanted if key not in self.shards) * self.bytes_a_token
        if size == 0:
            return True
        # By size and hash, not by what is missing: after a kill the rest is grouped, and rounded, as it was to be.
        groups = grouped(sorted(wanted, key=lambda key: (tokens[key], key)), tokens)
        missing = [{key: wanted[key] for key in group if key not in self.shards} for group in groups]
        try:
            if not self._make_room(size):
                return False
            self._encode(model, [group for group in missing if group], show)
        except (OSError, SafetensorError) as error:  # read-only, full, or taken away
            raise UserError(
                f"vision_cache_dir {self.root}: {error}; give another one, with room, or --vision_cache false"
            ) from None
        self._open_shards(wanted.keys())
        return True

    def _open_shards(self, wanted) -> None:
        """Open the shards that hold any of the keys `wanted`. A damaged one is removed as if it were not there."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if path in self.handles:
                continue
            try:
                handle = safe_open(path, "pt")
                if wanted.isdisjoint(handle.keys()):
                    continue
                if handle.metadata()["crc32"] != checksum({key: handle.get_tensor(key) for key in handle.keys()}):
                    raise ValueError("its checksum differs")
            except FileNotFoundError:  # evicted by another process
                continue
            except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
                print(f"{path} is damaged ({' '.join(str(error).split())}); its images are encoded anew")
                path.unlink(missing_ok=True)
                continue
            with suppress(OSError):  # a folder that is only read
                os.utime(path)  # used just now
            self.handles[path] = handle
            self.shards |= {key: path for key in handle.keys() if key not in self.shards}

    def _make_room(self, size: int) -> bool:
        """Whether `size` bytes more may be written, once the shards that were used longest ago have given way."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.root / "room.lock"):
            files = shards_below(self.root)
            used = sum(stat.st_size for stat in files.values())
            limit = min(self.limit, used + shutil.disk_usage(self.root).free - SPARE_DISK)
            in_use = sum(files[path].st_size for path in self.handles if path in files)
            if in_use + size > limit:
                print(
                    f"the vision cache has no room for {size / 1e9:.3g} GB of image features (bound: "
                    f"{limit / 1e9:.3g} GB, in use: {in_use / 1e9:.3g}); these images are encoded in every pass, "
                    "which is slower: raise vision_cache_gb, or give a vision_cache_dir on a larger disk"
                )
                return False
            for path in sorted(files.keys() - self.handles.keys(), key=lambda path: files[path].st_mtime):
                if used + size <= limit:
                    break
                path.unlink(missing_ok=True)
                used -= files[path].st_size
        return True

    def _encode(self, model: torch.nn.Module, groups: list[dict[str, dict]], show: bool) -> None:
        """Write a shard for each group (key -> row). Processes that want the same groups share them out."""
        count, start, waiting = sum(map(len, groups)), time.time(), deque(groups)
        with tqdm(total=count, desc=f"encoding {count} images", unit=" images", leave=False, disable=not show) as bar:
            while waiting:
                group = waiting.popleft()
                path = self.folder / f"{hashlib.sha256(' '.join(group).encode()).hexdigest()[:16]}.safetensors"
                try:
                    with FileLock(f"{path}.lock", blocking=False):
                        if not path.exists():  # another process may have written it since
                            self._write(model, group, path)
                        Path(f"{path}.lock").unlink(missing_ok=True)  # whoever still holds it finds the shard
                except Timeout:  # another process is at it
                    waiting.append(group)
                    time.sleep(0.05)
                    continue
                bar.update(len(group))
        if show:
            print(f"{count} images encoded in {time.time() - start:.1f} s, features in {self.folder}")

    def _write(self, model: torch.nn.Module, group: dict[str, dict], path: Path) -> None:
        for leftover in path.parent.glob(f".{path.name}.*"):  # of a process that was killed here
            leftover.unlink()
        rows = list(group.values())
        with ThreadPoolExecutor() as pool:
            images = list(pool.map(self._image, rows))
        inputs = self.processor.image_processor(images=images, do_resize=False, return_tensors="pt")
        device = next(vision_tower(unwrap_base_model(model)).parameters()).device
        pixels, grids = inputs["pixel_values"].to(device), inputs["image_grid_thw"].to(device)
        features = image_features(model, pixels, grids, [row["image"] for row in rows]).to("cpu", self.dtype)
        parts = features.split([image_tokens(*self.size(row), self.patch) for row in rows], dim=1)
        tensors = {key: part.clone(memory_format=torch.contiguous_format) for key, part in zip(group, parts)}
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, metadata={"crc32": checksum(tensors)})

    def _image(self, row: dict):
        return fetch_image(resized_image_item(row, self.image_size, self.patch), image_patch_size=self.patch)


def grouped(keys: list[str], tokens: dict[str, int]) -> list[list[str]]:
    """`keys` in order, in groups of at most MOST_IMAGES keys and MOST_TOKENS tokens, but at least one key each."""
    groups, total = [], 0
    for key in keys:
        total += tokens[key]
        if not groups or len(groups[-1]) == MOST_IMAGES or total > MOST_TOKENS:
            groups.append([])
            total = tokens[key]
        groups[-1].append(key)
    return groups


def shards_below(root: Path) -> dict[Path, os.stat_result]:
    """The shards of all stores in `root`, half-written ones of killed processes included; nobody else's files."""
    files = {}
    for path in root.glob("vision-????????????????-*/*.safetensors*"):
        with suppress(FileNotFoundError):  # another process has renamed or removed it
            if path.suffix != ".lock":
                files[path] = path.stat()
    return files


def checksum(tensors: dict[str, torch.Tensor]) -> str:
    """CRC-32 over names and bytes, 8 hex digits."""
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(name.encode(), value)
        value = zlib.crc32(tensors[name].contiguous().view(torch.uint8).numpy(), value)
    return f"{value:08x}"
