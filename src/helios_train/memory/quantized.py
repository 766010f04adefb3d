"""Frozen linear layers stored in 4 or 8 bits, widened for each product; nothing of them trains.

nf4: 4-bit NormalFloat in blocks of 64 weights, the blocks' scales in 8 bits themselves (Dettmers et al., 2023), by bitsandbytes'
operators: 4.13 bits a weight. int8: a scale a row, 8 bits a weight. bitsandbytes' own modules quantize when they are moved to a
GPU and cannot be made on fake tensors; these are quantized where they stand, so a plan has them too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.functional import linear
from torch.utils._python_dispatch import _disable_current_modes

Kind = Literal["int8", "nf4"]
BLOCK, SCALES = 64, 256  # weights that share a scale, scales that share one
PIECE = 2**16  # weights that a CPU quantizes at once
LEVELS = 127  # of int8 on each side


class FrozenLinear(nn.Linear):
    """A linear layer with its weight in `kind`; input and output as of the layer it was made from. It has no parameters."""

    packed: Tensor
    scale: Tensor
    scale_of_scales: Tensor
    code: Tensor
    middle: Tensor

    def __init__(self, layer: nn.Linear, kind: Kind):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.kind = layer.in_features, layer.out_features, kind
        self.dtype = layer.weight.dtype
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())
        for name, tensor in (_nf4 if kind == "nf4" else _int8)(layer.weight.detach()).items():
            self.register_buffer(name, tensor)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight, widened: what the layer computes with. [out, in]"""
        with torch.no_grad():
            if self.kind == "int8":
                return (self.packed * self.scale).to(self.dtype)
            ops = torch.ops.bitsandbytes
            scale = ops.dequantize_blockwise(self.scale, self.scale_of_scales, self.code, SCALES, torch.float32) + self.middle
            shape = [self.out_features, self.in_features]
            return ops.dequantize_4bit(self.packed, scale, BLOCK, "nf4", shape, self.dtype)  # type: ignore[no-any-return]

    def forward(self, input: Tensor) -> Tensor:
        """The product, in the layer's dtype; its backward widens the weight again and gives the input's gradient alone."""
        return _Product.apply(input, self)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """For print(model)."""
        return f"{self.in_features}, {self.out_features}, {self.kind}"


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer
        return linear(x, layer.weight, layer.bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient @ ctx.layer.weight, None


def _nf4(weight: Tensor) -> dict[str, Tensor]:
    code = _code(weight.device)
    ops = torch.ops.bitsandbytes
    parts = [ops.quantize_4bit(part, BLOCK, "nf4", torch.uint8) for part in _parts(weight.contiguous())]
    packed, scale = (torch.cat(one) if len(one) > 1 else one[0] for one in zip(*parts, strict=True))
    middle = scale.mean()
    narrow, scale_of_scales = ops.quantize_blockwise(scale - middle, code, SCALES)
    return {"packed": packed, "scale": narrow, "scale_of_scales": scale_of_scales, "code": code, "middle": middle}


def _parts(weight: Tensor) -> Sequence[Tensor]:
    """The weight in whole blocks: on a CPU in pieces that its caches hold, for there each weight is compared with all 16 values
    at once, which takes 64 bytes a weight."""
    return weight.flatten().split(PIECE) if weight.device.type == "cpu" and not isinstance(weight, FakeTensor) else [weight]


@cache
def _code(device: torch.device) -> Tensor:
    """The 256 values that scales are rounded to, one tensor for all layers; real also while a plan is traced."""
    from bitsandbytes.functional import create_dynamic_map  # here: it probes for CUDA when imported

    with _disable_current_modes():
        return create_dynamic_map().to(device)


def _int8(weight: Tensor) -> dict[str, Tensor]:
    largest = torch.maximum(weight.amax(dim=1, keepdim=True), -weight.amin(dim=1, keepdim=True))
    scale = largest.float().clamp_min(torch.finfo(torch.float32).tiny) / LEVELS
    return {"packed": (weight.float() / scale).round_().to(torch.int8), "scale": scale}


def storing(kind: Kind) -> Callable[[str, nn.Module], nn.Module]:
    """What stores the linear layers of blocks in `kind` while a model is loaded: called with a layer's name and the layer."""

    def _store(name: str, layer: nn.Module) -> nn.Module:
        return FrozenLinear(layer, kind) if name.startswith("blocks.") and type(layer) is nn.Linear else layer

    return _store


def quantize(module: nn.Module, kind: Kind, lineage: bool = False) -> int:
    """Stores every frozen linear layer under `module` in `kind`, below adapters too; how many.

    Adapters themselves stay, but for those of earlier links, frozen too, with `lineage`.
    """
    count = 0
    for owner_name, owner in list(module.named_modules()):
        if ".lora_" in f".{owner_name}." and not lineage:
            continue
        for name, layer in list(owner.named_children()):
            if type(layer) is nn.Linear and not layer.weight.requires_grad:
                setattr(owner, name, FrozenLinear(layer, kind))
                count += 1
    return count
