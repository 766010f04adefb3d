"""The manifest: read back equal, tied to its content, and clear about what is wrong with it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helios_train.data.format import MANIFEST, Bucket, RawInfo, atomic, read_manifest, write_manifest
from helios_train.data.writer import Sample
from helios_train.errors import InputError


def edit(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = root / MANIFEST
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def test_round_trip(dataset: tuple[Path, list[Sample]], tmp_path: Path) -> None:
    manifest = read_manifest(dataset[0])
    assert manifest.total == 8 and manifest.codec["name"] == "dct" and manifest.columns["lat"][0] == "latents.safetensors"
    write_manifest(tmp_path / "copy", manifest)
    assert (tmp_path / "copy" / MANIFEST).read_bytes() == (dataset[0] / MANIFEST).read_bytes()
    assert read_manifest(tmp_path / "copy").manifest_sha == manifest.manifest_sha


def test_layout_and_names(dataset: tuple[Path, list[Sample]]) -> None:
    files = sorted(str(path.relative_to(dataset[0])) for path in dataset[0].rglob("*") if path.is_file())
    shards = ["b00066x32x48/000000", "b00132x32x48/000000", "b00132x32x48/000001"]
    assert files == sorted([MANIFEST, *(f"lat/{s}.tar" for s in shards), *(f"index/lat/{s}.idx" for s in shards)])
    assert Bucket(132, 384, 640, 1).section_bytes == 2 * 16 * 9 * 48 * 80


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda raw: raw.update(schema=2), "schema 2 is newer"),
        (lambda raw: raw.update(total=9), "manifest_sha"),
        (lambda raw: raw["codec"].update(latents_std=[2.0] * 16), "manifest_sha"),
        (lambda raw: raw["shards"][0].update(nsamples=4), "manifest_sha"),
        (lambda raw: raw.pop("text"), "'text'"),
        (lambda raw: raw["shards"][0].update(extra=1), "extra"),
        (lambda raw: raw.pop("schema"), "not a dataset manifest"),
    ],
)
def test_edited_manifests_are_refused(
    dataset: tuple[Path, list[Sample]], change: Callable[[dict[str, Any]], None], said: str
) -> None:
    edit(dataset[0], change)
    with pytest.raises(InputError, match=said) as caught:
        read_manifest(dataset[0])
    assert MANIFEST in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("url", ["../outside.tar", "/etc/passwd", "lat/../../x"])
def test_shards_stay_inside(dataset: tuple[Path, list[Sample]], url: str) -> None:
    manifest = read_manifest(dataset[0])
    object.__setattr__(manifest.shards[0], "url", url)
    manifest.__dict__.pop("manifest_sha")
    write_manifest(dataset[0], manifest)
    with pytest.raises(InputError, match="leads out of the dataset"):
        read_manifest(dataset[0])


def test_videos_stay_inside_too(dataset: tuple[Path, list[Sample]]) -> None:
    manifest = read_manifest(dataset[0])
    outside = dataclasses.replace(manifest, raw=(RawInfo("../videos.tar", 1, 1, "0" * 64, manifest.buckets[0].name),))
    write_manifest(dataset[0], outside)
    with pytest.raises(InputError, match="../videos.tar leads out of the dataset"):
        read_manifest(dataset[0])


def test_missing_and_broken_manifest(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no dataset.json.*task=prepare"):
        read_manifest(tmp_path)
    (tmp_path / MANIFEST).write_text('{"schema": 1,')
    with pytest.raises(InputError, match="not a readable manifest"):
        read_manifest(tmp_path)


def test_a_file_appears_only_when_whole(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("before")
    with pytest.raises(ZeroDivisionError), atomic(tmp_path / "x") as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert (tmp_path / "x").read_text() == "before" and [p.name for p in tmp_path.iterdir()] == ["x"]
    with atomic(tmp_path / "x") as file:
        file.write(b"whole")
    assert (tmp_path / "x").read_text() == "whole" and [p.name for p in tmp_path.iterdir()] == ["x"]
