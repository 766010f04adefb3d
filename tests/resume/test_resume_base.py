"""stage=base: killed and resumed equals never killed: weights, moments, EMA, samples, draws and metrics, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from .runs import Runs, draws, killed_and_resumed, metrics


@pytest.mark.parametrize(("ranks", "workers"), [pytest.param(1, 2, marks=pytest.mark.slow), (2, 0)])
def test_killed_and_resumed_is_bit_equal(runs: Runs, unkilled: Callable[[str, int], Path], ranks: int, workers: int) -> None:
    killed_and_resumed(runs, unkilled("base", ranks), "base", ranks, workers)


@pytest.mark.slow
def test_two_ranks_go_on_as_one(runs: Runs) -> None:
    micro = "data.micro_batch=1"
    whole = runs.run("elastic_whole", 2, 0, micro, "trainer.max_steps=15", "optimizer.total=15")
    runs.run("elastic", 2, 0, micro, "trainer.max_steps=4", "optimizer.total=15")
    other = runs.run("elastic", 1, 0, micro, "trainer.max_steps=15", "optimizer.total=15", "resume=auto")
    assert draws(whole) == draws(other)
    losses = [{int(row["iteration"]): float(row["loss"]) for row in metrics(run) if "loss" in row} for run in (whole, other)]
    assert losses[0].keys() == losses[1].keys() == set(range(1, 16))
    assert losses[1][5] == pytest.approx(losses[0][5], rel=1e-6)
    for iteration in range(5, 16):
        assert losses[1][iteration] == pytest.approx(losses[0][iteration], rel=1e-4)
