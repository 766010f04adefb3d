"""The dataset on disk: names, the manifest `dataset.json`, and files that appear only when they are whole.

    root/dataset.json                              the manifest, written last
    root/lat/b00132x64x128/000000.tar              KEY.json  KEY.latents.safetensors  KEY.text.safetensors
    root/raw/b00132x64x128/000000.tar              KEY.mp4  KEY.json  KEY.txt: the same clips in the same order, as they came
    root/index/lat/b00132x64x128/000000.idx        a safetensors file: where each member lies, and its checksums
    root/skipped.json                              what was left out and why, where something was
    root/negative.text.safetensors                 the embedded negative prompt, where one was given
    root/prepare/                                  the plan and the receipts of task=prepare; nothing else reads them

Shards are plain tars that the webdataset library reads; the index lets `ClipStore` read any section of any clip by itself.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from helios_train.errors import InputError

try:
    from isal.isal_zlib import crc32  # the same sums at five times the speed: half of the time a window takes to read
except ImportError:  # no wheel for this platform
    from zlib import crc32  # noqa: F401  (readers and writers take it from here)

SCHEMA = 1
MANIFEST = "dataset.json"
SECTION_FRAMES, SECTION_LATENTS, CHANNELS, STRIDE = 33, 9, 16, 8  # a section's pixel and latent frames; pixels a latent side
LATENTS, TEXT, META = "latents.safetensors", "text.safetensors", "json"  # the suffixes of a sample's three members
MEMBERS = (LATENTS, TEXT, META)
NEGATIVE = "negative.text.safetensors"  # under the root: the text that guidance leads away from, where one was given
CAPTION = "txt"  # in raw shards, beside META and the video
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # of a disk, not of what is being written
KEY = re.compile(r"[a-z0-9_-]{1,75}")  # no dots: webdataset cuts names at the first; short enough for USTAR's 100 characters


@dataclass(frozen=True)
class Bucket:
    """Clips of one shape: `frames` (a multiple of 33), `height` and `width` in pixels, `n` clips."""

    frames: int
    height: int
    width: int
    n: int

    @property
    def name(self) -> str:
        """The folder of this shape's shards."""
        return f"b{self.frames:05d}x{self.height}x{self.width}"

    @property
    def sections(self) -> int:
        """Sections a clip."""
        return self.frames // SECTION_FRAMES

    @property
    def section_shape(self) -> tuple[int, int, int, int]:
        """[16, 9, h, w] of one section's latents."""
        return CHANNELS, SECTION_LATENTS, self.height // STRIDE, self.width // STRIDE

    @property
    def section_bytes(self) -> int:
        """Bytes of one section's bf16 latents."""
        return 2 * CHANNELS * SECTION_LATENTS * (self.height // STRIDE) * (self.width // STRIDE)


@dataclass(frozen=True)
class ShardInfo:
    """One tar and its index: paths relative to the root, samples, bytes, sha256 of both files, the bucket's name."""

    url: str
    nsamples: int
    nbytes: int
    sha256: str
    bucket: str
    index: str
    index_sha256: str


@dataclass(frozen=True)
class RawInfo:
    """One tar of videos: its path relative to the root, samples, bytes, sha256, the bucket's name."""

    url: str
    nsamples: int
    nbytes: int
    sha256: str
    bucket: str


@dataclass(frozen=True)
class Manifest:
    """What `dataset.json` says. Sample ids number the samples of `shards` in their order here.

    `codec`: name, fingerprint, latents_mean, latents_std. `text`: name, fingerprint, rows, dim, and `negative` (prompt, sha256)
    where the dataset has a negative prompt. `source_sha256`: what the dataset was made from and how. `columns`: the members of a
    sample, by folder. `raw`: the shards of videos, none where they were not kept. `health`: clips by what is amiss with them
    (short_history: under 4 sections, so that none shows a full history; caption_missing; caption_empty), and `skipped`, what was
    left out, counted by kind.
    """

    buckets: tuple[Bucket, ...]
    shards: tuple[ShardInfo, ...]
    codec: dict[str, Any]
    text: dict[str, Any]
    source_sha256: str
    columns: dict[str, list[str]] = field(default_factory=lambda: {"lat": list(MEMBERS)})
    raw: tuple[RawInfo, ...] = ()
    health: dict[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    @cached_property
    def total(self) -> int:
        """Samples in all shards."""
        return sum(shard.nsamples for shard in self.shards)

    @cached_property
    def manifest_sha(self) -> str:
        """sha256 of the content as canonical JSON: equal for equal datasets, in any folder."""
        return hashlib.sha256(json.dumps(self.content(), sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def content(self) -> dict[str, Any]:
        """Everything but the manifest's own checksum, as plain JSON values."""
        return {
            "schema": self.schema,
            "columns": self.columns,
            "codec": self.codec,
            "text": self.text,
            "source_sha256": self.source_sha256,
            "total": self.total,
            "health": self.health,
            "buckets": [dict(vars(bucket)) for bucket in self.buckets],
            "shards": [dict(vars(shard)) for shard in self.shards],
            "raw": [dict(vars(shard)) for shard in self.raw],
        }


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Write `root/dataset.json`, the act that makes the dataset exist."""
    content = {"manifest_sha": manifest.manifest_sha, **manifest.content()}
    with atomic(root / MANIFEST) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())


def read_manifest(root: Path) -> Manifest:
    """Read and check `root/dataset.json`.

    InputError when it is missing, damaged or edited, from a newer schema, or its totals or paths make no sense.
    """
    path = root / MANIFEST
    try:
        raw = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{root}: no {MANIFEST}, so no finished dataset; run task=prepare, or give another folder") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable manifest ({error}); run task=prepare again into a new folder") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("schema"), int):
        raise InputError(f"{path}: not a dataset manifest; give the folder that task=prepare wrote")
    if raw["schema"] > SCHEMA:
        raise InputError(f"{path}: schema {raw['schema']} is newer than the {SCHEMA} known here; update helios_train")
    try:
        manifest = Manifest(
            buckets=tuple(Bucket(**bucket) for bucket in raw["buckets"]),
            shards=tuple(ShardInfo(**shard) for shard in raw["shards"]),
            raw=tuple(RawInfo(**shard) for shard in raw["raw"]),
            **{name: raw[name] for name in ("codec", "text", "source_sha256", "columns", "health", "schema")},
        )
        if manifest.manifest_sha != raw["manifest_sha"] or manifest.total != raw["total"]:
            raise InputError(f"{path}: its content does not match its manifest_sha; restore it, or run task=prepare again")
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: field missing or unknown ({error}); restore it, or run task=prepare again") from error
    _check_shards(path, manifest)
    return manifest


def _check_shards(path: Path, manifest: Manifest) -> None:
    """Paths stay inside the root, shards name known buckets, and the counts add up."""
    counts = {bucket.name: 0 for bucket in manifest.buckets}
    urls = [url for shard in manifest.shards for url in (shard.url, shard.index)] + [shard.url for shard in manifest.raw]
    for url in urls:
        if url.startswith("/") or ".." in url.split("/"):
            raise InputError(f"{path}: {url} leads out of the dataset; shards lie inside its folder")
    for shard in manifest.shards:
        if shard.bucket not in counts:
            raise InputError(f"{path}: {shard.url} is of bucket {shard.bucket}, which the manifest does not list")
        counts[shard.bucket] += shard.nsamples
    for bucket in manifest.buckets:
        if counts[bucket.name] != bucket.n:
            raise InputError(f"{path}: bucket {bucket.name} lists {bucket.n} clips, its shards hold {counts[bucket.name]}")


@contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """Open `path` for writing so that it appears only when whole: a `.tmp` beside it, fsync, rename, fsync of the folder.

    InputError, and nothing left behind, when the disk is full, read-only or refuses.
    """
    part = path.with_name(path.name + ".tmp")
    try:
        with writable(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(part, "wb+")
        with writable(path, NO_ROOM), file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        with writable(path):
            os.replace(part, path)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def writable(path: Path, errors: tuple[int, ...] | None = None) -> Iterator[None]:
    """Context of writing `path`: an OSError of it (one of `errors` where given) becomes an InputError that says what to do."""
    try:
        yield
    except OSError as error:
        if errors is not None and error.errno not in errors:
            raise
        raise InputError(
            f"{path}: cannot be written ({error.strerror}); free or choose another place, then give the same command again: "
            "what is finished stays"
        ) from error


def sha256_of(path: Path) -> str:
    """sha256 of a file, hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
