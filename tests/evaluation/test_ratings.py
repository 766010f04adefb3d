"""Ratings and totals against the published example, its typing errors, and what mending changes."""

from __future__ import annotations

import math

import pytest

from helios_train.evaluation.ratings import RULES, ratings, throughput_rating, total

GOLDEN = {  # means over the two videos that HeliosBench ships with its results (PKU-YuanGroup/Helios, eval/playground)
    "aesthetic": 0.65643,
    "motion_amplitude": 0.12900,
    "motion_smoothness": 0.99223,
    "semantic": 0.28176,
    "naturalness": 0.5,
    "drifting_aesthetic": 0.02787,
    "drifting_motion_smoothness": 0.00096,
    "drifting_semantic": 0.00664,
    "drifting_naturalness": 0.0,
}


def test_the_published_example() -> None:
    long, short = ratings(GOLDEN, "long", strict_compat=True), ratings(GOLDEN, "short", strict_compat=True)
    assert list(long.values()) == [9, 3, 10, 8, 7, 8, 10, 10, 10] and list(short.values()) == [9, 3, 10, 8, 7]
    assert total(long, "long", strict_compat=True) == 8.247
    assert total(short, "short", strict_compat=True) == 7.45


def test_published_typing_errors_are_kept_and_mended() -> None:
    for mean, strict, mended in ((0.40, 4, 4), (0.399, 1, 3), (0.35, 1, 3), (0.31, 1, 2), (0.29, 1, 1)):
        assert ratings({"aesthetic": mean}, "long", True)["aesthetic"] == strict
        assert ratings({"aesthetic": mean}, "long", False)["aesthetic"] == mended
        assert ratings({"aesthetic": mean}, "short", True)["aesthetic"] == mended
    for mean, strict, mended in ((0.36, 4, 4), (0.30, 4, 3), (0.20, 2, 1)):
        assert ratings({"naturalness": mean}, "long", True)["naturalness"] == strict
        assert ratings({"naturalness": mean}, "long", False)["naturalness"] == mended


@pytest.mark.parametrize(("length", "most"), [("long", 9.96), ("short", 10.0)])
def test_a_perfect_model(length: str, most: float) -> None:
    best = {name: 0.0 if rule.drift else 1.0 for name, rule in RULES.items()}
    assert total(ratings(best, length, True), length, True) == most
    assert total(ratings(best, length), length) == 10.0


def test_what_is_not_there_weighs_nothing_when_mended() -> None:
    part = {"semantic": 0.9, "aesthetic": 0.0}
    assert total(ratings(part, "short"), "short") == round((0.35 * 10 + 0.10 * 1) / 0.45, 4)
    assert total(ratings({"semantic": 0.9}, "short", True), "short", True) == 3.5
    assert ratings(part, "short", True) == {"semantic": 10}  # published: a mean of 0 is taken for none
    assert ratings({"drifting_semantic": 0.0}, "long", True) == {"drifting_semantic": 10}
    assert total({}) is None and ratings({"aesthetic": math.nan}) == {}


def test_means_are_brought_within_the_scale() -> None:
    assert ratings({"motion_amplitude": 7.0, "drifting_semantic": -0.1, "motion_smoothness": 0.99})["motion_amplitude"] == 10
    assert ratings({"drifting_naturalness": 0.221}) == {"drifting_naturalness": 1}
    assert ratings({"motion_smoothness": 0.99}) == {"motion_smoothness": 10}


def test_throughput() -> None:
    assert [throughput_rating(fps) for fps in (0.1, 3.2, 3.3, 19.5, 32.0, 100.0)] == [1, 1, 2, 7, 10, 10]
