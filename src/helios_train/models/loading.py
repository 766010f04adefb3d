"""Where a transformer's weights come from: random numbers, or a diffusers folder of a Helios or Wan model."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import HeliosTransformer3DModel
from torch import nn

from helios_train import rng
from helios_train.errors import InputError
from helios_train.models.checkpoint import audit
from helios_train.models.precision import cast, dtype_of
from helios_train.models.pretrained import mapped_weights
from helios_train.models.transformer import HISTORY_PATCHES, HeliosTransformer

WEIGHTS = "diffusion_pytorch_model"
# Where Wan and older Helios files keep what now has another name.
RENAMED = {"scale_shift_table": "norm_out.scale_shift_table"}
CONFIG_KEYS = inspect.signature(HeliosTransformer3DModel.__init__).parameters.keys() - {"self"} | {"positions"}


def random_transformer(shape: Mapping[str, Any], dtype: torch.dtype, seed: int) -> HeliosTransformer:
    """A transformer of that shape (keys of diffusers' config) with random weights; its output starts at zero."""
    with rng.forked(seed, "transformer"):
        transformer = HeliosTransformer(**shape)
    for name in HISTORY_PATCHES:
        start_patch(transformer, name)
    nn.init.zeros_(transformer.proj_out.weight)
    nn.init.zeros_(transformer.proj_out.bias)
    cast(transformer, dtype)
    return transformer


@torch.no_grad()
def start_patch(transformer: HeliosTransformer3DModel, name: str) -> None:
    """Starts one history patch from the target's: the kernel tiled over time, rows, columns, divided by the number of tiles."""
    source, patch = transformer.patch_embedding, getattr(transformer, name)
    times = HISTORY_PATCHES[name]
    patch.weight.copy_(source.weight.repeat(1, 1, times, times, times) / times**3)
    patch.bias.copy_(source.bias)


def fill_buffers(transformer: nn.Module) -> None:
    """Computes the buffers that are in no file, of a transformer (ours or diffusers') that was made on meta."""
    assert isinstance(transformer, HeliosTransformer3DModel)
    config = transformer.config
    transformer.rope = type(transformer.rope)(config.rope_dim, config.rope_theta)


def load_transformer(folder: Path, dtype: torch.dtype) -> HeliosTransformer:
    """The transformer of a diffusers folder (the pipeline's, or its `transformer/`), in `dtype` on the host.

    Takes Helios folders, older ones with a top-level scale_shift_table, and Wan text-to-video folders, whose missing history
    patches start from the target's. InputError names a key that is missing, extra or misshapen.
    """
    folder = folder / "transformer" if (folder / "transformer").is_dir() else folder
    shape = read_shape(folder)
    try:
        with torch.device("meta"):
            transformer = HeliosTransformer(**shape)
    except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:  # a number that is none, or fits no other
        raise InputError(f"{folder / 'config.json'}: makes no model ({error}); copy or export the folder again") from error
    weights = {RENAMED.get(name, name): value for name, value in mapped_weights(folder, WEIGHTS)}
    expected = {name: tuple(value.shape) for name, value in transformer.state_dict().items()}
    fresh = [name for name in HISTORY_PATCHES if f"{name}.weight" not in weights and f"{name}.bias" not in weights]
    if len(fresh) != len(HISTORY_PATCHES):  # all are there, or all are new: a folder with some is damaged
        fresh = []
    audit({name: size for name, size in expected.items() if name.split(".")[0] not in fresh}, weights, str(folder))
    for name, value in list(weights.items()):
        weights[name] = value.to(dtype_of(name, dtype))
    transformer.load_state_dict(weights, strict=False, assign=True)
    for name in fresh:
        getattr(transformer, name).to_empty(device="cpu")
        start_patch(transformer, name)
    fill_buffers(transformer)
    cast(transformer, dtype)
    return transformer


def read_shape(folder: Path) -> dict[str, Any]:
    """The keys of config.json that make the model; InputError where the folder holds no such model."""
    path = (folder / "transformer" if (folder / "transformer").is_dir() else folder) / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); give a diffusers folder of a Helios or Wan transformer") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: is no JSON object; give a diffusers folder of a Helios or Wan transformer")
    known = ("HeliosTransformer3DModel", "HeliosTransformer", "WanTransformer3DModel")
    if config.get("_class_name") not in known:
        raise InputError(f"{path}: holds a {config.get('_class_name')}; give a folder of one of {', '.join(known)}")
    shape = {name: config[name] for name in sorted(CONFIG_KEYS & config.keys())} | {"has_multi_term_memory_patch": True}
    if config["_class_name"] == "WanTransformer3DModel":
        width = config.get("attention_head_dim")
        if not isinstance(width, int):
            raise InputError(f"{path}: attention_head_dim is {width}, no whole number; copy or export the folder again")
        shape["rope_dim"] = [
            width - 4 * (width // 6),
            2 * (width // 6),
            2 * (width // 6),
        ]  # Wan's own split: the rest goes to time
        images = config.get("image_dim") or config.get("added_kv_proj_dim")
        if images or config.get("in_channels", 16) != config.get("out_channels", 16):  # 2.2 appends the image to the channels
            raise InputError(f"{path}: is an image-to-video Wan; Base starts from a text-to-video one")
    return shape
