"""The hand-off between stages: helios_train.json beside the weights, and the folder that holds them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from diffusers import SchedulerMixin
from safetensors.torch import save_file
from torch import Tensor

from helios_train.errors import InputError
from helios_train.models.loading import WEIGHTS
from helios_train.models.transformer import HeliosTransformer

SCHEMA = 1
NAME = "helios_train.json"
BASE_CLASS = "HeliosTransformer3DModel"
SHARD_BYTES = 5 * 10**9
SHORT = 12  # letters of a fingerprint that people are shown


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

    `sampler`: keys of sampling.SamplerSettings. `codec`, `text`: name and fingerprint of what the latents and texts came from,
    `text` with its rows and width. `size`: (H, W) in pixels of the training videos. `base`: fingerprint of the weights the first
    link started from, null for random ones. `adapters`: the files of each link that has any, relative to the folder.
    """

    lineage: tuple[Link, ...]
    sampler: dict[str, Any]
    codec: dict[str, Any]
    text: dict[str, Any]
    size: tuple[int, int]
    base: str | None = None
    adapters: dict[str, list[str]] = field(default_factory=dict)
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
        for name in ("codec", "text"):
            if not all(isinstance(content[name][part], str) for part in ("name", "fingerprint")):
                raise ValueError(f"{name} has no name and fingerprint")
        files = [file for files in content["adapters"].values() for file in files]
        if not all(re.fullmatch(r"adapters/\w[\w.-]*", file) for file in files):
            raise ValueError(f"adapters {files} lie elsewhere")
        return ModelManifest(
            **{**content, "lineage": tuple(Link(**link) for link in content["lineage"]), "size": tuple(content["size"])}
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: is no manifest of helios_train ({error}); merge the run again") from error


def same_encoder(what: str, one: Mapping[str, Any], place: str, other: Mapping[str, Any], other_place: str, remedy: str) -> None:
    """InputError unless two records of a codec or text encoder agree in name, fingerprint, rows and dim, where both have them.

    `what`: codec or text; `place` and `other_place`: whose the records are, for the message.
    """
    for key in ("name", "rows", "dim", "fingerprint"):
        if key in one and key in other and one[key] != other[key]:
            raise InputError(f"{what}: {place} has {shown_encoder(one)}, {other_place} has {shown_encoder(other)}; {remedy}")


def shown_encoder(record: Mapping[str, Any]) -> str:
    """A record of a codec or text encoder for people: name, short fingerprint, size."""
    size = f" ({record['rows']} rows of {record['dim']})" if "rows" in record and "dim" in record else ""
    known = str(record["fingerprint"])[:SHORT] if "fingerprint" in record else "weights unknown"
    return f"{record['name']} {known}{size}"


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
    scheduler: SchedulerMixin,
    pipeline: Mapping[str, Any],
    manifest: ModelManifest,
) -> None:
    """Writes a diffusers pipeline folder without vae and text encoder, the manifest last. `pipeline`: class and switches."""
    transformer = folder / "transformer"
    transformer.mkdir(parents=True, exist_ok=True)
    _write_json(transformer / "config.json", {"_class_name": BASE_CLASS, **shape})
    _write_weights(transformer, weights)
    scheduler.save_pretrained(folder / "scheduler")
    parts = {
        "transformer": ["diffusers", BASE_CLASS],
        "scheduler": ["diffusers", type(scheduler).__name__],
        "vae": [None, None],
        "text_encoder": [None, None],
        "tokenizer": [None, None],
    }
    _write_json(folder / "model_index.json", {**pipeline, **parts})
    write_manifest(folder, manifest)


def write_manifest(folder: Path, manifest: ModelManifest) -> None:
    """Writes helios_train.json."""
    _write_json(folder / NAME, asdict(manifest))


def write_adapter(folder: Path, link: str, tensors: Mapping[str, Tensor]) -> list[str]:
    """Writes what one link trained (`adapters.link_state`) under `folder`; returns the files, relative to it.

    adapters/<link>.safetensors is a LoRA as diffusers' pipelines load it, and they take nothing else in it: layers that trained
    in full are adapters/<link>.trained_layers.safetensors, in the transformer's own names.
    """
    (folder / "adapters").mkdir(parents=True, exist_ok=True)
    lora = {name: value for name, value in tensors.items() if ".lora_" in name}
    layers = {name: value for name, value in tensors.items() if name not in lora}
    files = {f"adapters/{link}.safetensors": lora, f"adapters/{link}.trained_layers.safetensors": layers}
    for file, content in files.items():
        if content:
            save_file(content, folder / file, metadata={"format": "pt"})
    return [file for file, content in files.items() if content]


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
