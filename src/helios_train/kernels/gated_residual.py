"""Gated residual and the norm of its result, in one pass each way: new = x + gate * y, n = norm(new).

Axes: B samples, L tokens, D width, R = 2 rows by segment: the first for tokens before `split` (history), the second from there
on (target). A block needs three forms, and no copy between them:
- after self-attention: gate, then the affine LayerNorm of the target tokens alone;
- after cross-attention: no gate, y of the target tokens alone (history passes), then the modulated norm of all tokens;
- after the feed-forward: gate, no norm (the next block's belongs to the next checkpoint).
The norm reads `new` as rounded to x's dtype, as it would unfused. Kept for backward: new, each normed token's mean and
1 / sqrt(var + eps) in fp32, the rows, and y where the gate wants a gradient.
"""

# ruff: noqa: RUF005 -- Triton compiles no starred tuples

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, no_type_check

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from helios_train.kernels import modulated_norm as norm
from helios_train.kernels.dispatch import choose, jit, tl, wide
from helios_train.kernels.modulated_norm import by_segment, layer_norm_row, modulate_row, norm_gradient_row
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
    segments,
    store_row,
    zero_row,
)

WARPS, BACKWARD_WARPS, STAGES = 8, 16, 2


@jit()
@no_type_check
def residual_row(x, y, gate, dtype: tl.constexpr, GATE: tl.constexpr, TILES: tl.constexpr):
    """x + gate * y (gate 1 without GATE), rounded to the dtype in which it is stored, as fp32."""
    row = ()
    for tile in tl.static_range(TILES):
        if GATE:
            row = row + ((x[tile] + gate[tile] * y[tile]).to(dtype).to(tl.float32),)
        else:
            row = row + ((x[tile] + y[tile]).to(dtype).to(tl.float32),)
    return row


