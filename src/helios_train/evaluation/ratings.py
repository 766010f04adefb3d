"""HeliosBench's ratings, 10 to 1 a metric, and their weighted total: one table, as published or mended.

As published (`strict`), long lists have a typing error that makes the ratings 3 and 2 of the aesthetic score unreachable, 0.35 is
missing from naturalness, the weights of long videos sum to 0.996, a metric whose mean is exactly 0 (and no drift) is left out,
and what is left out counts for nothing. Mended, thresholds are even, and weights are shares of what is there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

Length = Literal["long", "short"]
Thresholds = tuple[float, ...]
BEST, WORST = 10, 1
FRAMES_A_POINT = 3.2  # frames a second a point of the rating of throughput, which is not part of the total
DIGITS = 4  # of a total


def _even(first: float, step: float) -> Thresholds:
    return tuple(round(first + step * number, 6) for number in range(BEST - WORST))


class Rule(NamedTuple):
    """How a metric is rated: nine thresholds for 10 to 2, published ones where they differ, weights for long and short videos."""

    thresholds: Thresholds
    weights: Mapping[Length, float]
    published: Mapping[Length, Thresholds] = {}
    drift: bool = False

    def rating(self, mean: float, length: Length, strict: bool) -> int:
        """10 for what passes the first threshold, down to 1 for what passes none; the mean is brought within 0 to 1."""
        value = min(max(mean, 0.0), 1.0)
        thresholds = self.published.get(length, self.thresholds) if strict else self.thresholds
        passed = (value <= bound if self.drift else value >= bound for bound in thresholds)
        return next((BEST - number for number, is_passed in enumerate(passed) if is_passed), WORST)


_TYPING_ERROR = (0.70, 0.65, 0.60, 0.55, 0.50, 0.45, 0.40, 0.45, 0.40)
_HOLE = (0.65, 0.60, 0.55, 0.50, 0.45, 0.40, 0.30, 0.25, 0.20)
_DRIFT: Mapping[Length, float] = {"long": 0.099}

RULES: dict[str, Rule] = {
    "aesthetic": Rule(_even(0.70, -0.05), {"short": 0.10, "long": 0.03}, {"long": _TYPING_ERROR}),
    "motion_amplitude": Rule(_even(0.45, -0.05), {"short": 0.10, "long": 0.03}),
    "motion_smoothness": Rule(_even(0.99, -0.01), {"short": 0.10, "long": 0.03}),
    "semantic": Rule(_even(0.30, -0.01), {"short": 0.35, "long": 0.255}),
    "naturalness": Rule(_even(0.65, -0.05), {"short": 0.35, "long": 0.255}, {"short": _HOLE, "long": _HOLE}),
    "drifting_aesthetic": Rule(_even(0.01, 0.01), _DRIFT, drift=True),
    "drifting_motion_smoothness": Rule(_even(0.01, 0.01), _DRIFT, drift=True),
    "drifting_semantic": Rule(_even(0.01, 0.01), _DRIFT, drift=True),
    "drifting_naturalness": Rule(_even(0.06, 0.02), _DRIFT, drift=True),
}


def ratings(means: Mapping[str, float], length: Length = "long", strict_compat: bool = False) -> dict[str, int]:
    """The rating of each metric that has a mean and, for videos of this length, a weight."""
    rated = {name: mean for name, mean in means.items() if length in RULES[name].weights and not math.isnan(mean)}
    if strict_compat:
        rated = {name: mean for name, mean in rated.items() if mean != 0 or RULES[name].drift}
    return {name: RULES[name].rating(mean, length, strict_compat) for name, mean in rated.items()}


def total(rated: Mapping[str, int], length: Length = "long", strict_compat: bool = False) -> float | None:
    """The weighted rating of a model, at most 10 (published: 9.96 for long videos); None where nothing was rated."""
    weights = {name: RULES[name].weights[length] for name in rated}
    if not weights:
        return None
    whole = 1.0 if strict_compat else sum(weights.values())
    return round(sum(weights[name] * rating for name, rating in rated.items()) / whole, DIGITS)


def throughput_rating(frames_a_second: float) -> int:
    """1 to 10: a point for every 3.2 frames a second begun."""
    return min(max(math.ceil(frames_a_second / FRAMES_A_POINT), WORST), BEST)
