"""Writing shards: one tar of clips of one shape and the index beside it, the same bytes for the same samples."""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors.numpy
import safetensors.torch
import torch
import webdataset

from helios_train.data.format import (
    CAPTION,
    KEY,
    LATENTS,
    MEMBERS,
    META,
    NEGATIVE,
    SCHEMA,
    TEXT,
    Bucket,
    RawInfo,
    ShardInfo,
    atomic,
    crc32,
    sha256_of,
)
from helios_train.errors import InputError

COLUMNS = (("lat", "tar"), ("index/lat", "idx"), ("raw", "tar"))
NO_SUFFIX = "video"  # of a video whose name has none that a tar member may have


@dataclass(frozen=True)
class Sample:
    """One clip to store: key, normalised latents [S, 16, 9, h, w], text rows [L, dim], and a JSON-able record of the rest."""

    key: str
    latents: torch.Tensor
    text: torch.Tensor
    meta: dict[str, Any]


@dataclass
class _Row:
    """What the index keeps of one sample, members in the order of MEMBERS."""

    key: bytes
    sizes: list[int]
    crcs: list[int]
    payload: int  # where the latents' numbers begin inside their member
    section_crcs: list[int]


def shard_paths(bucket: str, number: int) -> tuple[str, str, str]:
    """Where a shard's latents, their index and its videos lie under the root."""
    return tuple(f"{column}/{bucket}/{number:06d}.{ending}" for column, ending in COLUMNS)  # type: ignore[return-value]


def write_shard(root: Path, bucket: Bucket, number: int, samples: Iterable[Sample]) -> ShardInfo:
    """Write shard `number` of a bucket and its index under `root`, streaming the samples; any earlier one is replaced.

    Latents and text are stored as bf16, nothing is pickled. InputError, and no file, when a sample does not fit the bucket, is
    not finite, or its key is no plain name or comes twice.
    """
    url, index, _ = shard_paths(bucket.name, number)
    rows: list[_Row] = []
    with atomic(root / url) as file:
        # The default of the library adds the clock; mtime=0 makes the bytes a function of the samples.
        with webdataset.TarWriter(file, mtime=0) as tar:
            for sample in samples:
                members, row = _pack(sample, bucket)
                tar.write({"__key__": sample.key, **members})
                rows.append(row)
        keys = {row.key for row in rows}
        if not rows or len(keys) != len(rows):
            raise InputError(f"{root / url}: {len(rows)} samples with {len(keys)} keys; a shard holds one or more, each key once")
        content = _index(rows, member_offsets(file), bucket)
    with atomic(root / index) as file:
        file.write(content)
    return ShardInfo(
        url=url,
        nsamples=len(rows),
        nbytes=(root / url).stat().st_size,
        sha256=sha256_of(root / url),
        bucket=bucket.name,
        index=index,
        index_sha256=hashlib.sha256(content).hexdigest(),
    )


def _pack(sample: Sample, bucket: Bucket) -> tuple[dict[str, bytes], _Row]:
    """The three members of a sample as bytes, and its index row; InputError when it does not fit the bucket."""
    if not KEY.fullmatch(sample.key):
        raise InputError(f"key {sample.key!r}: only a-z, 0-9, _ and - are allowed, 75 at most (webdataset cuts names at a dot)")
    name = f"{sample.key} ({sample.meta['source']['file']})" if "source" in sample.meta else sample.key
    wanted = [bucket.sections, *bucket.section_shape]
    if list(sample.latents.shape) != wanted:
        raise InputError(
            f"{name}: latents {list(sample.latents.shape)} do not fit bucket {bucket.name}, which takes {wanted}, "
            f"an eighth of its {bucket.height}x{bucket.width} pixels; choose a codec of that geometry"
        )
    latents, text = sample.latents.to(torch.bfloat16).contiguous(), sample.text.to(torch.bfloat16).contiguous()
    if text.dim() != 2:
        raise InputError(f"{name}: text {list(text.shape)} must be [L, dim]; choose another text encoder")
    for what, values in (("latents", latents), ("text", text)):
        if not values.isfinite().all():
            bad = int((~values.isfinite()).sum())
            raise InputError(
                f"{name}: {bad} of {values.numel()} numbers of its {what} are not finite; "
                "look at the weights of the encoder (a half-precision one overflows), then at this video and its caption"
            )
    packed = safetensors.torch.save({"vae_latent": latents})
    payload = len(packed) - bucket.sections * bucket.section_bytes
    members = {
        LATENTS: packed,
        TEXT: safetensors.torch.save({"prompt_embed": text}),
        META: to_json(sample.meta),
    }
    cuts = range(payload, len(packed), bucket.section_bytes)
    row = _Row(
        key=sample.key.encode(),
        sizes=[len(members[name]) for name in MEMBERS],
        crcs=[crc32(members[name]) for name in MEMBERS],
        payload=payload,
        section_crcs=[crc32(memoryview(packed)[cut : cut + bucket.section_bytes]) for cut in cuts],
    )
    return members, row


