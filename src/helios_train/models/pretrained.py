"""Parts of other people's models: where they lie, on this disk or on the Hugging Face hub; loaded whole or not at all."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
from safetensors import SafetensorError, safe_open
from torch import Tensor

from helios_train.errors import InputError

HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
PICKLES = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.msgpack", "*.h5", "*.onnx"]  # never read, so not downloaded either


def root_of(weights: str, parts: tuple[str, ...], key: str) -> Path:
    """The folder that `weights` names: one on this disk, or a model on the hub, of which `parts` (subfolders; "": the files
    beside them) are downloaded unless they are in its cache. `key` is the config's. InputError where there is neither."""
    local = Path(weights).expanduser()
    if weights and local.is_dir():
        return local
    if (weights and local.exists()) or not HUB_NAME.fullmatch(weights):
        raise InputError(f"{key}={weights}: no such folder; name a diffusers folder, or a model on the hub as OWNER/NAME")
    wanted = [pattern for part in parts for pattern in ([f"{part}/*"] if part else ["*.json", "*.safetensors"])]
    try:
        return Path(huggingface_hub.snapshot_download(weights, allow_patterns=wanted, ignore_patterns=PICKLES))
    except (OSError, ValueError) as error:
        included = " ".join(f"--include '{pattern}'" for pattern in wanted)
        raise InputError(
            f"{key}={weights}: no such folder, and the hub gave no model of that name ({reason(error)}); where there is a "
            f"network run `hf download {weights} {included} --local-dir FOLDER`, and set {key}=FOLDER"
        ) from error


def read_config(folder: Path, key: str) -> dict[str, Any]:
    """config.json of a part; InputError where it is missing, unreadable or no JSON object."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({reason(error)}); {key} names a diffusers folder") from error
    if not isinstance(config, dict):
        raise InputError(f"{path}: is no JSON object; {key} names a diffusers folder")
    return config


def load(kind: Any, folder: Path, **options: Any) -> Any:
    """`kind.from_pretrained` of a local folder of safetensors, in eval mode, nothing trainable.

    The libraries only warn of a weight that is missing, and make one up; here it is an InputError, as is a damaged file.
    """
    try:
        model, found = kind.from_pretrained(
            folder, output_loading_info=True, use_safetensors=True, local_files_only=True, **options
        )
    except Exception as error:  # what diffusers and transformers raise depends on where the damage lies
        raise InputError(f"{folder}: cannot be loaded ({reason(error)}); download or copy the folder again") from error
    faults = [str(name) for what in ("missing_keys", "mismatched_keys", "error_msgs") for name in sorted(found[what], key=str)]
    if faults:
        raise InputError(
            f"{folder}: {len(faults)} weights of {kind.__name__} are missing or misshapen, {faults[0]} among them; "
            "download or copy the folder again"
        )
    return model.eval().requires_grad_(False)


class Stored(NamedTuple):
    """Where a weight lies, as the file's header says."""

    file: Path
    shape: tuple[int, ...]


def stored_weights(folder: Path, name: str) -> dict[str, Stored]:
    """The weights of NAME.safetensors, or of the shards that NAME.safetensors.index.json lists, from their headers alone.

    InputError names a file that is missing, damaged or cut short, and a key that the index has in a file which lacks it.
    """
    index, single = folder / f"{name}.safetensors.index.json", folder / f"{name}.safetensors"
    try:
        listed = dict(json.loads(index.read_bytes())["weight_map"]) if index.is_file() else {}
        files = sorted({folder / file for file in listed.values()}) if index.is_file() else [single]
        if not files:
            raise ValueError("its index lists no file")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unreadable(folder, reason(error)) from error
    found: dict[str, Stored] = {}
    for file in files:
        own = [key for key, where in listed.items() if folder / where == file]
        if not file.is_file():
            raise _unreadable(file, f"there is no such file; the index has {own[0]} in it" if own else "there is no such file")
        here = _header(file)
        lost = next((key for key in own if key not in here), None)
        if lost is not None:
            raise _unreadable(file, f"it lacks {lost}, which the index has in it: it is of another model or export")
        found |= here
    return found


def _header(file: Path) -> dict[str, Stored]:
    try:
        with safe_open(file, framework="pt") as tensors:
            return {key: Stored(file, tuple(tensors.get_slice(key).get_shape())) for key in tensors.keys()}
    except (OSError, SafetensorError, ValueError) as error:
        raise _unreadable(file, _cut(file) or reason(error)) from error


def _cut(file: Path) -> str | None:
    """Of a file that ends too early: how much is missing, and the first weight that is not whole."""
    try:
        size = file.stat().st_size
        with file.open("rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
            header = json.loads(raw.read(length)) if length < size else {}
        ends = {key: 8 + length + one["data_offsets"][1] for key, one in header.items() if key != "__metadata__"}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    cut = [key for key in sorted(ends, key=lambda key: ends[key]) if ends[key] > size]
    return f"it has {size:,} of its {max(ends.values()):,} bytes and ends in {cut[0]}" if cut else None


def _unreadable(where: Path, why: str) -> InputError:
    return InputError(f"{where}: the weights cannot be read ({why}); download, copy or export the folder again")


def mapped_weights(folder: Path, name: str) -> Iterator[tuple[str, Tensor]]:
    """Each weight that `stored_weights` finds, on the host, file by file.

    Files are mapped: of a weight only what is looked at is read, and what was read of a file is let go of with the last of its
    weights. InputError, before the first, where a file is missing or damaged.
    """
    for file in sorted({one.file for one in stored_weights(folder, name).values()}):
        try:
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():
                    yield key, tensors.get_tensor(key)
        except (OSError, SafetensorError) as error:  # it was whole a moment ago
            raise _unreadable(file, reason(error)) from error


def reason(error: Exception) -> str:
    """The first line of an error, for a sentence."""
    return str(error).strip().partition("\n")[0].rstrip(". ") or type(error).__name__
