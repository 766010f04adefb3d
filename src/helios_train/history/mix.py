"""The history mix: one model for text, image and video to video, by what each training sample is left with.

Shares are true shares of the samples and sum to 1. In `t2v` history and anchor go; in `i2v` the newest frame and the anchor stay;
in `v2v` the oldest 1, 10 or 19 of the 19 frames go and the anchor stays; in `full` all stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from helios_train import rng
from helios_train.history import FRAMES, SECTION, History

MODES = ("t2v", "i2v", "v2v", "full")


@dataclass(frozen=True)
class Mix:
    """Shares of the four modes. `group` samples next to one another in the global batch share one draw (1 = each its own)."""

    t2v: float
    i2v: float
    v2v: float
    full: float
    group: int = 1

    def __post_init__(self) -> None:
        shares = self.shares
        if min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
            raise ValueError(f"shares of the history mix must be >= 0 and sum to 1, got {dict(zip(MODES, shares, strict=True))}")

    @property
    def shares(self) -> tuple[float, float, float, float]:
        """In the order of MODES."""
        return self.t2v, self.i2v, self.v2v, self.full

    def draw(self, seed: int, iteration: int, positions: Sequence[int], who: str = "") -> list[MixDraw]:
        """One draw for each position in the global batch. `who`: draws of their own."""
        return [self._draw(rng.generator(seed, f"{who}mix", iteration, position // self.group)) for position in positions]

    def _draw(self, generator: np.random.Generator) -> MixDraw:
        mode = MODES[int(np.searchsorted(np.cumsum(self.shares)[:-1], generator.random(), side="right"))]
        return MixDraw(mode, 1 + SECTION * int(generator.integers(3)))


@dataclass(frozen=True)
class MixDraw:
    """What one sample is left with; `oldest` frames go in v2v (1, 10 or 19)."""

    mode: str
    oldest: int

    @property
    def frames(self) -> int:
        """How many of the newest frames may stay."""
        return {"t2v": 0, "i2v": 1, "v2v": FRAMES - self.oldest, "full": FRAMES}[self.mode]


def apply(history: History, draws: Sequence[MixDraw]) -> History:
    """The history each sample is left with."""
    return history.keep(tuple(draw.frames for draw in draws), tuple(draw.mode != "t2v" for draw in draws))
