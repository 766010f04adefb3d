"""GELU in its tanh form, which keeps its input alone and computes the rest again in backward.

0.5 * x * (1 + tanh(u)) = x * sigmoid(2u) with u = sqrt(2 / pi) * (x + 0.044715 x^3); the second form does not cancel where x is
well below zero. torch's own op keeps the input alone too: it is the reference.
"""

from __future__ import annotations

from typing import Any, no_type_check

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from helios_train.kernels.dispatch import choose, jit, tl
from helios_train.kernels.rows import dense_rows

BLOCK, WARPS = 2048, 8


@jit()
@no_type_check
def gate_of(x):
    """(sigmoid(2u), d(2u) / dx)."""
    u2 = 1.5957691216057308 * (x + 0.044715 * x * x * x)
    return 1.0 / (1.0 + tl.exp(-u2)), 1.5957691216057308 * (1.0 + 0.134145 * x * x)


@jit("length")
@no_type_check
def forward_kernel(x_ptr, y_ptr, x_b, x_l, length, D: tl.constexpr, BLOCK: tl.constexpr):
    """y = x * sigmoid(2u)."""
    blocks: tl.constexpr = (D + BLOCK - 1) // BLOCK
    sample, token = tl.program_id(1).to(tl.int64), tl.program_id(0) // blocks
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + sample * x_b + token * x_l + columns, mask=columns < D, other=0.0).to(tl.float32)
    gate, _ = gate_of(x)
    tl.store(y_ptr + (sample * length + token) * D + columns, (x * gate).to(y_ptr.dtype.element_ty), mask=columns < D)


@jit("length")
@no_type_check
def backward_kernel(dy_ptr, x_ptr, dx_ptr, dy_b, dy_l, x_b, x_l, length, D: tl.constexpr, BLOCK: tl.constexpr):
    """dx = dy * (s + x * s * (1 - s) * d(2u)/dx), s = sigmoid(2u)."""
    blocks: tl.constexpr = (D + BLOCK - 1) // BLOCK
    sample, token = tl.program_id(1).to(tl.int64), tl.program_id(0) // blocks
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    dy = tl.load(dy_ptr + sample * dy_b + token * dy_l + columns, mask=columns < D, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + sample * x_b + token * x_l + columns, mask=columns < D, other=0.0).to(tl.float32)
    gate, slope = gate_of(x)
    dx = dy * (gate + x * gate * (1.0 - gate) * slope)
    tl.store(dx_ptr + (sample * length + token) * D + columns, dx.to(dx_ptr.dtype.element_ty), mask=columns < D)


def _grid(x_BLD: Tensor) -> tuple[int, int]:
    batch, length, width = x_BLD.shape
    return length * -(-width // BLOCK), batch


@torch.library.custom_op("helios_train::gelu_tanh", mutates_args=())
def triton_forward(x: Tensor) -> Tensor:
    """GELU of [B, L, D], contiguous."""
    y, x = torch.empty_like(x, memory_format=torch.contiguous_format), dense_rows(x)
    forward_kernel[_grid(x)](x, y, *x.stride()[:2], *x.shape[1:], BLOCK, num_warps=WARPS)
    return y


@torch.library.custom_op("helios_train::gelu_tanh_backward", mutates_args=())
def triton_backward(dy: Tensor, x: Tensor) -> Tensor:
    """dx, contiguous."""
    dx, dy, x = torch.empty_like(x, memory_format=torch.contiguous_format), dense_rows(dy), dense_rows(x)
    backward_kernel[_grid(x)](dy, x, dx, *dy.stride()[:2], *x.stride()[:2], *x.shape[1:], BLOCK, num_warps=WARPS)
    return dx


@torch.library.custom_op("helios_train::gelu_tanh_backward_", mutates_args=("dy",))
def triton_backward_(dy: Tensor, x: Tensor) -> None:
    """dx in place of dy, which is contiguous: each element is read where it is written."""
    x = dense_rows(x)
    backward_kernel[_grid(x)](dy, x, dy, *dy.stride()[:2], *x.stride()[:2], *x.shape[1:], BLOCK, num_warps=WARPS)


@triton_forward.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@triton_backward.register_fake
def _(dy: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@triton_backward_.register_fake
def _(dy: Tensor, x: Tensor) -> None:
    return None


class _GeluTanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Runs the chosen forward and keeps what the module's head says."""
        ctx.save_for_backward(x)
        return triton_forward(x)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        """The gradients that are asked for."""
        return triton_backward(dy, *ctx.saved_tensors)  # type: ignore[no-any-return]


def gelu_tanh(x: Tensor, kernels: str = "auto") -> Tensor:
    """0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))), elementwise; same shape and dtype, computed in at least fp32."""
    if choose(kernels, x) != "triton":
        return F.gelu(x, approximate="tanh")
    x_BLD = x if x.ndim == 3 else x.reshape(1, -1, x.shape[-1])
    return _GeluTanh.apply(x_BLD).view(x.shape)  # type: ignore[no-any-return]


def gelu_tanh_backward_(dy: Tensor, x: Tensor, kernels: str = "auto") -> Tensor:
    """The gradient by x [L, D] of `gelu_tanh`, in place of dy, which is contiguous and shaped like it."""
    if choose(kernels, x) != "triton":
        return torch.ops.aten.gelu_backward.grad_input(dy, x, approximate="tanh", grad_input=dy)  # type: ignore[no-any-return]
    triton_backward_(dy[None], x[None])
    return dy
