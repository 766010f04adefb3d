"""The hand-off between stages: helios_train.json beside the weights, and the folder that holds them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from diffusers import HeliosScheduler
from safetensors.torch import save_file
from torch import Tensor

from helios_train.errors import InputError
from helios_train.models.transformer import WEIGHTS, HeliosTransformer

SCHEMA = 1
NAME = "helios_train.json"
BASE_CLASS = "HeliosTransformer3DModel"
SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Link:
    """One stage in a model's lineage."""

    stage: str
    recipe: str
    iterations: int
    weights: str  # ema or last
    trained: str  # lora or full
    seed: int
    dataset: str  # sha256 of the dataset's manifest


@dataclass(frozen=True)
class ModelManifest:
    """What a next stage, or a sampler, must know of a folder of weights.

    `sampler`: keys of sampling.SamplerSettings. `codec`, `text`: name and fingerprint of what the latents and texts came from.
    `size`: (H, W) in pixels of the training videos. `base`: fingerprint of the weights the first link started from, null for
    random ones.
    """

    lineage: tuple[Link, ...]
    sampler: dict[str, Any]
    codec: dict[str, Any]
    text: dict[str, Any]
    size: tuple[int, int]
    base: str | None = None
    schema: int = field(default=SCHEMA)


def read_manifest(folder: Path) -> ModelManifest | None:
    """The manifest of a folder, None where there is none (a folder of somebody else); InputError where it cannot be followed."""
    path = folder / NAME
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
        schema = content["schema"]
        if schema > SCHEMA:
            raise InputError(
                f"{path}: schema {schema} is newer than {SCHEMA}, the newest this version reads; update helios_train"
            )
        return ModelManifest(
            **{**content, "lineage": tuple(Link(**link) for link in content["lineage"]), "size": tuple(content["size"])}
        )
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: is no manifest of helios_train ({error}); merge the run again") from error


def fingerprint(folder: Path) -> str:
    """sha256 over the weight files of a transformer folder."""
    folder = folder / "transformer" if (folder / "transformer").is_dir() else folder
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def write_folder(
    folder: Path,
    shape: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    scheduler: HeliosScheduler,
    manifest: ModelManifest,
    adapters: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """Writes a diffusers pipeline folder without vae and text encoder, `adapters/<link>.safetensors`, and the manifest last."""
    transformer = folder / "transformer"
    (folder / "adapters").mkdir(parents=True, exist_ok=True)
    transformer.mkdir(exist_ok=True)
    _write_json(transformer / "config.json", {"_class_name": BASE_CLASS, **shape})
    _write_weights(transformer, weights)
    scheduler.save_pretrained(folder / "scheduler")
    for link, tensors in adapters.items():
        save_file(dict(tensors), folder / "adapters" / f"{link}.safetensors", metadata={"format": "pt"})
    parts = {
        "transformer": ["diffusers", BASE_CLASS],
        "scheduler": ["diffusers", "HeliosScheduler"],
        "vae": [None, None],
        "text_encoder": [None, None],
        "tokenizer": [None, None],
    }
    _write_json(folder / "model_index.json", {"_class_name": "HeliosPipeline", **parts})
    _write_json(folder / NAME, asdict(manifest))


def shape_of(transformer: HeliosTransformer) -> dict[str, Any]:
    """The keys of the transformer's config that make it, for config.json."""
    return {name: value for name, value in dict(transformer.config).items() if not name.startswith("_")}


def _write_weights(folder: Path, weights: Mapping[str, Tensor]) -> None:
    """diffusers' file names: one file, or shards of at most 5 GB with an index."""
    shards: list[dict[str, Tensor]] = [{}]
    held = 0
    for name, value in weights.items():
        size = value.numel() * value.element_size()
        if held and held + size > SHARD_BYTES:
            shards.append({})
            held = 0
        shards[-1][name] = value
        held += size
    if len(shards) == 1:
        save_file(shards[0], folder / f"{WEIGHTS}.safetensors", metadata={"format": "pt"})
        return
    index = {}
    for number, shard in enumerate(shards, 1):
        file = f"{WEIGHTS}-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(shard, file))
    total = sum(value.numel() * value.element_size() for value in weights.values())
    _write_json(folder / f"{WEIGHTS}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
