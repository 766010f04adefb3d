"""Shards: plain tars for webdataset, the same bytes every time, refused samples leave nothing behind."""

from __future__ import annotations

import dataclasses
import json
import tarfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
import webdataset

from helios_train.data.format import Bucket
from helios_train.data.writer import Sample, write_shard
from helios_train.errors import InputError

BUCKET = Bucket(33, 32, 32, n=1)


def sample(**changes: object) -> Sample:
    whole = Sample("a-000000000", torch.zeros(1, 16, 9, 4, 4), torch.zeros(2, 8), {})
    return dataclasses.replace(whole, **changes)


def test_plain_webdataset_reads_the_shards(dataset: tuple[Path, list[Sample]]) -> None:
    root, samples = dataset
    urls = [str(path) for path in sorted(root.glob("lat/*/*.tar"))]
    read = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [item["__key__"] for item in read] == [wanted.key for wanted in samples]
    for item, wanted in zip(read, samples, strict=True):
        assert {name for name in item if not name.startswith("__")} == {"latents.safetensors", "text.safetensors", "json"}
        assert torch.equal(safetensors.torch.load(item["latents.safetensors"])["vae_latent"], wanted.latents)
        assert torch.equal(safetensors.torch.load(item["text.safetensors"])["prompt_embed"], wanted.text)
        assert json.loads(item["json"]) == wanted.meta


def test_same_samples_same_bytes(dataset: tuple[Path, list[Sample]], tmp_path: Path) -> None:
    root, samples = dataset
    for _ in range(3):  # a library that wrote a map in its own order would need luck three times
        again = write_shard(tmp_path / "again", Bucket(66, 32, 48, n=3), 0, samples[:3])
        for url in (again.url, again.index):
            assert (tmp_path / "again" / url).read_bytes() == (root / url).read_bytes()
    with tarfile.open(root / again.url) as tar:
        assert {member.mtime for member in tar} == {0}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"key": "clip_1.5x"}, "key 'clip_1.5x'"),
        ({"key": "a" * 76}, "75 at most"),
        ({"latents": torch.zeros(2, 16, 9, 4, 4)}, "do not fit bucket b00033x32x32"),
        ({"latents": torch.full((1, 16, 9, 4, 4), float("nan"))}, "finite"),
        ({"text": torch.zeros(8)}, "a-000000000"),
    ],
)
def test_samples_that_cannot_be_stored(wrong: dict[str, object], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        write_shard(tmp_path, BUCKET, 0, [sample(key="a-000000007"), sample(**wrong)])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_key_twice_and_an_empty_shard_are_refused(tmp_path: Path) -> None:
    for group in ([sample(), sample()], []):
        with pytest.raises(InputError, match="each key once"):
            write_shard(tmp_path, BUCKET, 0, group)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_long_key_fits_the_tar(tmp_path: Path) -> None:
    info = write_shard(tmp_path, BUCKET, 0, [sample(key="k" * 75)])
    (item,) = webdataset.WebDataset(str(tmp_path / info.url), shardshuffle=False)
    assert item["__key__"] == "k" * 75
