"""Where a transformer's weights come from: random numbers, or a diffusers folder of a Helios or Wan model."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import HeliosTransformer3DModel
from torch import Tensor, nn

from helios_train import rng
from helios_train.errors import InputError
from helios_train.models.checkpoint import audit
from helios_train.models.precision import cast, dtype_of
from helios_train.models.pretrained import Stored, mapped_weights, stored_weights
from helios_train.models.transformer import HISTORY_PATCHES, HeliosTransformer

WEIGHTS = "diffusion_pytorch_model"
# Where Wan and older Helios files keep what now has another name.
RENAMED = {"scale_shift_table": "norm_out.scale_shift_table"}
AGAIN = "name the folder of this model, or copy or export it again"
Store = Callable[[str, nn.Module], nn.Module]  # a layer's name and the layer, to what stands in its place
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


def load_transformer(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    store: Store | None = None,
    fits: Callable[[int], None] | None = None,
) -> HeliosTransformer:
    """The transformer of a diffusers folder (the pipeline's, or its `transformer/`), in `dtype` on `device`.

    Takes Helios folders, older ones with a top-level scale_shift_table, and Wan text-to-video folders, whose missing history
    patches start from the target's. It is built on meta and filled weight by weight, file by file: beside what is loaded there
    is at most one file. `store` is called with each layer as soon as its weights are there. `fits` is called before anything is
    allocated, with the bytes that the host will have to hold. InputError, before that, from the files' headers alone, for a
    file that is missing or cut short, and a key that is missing, extra or misshapen.
    """
    folder = folder / "transformer" if (folder / "transformer").is_dir() else folder
    transformer = _on_meta(folder)
    stored = {RENAMED.get(name, name): one for name, one in stored_weights(folder, WEIGHTS).items()}
    fresh = [name for name in HISTORY_PATCHES if f"{name}.weight" not in stored and f"{name}.bias" not in stored]
    if len(fresh) != len(HISTORY_PATCHES):  # all are there, or all are new: a folder with some is damaged
        fresh = []
    _audit(transformer, stored, fresh, folder)
    if fits and torch.device(device).type == "cpu":
        fits(stored_size(_on_meta(folder), dtype, store))
    for name, value in mapped_weights(folder, WEIGHTS):
        name = RENAMED.get(name, name)
        _place(transformer, name, value.to(device=device, dtype=dtype_of(name, dtype), copy=True))
        _keep(transformer, name.rpartition(".")[0], store)
        del value  # and with the last of a file the file, before the next is opened
    for name in fresh:
        getattr(transformer, name).to_empty(device=device)
        start_patch(transformer, name)
    fill_buffers(transformer)
    transformer.rope.to(device)
    cast(transformer, dtype)
    return transformer


def _on_meta(folder: Path) -> HeliosTransformer:
    try:
        with torch.device("meta"):
            return HeliosTransformer(**read_shape(folder))
    except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:  # a number that is none, or fits no other
        raise InputError(f"{folder / 'config.json'}: makes no model ({error}); copy or export the folder again") from error


def _audit(transformer: HeliosTransformer, stored: Mapping[str, Stored], fresh: Sequence[str], folder: Path) -> None:
    """InputError unless the headers have this model's weights, but for those of `fresh` layers; names the file if one is to
    blame."""
    shapes = {name: tuple(value.shape) for name, value in transformer.state_dict().items()}
    blamed = {one.file for name, one in stored.items() if shapes.get(name) != one.shape}
    where = blamed.pop() if len(blamed) == 1 else folder
    audit({name: size for name, size in shapes.items() if name.split(".")[0] not in fresh}, stored, str(where), AGAIN)


def stored_size(transformer: HeliosTransformer, dtype: torch.dtype, store: Store | None = None) -> int:
    """Bytes of a transformer once it is loaded in `dtype`, its layers as `store` makes them; one on meta, which is changed."""
    cast(transformer, dtype)
    for name, _ in list(transformer.named_modules()):
        _keep(transformer, name, store)
    return sum(tensor.nbytes for tensor in (*transformer.parameters(), *transformer.buffers()))


def _place(transformer: HeliosTransformer, name: str, value: Tensor) -> None:
    """Puts one weight where it belongs."""
    owner, _, last = name.rpartition(".")
    transformer.get_submodule(owner)._parameters[last] = nn.Parameter(value)


def _keep(transformer: HeliosTransformer, name: str, store: Store | None) -> None:
    """A layer as `store` makes it, once all of its weights are there (or, to know its size, none)."""
    weights = [weight for weight in transformer.get_submodule(name)._parameters.values() if weight is not None]
    if store and name and weights and len({weight.is_meta for weight in weights}) == 1:
        above, _, own = name.rpartition(".")
        setattr(transformer.get_submodule(above), own, store(name, transformer.get_submodule(name)))


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
