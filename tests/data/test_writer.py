"""Shards: plain tars for webdataset, the same bytes every time, refused samples leave nothing behind."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import signal
import tarfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
import webdataset

from helios_train.data.format import Bucket
from helios_train.data.writer import Sample, raw_shard, suffix_of, write_shard
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


def test_videos_are_stored_as_they_came(tmp_path: Path) -> None:
    for name, content in (("a.mp4", b"one"), ("b.MKV", b"two" * 5000), ("c.json", b"three"), ("d", b"four")):
        (tmp_path / name).write_bytes(content)
    names = ["a.mp4", "b.MKV", "c.json", "d"]
    suffixes = [suffix_of(name) for name in names]
    assert suffixes == ["mp4", "mkv", "video", "video"]  # what a record or a caption is called would be taken for one
    for turn in ("one", "two"):
        with raw_shard(tmp_path / turn, "raw/0.tar") as tar:
            for number, (name, suffix) in enumerate(zip(names, suffixes, strict=True)):
                tar.add(f"k-{number}", tmp_path / name, suffix, {"name": name}, "grün")
        assert tar.samples == 4 and tar.suffixes == {"mp4", "mkv", "video"}
    assert (tmp_path / "one/raw/0.tar").read_bytes() == (tmp_path / "two/raw/0.tar").read_bytes()
    read = list(webdataset.WebDataset(str(tmp_path / "one/raw/0.tar"), shardshuffle=False))
    for number, (item, name, suffix) in enumerate(zip(read, names, suffixes, strict=True)):
        assert item["__key__"] == f"k-{number}" and item[suffix] == (tmp_path / name).read_bytes()
        assert json.loads(item["json"]) == {"name": name} and item["txt"].decode() == "grün"


def test_a_tar_of_videos_appears_only_when_whole(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), raw_shard(tmp_path, "raw/0.tar") as tar:
        tar.add("k", tmp_path / "gone.mp4", "mp4", {}, "")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("size", [1000, 20_000])
def test_a_full_disk_is_an_error_of_the_file(size: int, tmp_path: Path) -> None:
    def child() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            write_shard(tmp_path, BUCKET, 0, [sample()])
        except InputError as error:
            return 3 if "000000.tar: cannot be written (File too large); free or choose" in str(error) else 4
        return 5

    pid = os.fork()  # a limit cannot be taken back
    if not pid:
        os._exit(child())
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == (3 if size == 1000 else 5)
    assert bool([path for path in tmp_path.rglob("*") if path.is_file()]) == (size > 1000)