def write_negative(root: Path, prompt: str, rows: torch.Tensor) -> dict[str, str]:
    """Write the embedded negative prompt, rows [L, dim], as bf16; returns what the manifest says of it.

    InputError on a full disk.
    """
    content = safetensors.torch.save({"prompt_embed": rows.to(torch.bfloat16).contiguous()})
    with atomic(root / NEGATIVE) as file:
        file.write(content)
    return {"prompt": prompt, "sha256": hashlib.sha256(content).hexdigest()}


def member_offsets(file: BinaryIO) -> dict[str, int]:
    """Where each member's data begin, asked of the tar itself."""
    file.flush()
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        return {member.name: member.offset_data for member in tar}


def _index(rows: list[_Row], offsets: dict[str, int], bucket: Bucket) -> bytes:
    """The index as safetensors: for n samples of S sections, members in the order of MEMBERS."""
    names = [[f"{row.key.decode()}.{suffix}" for suffix in MEMBERS] for row in rows]
    tensors: dict[str, np.ndarray] = {
        "keys": np.array([row.key for row in rows]).view(np.uint8).reshape(len(rows), -1),  # [n, longest], zeros after
        "offset": np.array([[offsets[name] for name in sample] for sample in names], dtype=np.int64),  # [n, 3] bytes into the tar
        "size": np.array([row.sizes for row in rows], dtype=np.int64),  # [n, 3] bytes
        "crc32": np.array([row.crcs for row in rows], dtype=np.uint32),  # [n, 3]
        "payload": np.array([row.payload for row in rows], dtype=np.int64),  # [n] bytes into the latents member
        "section_crc32": np.array([row.section_crcs for row in rows], dtype=np.uint32),  # [n, S]
    }
    # One entry: the library writes several in no fixed order, and the bytes would differ from run to run.
    about = {"helios_train": json.dumps({"schema": SCHEMA, "bucket": bucket.name, "members": MEMBERS})}
    return safetensors.numpy.save(tensors, metadata=about)


class RawShard:
    """A tar of videos being written, members KEY.mp4 (or as the file is called), KEY.json, KEY.txt, nothing of the clock."""

    def __init__(self, tar: tarfile.TarFile):
        self._tar = tar
        self.samples = 0
        self.suffixes: set[str] = set()

    def add(self, key: str, video: Path, suffix: str, record: dict[str, Any], caption: str) -> None:
        """Copy a video's bytes, its record and its caption into the tar. OSError when the file cannot be read."""
        with open(video, "rb") as file:
            self._member(f"{key}.{suffix}", file, video.stat().st_size)
        for name, text in ((META, to_json(record)), (CAPTION, caption.encode())):
            self._member(f"{key}.{name}", io.BytesIO(text), len(text))
        self.samples += 1
        self.suffixes.add(suffix)

    def _member(self, name: str, content: BinaryIO, size: int) -> None:
        about = tarfile.TarInfo(name)
        about.size, about.mode = size, 0o444
        self._tar.addfile(about, content)


@contextmanager
def raw_shard(root: Path, url: str) -> Iterator[RawShard]:
    """Context of writing the videos of a shard to `root/url`, which appears when the context is left without an error."""
    # GNU, for a video of 8 GiB or more fits no USTAR header; all others are written the same.
    with atomic(root / url) as file, tarfile.open(fileobj=file, mode="w|", format=tarfile.GNU_FORMAT) as tar:
        yield RawShard(tar)


def raw_info(root: Path, url: str, bucket: str, samples: int) -> RawInfo:
    """What the manifest says of a tar of videos."""
    return RawInfo(url, samples, (root / url).stat().st_size, sha256_of(root / url), bucket)


def suffix_of(name: str) -> str:
    """The suffix a video's member has in a tar: that of its file, without the dot."""
    suffix = Path(name).suffix.lower().removeprefix(".")
    return suffix if re.fullmatch(r"[a-z0-9]{1,8}", suffix) and suffix not in (META, CAPTION) else NO_SUFFIX


def to_json(record: dict[str, Any]) -> bytes:
    """A record as JSON in one way only."""
    return json.dumps(record, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()
