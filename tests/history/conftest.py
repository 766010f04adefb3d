"""Histories whose every number is known, and the tests of fit their draws are held against."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from helios_train import rng
from helios_train.history import FRAMES, History


@pytest.fixture
def make_history() -> Callable[..., History]:
    """Factory of a random history with the given counts; numbers that exist are never zero, absent ones are."""

    def build(
        counts: Sequence[int], anchored: Sequence[bool] | None = None, channels: int = 3, size: tuple[int, int] = (4, 6)
    ) -> History:
        draw = rng.generator(0, "history of the tests")
        batch = len(counts)
        flags = tuple(count > 0 for count in counts) if anchored is None else tuple(anchored)
        frames = rng.normal(draw, (batch, channels, FRAMES, *size))
        anchor = rng.normal(draw, (batch, channels, 1, *size))
        for b, count in enumerate(counts):
            frames[b, :, : FRAMES - count] = 0
            anchor[b] *= flags[b]
        return History(frames, anchor, tuple(counts), flags)

    return build


@pytest.fixture
def agrees() -> Callable[[History], None]:
    """Asserts that `counts` and `anchored` say what the tensors hold, exactly."""

    def check(history: History) -> None:
        for b, (count, anchored) in enumerate(zip(history.counts, history.anchored, strict=True)):
            held = (history.frames[b] != 0).flatten(2).all(dim=2).all(dim=0).tolist()
            empty = (history.frames[b] == 0).flatten(2).all(dim=2).all(dim=0).tolist()
            assert held == [slot >= FRAMES - count for slot in range(FRAMES)] and empty == [not one for one in held]
            assert bool((history.anchor[b] != 0).all()) == anchored and bool((history.anchor[b] == 0).all()) != anchored

    return check


@pytest.fixture
def chi_square() -> Callable[[Sequence[int], Sequence[float]], float]:
    """p-value of counts under shares; categories of share 0 must be empty."""

    def p_value(counts: Sequence[int], shares: Sequence[float]) -> float:
        total = sum(counts)
        assert all(count == 0 for count, share in zip(counts, shares, strict=True) if share == 0)
        cells = [(count, share * total) for count, share in zip(counts, shares, strict=True) if share > 0]
        if len(cells) == 1:
            return 1.0
        distance = sum((count - wanted) ** 2 / wanted for count, wanted in cells)
        return float(torch.special.gammaincc(torch.tensor((len(cells) - 1) / 2), torch.tensor(distance / 2)))

    return p_value


@pytest.fixture
def uniform() -> Callable[[Tensor, float, float], bool]:
    """Whether numbers pass for uniform on (low, high): Kolmogorov-Smirnov at a level of 0.1 %."""

    def passes(numbers: Tensor, low: float, high: float) -> bool:
        found = ((numbers.double().flatten() - low) / (high - low)).sort().values
        steps = torch.arange(len(found) + 1, dtype=torch.float64) / len(found)
        distance = torch.maximum((found - steps[:-1]).abs().max(), (steps[1:] - found).abs().max())
        return bool(found[0] >= 0 and found[-1] <= 1 and distance * len(found) ** 0.5 < 1.95)

    return passes
