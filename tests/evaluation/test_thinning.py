"""Columns of any length: few points, exact means and extremes."""

from __future__ import annotations

import numpy as np
import pytest

from helios_train.evaluation.thinning import KEPT, Series, Thinned


def thinned(y: np.ndarray, blocks: int) -> Series:
    series = Thinned()
    for x, part in zip(np.array_split(np.arange(len(y), dtype=float), blocks), np.array_split(y, blocks), strict=True):
        series.add(x, part)
    found = series.series()
    assert found is not None
    return found


def test_few_values_stay_as_they_are() -> None:
    y = np.array([3.0, -1.0, 2.0])
    found = thinned(y, 2)
    assert found.x.tolist() == [0, 1, 2] and found.y.tolist() == [3, -1, 2] and found.count.tolist() == [1, 1, 1]
    assert (found.first, found.last) == (3, 2)


@pytest.mark.parametrize(("rows", "blocks"), [(301, 1), (1000, 7), (5001, 3), (200_000, 49)])
def test_many_values_keep_mean_extremes_and_order(rows: int, blocks: int) -> None:
    y = np.random.default_rng(0).normal(size=rows)
    y[rows // 3], y[rows // 2] = 50.0, -50.0
    found = thinned(y, blocks)
    assert KEPT // 2 <= len(found.y) <= KEPT + 1 and found.count.sum() == rows
    assert found.count.max() <= 2 * np.median(found.count)  # the cells are alike
    assert np.average(found.y, weights=found.count) == pytest.approx(y.mean())
    assert np.average(found.x, weights=found.count) == pytest.approx((rows - 1) / 2)
    assert (found.low.min(), found.high.max()) == (-50, 50)
    assert (np.diff(found.x) > 0).all() and (found.low <= found.y + 1e-12).all() and (found.y <= found.high + 1e-12).all()
    at = int(np.abs(found.x - rows // 3).argmin())
    assert 50.0 in found.high[max(0, at - 1) : at + 2]
    assert (found.first, found.last) == (y[0], y[-1])


def test_the_tail_is_the_last_tenth_of_the_iterations() -> None:
    assert thinned(np.concatenate([np.zeros(900), np.ones(101)]), 4).tail == pytest.approx(1.0, abs=0.02)
    assert thinned(np.array([7.0]), 1).tail == 7.0


def test_nothing_added_is_no_series() -> None:
    series = Thinned()
    series.add(np.empty(0), np.empty(0))
    assert series.series() is None
