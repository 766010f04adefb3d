"""LayerNorm without affine, then scale and shift by segment: LN(x) * (1 + scale) + shift.

Axes: B samples, L tokens, D width, R = 2 rows of modulation: the first for tokens before `split`, the second from there on.
Kept for backward: x, and each token's mean and 1 / sqrt(var + eps) in fp32. The launchers also serve the affine LayerNorm
(`base` 0 instead of 1, the weight seen as both rows of every sample) and the norm after a gated residual.
"""

# ruff: noqa: RUF005 -- Triton compiles no starred tuples

from __future__ import annotations

from typing import Any, no_type_check

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from helios_train.kernels.dispatch import choose, jit, tl, wide
from helios_train.kernels.rows import (
    VARYING,
    add_product,
    add_row,
    check_split,
    chunk_of,
    dense_rows,
    fold,
    launch,
    load_row,
    mean_of,
    mean_of_product,
    segments,
    store_row,
    zero_row,
)

WARPS, STAGES = 8, 2


@jit()
@no_type_check
def layer_norm_row(x, eps, D: tl.constexpr, TILE: tl.constexpr):
    """(mean, 1 / sqrt(var + eps)) of a row in registers: the variance about the mean, not by the difference of squares."""
    mean, centred = mean_of(x, D, TILE), ()
    for tile in tl.static_range((D + TILE - 1) // TILE):
        inside = tile * TILE + tl.arange(0, TILE) < D
        centred = centred + (tl.where(inside, x[tile] - mean, 0.0),)
    return mean, tl.rsqrt(mean_of_product(centred, centred, D, TILE) + eps)


@jit()
@no_type_check
def modulate_row(x, mean, rstd, scale, shift, BASE: tl.constexpr, TILES: tl.constexpr):
    """(x - mean) * rstd * (BASE + scale) + shift."""
    row = ()
    for tile in tl.static_range(TILES):
        row = row + ((x[tile] - mean) * rstd * (BASE + scale[tile]) + shift[tile],)
    return row


@jit()
@no_type_check
def norm_gradient_row(dn, x, mean, rstd, scale, BASE: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr):
    """(dx, h): with h = (x - mean) * rstd and g = dn * (BASE + scale), dx = rstd * (g - mean(g) - h * mean(g * h))."""
    g, h, dx = (), (), ()
    for tile in tl.static_range((D + TILE - 1) // TILE):
        g = g + (dn[tile] * (BASE + scale[tile]),)
        h = h + ((x[tile] - mean) * rstd,)
    level, slope = mean_of(g, D, TILE), mean_of_product(g, h, D, TILE)
    for tile in tl.static_range((D + TILE - 1) // TILE):
        dx = dx + (rstd * (g[tile] - level - h[tile] * slope),)
    return dx, h


@jit(*VARYING)
@no_type_check
def forward_kernel(
    x_ptr, scale_ptr, shift_ptr, y_ptr, mean_ptr, rstd_ptr, x_b, x_l, scale_b, scale_r, shift_b, shift_r, length, split, chunk,
    eps, BASE: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y = (x - mean(x)) * rstd * (BASE + scale[segment]) + shift[segment], rstd = 1 / sqrt(var(x) + eps)."""
    sample = tl.program_id(1).to(tl.int64)
    segment, start, end = chunk_of(tl.program_id(0), length, split, chunk)
    scale = load_row(scale_ptr + sample * scale_b + segment * scale_r, D, D, TILE)
    shift = load_row(shift_ptr + sample * shift_b + segment * shift_r, D, D, TILE)
    for token in tl.range(start, end, num_stages=STAGES):
        x = load_row(x_ptr + sample * x_b + token * x_l, D, D, TILE)
        mean, rstd = layer_norm_row(x, eps, D, TILE)
        here = sample * length + token
        store_row(y_ptr + here * D, modulate_row(x, mean, rstd, scale, shift, BASE, (D + TILE - 1) // TILE), D, D, TILE)
        tl.store(mean_ptr + here, mean)
        tl.store(rstd_ptr + here, rstd)


@jit(*VARYING)
@no_type_check
def backward_kernel(
    dy_ptr, x_ptr, mean_ptr, rstd_ptr, scale_ptr, dx_ptr, dscale_ptr, dshift_ptr, dy_b, dy_l, x_b, x_l, scale_b, scale_r,
    length, split, chunk, SUMS: tl.constexpr, BASE: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx as in `norm_gradient_row`; of the chunk, dscale = sum(dy * (x - mean) * rstd), dshift = sum(dy)."""
    TILES: tl.constexpr = (D + TILE - 1) // TILE
    sample = tl.program_id(1).to(tl.int64)
    segment, start, end = chunk_of(tl.program_id(0), length, split, chunk)
    scale = load_row(scale_ptr + sample * scale_b + segment * scale_r, D, D, TILE)
    dscale, dshift = zero_row(D, TILE), zero_row(D, TILE)
    for token in tl.range(start, end, num_stages=STAGES):
        dy = load_row(dy_ptr + sample * dy_b + token * dy_l, D, D, TILE)
        x = load_row(x_ptr + sample * x_b + token * x_l, D, D, TILE)
        here = sample * length + token
        dx, h = norm_gradient_row(dy, x, tl.load(mean_ptr + here), tl.load(rstd_ptr + here), scale, BASE, D, TILE)
        store_row(dx_ptr + here * D, dx, D, D, TILE)
        if SUMS:
            dscale, dshift = add_product(dscale, dy, h, TILES), add_row(dshift, dy, TILES)
    if SUMS:
        partial = (sample * tl.num_programs(0) + tl.program_id(0)) * D
        store_row(dscale_ptr + partial, dscale, D, D, TILE)
        store_row(dshift_ptr + partial, dshift, D, D, TILE)


def _forward_outputs(x_BLD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Empty y, mean, rstd; the statistics are fp32, of fp64 input fp64."""
    mean_BL = torch.empty(x_BLD.shape[:2], dtype=wide(x_BLD[:0]).dtype, device=x_BLD.device)
    return torch.empty_like(x_BLD, memory_format=torch.contiguous_format), mean_BL, torch.empty_like(mean_BL)


@torch.library.custom_op("helios_train::modulated_norm", mutates_args=())
def triton_forward(x: Tensor, scale: Tensor, shift: Tensor, split: int, base: float, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(y like x, mean, rstd fp32 [B, L]) of x [B, L, D], scale and shift [B, 2, D]."""
    y, mean, rstd = _forward_outputs(x)
    x, scale, shift, cut = dense_rows(x), dense_rows(scale), dense_rows(shift), launch(x, split, sums=False)
    forward_kernel[cut.grid](
        x, scale, shift, y, mean, rstd, *x.stride()[:2], *scale.stride()[:2], *shift.stride()[:2], x.shape[1], split, cut.chunk,
        eps, base, x.shape[2], cut.tile, STAGES, num_warps=WARPS,
    )  # fmt: skip
    return y, mean, rstd


@triton_forward.register_fake
def _(x: Tensor, scale: Tensor, shift: Tensor, split: int, base: float, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return _forward_outputs(x)


def _backward_outputs(x_BLD: Tensor, sums: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Empty dx, dscale and dshift (fp32 [B, 2, D]; [0] where they are not wanted)."""
    batch, _, width = x_BLD.shape
    size = (batch, 2, width) if sums else (0,)
    dx = torch.empty_like(x_BLD, memory_format=torch.contiguous_format)
    return dx, *(torch.empty(size, dtype=torch.float32, device=x_BLD.device) for _ in range(2))  # type: ignore[return-value]


@torch.library.custom_op("helios_train::modulated_norm_backward", mutates_args=())
def triton_backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor, split: int, base: float, sums: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dscale, dshift) of `triton_forward`; the latter two fp32 [B, 2, D], or [0] without `sums`."""
    dy, x, scale, cut = dense_rows(dy), dense_rows(x), dense_rows(scale), launch(x, split, sums)
    dx, dscale, dshift = _backward_outputs(x, sums)
    partials = dscale.new_empty(2, x.shape[0], cut.grid[0] if sums else 0, x.shape[2])
    backward_kernel[cut.grid](
        dy, x, mean, rstd, scale, dx, partials[0], partials[1], *dy.stride()[:2], *x.stride()[:2], *scale.stride()[:2],
        x.shape[1], split, cut.chunk, sums, base, x.shape[2], cut.tile, STAGES, num_warps=WARPS,
    )  # fmt: skip
    return (dx, fold(partials[0], cut.first), fold(partials[1], cut.first)) if sums else (dx, dscale, dshift)


@triton_backward.register_fake
def _(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor, split: int, base: float, sums: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _backward_outputs(x, sums)


def _pieces(scale_BRD: Tensor, split: int, length: int) -> list[tuple[tuple[int | slice, slice], tuple[int, int]]]:
    """Where one row of the modulation holds: (sample and tokens, row). One affine weight for all is a single piece."""
    if scale_BRD.stride()[:2] == (0, 0):
        return [((slice(None), slice(None)), (0, 0))]
    return [((sample, tokens), (sample, row)) for row, tokens in segments(split, length) for sample in range(len(scale_BRD))]


def reference_forward(
    x: Tensor, scale: Tensor, shift: Tensor, split: int, base: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As `triton_forward`: where one row holds, scale and shift are the affine part of torch's fused LayerNorm."""
    pieces = _pieces(scale, split, x.shape[1])
    y, mean, rstd = _forward_outputs(x) if len(pieces) != 1 else (x, x, x)
    for here, row in pieces:
        part = wide(x[here])
        weight, bias = (base + scale[row]).to(part.dtype), shift[row].to(part.dtype).contiguous()
        found = torch.native_layer_norm(part, x.shape[2:], weight, bias, eps)
        if len(pieces) == 1:  # that is all, and no copy
            return found[0].to(x.dtype).view(x.shape), found[1].view(x.shape[:2]), found[2].view(x.shape[:2])
        y[here], mean[here], rstd[here] = found[0], found[1].squeeze(-1), found[2].squeeze(-1)
    return y, mean, rstd


def reference_backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor, split: int, base: float, sums: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As `triton_backward`."""
    pieces = _pieces(scale, split, x.shape[1])
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if len(pieces) != 1 else x
    dscale = torch.zeros(x.shape[0], 2, x.shape[2], dtype=mean.dtype, device=x.device)
    dshift = torch.zeros_like(dscale)
    for here, row in pieces:
        weight = (base + scale[row]).to(mean.dtype)
        # The bias does not enter the gradient; torch asks for one where it is asked for the bias's.
        found = torch.ops.aten.native_layer_norm_backward(
            wide(dy[here]), wide(x[here]), x.shape[2:], mean[here].unsqueeze(-1), rstd[here].unsqueeze(-1), weight, weight,
            [True, sums, sums],
        )  # fmt: skip
        if sums:
            dscale[row], dshift[row] = found[1], found[2]
        if len(pieces) == 1:
            dx = found[0].to(x.dtype).view(x.shape)
        else:
            dx[here] = found[0]
    return dx, dscale, dshift


class _ModulatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, split: int, eps: float, triton: bool) -> Tensor:
        """Runs the chosen forward and keeps what the module's head says."""
        y, mean, rstd = (triton_forward if triton else reference_forward)(x, scale, shift, split, 1.0, eps)
        ctx.save_for_backward(x, mean, rstd, scale)
        ctx.split, ctx.triton = split, triton
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients that are asked for."""
        x, mean, rstd, scale = ctx.saved_tensors
        wants_x, wants_scale, wants_shift = ctx.needs_input_grad[:3]
        run = triton_backward if ctx.triton else reference_backward
        dx, dscale, dshift = run(dy, x, mean, rstd, scale, ctx.split, 1.0, wants_scale or wants_shift)
        # Autograd rounds the sums to their parameters' dtype.
        return dx if wants_x else None, dscale if wants_scale else None, dshift if wants_shift else None, None, None, None


def by_segment(rows_BRD: Tensor, split: int, length: int) -> Tensor:
    """Two rows seen by every token, [B, L, D], as torch.compile folds it into its kernels; eagerly it is L rows of memory."""
    late = torch.arange(length, device=rows_BRD.device)[:, None] >= split
    return torch.where(late, rows_BRD[:, 1:], rows_BRD[:, :1])


def modulated_norm(x: Tensor, scale: Tensor, shift: Tensor, split: int, eps: float = 1e-6, kernels: str = "auto") -> Tensor:
    """LN(x) * (1 + scale) + shift for x [B, L, D], scale and shift [B, 2, D]; like x, contiguous.

    Tokens before `split` (0 to L) take the first of the two rows, the others the second. Any strides; fp32 arithmetic (fp64
    for fp64) and one rounding to x's dtype. Gradients to x, scale, shift where asked for.
    """
    check_split(split, x)
    choice = choose(kernels, x)
    if choice == "compile":
        scale, shift = (by_segment(row, split, x.shape[1]) for row in (scale, shift))
        return (F.layer_norm(wide(x), x.shape[2:], None, None, eps) * (1 + scale) + shift).type_as(x)
    return _ModulatedNorm.apply(x, scale, shift, split, eps, choice == "triton")  # type: ignore[no-any-return]
