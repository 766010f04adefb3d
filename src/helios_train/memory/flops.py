"""Floating-point operations of a step, counted in a pass of its own (a multiply and an add are two)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def count_flops(step: Callable[[], Any]) -> int:
    """FLOPs of `step`: matrix products, convolutions and attention, as often as they run, so what checkpointing recomputes too.

    Not under a LiveCounter: torch's counter decomposes operators, and the peak would be that of their pieces.
    """
    formulas = {_ATTENTION: attention_flops, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward_flops}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        step()
    return int(counter.get_total_flops())


def attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """FLOPs of attention's forward, of the shapes [B, N, L, K]: scores, and their product with the values.

    torch's table has the GPU's flash attention and not the CPU's.
    """
    batch, heads, rows, width = query
    return 2 * batch * heads * rows * key[2] * (width + value[3])


def _backward_flops(
    _gradient: Sequence[int], query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any
) -> int:
    """Scores again, and two products for each of the two of the forward."""
    batch, heads, rows, width = query
    return 2 * batch * heads * rows * key[2] * (3 * width + 2 * value[3])
