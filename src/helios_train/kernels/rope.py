"""Rotary position embedding over time, rows and columns: the torch reference.

Axes: B batch, L tokens, N heads, K head width, T frames, D one axis' share of K (`rope_dim`, three of them, sum K).
Neighbouring channels (2i, 2i+1) are one plane, turned by position * theta^(-2i/D). Layout and numbers follow diffusers'
`HeliosRotaryPosEmbed` and `apply_rotary_emb_transposed` (0.42).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from helios_train.errors import InputError


def rope_frequencies(rope_dim: Sequence[int], theta: float, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Radians a position for the planes of each axis (time, rows, columns): three fp32 tensors [D / 2].

    Raises InputError unless `rope_dim` is three even widths.
    """
    if len(rope_dim) != 3 or any(dim <= 0 or dim % 2 for dim in rope_dim):
        raise InputError(f"rope_dim={tuple(rope_dim)} must be three positive even widths (time, rows, columns)")
    time, rows, columns = (1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim) for dim in rope_dim)
    return time, rows, columns


def rope_table(
    indices_T: Tensor,
    height: int,
    width: int,
    rope_dim: Sequence[int],
    theta: float,
    pool: int | tuple[int, int, int] = 1,
    offset: tuple[int, int] = (0, 0),
) -> Tensor:
    """Cosines and sines of every token of a [T, height, width] grid: fp32 [L, 2K], K cosines, then K sines, each pair twice.

    `indices_T` are the frames' positions in time; rows and columns count from `offset`. With `pool` > 1 the table is that of the
    full grid, padded by its last entries to whole blocks and averaged over blocks of pool^3 (the mid and long history
    patches: 2 and 4), or of three sides of their own; one number gives L = ceil(T / pool) * ceil(height / pool) *
    ceil(width / pool). An axis' entries vary along that axis only, so averaging along it gives the block's mean.
    """
    device = indices_T.device
    sides = (
        torch.arange(first, first + side, dtype=torch.float32, device=device)
        for first, side in zip(offset, (height, width), strict=True)
    )
    positions = (indices_T.float(), *sides)
    sizes = (pool,) * 3 if isinstance(pool, int) else pool
    cosines, sines = [], []
    for position, frequency, size in zip(positions, rope_frequencies(rope_dim, theta, device), sizes, strict=True):
        angle = torch.outer(position, frequency).repeat_interleave(2, dim=-1)
        cosines.append(_pooled(angle.cos(), size))
        sines.append(_pooled(angle.sin(), size))
    frames, rows, columns = (len(axis) for axis in cosines)
    grid = [
        axis.view(*shape, -1).expand(frames, rows, columns, -1)
        for axes in (cosines, sines)
        for axis, shape in zip(axes, ((frames, 1, 1), (1, rows, 1), (1, 1, columns)), strict=True)
    ]
    return torch.cat(grid, dim=-1).flatten(0, 2)


def _pooled(axis: Tensor, pool: int) -> Tensor:
    """[P, D] -> [ceil(P / pool), D]: the last row repeated to whole blocks, then the mean of each block."""
    if pool == 1:
        return axis
    missing = -len(axis) % pool
    padded = torch.cat([axis, axis[-1:].expand(missing, -1)]) if missing else axis
    return padded.unflatten(0, (-1, pool)).mean(dim=1)


def apply_rope(x_BLNK: Tensor, table: Tensor) -> Tensor:
    """Turn every plane of queries or keys [B, L, N, K] by its token's angle; same shape and dtype, computed in at least fp32.

    `table` is [L, 2K] (or [B, L, 2K]) of `rope_table`. Differentiable any number of times; strides of `x_BLNK` are free.
    """
    # One complex product: 4 to 5 times the speed of writing even and odd channels apart (fp32, one thread).
    planes = x_BLNK.to(torch.promote_types(x_BLNK.dtype, torch.float32)).contiguous().unflatten(-1, (-1, 2))
    turned = torch.view_as_complex(planes) * rope_planes(table).unsqueeze(-2)
    return torch.view_as_real(turned).flatten(-2).type_as(x_BLNK)


def rope_planes(table: Tensor) -> Tensor:
    """cosine + i sine of every plane, complex [..., K / 2], of a table [..., 2K] that holds each pair twice."""
    return torch.complex(*table.unflatten(-1, (2, -1, 2))[..., 0].unbind(-2))
