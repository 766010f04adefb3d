"""Floating-point operations of a step (a multiply and an add are two), by torch's own formulas.

torch's counter mode decomposes operators, so that a memory count beside it sees the peak of their pieces, and follows modules by
hooks, which fail where a backward differentiates; this one only looks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, shape_wrapper

_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def count_flops(step: Callable[[], Any]) -> int:
    """FLOPs of `step`: matrix products, convolutions, attention, as often as they run, so what checkpointing recomputes too."""
    with FlopCounter() as counter:
        step()
    return counter.total


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


class FlopCounter(TorchDispatchMode):
    """Adds up in `total` what is computed while it is entered; beside a LiveCounter, inside any FakeTensorMode."""

    formulas: Mapping[Any, Callable[..., int]] = flop_registry | {
        torch.ops.aten.addmm_: flop_registry[torch.ops.aten.addmm],  # in place: torch's table has it not
        _ATTENTION: shape_wrapper(attention_flops),
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: shape_wrapper(_backward_flops),
    }

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as LiveCounter

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        output = func(*args, **(kwargs or {}))
        formula = self.formulas.get(func._overloadpacket)
        if formula is not None:
            self.total += int(formula(*args, **(kwargs or {}), out_val=output))
        return output
