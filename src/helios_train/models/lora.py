"""Linear layers with adapters: PEFT's parameters under a forward of our own, for less memory.

PEFT adds `scale B A x` to a layer's output in three steps, each as large as that output; here the product is added into it. And a
weight that several calls share gets its gradient call by call: left to itself, torch adds them all up before it hands any over,
which at 14 B keeps 2.3 GiB of a student's gradients on the device until its whole rollout is differentiated.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

_gathered: ContextVar[bool] = ContextVar("gathered", default=False)


class _Now(torch.autograd.Function):
    """A weight whose gradient is handed over as soon as one call has made it."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        """The weight."""
        ctx.set_materialize_grads(False)
        ctx.weight = weight
        return weight.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> None:  # type: ignore[override]
        """Adds to `.grad`, and calls the weight's hooks."""
        if gradient is None:
            return
        weight = ctx.weight
        weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)
        for hook in list((weight._post_accumulate_grad_hooks or {}).values()):
            hook(weight)


def now(weight: Tensor) -> Tensor:
    """The weight for one call: in a backward its gradient by that call goes to `.grad`, and to the hooks that wait for it, at
    once. torch.autograd.grad does not see it through this; inside `gathered` it does."""
    if torch.compiler.is_compiling() or not weight.requires_grad or _gathered.get():
        return weight
    return _Now.apply(weight)  # type: ignore[no-any-return]


@contextmanager
def gathered() -> Iterator[None]:
    """Inside, weights are plain leaves of what is computed."""
    token = _gathered.set(True)
    try:
        yield
    finally:
        _gathered.reset(token)


class Adapted(LoraLinear):  # type: ignore[misc]
    """PEFT's layer, computed as above. Never merged and never disabled: `roles.Backbone` says which adapters are active."""

    def forward(self, x: Tensor) -> Tensor:
        """`W x + b`, and of each active adapter `scale B A x`; like x but for its width."""
        rows = x.flatten(0, -2)
        out = self.base_layer(rows)
        for name in self._active():
            A, B = now(self.lora_A[name].weight), now(self.lora_B[name].weight)
            inner = F.linear(rows.to(A.dtype), A)
            if out.dtype == B.dtype:
                out.addmm_(inner, B.t(), alpha=self.scaling[name])
            else:  # an fp32 adapter on a narrower layer, or the reverse
                out = (out + self.scaling[name] * F.linear(inner, B)).to(out.dtype)
        return out.view(*x.shape[:-1], out.shape[-1])  # type: ignore[no-any-return]

    def _active(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.lora_A]


def _parts(layer: nn.Module) -> tuple[Any, list[tuple[Tensor, Tensor, float]]]:
    """The frozen layer, and of each active adapter A, B and its scale."""
    if not isinstance(layer, Adapted):
        return layer, []
    return layer.base_layer, [(layer.lora_A[n].weight, layer.lora_B[n].weight, layer.scaling[n]) for n in layer._active()]


def by_input(layer: nn.Module, dy: Tensor) -> Tensor:
    """The gradient of a linear layer, adapters or not, by its input [L, in], from dy [L, out]."""
    base, adapters = _parts(layer)
    dx = dy @ base.weight
    for A, B, scale in adapters:
        dx.addmm_((dy.to(B.dtype) @ B).to(dx.dtype), A.to(dx.dtype), alpha=scale)
    return dx  # type: ignore[no-any-return]


def by_weights(layer: nn.Module, rows: Tensor, dy: Tensor) -> dict[int, Tensor]:
    """The gradients of a linear layer by its trainable weights, by their ids: it was given `rows` [L, in], got dy [L, out]."""
    base, adapters = _parts(layer)
    found = {}
    if isinstance(base, nn.Linear) and base._parameters.get("weight") is not None:
        if base.weight.requires_grad:
            found[id(base.weight)] = dy.t() @ rows
        if base.bias is not None and base.bias.requires_grad:
            found[id(base.bias)] = dy.sum(0)
    for A, B, scale in adapters:
        if A.requires_grad:
            found[id(A)] = (dy.to(B.dtype) @ B).mul_(scale).t() @ rows.to(A.dtype)
        if B.requires_grad:
            found[id(B)] = scale * (dy.to(B.dtype).t() @ F.linear(rows.to(A.dtype), A))
    return found
