"""Reading shards: any section of any clip by its byte range, checked on every read.

Nothing is opened before it is needed, and what is open belongs to one process: a store can be pickled into a worker or carried
over a fork. Sample ids number the samples of the manifest's shards in order.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
import safetensors.torch
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError

from helios_train.data.format import (
    LATENTS,
    MANIFEST,
    MEMBERS,
    META,
    NEGATIVE,
    TEXT,
    Bucket,
    ShardInfo,
    crc32,
    read_manifest,
    sha256_of,
)
from helios_train.errors import InputError

OPEN_FILES = 128  # shards kept open at once in a process
AHEAD = 2**17  # bytes the kernel fetches ahead when it is told to, by default; left alone it fetches by the page
REMEDY = "copy the shard and its index again from their source, or run task=prepare again"


@dataclass(frozen=True)
class StoreBucket:
    """One shape of clips: F frames, H and W in pixels; for each of its shards the size and the id of its first sample."""

    frames: int
    height: int
    width: int
    shard_sizes: tuple[int, ...]
    first_ids: tuple[int, ...]


class _Open(NamedTuple):
    """A shard in use: its descriptor, and its bytes as they are mapped."""

    file: int
    mapping: mmap.mmap
    data: NDArray[np.uint8]


class ClipStore:
    """The prepared clips under `root`; `manifest` is what dataset.json says.

    InputError when there is no usable manifest; later, when a shard or an index is missing, cut short or damaged.
    """

    def __init__(self, root: Path | str):
        self.root = Path(root)
        self.manifest = read_manifest(self.root)
        sizes = np.array([shard.nsamples for shard in self.manifest.shards], dtype=np.int64)
        self._ends = np.cumsum(sizes)
        self._buckets = {bucket.name: bucket for bucket in self.manifest.buckets}
        self.buckets = self._by_shape(sizes)
        self._indices: dict[int, dict[str, NDArray[Any]]] = {}
        self._forget()

    def _by_shape(self, sizes: NDArray[np.int64]) -> tuple[StoreBucket, ...]:
        places: dict[str, list[int]] = {name: [] for name in self._buckets}
        for number, shard in enumerate(self.manifest.shards):
            places[shard.bucket].append(number)
        firsts = self._ends - sizes
        return tuple(
            StoreBucket(bucket.frames, bucket.height, bucket.width, tuple(sizes[own].tolist()), tuple(firsts[own].tolist()))
            for bucket, own in ((self._buckets[name], numbers) for name, numbers in places.items())
            if own
        )

    def __len__(self) -> int:
        return self.manifest.total

    def section_count(self, sample: int) -> int:
        """Sections of 33 frames in a clip."""
        return self._bucket(self._locate(sample)[0]).sections

    def sections(self, sample: int, first: int, last: int) -> torch.Tensor:
        """Normalised latents of sections first..last-1 as bf16 [last - first, 16, 9, h, w]; only their bytes are read."""
        return self.view(sample, first, last).clone()

    def view(self, sample: int, first: int, last: int) -> torch.Tensor:
        """The same without a copy, for who only looks: writing to it would spoil what is read later."""
        number, row = self._locate(sample)
        bucket, index = self._bucket(number), self._index(number)
        if not 0 <= first < last <= bucket.sections:
            raise InputError(f"{self._name(number, row)}: sections {first} to {last} of {bucket.sections} do not exist")
        column, step = MEMBERS.index(LATENTS), bucket.section_bytes
        start = int(index["offset"][row, column] + index["payload"][row]) + first * step
        data = self._read(number, row, start, (last - first) * step)
        for section in range(first, last):
            piece = data[(section - first) * step : (section - first + 1) * step]
            self._check(number, row, f"section {section}", piece, int(index["section_crc32"][row, section]))
        return torch.from_numpy(data).view(torch.bfloat16).view(last - first, *bucket.section_shape)

    def text(self, sample: int) -> torch.Tensor:
        """The caption's rows as bf16 [L, dim], unpadded, only to look at as `view`; L is 0 for an empty caption."""
        data = self._member(sample, TEXT)
        # Read in place; the library would copy it twice.
        start = 8 + int.from_bytes(data[:8].tobytes(), "little")
        about = json.loads(data[8:start].tobytes())["prompt_embed"]
        return torch.from_numpy(data[start:]).view(torch.bfloat16).view(about["shape"])

    def negative_text(self) -> torch.Tensor | None:
        """The negative prompt's rows as bf16 [L, dim], None where the dataset has none. InputError where the file is damaged."""
        about = self.manifest.text.get("negative")
        if about is None:
            return None
        path = self.root / NEGATIVE
        if not path.is_file() or sha256_of(path) != about["sha256"]:
            raise InputError(f"{path}: missing or not the file {MANIFEST} lists; {REMEDY}")
        return safetensors.torch.load_file(path)["prompt_embed"]

    def meta(self, sample: int) -> dict[str, Any]:
        """The clip's record: caption (a list), source, truth where it is known, and how the latents were made."""
        return json.loads(self._member(sample, META).tobytes())

    def key(self, sample: int) -> str:
        """The clip's key, the same in every dataset made from the same videos."""
        number, row = self._locate(sample)
        return bytes(self._index(number)["keys"][row]).rstrip(b"\0").decode()

    def keys(self) -> Iterator[bytes]:
        """The keys of all clips in order. Every index is read, for a moment: a million clips take about a second."""
        for number, shard in enumerate(self.manifest.shards):
            keys = (self._indices.get(number) or self._load_index(shard))["keys"]
            yield from keys.view(f"S{keys.shape[1]}").ravel().tolist()

    def verify(self) -> None:
        """Read every file of shards and compare its sha256 with the manifest's; InputError at the first that differs."""
        lat = [pair for shard in self.manifest.shards for pair in ((shard.url, shard.sha256), (shard.index, shard.index_sha256))]
        for url, wanted in [*lat, *((shard.url, shard.sha256) for shard in self.manifest.raw)]:
            path = self.root / url
            if not path.is_file() or sha256_of(path) != wanted:
                raise InputError(f"{path}: missing or not the file {MANIFEST} lists; {REMEDY}")

    def _locate(self, sample: int) -> tuple[int, int]:
        """Shard number and row in it."""
        if not 0 <= sample < len(self):
            raise InputError(f"{self.root}: sample {sample} does not exist; there are {len(self)}")
        number = int(np.searchsorted(self._ends, sample, side="right"))
        return number, sample - int(self._ends[number]) + self._shard(number).nsamples

    def _shard(self, number: int) -> ShardInfo:
        return self.manifest.shards[number]

    def _bucket(self, number: int) -> Bucket:
        return self._buckets[self._shard(number).bucket]

    def _name(self, number: int, row: int) -> str:
        key = bytes(self._index(number)["keys"][row]).rstrip(b"\0").decode()
        return f"{self.root / self._shard(number).url}, clip {key}"

    def _member(self, sample: int, suffix: str) -> NDArray[np.uint8]:
        number, row = self._locate(sample)
        index, column = self._index(number), MEMBERS.index(suffix)
        data = self._read(number, row, int(index["offset"][row, column]), int(index["size"][row, column]))
        self._check(number, row, suffix, data, int(index["crc32"][row, column]))
        return data

    def _check(self, number: int, row: int, what: str, data: NDArray[np.uint8], crc: int) -> None:
        if crc32(data) != crc:
            raise InputError(f"{self._name(number, row)}: {what} is damaged (crc32 differs from the index); {REMEDY}")

    def _read(self, number: int, row: int, start: int, size: int) -> NDArray[np.uint8]:
        """`size` bytes of a shard from `start`, where they lie in the page cache."""
        shard = self._open(number)
        there = os.fstat(shard.file).st_size  # what is mapped and no longer there would end the process
        if start + size > there:
            got = max(0, there - start)
            raise InputError(f"{self._name(number, row)}: the shard ends early, {got} of {size} bytes; {REMEDY}")
        if hasattr(os, "posix_fadvise"):
            for ahead in range(start, start + size, AHEAD):
                os.posix_fadvise(shard.file, ahead, AHEAD, os.POSIX_FADV_WILLNEED)
        return shard.data[start : start + size]

    def _open(self, number: int) -> _Open:
        """A shard, mapped by this process."""
        if self._process != os.getpid():
            self._forget()
        if number in self._files:
            self._files.move_to_end(number)
            return self._files[number]
        info = self._shard(number)
        path = self.root / info.url
        try:
            file = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise InputError(f"{path}: cannot be opened ({error.strerror}); {REMEDY}") from error
        size = os.fstat(file).st_size
        if size != info.nbytes:
            os.close(file)
            raise InputError(f"{path}: {size} bytes, but {MANIFEST} lists {info.nbytes}; {REMEDY}")
        mapping = mmap.mmap(file, size, access=mmap.ACCESS_COPY)  # a copy only where somebody writes, which nobody does
        self._files[number] = _Open(file, mapping, np.frombuffer(mapping, dtype=np.uint8))
        if len(self._files) > OPEN_FILES:
            os.close(self._files.popitem(last=False)[1].file)  # the mapping goes with the last view of it
        return self._files[number]

    def _index(self, number: int) -> dict[str, NDArray[Any]]:
        """The shard's index, read and verified at first use; about 70 bytes a clip and 4 a section are kept."""
        if number not in self._indices:
            self._indices[number] = self._load_index(self._shard(number))
        return self._indices[number]

    def _load_index(self, shard: ShardInfo) -> dict[str, NDArray[Any]]:
        path = self.root / shard.index
        try:
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() != shard.index_sha256:
                raise InputError(f"{path}: its sha256 is not the one {MANIFEST} lists; {REMEDY}")
            return safetensors.numpy.load(content)
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}); {REMEDY}") from error
        except SafetensorError as error:
            raise InputError(f"{path}: not an index ({error}); {REMEDY}") from error

    def _forget(self) -> None:
        """Start with nothing open. A forked child leaves its parent's descriptors alone and opens its own."""
        self._files: OrderedDict[int, _Open] = OrderedDict()
        self._process = os.getpid()

    def close(self) -> None:
        """Close the shards this process opened; the next read opens them again."""
        if self._process == os.getpid():
            for shard in self._files.values():
                os.close(shard.file)
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict(), "_indices": {}, "_process": -1}