@jit(*VARYING)
@no_type_check
def forward_kernel(
    x_ptr, y_ptr, gate_ptr, scale_ptr, shift_ptr, new_ptr, n_ptr, mean_ptr, rstd_ptr, x_b, x_l, y_b, y_l, gate_b, gate_r,
    scale_b, scale_r, shift_b, shift_r, length, split, chunk, eps, GATE: tl.constexpr, NORM: tl.constexpr,
    SHORT_Y: tl.constexpr, SHORT_N: tl.constexpr, BASE: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """new = x + gate[segment] * y; n = (new - mean) * rstd * (BASE + scale[segment]) + shift[segment].

    rstd = 1 / sqrt(var(new) + eps); y with SHORT_Y, n with SHORT_N hold the tokens from `split` on alone.
    """
    TILES: tl.constexpr = (D + TILE - 1) // TILE
    sample = tl.program_id(1).to(tl.int64)
    segment, start, end = chunk_of(tl.program_id(0), length, split, chunk)
    y_first, n_first = split if SHORT_Y else 0, split if SHORT_N else 0
    normed = start >= n_first
    y_count, n_count = tl.where(start >= y_first, D, 0), tl.where(normed, D, 0)  # columns to read and write
    gate, scale, shift = (), (), ()
    if GATE:
        gate = load_row(gate_ptr + sample * gate_b + segment * gate_r, y_count, D, TILE)
    if NORM:
        scale = load_row(scale_ptr + sample * scale_b + segment * scale_r, n_count, D, TILE)
        shift = load_row(shift_ptr + sample * shift_b + segment * shift_r, n_count, D, TILE)
    for token in tl.range(start, end, num_stages=STAGES):
        x = load_row(x_ptr + sample * x_b + token * x_l, D, D, TILE)
        y = load_row(y_ptr + sample * y_b + (token - y_first) * y_l, y_count, D, TILE)
        new = residual_row(x, y, gate, new_ptr.dtype.element_ty, GATE, TILES)
        store_row(new_ptr + (sample * length + token) * D, new, D, D, TILE)
        if NORM:
            mean, rstd = layer_norm_row(new, eps, D, TILE)
            here = sample * (length - n_first) + token - n_first
            store_row(n_ptr + here * D, modulate_row(new, mean, rstd, scale, shift, BASE, TILES), n_count, D, TILE)
            tl.store(mean_ptr + here, mean, mask=normed)
            tl.store(rstd_ptr + here, rstd, mask=normed)


@jit(*VARYING)
@no_type_check
def backward_kernel(
    dnew_ptr, dn_ptr, new_ptr, y_ptr, mean_ptr, rstd_ptr, gate_ptr, scale_ptr, dx_ptr, dy_ptr, dgate_ptr, dscale_ptr, dshift_ptr,
    dnew_b, dnew_l, dn_b, dn_l, y_b, y_l, gate_b, gate_r, scale_b, scale_r, length, split, chunk,
    DNEW: tl.constexpr, GATE: tl.constexpr, NORM: tl.constexpr, SHORT_Y: tl.constexpr, SHORT_N: tl.constexpr,
    GATE_SUM: tl.constexpr, NORM_SUMS: tl.constexpr, BASE: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dx = dnew + d(norm) / d(new) of dn; dy = gate * dx; a chunk's dgate = sum(dx * y), dscale = sum(dn * h), dshift = sum(dn).

    h = (new - mean) * rstd. Without NORM dx is dnew and not written again, without GATE dy is dx.
    """
    TILES: tl.constexpr = (D + TILE - 1) // TILE
    sample = tl.program_id(1).to(tl.int64)
    segment, start, end = chunk_of(tl.program_id(0), length, split, chunk)
    y_first, n_first = split if SHORT_Y else 0, split if SHORT_N else 0
    normed = start >= n_first
    y_count, n_count = tl.where(start >= y_first, D, 0), tl.where(normed, D, 0)  # columns to read and write
    gate, scale = (), ()
    if GATE:
        gate = load_row(gate_ptr + sample * gate_b + segment * gate_r, y_count, D, TILE)
    if NORM:
        scale = load_row(scale_ptr + sample * scale_b + segment * scale_r, n_count, D, TILE)
    dgate, dscale, dshift = zero_row(D, TILE), zero_row(D, TILE), zero_row(D, TILE)
    for token in tl.range(start, end, num_stages=STAGES):
        dx = zero_row(D, TILE)
        if DNEW:
            dx = load_row(dnew_ptr + sample * dnew_b + token * dnew_l, D, D, TILE)
        if NORM:
            here = sample * (length - n_first) + token - n_first
            # A token without a norm reads dn = 0 and rstd = 0: nothing is added.
            dn = load_row(dn_ptr + sample * dn_b + (token - n_first) * dn_l, n_count, D, TILE)
            new = load_row(new_ptr + (sample * length + token) * D, n_count, D, TILE)
            mean, rstd = tl.load(mean_ptr + here, mask=normed, other=0.0), tl.load(rstd_ptr + here, mask=normed, other=0.0)
            through, h = norm_gradient_row(dn, new, mean, rstd, scale, BASE, D, TILE)
            dx = add_row(dx, through, TILES)
            store_row(dx_ptr + (sample * length + token) * D, dx, D, D, TILE)
            if NORM_SUMS:
                dscale, dshift = add_product(dscale, dn, h, TILES), add_row(dshift, dn, TILES)
        if GATE:
            dy = add_product(zero_row(D, TILE), dx, gate, TILES)
            store_row(dy_ptr + (sample * (length - y_first) + token - y_first) * D, dy, y_count, D, TILE)
        if GATE_SUM:
            y = load_row(y_ptr + sample * y_b + (token - y_first) * y_l, y_count, D, TILE)
            dgate = add_product(dgate, dx, y, TILES)
    partial = (sample * tl.num_programs(0) + tl.program_id(0)) * D
    if GATE_SUM:
        store_row(dgate_ptr + partial, dgate, D, D, TILE)
    if NORM_SUMS:
        store_row(dscale_ptr + partial, dscale, D, D, TILE)
        store_row(dshift_ptr + partial, dshift, D, D, TILE)


def _forward_outputs(x: Tensor, scale: Tensor | None, split: int, affine: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Empty new, n, mean, rstd; the last three [0] without a norm."""
    batch, length, width = x.shape
    tokens = length - split if affine else length
    new = torch.empty_like(x, memory_format=torch.contiguous_format)
    n = x.new_empty((batch, tokens, width) if scale is not None else (0,))
    mean = torch.empty((batch, tokens) if scale is not None else (0,), dtype=torch.float32, device=x.device)
    return new, n, mean, torch.empty_like(mean)


def _strides(x: Tensor | None) -> tuple[int, ...]:
    return tuple(x.stride()[:2]) if x is not None else (0, 0)


@torch.library.custom_op("helios_train::gated_residual", mutates_args=())
def triton_forward(
    x: Tensor, y: Tensor, gate: Tensor | None, scale: Tensor | None, shift: Tensor | None, split: int, affine: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(new, n, mean, rstd); rows are [B, 2, D], `affine` norms the tokens from `split` on with base 0, else all with base 1."""
    outputs = _forward_outputs(x, scale, split, affine)
    cut = launch(x, split, sums=False)
    inputs = [dense_rows(part) if part is not None else None for part in (x, y, gate, scale, shift)]
    strides = [stride for part in inputs for stride in _strides(part)]
    forward_kernel[cut.grid](
        *inputs, *outputs, *strides, x.shape[1], split, cut.chunk, eps, gate is not None, scale is not None,
        y.shape[1] < x.shape[1], affine, 0.0 if affine else 1.0, x.shape[2], cut.tile, STAGES, num_warps=WARPS,
    )  # fmt: skip
    return outputs


@triton_forward.register_fake
def _(
    x: Tensor, y: Tensor, gate: Tensor | None, scale: Tensor | None, shift: Tensor | None, split: int, affine: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _forward_outputs(x, scale, split, affine)


Saved = Sequence[Tensor | None]  # new, mean, rstd, scale (None without a norm), gate (None without one), y (None if not wanted)


def _backward_outputs(
    dnew: Tensor | None, saved: Saved, split: int, short_y: bool, gate_sum: bool, norm_sums: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Empty dx (where there is a norm), dy (where a gate), dgate, dscale, dshift (where wanted; fp32 [B, 2, D]); others [0]."""
    new, gate = saved[0], saved[4]
    like = dnew if new is None else new
    assert like is not None
    batch, length, width = like.shape
    dx = like.new_empty((batch, length, width) if new is not None else (0,))
    dy = like.new_empty((batch, length - split if short_y else length, width) if gate is not None else (0,))
    sizes = ((batch, 2, width) if wanted else (0,) for wanted in (gate_sum, norm_sums, norm_sums))
    rows = (like.new_empty(size, dtype=torch.float32) for size in sizes)
    return dx, dy, *rows  # type: ignore[return-value]


@torch.library.custom_op("helios_train::gated_residual_backward", mutates_args=())
def triton_backward(
    dnew: Tensor | None,
    dn: Tensor | None,
    saved: Sequence[Tensor | None],
    split: int,
    short_y: bool,
    affine: bool,
    gate_sum: bool,
    norm_sums: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dy, dgate, dscale, dshift) of `triton_forward`, each [0] where `_backward_outputs` says so."""
    dx, dy, *rows = _backward_outputs(dnew, saved, split, short_y, gate_sum, norm_sums)
    new, mean, rstd, scale, gate, y = saved
    like = dnew if new is None else new
    assert like is not None
    batch, length, width = like.shape
    cut = launch(like, split, gate_sum or norm_sums)
    dnew, dn, y, gate, scale = (dense_rows(part) if part is not None else None for part in (dnew, dn, y, gate, scale))
    partials = [like.new_empty((batch, cut.grid[0], width), dtype=torch.float32) if row.numel() else None for row in rows]
    strides = [stride for part in (dnew, dn, y, gate, scale) for stride in _strides(part)]
    backward_kernel[cut.grid](
        dnew, dn, new, y, mean, rstd, gate, scale, dx, dy, *partials, *strides, length, split, cut.chunk, dnew is not None,
        gate is not None, new is not None, short_y, affine, gate_sum, norm_sums, 0.0 if affine else 1.0, width, cut.tile, STAGES,
        num_warps=BACKWARD_WARPS,
    )  # fmt: skip
    folded = (row if partial is None else fold(partial, cut.first) for row, partial in zip(rows, partials, strict=True))
    return dx, dy, *folded  # type: ignore[return-value]


@triton_backward.register_fake
def _(
    dnew: Tensor | None,
    dn: Tensor | None,
    saved: Sequence[Tensor | None],
    split: int,
    short_y: bool,
    affine: bool,
    gate_sum: bool,
    norm_sums: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _backward_outputs(dnew, saved, split, short_y, gate_sum, norm_sums)


def reference_forward(
    x: Tensor, y: Tensor, gate: Tensor | None, scale: Tensor | None, shift: Tensor | None, split: int, affine: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `triton_forward`."""
    new = torch.empty_like(x, memory_format=torch.contiguous_format)
    passed = x.shape[1] - y.shape[1]  # tokens without a y
    for row, tokens in segments(split, x.shape[1]):
        if tokens.start < passed:
            new[:, tokens] = x[:, tokens]
            continue
        added = y[:, tokens.start - passed : tokens.stop - passed]
        if gate is None:
            torch.add(wide(x[:, tokens]), wide(added), out=new[:, tokens])
        else:
            torch.addcmul(wide(x[:, tokens]), wide(added), gate[:, row : row + 1], out=new[:, tokens])
    if scale is None or shift is None:
        nothing = x.new_empty(0)
        return new, nothing, nothing, nothing
    normed, boundary = (new[:, split:], 0) if affine else (new, split)
    return new, *norm.reference_forward(normed, scale, shift, boundary, 0.0 if affine else 1.0, eps)


def reference_backward(
    dnew: Tensor | None, dn: Tensor | None, saved: Saved, split: int, short_y: bool, affine: bool, gate_sum: bool, norm_sums: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `triton_backward`."""
    new, mean, rstd, scale, gate, y = saved
    dx = dy = dgate = dscale = dshift = torch.empty(0)
    total = dnew
    if new is not None and dn is not None and mean is not None and rstd is not None and scale is not None:
        normed, boundary, base = (new[:, split:], 0, 0.0) if affine else (new, split, 1.0)
        through, dscale, dshift = norm.reference_backward(dn, normed, mean, rstd, scale, boundary, base, norm_sums)
        total = dx = _sum(dnew, through, new)
    if gate is not None and total is not None:
        passed = split if short_y else 0
        dy = torch.empty_like(total[:, passed:], memory_format=torch.contiguous_format)
        dgate = torch.zeros(total.shape[0], 2, total.shape[2], dtype=wide(total[:0]).dtype, device=total.device)
        for row, tokens in segments(split, total.shape[1]):
            if tokens.start >= passed:
                here, gradient = slice(tokens.start - passed, tokens.stop - passed), wide(total[:, tokens])
                torch.mul(gradient, gate[:, row : row + 1], out=dy[:, here])
                if gate_sum and y is not None:
                    dgate[:, row] = torch.linalg.vecdot(gradient, wide(y[:, here]), dim=1)
    return dx, dy, dgate, dscale, dshift


def _sum(dnew: Tensor | None, through: Tensor, new: Tensor) -> Tensor:
    """dnew (zero for None) plus the norm's gradient of the last tokens of `new`, in a tensor of its own."""
    passed = new.shape[1] - through.shape[1]
    if dnew is None:
        return F.pad(through, (0, 0, passed, 0))
    if not passed:
        return through.add_(dnew)  # made here, seen by no one else
    dx = torch.empty_like(new)
    dx[:, :passed] = dnew[:, :passed]
    torch.add(dnew[:, passed:], through, out=dx[:, passed:])
    return dx


class _GatedResidual(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        gate: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        split: int,
        affine: bool,
        eps: float,
        triton: bool,
    ) -> Any:
        """Runs the chosen forward and keeps what the module's head says."""
        run = triton_forward if triton else reference_forward
        new, n, mean, rstd = run(x, y, gate, scale, shift, split, affine, eps)
        ctx.set_materialize_grads(False)
        ctx.split, ctx.short_y, ctx.affine, ctx.triton = split, y.shape[1] < x.shape[1], affine, triton
        kept = (None,) * 4 if scale is None else (new, mean, rstd, scale)
        # A gate without a gradient is kept as it is, not "saved": saved last, it would make a checkpoint recompute all before it.
        wants_gate = ctx.needs_input_grad[2]
        ctx.gate = None if wants_gate else gate
        ctx.save_for_backward(*kept, *((gate, y) if wants_gate else (None, None)))
        return new if scale is None else (new, n)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dnew: Tensor | None, dn: Tensor | None = None) -> tuple[Tensor | None, ...]:
        """The gradients that are asked for."""
        if dnew is None and dn is None:
            return (None,) * 9
        saved: list[Tensor | None] = list(ctx.saved_tensors)
        saved[4] = ctx.gate if saved[4] is None else saved[4]
        if dn is None:  # the norm led nowhere
            saved[:4] = [None] * 4
        wants_x, wants_y, wants_gate, wants_scale, wants_shift = ctx.needs_input_grad[:5]
        gate_sum, norm_sums = wants_gate, (wants_scale or wants_shift) and dn is not None
        dx, dy, dgate, dscale, dshift = dnew, None, None, None, None
        if dn is not None or saved[4] is not None:
            run = triton_backward if ctx.triton else reference_backward
            dx, dy, dgate, dscale, dshift = run(dnew, dn, saved, ctx.split, ctx.short_y, ctx.affine, gate_sum, norm_sums)
            if dn is None:  # nothing to add to it
                dx = dnew
        if saved[4] is None and dx is not None:  # gate 1: the same gradient, seen from y's first token on
            dy = dx[:, ctx.split :] if ctx.short_y else dx
        return (
            dx if wants_x else None,
            dy if wants_y else None,
            dgate if wants_gate else None,
            dscale if wants_scale and norm_sums else None,
            dshift if wants_shift and norm_sums else None,
            *(None,) * 4,
        )


def gated_residual(x: Tensor, y: Tensor, gate: Tensor | None = None, split: int = 0, kernels: str = "auto") -> Tensor:
    """x + gate * y for x [B, L, D], y [B, L, D] or [B, L - split, D] (then tokens before `split` pass), gate [B, 2, D] or None.

    Like x, contiguous. No gate is a gate of 1. Tokens before `split` take the first row of the gate, the others the second.
    Any strides; fp32 arithmetic (fp64 for fp64), one rounding. Gradients where asked for.
    """
    _check(x, y, split)
    if (choice := choose(kernels, x)) == "compile":
        return _plain(x, y, gate, split)
    return _GatedResidual.apply(x, y, gate, None, None, split, False, 0.0, choice == "triton")  # type: ignore[no-any-return]


def gated_residual_modulated_norm(
    x: Tensor, y: Tensor, gate: Tensor | None, scale: Tensor, shift: Tensor, split: int, eps: float = 1e-6, kernels: str = "auto"
) -> tuple[Tensor, Tensor]:
    """new = `gated_residual`(x, y, gate, split) and LN(new) * (1 + scale) + shift, both [B, L, D]; scale and shift [B, 2, D]."""
    _check(x, y, split)
    if (choice := choose(kernels, x)) == "compile":
        new = _plain(x, y, gate, split)
        return new, norm.modulated_norm(new, scale, shift, split, eps, kernels)
    return _GatedResidual.apply(x, y, gate, scale, shift, split, False, eps, choice == "triton")  # type: ignore[no-any-return]


def gated_residual_layer_norm(
    x: Tensor, y: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor, split: int, eps: float = 1e-6, kernels: str = "auto"
) -> tuple[Tensor, Tensor]:
    """new = `gated_residual`(x, y, gate, split) [B, L, D] and LN(new[:, split:]) * weight + bias [B, L - split, D]."""
    _check(x, y, split)
    if (choice := choose(kernels, x)) == "compile":
        new = _plain(x, y, gate, split)
        part = wide(new[:, split:])
        return new, F.layer_norm(part, x.shape[2:], weight.to(part.dtype), bias.to(part.dtype), eps).type_as(x)
    rows = (part.expand(x.shape[0], 2, -1) for part in (weight, bias))
    return _GatedResidual.apply(x, y, gate, *rows, split, True, eps, choice == "triton")  # type: ignore[no-any-return]


def _plain(x: Tensor, y: Tensor, gate: Tensor | None, split: int) -> Tensor:
    """x + gate * y as torch.compile is to see it."""
    short = x.shape[1] - y.shape[1]
    added = wide(F.pad(y, (0, 0, short, 0)) if short else y)
    if gate is not None:
        added = added * by_segment(gate, split, x.shape[1])
    return (wide(x) + added).type_as(x)


def _check(x: Tensor, y: Tensor, split: int) -> None:
    check_split(split, x)
    if y.ndim != 3 or y.shape[1] not in (x.shape[1], x.shape[1] - split):
        raise ValueError(f"y of shape {tuple(y.shape)} has neither x's tokens {tuple(x.shape)} nor those from split={split} on")
