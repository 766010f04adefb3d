"""LayerNorm with weight and bias: LN(x) * weight + bias.

The kernels are those of `modulated_norm`: weight and bias are seen as both rows of every sample (strides 0) and nothing is
added to the weight. Axes: B samples, L tokens, D width. Kept for backward: x, and mean and 1 / sqrt(var + eps) in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from helios_train.kernels import modulated_norm as norm
from helios_train.kernels.dispatch import choose, wide


def _rows(x: Tensor, weight: Tensor) -> Tensor:
    """[D] as [B, 2, D] without a copy."""
    return weight.expand(x.shape[0], 2, -1)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BLD: Tensor, weight: Tensor, bias: Tensor, eps: float, triton: bool) -> Tensor:
        """Runs the chosen forward and keeps what the module's head says."""
        run = norm.triton_forward if triton else norm.reference_forward
        y, mean, rstd = run(x_BLD, _rows(x_BLD, weight), _rows(x_BLD, bias), 0, 0.0, eps)
        ctx.save_for_backward(x_BLD, mean, rstd, weight)
        ctx.triton = triton
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients that are asked for."""
        x, mean, rstd, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        run = norm.triton_backward if ctx.triton else norm.reference_backward
        dx, dweight, dbias = run(dy, x, mean, rstd, _rows(x, weight), 0, 0.0, wants_weight or wants_bias)
        return (
            dx if wants_x else None,
            dweight.sum((0, 1)) if wants_weight else None,
            dbias.sum((0, 1)) if wants_bias else None,
            None,
            None,
        )


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6, kernels: str = "auto") -> Tensor:
    """LN(x) * weight + bias for x [..., D], weight and bias [D]; like x, contiguous.

    Any strides; fp32 arithmetic (fp64 for fp64) and one rounding to x's dtype. Gradients to x, weight, bias where asked for.
    """
    choice = choose(kernels, x)
    if choice == "compile":
        part = wide(x)
        return F.layer_norm(part, x.shape[-1:], weight.to(part.dtype), bias.to(part.dtype), eps).type_as(x)
    x_BLD = x if x.ndim == 3 else x.reshape(1, -1, x.shape[-1])
    return _LayerNorm.apply(x_BLD, weight, bias, eps, choice == "triton").view(x.shape)  # type: ignore[no-any-return]
