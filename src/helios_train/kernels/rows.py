"""What the row-wise kernels share: segments, launch shapes, and device code on a row held in registers.

Axes: B samples, L tokens, D width, R rows of modulation (2: the first for tokens before `split`, the second from there on),
C chunks. A program takes one chunk, consecutive tokens of one segment of one sample: it reads the modulation once, and sums
its gradients in registers, which come out as one partial row a chunk [B, C, D] (no atomics: the same sums every time).

A row is a tuple of tiles, each a power of two wide, which together cover D: 5,120 is five tiles of 1,024, where one block
would be padded to 8,192 and spill.
"""

# ruff: noqa: RUF005 -- Triton compiles no starred tuples

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple, no_type_check

import torch
from torch import Tensor

from helios_train.kernels.dispatch import jit, tl

TILE = 1024  # columns at most; 8 warps read 8 bytes of bf16 a thread
FORWARD_ROWS = 16  # tokens a program in forward: enough to forget the cost of the modulation, few enough to balance
VARYING = ("length", "split", "chunk", "eps")  # arguments that change from call to call


class Launch(NamedTuple):
    """Grid and compile-time values of one launch."""

    grid: tuple[int, ...]
    chunk: int  # tokens a program
    first: int  # chunks of a sample's first segment
    tile: int


def segments(split: int, length: int) -> list[tuple[int, slice]]:
    """(row of the modulation, its tokens) of the segments that are not empty."""
    return [(row, tokens) for row, tokens in ((0, slice(0, split)), (1, slice(split, length))) if tokens.start < tokens.stop]


def launch(x_BLD: Tensor, split: int, sums: bool) -> Launch:
    """How to cut [B, L, D]: into chunks of FORWARD_ROWS tokens or, where a chunk gives `sums`, as few as fill the device."""
    batch, length, width = x_BLD.shape
    fill = 2 * _processors(x_BLD.device) if sums else batch * length // FORWARD_ROWS
    chunk = _chunk(batch, length, split, max(fill, 1))
    first, rest = -(-split // chunk), -(-(length - split) // chunk)
    return Launch((first + rest, batch), chunk, first, min(TILE, _power_of_two(width)))


@lru_cache(maxsize=1024)
def _chunk(batch: int, length: int, split: int, programs: int) -> int:
    """The smallest chunk with no more than that many programs, where two segments a sample allow it."""
    chunk = max(-(-batch * length // programs), 1)
    while chunk < length and batch * (-(-split // chunk) - (-(length - split) // chunk)) > programs:
        chunk += 1
    return chunk


def _processors(device: torch.device) -> int:
    if device.type != "cuda" or not torch.cuda.is_available():
        return 132  # of an H100: what is traced on fake tensors is planned for one
    return torch.cuda.get_device_properties(device).multi_processor_count


def _power_of_two(number: int) -> int:
    return 1 << max(number - 1, 1).bit_length()


def dense_rows(x: Tensor) -> Tensor:
    """`x` itself where its last axis is dense, else a contiguous copy: kernels take any other strides as they are."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def fold(partials_BCD: Tensor, first: int) -> Tensor:
    """Partial sums a chunk -> the two rows of each sample, fp32 [B, 2, D]; an empty segment gives zeros."""
    return torch.stack([partials_BCD[:, :first].sum(1), partials_BCD[:, first:].sum(1)], dim=1)


def check_split(split: int, x_BLD: Tensor) -> None:
    """ValueError unless x is [B, L, D] and split in [0, L]: a caller's mistake, not a user's."""
    if x_BLD.ndim != 3 or not 0 <= split <= x_BLD.shape[1]:
        raise ValueError(f"split={split} does not fit tokens of shape {tuple(x_BLD.shape)}, which must be [B, L, D]")


# Device code. `tl` types of arguments: pointers, int32 scalars; rows are tuples of TILES tiles.


@jit()
@no_type_check
def chunk_of(index, length, split, chunk):
    """(segment, first token, end) of a sample's chunk: chunks of the first segment come first and end at `split`."""
    first = (split + chunk - 1) // chunk
    late = index >= first
    start = tl.where(late, split + (index - first) * chunk, index * chunk)
    end = tl.minimum(start + chunk, tl.where(late, length, split))
    return late.to(tl.int32), start, end


@jit()
@no_type_check
def load_row(pointer, count, D: tl.constexpr, TILE: tl.constexpr):
    """The first `count` values as fp32, then zeros: `count` is D, or 0 to read nothing."""
    row = ()
    for tile in tl.static_range((D + TILE - 1) // TILE):
        columns = tile * TILE + tl.arange(0, TILE)
        row = row + (tl.load(pointer + columns, mask=columns < count, other=0.0).to(tl.float32),)
    return row


@jit()
@no_type_check
def store_row(pointer, row, count, D: tl.constexpr, TILE: tl.constexpr):
    """Write the first `count` values (D, or 0 for none), rounded to the pointer's dtype."""
    for tile in tl.static_range((D + TILE - 1) // TILE):
        columns = tile * TILE + tl.arange(0, TILE)
        tl.store(pointer + columns, row[tile].to(pointer.dtype.element_ty), mask=columns < count)


@jit()
@no_type_check
def zero_row(D: tl.constexpr, TILE: tl.constexpr):
    """A row of zeros."""
    row = ()
    for _ in tl.static_range((D + TILE - 1) // TILE):
        row = row + (tl.full((TILE,), 0.0, tl.float32),)
    return row


@jit()
@no_type_check
def add_product(total, a, b, TILES: tl.constexpr):
    """total + a * b."""
    row = ()
    for tile in tl.static_range(TILES):
        row = row + (total[tile] + a[tile] * b[tile],)
    return row


@jit()
@no_type_check
def add_row(total, a, TILES: tl.constexpr):
    """total + a."""
    row = ()
    for tile in tl.static_range(TILES):
        row = row + (total[tile] + a[tile],)
    return row


@jit()
@no_type_check
def mean_of_product(a, b, D: tl.constexpr, TILE: tl.constexpr):
    """mean(a * b) over D."""
    total = a[0] * b[0]
    for tile in tl.static_range(1, (D + TILE - 1) // TILE):
        total += a[tile] * b[tile]
    return tl.sum(total, 0) / D


@jit()
@no_type_check
def mean_of(a, D: tl.constexpr, TILE: tl.constexpr):
    """mean(a) over D."""
    total = a[0]
    for tile in tl.static_range(1, (D + TILE - 1) // TILE):
        total += a[tile]
    return tl.sum(total, 0) / D
