"""Writing shards: one tar of clips of one shape and the index beside it, the same bytes for the same samples."""

from __future__ import annotations

import hashlib
import json
import tarfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors.numpy
import safetensors.torch
import torch
import webdataset

from helios_train.data.format import KEY, LATENTS, MEMBERS, META, SCHEMA, TEXT, Bucket, ShardInfo, atomic, sha256_of
from helios_train.errors import InputError


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


def write_shard(root: Path, bucket: Bucket, number: int, samples: Iterable[Sample]) -> ShardInfo:
    """Write shard `number` of a bucket and its index under `root`, streaming the samples; any earlier one is replaced.

    Latents and text are stored as bf16, nothing is pickled. InputError, and no file, when a sample does not fit the bucket, is
    not finite, or its key is no plain name or comes twice.
    """
    url, index = f"lat/{bucket.name}/{number:06d}.tar", f"index/lat/{bucket.name}/{number:06d}.idx"
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
        content = _index(rows, _offsets(file), bucket)
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
    if sample.latents.shape != (bucket.sections, *bucket.section_shape):
        raise InputError(f"{sample.key}: latents {list(sample.latents.shape)} do not fit bucket {bucket.name}")
    latents, text = sample.latents.to(torch.bfloat16).contiguous(), sample.text.to(torch.bfloat16).contiguous()
    if text.dim() != 2 or not (latents.isfinite().all() and text.isfinite().all()):
        raise InputError(f"{sample.key}: latents and text must be finite, text [L, dim]; look at this clip's video and caption")
    packed = safetensors.torch.save({"vae_latent": latents})
    payload = len(packed) - bucket.sections * bucket.section_bytes
    members = {
        LATENTS: packed,
        TEXT: safetensors.torch.save({"prompt_embed": text}),
        META: json.dumps(sample.meta, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode(),
    }
    cuts = range(payload, len(packed), bucket.section_bytes)
    row = _Row(
        key=sample.key.encode(),
        sizes=[len(members[name]) for name in MEMBERS],
        crcs=[zlib.crc32(members[name]) for name in MEMBERS],
        payload=payload,
        section_crcs=[zlib.crc32(memoryview(packed)[cut : cut + bucket.section_bytes]) for cut in cuts],
    )
    return members, row


def _offsets(file: BinaryIO) -> dict[str, int]:
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
