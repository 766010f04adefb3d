"""stage=mid: killed and resumed equals never killed: weights, moments, EMA, samples, draws and metrics, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from .runs import Runs, killed_and_resumed


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (2, 2)])
def test_killed_and_resumed_is_bit_equal(runs: Runs, unkilled: Callable[[str, int], Path], ranks: int, workers: int) -> None:
    killed_and_resumed(runs, unkilled("mid", ranks), "mid", ranks, workers)
