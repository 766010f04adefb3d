"""What of the transformer trains: LoRA adapters (PEFT) and whole layers, and how they fold back into plain weights."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from helios_train import rng
from helios_train.errors import InputError
from helios_train.models.checkpoint import audit
from helios_train.models.lora import Adapted
from helios_train.models.precision import dtype_of
from helios_train.models.transformer import HISTORY_PATCHES, HeliosTransformer


@dataclass(frozen=True)
class Lora:
    """Adapters of one link: rank and alpha, on the patch embedding too, and the history patches trained in full beside them, or
    adapted as well (`history_adapters`)."""

    rank: int = 128
    alpha: float = 128.0
    patch_embedding: bool = True
    history_patches: bool = True
    history_adapters: bool = False


@dataclass(frozen=True)
class Part:
    """What a role adds to its backbone: adapters by name, and whole layers that stand in for the backbone's own."""

    adapters: tuple[str, ...] = ()
    layers: Mapping[str, nn.Module] = field(default_factory=dict)


NOTHING = Part()  # a backbone by itself


def lora_targets(transformer: HeliosTransformer, lora: Lora) -> list[str]:
    """Every Linear whose dotted name has no "norm", and the patch layers where asked; with adapters on it or not."""
    modules = ((name, module) for name, module in transformer.named_modules() if ".lora_" not in name)
    names = [name.removesuffix(".base_layer") for name, module in modules if isinstance(module, nn.Linear) and "norm" not in name]
    return names + ["patch_embedding"] * lora.patch_embedding + list(HISTORY_PATCHES) * lora.history_adapters


def train_everything(transformer: HeliosTransformer) -> None:
    """Full training."""
    transformer.requires_grad_(True)


def add_lora(transformer: HeliosTransformer, role: str, lora: Lora, seed: int) -> None:
    """Freezes the transformer and puts one adapter on it: A normal with std 1 / rank, B zero; norms stay frozen.

    Adapters that are there already go on training, or not, as they did.
    """
    _inject(
        transformer,
        role,
        LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,  # type: ignore[arg-type]
            init_lora_weights="gaussian",
            target_modules=lora_targets(transformer, lora),
        ),
        seed,
    )
    for name, parameter in transformer.named_parameters():
        if f".{role}." in f"{name}." or (lora.history_patches and name.split(".")[0] in HISTORY_PATCHES):
            parameter.requires_grad = True


@torch.no_grad()
def add_frozen(transformer: HeliosTransformer, name: str, tensors: Mapping[str, Tensor], where: str) -> None:
    """Puts the adapter of an earlier link on the transformer, under `name`; it does not train.

    tensors: as `link_state` gives them, their scale in B. InputError names a layer of `where` that this model lacks, or a tensor
    that does not fit.
    """
    layers = {key.removeprefix("transformer.").partition(".lora_")[0] for key in tensors}
    ranks = {layer: tensors[f"transformer.{layer}.lora_B.weight"].shape[1] for layer in layers}
    unknown = sorted(layers - set(lora_targets(transformer, Lora(history_adapters=True))))
    if unknown:
        raise InputError(
            f"{where}: has an adapter for {unknown[0]}, which this model lacks; take the adapters of its own lineage"
        )
    _inject(
        transformer,
        name,
        LoraConfig(
            r=max(ranks.values()),
            lora_alpha=max(ranks.values()),
            rank_pattern=ranks,
            alpha_pattern=ranks,
            target_modules=sorted(layers),
        ),
        0,
    )
    found = {key: parameter for key, parameter in transformer.named_parameters() if f".{name}." in key}
    given = {key.removeprefix("transformer.").replace(".weight", f".{name}.weight"): value for key, value in tensors.items()}
    audit({key: tuple(parameter.shape) for key, parameter in found.items()}, given, where)
    for key, parameter in found.items():
        parameter.copy_(given[key])


