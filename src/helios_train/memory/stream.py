"""A frozen backbone that stands on the host and comes to the device block by block.

A block's weights (0.7 GB at 14 B) are copied from pinned memory into one of a few slots while earlier blocks compute, on a stream
of its own; nothing is ever written back. A forward takes the blocks upwards, a backward (which computes each again) downwards, so
the next one is known. A copy begins when all that was computed before it was asked for is done, the block before the one that
computes with its backward among that; an event says when it has arrived.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from helios_train.memory.places import DEVICE, Places

SLOTS = 3  # the block that computes, the one that arrives, and one more: it spares a copy where the direction turns


class Copier(Protocol):
    """Copies host tensors to the device beside what is computed there, in the order in which copies are begun."""

    def mark(self) -> Any:
        """Now, in the order of what is computed."""

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]], after: Any) -> Any:
        """Begins to copy (from host, to device) once what was computed until the mark `after` is done; what says it is done."""

    def wait(self, ticket: Any) -> None:
        """What is computed from now on comes after that copy."""


class SideStream:
    """Copies on a CUDA stream of their own; on a CPU at once."""

    def __init__(self, places: Places):
        self.places = places
        self._stream = torch.cuda.Stream(places.device) if places.device.type == "cuda" else None

    def mark(self) -> Any:
        """An event of the current stream."""
        if self._stream is None:
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]], after: Any) -> Any:
        """As Copier says."""
        if self._stream is not None and after is not None:
            self._stream.wait_event(after)
        with torch.cuda.stream(self._stream) if self._stream else nullcontext():
            for host, slot in pairs:
                self.places.fetch(host, out=slot)
            if self._stream is None:
                return None
            event = torch.cuda.Event()
            event.record()
            return event

    def wait(self, ticket: Any) -> None:
        """As Copier says."""
        if ticket is not None:
            torch.cuda.current_stream(self.places.device).wait_event(ticket)


class _Slot:
    """Room for one block on the device."""

    def __init__(self, tensors: list[Tensor]):
        self.tensors = tensors
        self.block: int | None = None  # whose weights are in it, or on their way
        self.arrived: Any = None
        self.used = 0  # when last, in turns


class Streamed:
    """Blocks whose frozen weights and buffers come when they are called. Trainable weights among them stay where they are."""

    def __init__(self, blocks: Sequence[nn.Module], places: Places, copier: Copier | None = None, slots: int = SLOTS):
        """Moves the blocks' frozen weights to the host. ValueError for blocks that are not alike, or fewer than two slots."""
        if slots < 2:
            raise ValueError(f"{slots} slots: one block computes while another arrives; take 2 or more")
        self.copier = copier or SideStream(places)
        self._where = [_frozen(block) for block in blocks]
        shapes = [[(name, tensor.shape, tensor.dtype) for (_, name), tensor in _now(where)] for where in self._where]
        if any(shape != shapes[0] for shape in shapes):
            raise ValueError("blocks of one backbone have the same weights")
        room = [[places.empty_like(tensor, DEVICE) for _, tensor in _now(self._where[0])] for _ in range(min(slots, len(blocks)))]
        self._slots = [_Slot(tensors) for tensors in room]
        self.host: list[list[Tensor]] = []
        for number, where in enumerate(self._where):
            self.host.append([places.stow(tensor.data) for _, tensor in _now(where)])
            self._point(number, [tensor.new_empty(0) for tensor in self.host[-1]])
        self._turn, self._last = 0, -1
        for number, block in enumerate(blocks):
            block.register_forward_pre_hook(self._called(number))

    @property
    def slots(self) -> list[list[Tensor]]:
        """The room on the device."""
        return [slot.tensors for slot in self._slots]

    def _called(self, number: int) -> Callable[..., None]:
        def _hook(*_: Any) -> None:
            self.use(number)

        return _hook

    def use(self, number: int) -> None:
        """Block `number` is about to compute: its weights are there, and the next one's are on their way."""
        self._turn += 1
        slot = self._bring(number)
        self.copier.wait(slot.arrived)
        slot.used = self._turn
        upwards = number == 0 or number > self._last  # a pass begins with block 0; a backward with the last, twice in a row
        self._last = number
        self._bring((number + (1 if upwards else -1)) % len(self._where))

    def _bring(self, number: int) -> _Slot:
        """The slot of a block: where it is, or that which was used longest ago, so never the one that computes."""
        for slot in self._slots:
            if slot.block == number:
                return slot
        slot = min(self._slots, key=lambda slot: slot.used)
        if slot.block is not None:
            self._point(slot.block, [tensor.new_empty(0) for tensor in slot.tensors])
        slot.block = number
        slot.arrived = self.copier.copy(list(zip(self.host[number], slot.tensors, strict=True)), self.copier.mark())
        self._point(number, slot.tensors)
        return slot

    def _point(self, number: int, tensors: Sequence[Tensor]) -> None:
        for ((owner, name), old), data in zip(_now(self._where[number]), tensors, strict=True):
            if isinstance(old, nn.Parameter):
                old.data = data
            else:
                owner._buffers[name] = data


def _frozen(block: nn.Module) -> list[tuple[nn.Module, str]]:
    """Where a block's frozen weights and its buffers are: (module, name)."""
    found = []
    for module in block.modules():
        found += [
            (module, name) for name, weight in module._parameters.items() if weight is not None and not weight.requires_grad
        ]
        found += [(module, name) for name, buffer in module._buffers.items() if buffer is not None]
    return found


def _now(where: Sequence[tuple[nn.Module, str]]) -> list[tuple[tuple[nn.Module, str], Tensor]]:
    """What stands there now."""
    return [((owner, name), {**owner._parameters, **owner._buffers}[name]) for owner, name in where]  # type: ignore[misc]
