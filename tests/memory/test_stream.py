"""Streamed blocks: none computes before it arrived, none is overwritten while it is used, however slow the copies are."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from helios_train.memory.places import Places
from helios_train.memory.stream import Streamed

CPU = Places("cpu")
SIZE = 16


class Slow:
    """Copies on a thread, some time later; until then the slot holds NaN."""

    def __init__(self, delay: float = 0.01):
        self.delay, self.log = delay, list[str]()
        self.last: threading.Thread | None = None

    def mark(self) -> Any:
        return None

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]], after: Any) -> Any:
        before = self.last
        for _, slot in pairs:
            slot.fill_(float("nan"))

        def _later() -> None:
            if before is not None:
                before.join()
            time.sleep(self.delay)
            with torch.no_grad():
                for host, slot in pairs:
                    slot.copy_(host)

        thread = threading.Thread(target=_later)
        self.last = thread
        (number,) = (int(host[0, 0]) for host, _ in pairs if host.ndim == 2)
        self.log.append(f"copy {number}")
        thread.start()
        return thread

    def wait(self, ticket: Any) -> None:
        ticket.join()


class Block(nn.Module):
    """A layer whose first weight is its number."""

    def __init__(self, number: int):
        super().__init__()
        self.layer, self.scale = nn.Linear(SIZE, SIZE), nn.Parameter(torch.ones(SIZE))
        self.layer.requires_grad_(False)
        self.register_buffer("offset", torch.full((SIZE,), 0.1))
        with torch.no_grad():
            self.layer.weight.copy_(torch.linspace(-0.4, 0.4, SIZE * SIZE).view(SIZE, SIZE).roll(number))
            self.layer.weight[0, 0] = number

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x) * self.scale / SIZE + self.offset)


def passes(blocks: Sequence[nn.Module]) -> list[Tensor]:
    """Two forwards, of which the second is differentiated, and one more: outputs and gradients."""
    x = torch.linspace(-1, 1, SIZE).requires_grad_()
    with torch.no_grad():
        plain = x
        for block in blocks:
            plain = block(plain)
    y = x
    for block in blocks:
        y = checkpoint(block, y, use_reentrant=False)
    y.sum().backward()
    with torch.no_grad():
        again = x
        for block in blocks:
            again = block(again)
    assert x.grad is not None
    return [plain, y, again, x.grad, *(block.scale.grad for block in blocks)]  # type: ignore[misc]


@pytest.mark.parametrize("slots", [2, 3, 4])
@pytest.mark.parametrize("number", [1, 2, 3, 6])
def test_slow_copies_change_nothing(slots: int, number: int) -> None:
    blocks = [Block(index) for index in range(number)]
    streamed = copy.deepcopy(blocks)
    Streamed(streamed, CPU, Slow(), slots)
    for one, other in zip(passes(streamed), passes(blocks), strict=True):
        assert torch.equal(one, other)


def test_the_next_block_is_on_its_way_while_one_computes() -> None:
    """Each block's copy is begun in the turn of the block before it, upwards and downwards."""
    blocks, slow = [Block(index) for index in range(6)], Slow()
    for index, block in enumerate(blocks):
        block.layer.register_forward_pre_hook(lambda *_, index=index: slow.log.append(f"use {index}"))
    Streamed(blocks, CPU, slow)
    passes(blocks)
    uses = [line for line in slow.log if line.startswith("use")]
    assert uses == [f"use {index}" for index in (*range(6), *range(6), *range(5, -1, -1), *range(6))]
    turns = [place for place, line in enumerate(slow.log) if line.startswith("use")]
    began = [place for place, line in enumerate(slow.log) if line.startswith("copy")]
    for turn, before in zip(turns[2:], turns[1:], strict=False):
        own = slow.log[turn].replace("use", "copy")
        assert own not in slow.log[before + 1 : turn], f"{own} was begun in its own turn"
    assert slow.log[:3] == ["copy 0", "copy 1", "use 0"], "but for the very first"
    assert len(began) == 6 + 6 + 4 + 4 + 1, "each block once a pass, but for those still there where the direction turns"


def test_a_copier_that_nobody_waits_for_is_seen() -> None:
    """The test above can fail: without waiting, NaN gets in."""
    blocks, hasty = [Block(index) for index in range(4)], Slow()
    hasty.wait = lambda ticket: None  # type: ignore[method-assign]
    Streamed(blocks, CPU, hasty)
    assert passes(blocks)[0].isnan().any()


def test_on_the_device_are_the_slots_alone() -> None:
    blocks = [Block(index) for index in range(6)]
    before = [block.layer.weight.clone() for block in blocks]
    streamed = Streamed(blocks, CPU)
    assert all(block.layer.weight.numel() == block.offset.numel() == 0 and block.scale.numel() == SIZE for block in blocks)
    assert len(streamed.slots) == 3 and len(streamed.host) == 6
    for host, weight in zip(streamed.host, before, strict=True):
        assert any(torch.equal(tensor, weight) for tensor in host)


def test_what_cannot_be_streamed() -> None:
    with pytest.raises(ValueError, match="take 2 or more"):
        Streamed([Block(0)], CPU, slots=1)
    with pytest.raises(ValueError, match="have the same weights"):
        Streamed([Block(0), nn.Linear(3, 3).requires_grad_(False)], CPU)