def add_lineage(transformer: HeliosTransformer, links: Mapping[str, Sequence[Path]]) -> Part:
    """Puts earlier links, in their order, frozen on their common base: the files of each, as `manifest.write_adapter` names them.

    A layer that a link trained in full takes the place of the base's own, and ends what earlier links adapted of it. InputError
    names a file that is missing, damaged, or of another model.
    """
    tensors = {name: {key: value for file in files for key, value in _read(file).items()} for name, files in links.items()}
    layers: dict[str, nn.Module] = {}
    for number, (name, content) in enumerate(tensors.items()):
        whole = {key.rpartition(".")[0] for key in content if ".lora_" not in key}
        for layer in whole:
            own = copy.deepcopy(transformer.get_submodule(layer)).requires_grad_(False)
            given = {key: content[f"{layer}.{key}"] for key in ("weight", "bias")}
            audit({key: tuple(value.shape) for key, value in own.state_dict().items()}, given, f"link {name}, {layer}")
            own.load_state_dict(given)
            layers[layer] = own
        for earlier in list(tensors.values())[:number]:
            for key in [key for key in earlier if any(key.startswith(f"transformer.{layer}.lora_") for layer in whole)]:
                del earlier[key]
    for name, content in tensors.items():
        add_frozen(transformer, name, {key: value for key, value in content.items() if ".lora_" in key}, f"link {name}")
    return Part(tuple(tensors), layers)


def _read(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file}: cannot be read ({error}); copy or merge that folder again") from error


def _inject(transformer: HeliosTransformer, name: str, config: LoraConfig, seed: int) -> None:
    """PEFT's injection, which changes what trains; here every flag stays, all of the base and the new adapter are frozen."""
    training = {key for key, parameter in transformer.named_parameters() if parameter.requires_grad and ".lora_" in key}
    dtype = transformer.proj_out.weight.dtype
    with rng.forked(seed, f"adapter {name}"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are meant
        inject_adapter_in_model(config, transformer, adapter_name=name)
    for module in transformer.modules():
        if type(module) is LoraLinear:
            module.__class__ = Adapted  # the same parameters, another forward
    for key, parameter in transformer.named_parameters():
        if f".{name}." in key:
            parameter.data = parameter.data.to(dtype_of(key.split(".lora_")[0], dtype))
        parameter.requires_grad = key in training


def trainable(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that train, by name."""
    return {name: parameter for name, parameter in transformer.named_parameters() if parameter.requires_grad}


def group_of(name: str) -> str:
    """The group a weight is counted under on the run card."""
    if ".lora_" in name:
        return "LoRA"
    first = name.split(".")[0]
    if first in HISTORY_PATCHES:
        return "history patches"
    return {"blocks": "blocks", "condition_embedder": "embedders", "patch_embedding": "embedders"}.get(first, "output")


def folded(transformer: nn.Module, overrides: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The plain state dict: every adapter added to its base in fp32, the sum stored in the base's dtype.

    `overrides`: fp32 values (masters, EMA) to use in place of the module's own.
    """
    return dict(folding(transformer, overrides))


def folding(
    transformer: nn.Module, overrides: Mapping[str, Tensor] | None = None, taking: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """The entries of `folded`, one by one. With `taking` each of the transformer's weights is emptied once it was folded: of two
    copies one and a layer are there at a time."""
    given = overrides or {}
    parameters = dict(transformer.named_parameters())
    value = {name: given.get(name, parameter).detach() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        if ".lora_" in name:
            continue
        with torch.no_grad():
            weight = _with_adapters(transformer, name, value).to(parameter.dtype, copy=True).contiguous()
            if taking:
                parameter.data = parameter.data.new_empty(0)
                del value[name]
        yield name.replace(".base_layer.", "."), weight


def _with_adapters(transformer: nn.Module, name: str, value: Mapping[str, Tensor]) -> Tensor:
    """A weight in fp32, the adapters on its layer added."""
    layer_name = name.removesuffix(".base_layer.weight")
    weight = value[name].float()
    if layer_name != name:
        layer = transformer.get_submodule(layer_name)
        assert isinstance(layer, LoraLayer)
        for role in layer.lora_A:
            A, B = (value[f"{layer_name}.lora_{side}.{role}.weight"].float() for side in "AB")
            weight = weight + layer.scaling[role] * (B.flatten(1) @ A.flatten(1)).view_as(weight)
    return weight


def link_state(transformer: nn.Module, role: str, overrides: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """What one link trained, fp32, the adapters in diffusers' names (`transformer.<layer>.lora_A.weight`).

    Their scale alpha / rank is in B: a reader who knows the tensors alone takes it for 1.
    """
    given = overrides or {}
    state = {}
    for name, parameter in trainable(transformer).items():
        value = given.get(name, parameter).detach().float()
        layer_name, is_adapter, _ = name.partition(".lora_")
        if f".lora_B.{role}." in name:
            layer = transformer.get_submodule(layer_name)
            assert isinstance(layer, LoraLayer)
            value = value * layer.scaling[role]
        public = f"transformer.{name.replace(f'.{role}.', '.')}" if is_adapter else name
        state[public] = value.contiguous()
    return state
