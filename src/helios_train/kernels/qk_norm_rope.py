"""RMSNorm of queries or keys over all heads together, then RoPE, in one pass into the attention layout [B, L, N, K].

Axes: B samples, L tokens, N heads, K head width (even with a table), D = N K, C chunks. The weight is [D], or [2, D]: one row for
tokens before `split` and one for the rest. The latter is how history keys are amplified: rows (weight * factor of the head,
weight), for a factor a head commutes with the turning of planes, and its gradient is autograd's of that product. Kept for
backward: x, 1 / sqrt(mean(x^2) + eps) of each token in fp32, the weight, and the table, which all blocks share.
"""

# ruff: noqa: RUF005 -- Triton compiles no starred tuples

from __future__ import annotations

from typing import Any, no_type_check

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from helios_train.kernels.dispatch import choose, jit, tl, wide
from helios_train.kernels.rope import rope_planes
from helios_train.kernels.rows import VARYING, check_split, chunk_of, dense_rows, launch, segments

WARPS, BACKWARD_WARPS, STAGES = 8, 8, 2
TILE = 1024  # channels of as many whole heads at most

# A row here is a tuple of (even, odd) pairs of tiles [H, K / 2]: H heads, the two channels of each plane apart.


@jit()
@no_type_check
def load_heads(pointer, D: tl.constexpr, K: tl.constexpr, H: tl.constexpr, WIDE: tl.constexpr):
    """D values as fp32, zero beyond; WIDE is K as a power of two."""
    evens, odds = (), ()
    for tile in tl.static_range((D + H * K - 1) // (H * K)):
        heads, channels = tile * H + tl.arange(0, H)[:, None], tl.arange(0, WIDE)[None, :]
        inside = (heads * K + channels < D) & (channels < K)
        value = tl.load(pointer + heads * K + channels, mask=inside, other=0.0).to(tl.float32)
        even, odd = tl.split(tl.reshape(value, (H, WIDE // 2, 2)))
        evens, odds = evens + (even,), odds + (odd,)
    return evens, odds


@jit()
@no_type_check
def store_heads(pointer, evens, odds, D: tl.constexpr, K: tl.constexpr, H: tl.constexpr, WIDE: tl.constexpr):
    """Write the D values, rounded to the pointer's dtype."""
    for tile in tl.static_range((D + H * K - 1) // (H * K)):
        heads, channels = tile * H + tl.arange(0, H)[:, None], tl.arange(0, WIDE)[None, :]
        inside = (heads * K + channels < D) & (channels < K)
        value = tl.reshape(tl.join(evens[tile], odds[tile]), (H, WIDE))
        tl.store(pointer + heads * K + channels, value.to(pointer.dtype.element_ty), mask=inside)


@jit()
@no_type_check
def load_turn(pointer, K: tl.constexpr, WIDE: tl.constexpr):
    """Cosines and sines [1, K / 2] of a token's planes; the table holds each twice."""
    planes = tl.arange(0, WIDE // 2)[None, :] * 2
    cosine = tl.load(pointer + planes, mask=planes < K, other=0.0).to(tl.float32)
    return cosine, tl.load(pointer + K + planes, mask=planes < K, other=0.0).to(tl.float32)


@jit(*VARYING)
@no_type_check
def forward_kernel(
    x_ptr, weight_ptr, table_ptr, y_ptr, rstd_ptr, x_b, x_l, weight_r, table_b, table_l, length, split, chunk, eps,
    ROPE: tl.constexpr, D: tl.constexpr, K: tl.constexpr, H: tl.constexpr, WIDE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y = R(x * rstd * weight[segment]), rstd = 1 / sqrt(mean(x^2) + eps); R turns (e, o) to (e cos - o sin, o cos + e sin)."""
    TILES: tl.constexpr = (D + H * K - 1) // (H * K)
    sample = tl.program_id(1).to(tl.int64)
    segment, start, end = chunk_of(tl.program_id(0), length, split, chunk)
    weight_e, weight_o = load_heads(weight_ptr + segment * weight_r, D, K, H, WIDE)
    for token in tl.range(start, end, num_stages=STAGES):
        x_e, x_o = load_heads(x_ptr + sample * x_b + token * x_l, D, K, H, WIDE)
        squares = x_e[0] * x_e[0] + x_o[0] * x_o[0]
        for tile in tl.static_range(1, TILES):
            squares += x_e[tile] * x_e[tile] + x_o[tile] * x_o[tile]
        rstd = tl.rsqrt(tl.sum(squares) / D + eps)
        y_e, y_o = (), ()
        if ROPE:
            cosine, sine = load_turn(table_ptr + sample * table_b + token * table_l, K, WIDE)
        for tile in tl.static_range(TILES):
            even, odd = x_e[tile] * rstd * weight_e[tile], x_o[tile] * rstd * weight_o[tile]
            if ROPE:
                even, odd = even * cosine - odd * sine, odd * cosine + even * sine
            y_e, y_o = y_e + (even,), y_o + (odd,)
        store_heads(y_ptr + (sample * length + token) * D, y_e, y_o, D, K, H, WIDE)
        tl.store(rstd_ptr + sample * length + token, rstd)


@jit(*VARYING)
@no_type_check
def backward_kernel(
    dy_ptr, x_ptr, rstd_ptr, weight_ptr, table_ptr, dx_ptr, dweight_ptr, dy_b, dy_l, x_b, x_l, weight_r, table_b, table_l,
    length, split, chunk, ROPE: tl.constexpr, SUM: tl.constexpr, D: tl.constexpr, K: tl.constexpr, H: tl.constexpr,
    WIDE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """With g = R^T(dy), h = x * rstd: dx = rstd * (g * weight - h * mean(g * weight * h)); of the chunk, dweight = sum(g * h)."""
    TILES: tl.constexpr = (D + H * K - 1) // (H * K)
    sample = tl.program_id(1).to(tl.int64)
    segment, start, end = chunk_of(tl.program_id(0), length, split, chunk)
    weight_e, weight_o = load_heads(weight_ptr + segment * weight_r, D, K, H, WIDE)
    sum_e, sum_o = (), ()
    for _ in tl.static_range(TILES):
        sum_e, sum_o = sum_e + (tl.full((H, WIDE // 2), 0.0, tl.float32),), sum_o + (tl.full((H, WIDE // 2), 0.0, tl.float32),)
    for token in tl.range(start, end, num_stages=STAGES):
        dy_e, dy_o = load_heads(dy_ptr + sample * dy_b + token * dy_l, D, K, H, WIDE)
        x_e, x_o = load_heads(x_ptr + sample * x_b + token * x_l, D, K, H, WIDE)
        rstd = tl.load(rstd_ptr + sample * length + token)
        if ROPE:
            cosine, sine = load_turn(table_ptr + sample * table_b + token * table_l, K, WIDE)
        g_e, g_o, slopes = (), (), tl.full((H, WIDE // 2), 0.0, tl.float32)
        for tile in tl.static_range(TILES):
            even, odd = dy_e[tile], dy_o[tile]
            if ROPE:
                even, odd = even * cosine + odd * sine, odd * cosine - even * sine
            g_e, g_o = g_e + (even,), g_o + (odd,)
            slopes += even * weight_e[tile] * x_e[tile] + odd * weight_o[tile] * x_o[tile]
        slope = tl.sum(slopes) / D * rstd * rstd
        dx_e, dx_o, new_e, new_o = (), (), (), ()
        for tile in tl.static_range(TILES):
            dx_e = dx_e + (rstd * (g_e[tile] * weight_e[tile] - x_e[tile] * slope),)
            dx_o = dx_o + (rstd * (g_o[tile] * weight_o[tile] - x_o[tile] * slope),)
            if SUM:
                new_e = new_e + (sum_e[tile] + g_e[tile] * x_e[tile] * rstd,)
                new_o = new_o + (sum_o[tile] + g_o[tile] * x_o[tile] * rstd,)
        if SUM:
            sum_e, sum_o = new_e, new_o
        store_heads(dx_ptr + (sample * length + token) * D, dx_e, dx_o, D, K, H, WIDE)
    if SUM:
        partial = (sample * tl.num_programs(0) + tl.program_id(0)) * D
        store_heads(dweight_ptr + partial, sum_e, sum_o, D, K, H, WIDE)


def _heads_a_tile(width: int, heads: int) -> tuple[int, int, int]:
    """(K, heads a tile, K as a power of two)."""
    size = width // heads
    padded = 1 << (size - 1).bit_length()
    return size, min(max(TILE // padded, 1), 1 << (heads - 1).bit_length()), padded


def _table_strides(table: Tensor | None) -> tuple[int, int]:
    if table is None:
        return 0, 0
    return (table.stride(0) if table.ndim == 3 and table.shape[0] > 1 else 0), table.stride(-2)


def _forward_outputs(x_BLD: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Empty y [B, L, N, K] and rstd fp32 [B, L]."""
    batch, length, width = x_BLD.shape
    rstd = torch.empty(batch, length, dtype=torch.float32, device=x_BLD.device)
    return x_BLD.new_empty(batch, length, heads, width // heads), rstd


@torch.library.custom_op("helios_train::qk_norm_rope", mutates_args=())
def triton_forward(x: Tensor, weight: Tensor, table: Tensor | None, heads: int, split: int, eps: float) -> tuple[Tensor, Tensor]:
    """(y [B, L, N, K], rstd fp32 [B, L]) of x [B, L, D], weight [R, D], table [L, 2K], [B, L, 2K] or None."""
    y, rstd = _forward_outputs(x, heads)
    x, weight, cut = dense_rows(x), dense_rows(weight), launch(x, split, sums=False)
    table = None if table is None else dense_rows(table)
    forward_kernel[cut.grid](
        x, weight, table, y, rstd, *x.stride()[:2], weight.stride(0) if len(weight) > 1 else 0, *_table_strides(table),
        x.shape[1], split, cut.chunk, eps, table is not None, x.shape[2], *_heads_a_tile(x.shape[2], heads), STAGES,
        num_warps=WARPS,
    )  # fmt: skip
    return y, rstd


@triton_forward.register_fake
def _(x: Tensor, weight: Tensor, table: Tensor | None, heads: int, split: int, eps: float) -> tuple[Tensor, Tensor]:
    return _forward_outputs(x, heads)


def _backward_outputs(x_BLD: Tensor, weight: Tensor, sums: bool) -> tuple[Tensor, Tensor]:
    """Empty dx and dweight (fp32 [R, D]; [0] where it is not wanted)."""
    dx = torch.empty_like(x_BLD, memory_format=torch.contiguous_format)
    return dx, torch.empty(weight.shape if sums else (0,), dtype=torch.float32, device=x_BLD.device)


@torch.library.custom_op("helios_train::qk_norm_rope_backward", mutates_args=())
def triton_backward(
    dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, table: Tensor | None, split: int, sums: bool
) -> tuple[Tensor, Tensor]:
    """(dx, dweight) of `triton_forward`; dweight fp32 [R, D], or [0] without `sums`."""
    dx, dweight = _backward_outputs(x, weight, sums)
    heads, dy = dy.shape[2], _flat(dy)
    x, weight, cut = dense_rows(x), dense_rows(weight), launch(x, split, sums)
    table = None if table is None else dense_rows(table)
    partials = dweight.new_empty(x.shape[0], cut.grid[0], x.shape[2]) if sums else dweight
    backward_kernel[cut.grid](
        dy, x, rstd, weight, table, dx, partials, *dy.stride()[:2], *x.stride()[:2], weight.stride(0) if len(weight) > 1 else 0,
        *_table_strides(table), x.shape[1], split, cut.chunk, table is not None, sums, x.shape[2],
        *_heads_a_tile(x.shape[2], heads), STAGES, num_warps=BACKWARD_WARPS,
    )  # fmt: skip
    if not sums:
        return dx, dweight
    if len(weight) == 1:
        return dx, partials.sum((0, 1))[None]
    return dx, torch.stack([partials[:, : cut.first].sum((0, 1)), partials[:, cut.first :].sum((0, 1))])


@triton_backward.register_fake
def _(dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, table: Tensor | None, split: int, sums: bool) -> tuple[Tensor, Tensor]:
    return _backward_outputs(x, weight, sums)


def _flat(dy_BLNK: Tensor) -> Tensor:
    """[B, L, D] with dense rows: attention may hand back a gradient in another order of axes."""
    return dense_rows(dy_BLNK.flatten(2))


def reference_forward(
    x: Tensor, weight: Tensor, table: Tensor | None, heads: int, split: int, eps: float
) -> tuple[Tensor, Tensor]:
    """As `triton_forward`: a scaled row, then one complex product a plane, which carries rstd along."""
    y, values = x.new_empty(*x.shape[:2], heads, x.shape[2] // heads), wide(x)
    rstd = torch.linalg.vector_norm(values, dim=-1).square_().div_(x.shape[2]).add_(eps).rsqrt_()
    turn = None if table is None else rope_planes(table) * rstd.unsqueeze(-1)
    out = y if values is x else torch.empty_like(y, dtype=values.dtype)
    for row, tokens in segments(split, x.shape[1]):
        torch.mul(values[:, tokens], weight[row % len(weight)], out=out[:, tokens].flatten(2))
    if turn is None:
        out.mul_(rstd[..., None, None])
    else:
        torch.view_as_complex(out.unflatten(-1, (-1, 2))).mul_(turn.unsqueeze(-2))
    return y if out is y else y.copy_(out), rstd


def reference_backward(
    dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, table: Tensor | None, split: int, sums: bool
) -> tuple[Tensor, Tensor]:
    """As `triton_backward`."""
    values, gradient = wide(x), wide(dy)
    if table is None:
        g = gradient.flatten(2) * rstd.unsqueeze(-1)
    else:
        turn = (rope_planes(table) * rstd.unsqueeze(-1)).conj().unsqueeze(-2)
        g = torch.view_as_real(torch.view_as_complex(gradient.contiguous().unflatten(-1, (-1, 2))) * turn).flatten(2)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dweight = torch.zeros(weight.shape, dtype=values.dtype, device=x.device)
    for row, tokens in segments(split, x.shape[1]):
        here, part, factor = g[:, tokens], values[:, tokens], weight[row % len(weight)].to(values.dtype)
        product = here * part  # both sums are of it: over tokens for the weight, over channels for the slope
        if sums:
            dweight[row % len(weight)] += product.sum((0, 1))
        slope = (product @ factor).div_(-x.shape[2]).mul_(rstd[:, tokens]).mul_(rstd[:, tokens])
        torch.addcmul(here.mul_(factor), part, slope.unsqueeze(-1), out=dx[:, tokens])
    return dx, dweight


class _QkNormRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, table: Tensor | None, heads: int, split: int, eps: float, triton: bool
    ) -> Tensor:
        """Runs the chosen forward and keeps what the module's head says."""
        y, rstd = (triton_forward if triton else reference_forward)(x, weight, table, heads, split, eps)
        ctx.save_for_backward(x, rstd, weight, table)
        ctx.split, ctx.triton = split, triton
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients that are asked for."""
        x, rstd, weight, table = ctx.saved_tensors
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        run = triton_backward if ctx.triton else reference_backward
        dx, dweight = run(dy, x, rstd, weight, table, ctx.split, wants_weight)
        return dx if wants_x else None, dweight if wants_weight else None, *(None,) * 5


def _turned(y_BLNK: Tensor, table: Tensor) -> Tensor:
    """RoPE in real numbers: torch.compile makes no code for complex ones."""
    cosine, sine = table.unsqueeze(-2).unflatten(-1, (2, -1, 2))[..., 0].unbind(-2)
    even, odd = y_BLNK.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cosine - odd * sine, odd * cosine + even * sine], dim=-1).flatten(-2)


def qk_norm_rope(
    x: Tensor, weight: Tensor, heads: int, table: Tensor | None = None, split: int = 0, eps: float = 1e-6, kernels: str = "auto"
) -> Tensor:
    """RMSNorm over D of x [B, L, D], times `weight`, turned by `table` (none: not turned); contiguous [B, L, N, K] of x's dtype.

    `weight` is [D], or [2, D] with a row for tokens before `split` and one for the rest; `table` is [L, 2K] or [B, L, 2K] of
    `rope.rope_table`, which gets no gradient. Any strides; fp32 arithmetic (fp64 for fp64), one rounding.
    """
    check_split(split, x)
    if x.shape[2] % heads or (table is not None and table.shape[-1] != 2 * (x.shape[2] // heads)):
        raise ValueError(
            f"{heads} heads and a table {None if table is None else tuple(table.shape)} do not fit x {tuple(x.shape)}"
        )
    choice = choose(kernels, x)
    rows = weight if weight.ndim == 2 else weight[None]
    if choice == "compile":
        values = wide(x)
        late = (torch.arange(x.shape[1], device=x.device)[:, None] >= split) if len(rows) > 1 else None
        factor = rows[0] if late is None else torch.where(late, rows[1], rows[0])
        normed = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps) * factor
        y_BLNK = normed.unflatten(-1, (heads, -1))
        return (y_BLNK if table is None else _turned(y_BLNK, table)).type_as(x)
    return _QkNormRope.apply(x, rows, table, heads, split if len(rows) > 1 else 0, eps, choice == "triton")  # type: ignore[no-any-return]
