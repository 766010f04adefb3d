"""stage=distill: killed and resumed equals never killed: weights, moments, EMA, samples, draws and metrics, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from .runs import Runs, killed_and_resumed


@pytest.mark.parametrize(("ranks", "workers"), [(1, 2), pytest.param(2, 0, marks=pytest.mark.slow)])
def test_killed_and_resumed_is_bit_equal(runs: Runs, unkilled: Callable[[str, int], Path], ranks: int, workers: int) -> None:
    killed_and_resumed(runs, unkilled("distill", ranks), "distill", ranks, workers)
