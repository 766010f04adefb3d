"""The hand-off folder: what is written is what is read, by us and by diffusers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import HeliosScheduler, HeliosTransformer3DModel
from safetensors.torch import load_file

from helios_train.errors import InputError
from helios_train.models import manifest
from helios_train.models.loading import load_transformer
from helios_train.models.manifest import (
    NAME,
    Link,
    ModelManifest,
    fingerprint,
    read_manifest,
    same_encoder,
    shape_of,
    write_adapter,
    write_folder,
)
from helios_train.models.transformer import HeliosTransformer

MANIFEST = ModelManifest(
    lineage=(Link("base", "corrected", 5, "ema", "full", 0, "d" * 64), Link("base", "released", 7, "last", "lora", 1, "e" * 64)),
    sampler={"time_shift_type": "exponential", "solver": "unipc"},
    codec={"name": "dct", "fingerprint": "c"},
    text={"name": "hash", "fingerprint": "t", "rows": 16, "dim": 64},
    size=(64, 128),
    base="f" * 64,
    adapters={"base_2": ["adapters/base_2.safetensors", "adapters/base_2.trained_layers.safetensors"]},
)


def write(folder: Path, model: HeliosTransformer) -> None:
    write_folder(folder, shape_of(model), model.state_dict(), HeliosScheduler(), {"_class_name": "HeliosPipeline"}, MANIFEST)


def test_round_trip(tmp_path: Path, ours: HeliosTransformer) -> None:
    write(tmp_path, ours)
    assert read_manifest(tmp_path) == MANIFEST
    assert json.loads((tmp_path / NAME).read_text())["schema"] == manifest.SCHEMA
    HeliosScheduler.from_pretrained(tmp_path / "scheduler")
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "HeliosPipeline"
    assert read_manifest(tmp_path / "transformer") is None


def test_an_adapter_and_what_trained_in_full_are_two_files(tmp_path: Path) -> None:
    lora = {f"transformer.proj_out.lora_{side}.weight": torch.ones(2, 3) for side in "AB"}
    files = write_adapter(tmp_path, "base_2", lora | {"patch_mid.bias": torch.zeros(2)})
    assert files == MANIFEST.adapters["base_2"] and write_adapter(tmp_path, "mid", lora) == ["adapters/mid.safetensors"]
    held = [load_file(tmp_path / file).keys() for file in files]
    assert held == [lora.keys(), {"patch_mid.bias"}]
    assert sorted(path.name for path in (tmp_path / "adapters").iterdir()) == [
        "base_2.safetensors",
        "base_2.trained_layers.safetensors",
        "mid.safetensors",
    ]


RECORD = {"name": "wan", "fingerprint": "a" * 64, "rows": 512, "dim": 4096}


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ({"name": "dct"}, "dct aaaaaaaaaaaa (512 rows of 4096)"),
        ({"fingerprint": "b" * 64}, "wan bbbbbbbbbbbb (512 rows of 4096)"),
        ({"rows": 256}, "wan aaaaaaaaaaaa (256 rows of 4096)"),
        ({"dim": 32}, "wan aaaaaaaaaaaa (512 rows of 32)"),
    ],
)
def test_records_that_differ(change: dict[str, object], shown: str) -> None:
    with pytest.raises(InputError) as caught:
        same_encoder("codec", RECORD, "the dataset D", RECORD | change, "this config", "prepare it again")
    known = "the dataset D has wan aaaaaaaaaaaa (512 rows of 4096)"
    assert str(caught.value) == f"codec: {known}, this config has {shown}; prepare it again"


def test_records_agree_where_both_say_something() -> None:
    named = {"name": "wan"}
    same_encoder("codec", RECORD, "a", dict(RECORD), "b", "")
    same_encoder("codec", RECORD | {"latents_mean": [0.0]}, "a", named, "b", "")
    same_encoder("codec", named, "a", RECORD, "b", "")
    with pytest.raises(InputError, match="b has dct weights unknown; x"):
        same_encoder("codec", RECORD, "a", {"name": "dct"}, "b", "x")


def damage(content: dict[str, object]) -> list[tuple[object, str]]:
    return [
        (content | {"schema": manifest.SCHEMA + 1}, f"schema {manifest.SCHEMA + 1} is newer.*update helios_train"),
        (content | {"stray": 1}, "stray"),
        ({key: value for key, value in content.items() if key != "size"}, "size"),
        (content | {"lineage": [{"stage": "base"}]}, "is no manifest"),
        ([content], "is no manifest"),
        ("text", "is no manifest"),
        (content | {"schema": "new"}, "is no manifest"),
        (content | {"codec": "dct"}, "is no manifest"),
        (content | {"text": {"name": "hash"}}, "is no manifest"),
        (content | {"codec": {"name": "dct", "fingerprint": 7}}, "codec has no name and fingerprint"),
        (content | {"size": 64}, "is no manifest"),
        (content | {"adapters": {"base": ["../../elsewhere.safetensors"]}}, "lie elsewhere"),
        (content | {"adapters": ["base"]}, "is no manifest"),
    ]


def test_what_cannot_be_followed_is_refused(tmp_path: Path, ours: HeliosTransformer) -> None:
    write(tmp_path, ours)
    for content, said in damage(json.loads((tmp_path / NAME).read_text())):
        (tmp_path / NAME).write_text(json.dumps(content))
        with pytest.raises(InputError, match=said):
            read_manifest(tmp_path)
    for broken in (b"{", b"\xff\xfe", b""):
        (tmp_path / NAME).write_bytes(broken)
        with pytest.raises(InputError, match="is no manifest"):
            read_manifest(tmp_path)
    (tmp_path / NAME).unlink()
    (tmp_path / NAME).symlink_to("/proc/self/mem")  # a file that cannot be read, by anybody
    with pytest.raises(InputError, match="is no manifest"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("limit", [None, 450_000, 1000])
def test_shards_load_in_diffusers(
    tmp_path: Path, ours: HeliosTransformer, monkeypatch: pytest.MonkeyPatch, limit: int | None
) -> None:
    """1000 bytes are fewer than the largest tensor has: it gets a file of its own."""
    if limit:
        monkeypatch.setattr(manifest, "SHARD_BYTES", limit)
    write(tmp_path, ours)
    files = sorted((tmp_path / "transformer").glob("*.safetensors"))
    assert (len(files) == 1) == (limit is None)
    weights = ours.state_dict()
    if limit == 450_000:
        assert all(file.stat().st_size < limit + 10_000 for file in files)
    for loaded in (
        HeliosTransformer3DModel.from_pretrained(tmp_path, subfolder="transformer"),
        load_transformer(tmp_path, torch.float32),
    ):
        back = loaded.state_dict()
        assert back.keys() == weights.keys() and all(torch.equal(back[name], weights[name]) for name in weights)
        assert json.dumps(shape_of(loaded)) == json.dumps(shape_of(ours))


def test_the_fingerprint_follows_the_weights(tmp_path: Path, ours: HeliosTransformer) -> None:
    write(tmp_path / "a", ours)
    write(tmp_path / "b", ours)
    with torch.no_grad():
        ours.proj_out.bias[0] += 1
    write(tmp_path / "c", ours)
    a, b, c = (fingerprint(tmp_path / name) for name in "abc")
    assert a == b == fingerprint(tmp_path / "a" / "transformer") and a != c
