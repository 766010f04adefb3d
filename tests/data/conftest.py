"""A small written dataset of two shapes of clips."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helios_train.data.format import Bucket, Manifest, write_manifest
from helios_train.data.writer import Sample, write_shard
from helios_train.rng import generator, normal

BUCKETS = (Bucket(66, 32, 48, n=3), Bucket(132, 32, 48, n=5))
SHARDS = ((0, 0, 3), (1, 0, 3), (1, 1, 2))  # bucket, number, samples


def make_sample(bucket: Bucket, ordinal: int) -> Sample:
    draw = generator(0, "sample", bucket.frames, ordinal)
    words = ordinal % 4
    return Sample(
        key=f"clip_a-{ordinal:09d}",
        latents=normal(draw, (bucket.sections, *bucket.section_shape)).bfloat16(),
        text=normal(draw, (words, 8)).bfloat16(),
        meta={"caption": ["ein Kreis, grün"], "sections": bucket.sections, "ordinal": ordinal},
    )


def write_dataset(root: Path) -> list[Sample]:
    """Write the dataset; its samples in the order of their ids."""
    samples, shards = [], []
    for bucket, number, size in SHARDS:
        own = [make_sample(BUCKETS[bucket], len(samples) + i) for i in range(size)]
        shards.append(write_shard(root, BUCKETS[bucket], number, iter(own)))
        samples += own
    codec = {"name": "dct", "fingerprint": "f", "latents_mean": [0.0] * 16, "latents_std": [1.0] * 16}
    text = {"name": "hash", "fingerprint": "t", "rows": 16, "dim": 8}
    write_manifest(root, Manifest(BUCKETS, tuple(shards), codec, text, source_sha256="s"))
    return samples


@pytest.fixture
def dataset(tmp_path: Path) -> tuple[Path, list[Sample]]:
    return tmp_path / "set", write_dataset(tmp_path / "set")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
