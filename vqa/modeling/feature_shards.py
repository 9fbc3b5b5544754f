"""Files of named tensors that any number of processes read and write side by side, within a bound on disk space.

    <root>/vision-<16 hex digits>-<dtype>/<16 hex digits>.safetensors

A file (a shard) is written atomically and never changed. So a run that was killed continues with the shards that are
complete, and the folder may be deleted at any time when nothing runs.
"""

import hashlib
import os
import shutil
import time
import zlib
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vqa.core.io import atomic_write

SPARE_DISK = 2**30  # bytes of the disk that checkpoints and outputs may still need


class FeatureShards:
    """The shards of one folder, read through memory maps.

    Args:
        folder: folder of the shards.
        limit: bytes on disk for this folder and those beside it with names of the same form. The least recently used
            shards are deleted first, those open in this process never.
    """

    def __init__(self, folder: Path, limit: float):
        self.folder, self.limit = folder, limit
        self.paths: dict[str, Path] = {}  # key -> the shard that holds it
        self.handles: dict[Path, safe_open] = {}  # kept open: what another process deletes stays readable here

    def __getstate__(self) -> dict:
        return self.__dict__ | {"handles": {}}  # memory maps cannot be sent to a spawned process

    def __contains__(self, key: str) -> bool:
        return key in self.paths

    def read(self, key: str) -> torch.Tensor:
        path = self.paths[key]
        if path not in self.handles:
            self.handles[path] = safe_open(path, "pt")
        return self.handles[path].get_tensor(key)

    def open(self, keys: Collection[str]) -> None:
        """Open the shards that hold any of `keys`. A damaged shard is deleted, with a line that says so."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if path in self.handles:
                continue
            try:
                handle = safe_open(path, "pt")
                stored = handle.keys()
                if not set(keys).intersection(stored):
                    continue
                if handle.metadata()["crc32"] != checksum({key: handle.get_tensor(key) for key in stored}):
                    raise ValueError("its checksum differs")
            except FileNotFoundError:  # deleted by another process
                continue
            except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
                print(f"{path} is damaged ({' '.join(str(error).split())}); its images are encoded again")
                path.unlink(missing_ok=True)
                continue
            with suppress(OSError):  # a read-only folder
                os.utime(path)  # used just now
            self.handles[path] = handle
            self.paths |= {key: path for key in stored if key not in self.paths}

    def make_room(self, size: int) -> bool:
        """Delete least recently used shards until `size` more bytes fit. False, and a line, where they cannot."""
        self.folder.mkdir(parents=True, exist_ok=True)
        root = self.folder.parent
        with FileLock(root / "room.lock"):
            files = shard_files(root)
            used = sum(stat.st_size for stat in files.values())
            limit = min(self.limit, used + shutil.disk_usage(root).free - SPARE_DISK)
            in_use = sum(files[path].st_size for path in self.handles if path in files)
            if in_use + size > limit:
                print(
                    f"the vision cache has no room for {size / 1e9:.3g} GB of image features (limit "
                    f"{limit / 1e9:.3g} GB, in use {in_use / 1e9:.3g} GB). These images are encoded in every epoch, "
                    "which is slower. Raise vision_cache_gb, or set vision_cache_dir to a larger disk."
                )
                return False
            for path in sorted(files.keys() - self.handles.keys(), key=lambda path: files[path].st_mtime):
                if used + size <= limit:
                    break
                path.unlink(missing_ok=True)
                used -= files[path].st_size
        return True

    def write(
        self, groups: list[list[str]], encode: Callable[[list[str]], dict[str, torch.Tensor]]
    ) -> Iterator[list[str]]:
        """Write a shard with `encode(keys)` for each group of keys, and yield each group once its shard is there.

        Processes that write the same groups at the same time divide them among themselves.
        """
        waiting = deque(groups)
        while waiting:
            keys = waiting.popleft()
            path = self.folder / f"{hashlib.sha256(' '.join(keys).encode()).hexdigest()[:16]}.safetensors"
            lock = Path(f"{path}.lock")
            try:
                with FileLock(lock, blocking=False):
                    if not path.exists():  # another process may just have written it
                        self._write_shard(path, encode(keys))
                    lock.unlink(missing_ok=True)  # a process that still waits for it finds the shard
            except Timeout:  # another process is writing it
                waiting.append(keys)
                time.sleep(0.05)
                continue
            yield keys

    def _write_shard(self, path: Path, tensors: dict[str, torch.Tensor]) -> None:
        for leftover in path.parent.glob(f".{path.name}.*"):  # of a process that was killed here
            leftover.unlink()
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, metadata={"crc32": checksum(tensors)})


def shard_files(root: Path) -> dict[Path, os.stat_result]:
    """The shards of all folders in `root`, incomplete ones of killed processes included, and no other files."""
    files = {}
    for path in root.glob("vision-????????????????-*/*.safetensors*"):
        with suppress(FileNotFoundError):  # renamed or deleted by another process
            if path.suffix != ".lock":
                files[path] = path.stat()
    return files


def checksum(tensors: dict[str, torch.Tensor]) -> str:
    """CRC-32 over names and bytes, 8 hex digits."""
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(name.encode(), value)
        value = zlib.crc32(tensors[name].contiguous().view(torch.uint8).numpy().data, value)
    return f"{value:08x}"
