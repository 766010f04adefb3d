"""The hand-off folder: what is written is what is read, by us and by diffusers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import HeliosScheduler, HeliosTransformer3DModel
from safetensors import safe_open

from helios_train.errors import InputError
from helios_train.models import manifest
from helios_train.models.manifest import NAME, Link, ModelManifest, fingerprint, read_manifest, shape_of, write_folder
from helios_train.models.transformer import HeliosTransformer, load_transformer

MANIFEST = ModelManifest(
    lineage=(Link("base", "corrected", 5, "ema", "full", 0, "d" * 64), Link("base", "released", 7, "last", "lora", 1, "e" * 64)),
    sampler={"time_shift_type": "exponential", "solver": "unipc"},
    codec={"name": "dct", "fingerprint": "c"},
    text={"name": "hash", "fingerprint": "t", "rows": 16},
    size=(64, 128),
    base="f" * 64,
)


def write(folder: Path, model: HeliosTransformer) -> None:
    tensors = {"transformer.proj_out.lora_A.weight": torch.ones(2, 3)}
    write_folder(folder, shape_of(model), model.state_dict(), HeliosScheduler(), MANIFEST, {"base": tensors})


def test_round_trip(tmp_path: Path, ours: HeliosTransformer) -> None:
    write(tmp_path, ours)
    assert read_manifest(tmp_path) == MANIFEST
    assert json.loads((tmp_path / NAME).read_text())["schema"] == manifest.SCHEMA
    with safe_open(tmp_path / "adapters" / "base.safetensors", framework="pt") as file:
        assert list(file.keys()) == ["transformer.proj_out.lora_A.weight"]
    HeliosScheduler.from_pretrained(tmp_path / "scheduler")
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "HeliosPipeline"
    assert read_manifest(tmp_path / "transformer") is None


def damage(content: dict[str, object]) -> list[tuple[object, str]]:
    return [
        (content | {"schema": manifest.SCHEMA + 1}, f"schema {manifest.SCHEMA + 1} is newer.*update helios_train"),
        (content | {"stray": 1}, "stray"),
        ({key: value for key, value in content.items() if key != "size"}, "size"),
        (content | {"lineage": [{"stage": "base"}]}, "is no manifest"),
        ([content], "is no manifest"),
    ]


def test_what_cannot_be_followed_is_refused(tmp_path: Path, ours: HeliosTransformer) -> None:
    write(tmp_path, ours)
    for content, said in damage(json.loads((tmp_path / NAME).read_text())):
        (tmp_path / NAME).write_text(json.dumps(content))
        with pytest.raises(InputError, match=said):
            read_manifest(tmp_path)
    (tmp_path / NAME).write_text("{")
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
