"""Pyramid flow: a section is denoised at growing resolutions, one level after the other, 0 the coarsest.

Inside a level local sigma falls from 1 (the level's start point) to 0 (its end point): `x = sigma start + (1 - sigma) end`,
`v = start - end`. Both points mix clean latents with noise of that resolution; the last level ends clean. A level starts from the
end of the one before, doubled in size, whose noise is then constant in 2x2 blocks: noise that is negatively correlated in a block
is added until all of it is white again. Levels share one axis of time, which falls from 999; the network knows its level by it.

Constants and tables are those of the published system, PKU-YuanGroup/Helios, whose scheduler is diffusers' HeliosScheduler; the
method is Pyramidal Flow Matching (Jin et al., 2024). Host arithmetic is fp64.

Axis letters: B batch, C latent channels, T latent frames, H W latent rows and columns. `...` stands for any leading axes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from helios_train.diffusion.schedule import STEPS, dynamic_factor, shift, token_count
from helios_train.errors import InputError

MOST = 4  # levels
TOP = 0.999  # highest sigma and, times 1000, highest time of every table (HeliosScheduler)
PATCH, PIXELS = 2, 8  # latents a patch and pixels a latent, along each side


@dataclass(frozen=True)
class Level:
    """Constants of one level.

    start, end: share of noise in its start and end points (level 0 in fact starts from noise alone, as published). entry: the
    share at the end of the level before; of the first table entry for level 0. first, last: times of the first and the last
    entry of its table.
    """

    start: float
    end: float
    entry: float
    first: float
    last: float

    def at(self, place: np.ndarray, factor: float | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Local sigma and time at places 0 (most noise) to 999 of the level's table, or between its entries.

        With a factor sigma is shifted, and its time is the point at share sigma between the last time and the first, which for
        factor 1 is not quite the time of the table.
        """
        sigma = TOP * (1 - place / STEPS)
        if factor is None:
            return sigma, self.first + place / (STEPS - 1) * (self.last - self.first)
        sigma = shift(sigma, factor)
        return sigma, self.last + sigma * (self.first - self.last)


@dataclass(frozen=True)
class Pyramid:
    """The levels between `edges` of the 1000-entry table of noise levels (None: evenly spread), coarse to fine.

    gamma: noise added between levels has correlation -gamma inside a 2x2 block; 1/3 is the strongest there is. shift: fixed
    shift of the table towards noise, 1 = none. ValueError for constants that give no pyramid.
    """

    count: int = 3
    edges: tuple[float, ...] | None = None
    gamma: float = 1 / 3
    shift: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.count <= MOST:
            raise ValueError(f"a pyramid has 1 to {MOST} levels, not {self.count}")
        if not 0 < self.gamma <= 1 / 3 + 1e-6:
            raise ValueError(f"gamma must be above 0 and at most 1/3, got {self.gamma}")
        if self.shift <= 0:
            raise ValueError(f"the fixed shift must be above 0, got {self.shift}")
        indices = self._indices()
        if len(indices) != self.count + 1 or (indices[0], indices[-1]) != (0, STEPS) or sorted(set(indices)) != indices:
            raise ValueError(f"{self.count} levels need {self.count + 1} edges that rise from 0 to 1, .001 apart: {self.edges}")

    def _indices(self) -> list[int]:
        """Table entries at which the levels begin, and 1000."""
        edges = [level / self.count for level in range(self.count + 1)] if self.edges is None else self.edges
        return [int(edge * STEPS) for edge in edges]

    @cached_property
    def levels(self) -> tuple[Level, ...]:
        """Constants of each level, coarse to fine."""
        table = shift((1 - np.linspace(1, 1 / STEPS, STEPS + 1))[:0:-1], self.shift)  # .999 ... .000999
        indices = self._indices()
        entries = [float(table[index]) for index in indices[:-1]]
        ends = [*entries[1:], 0.0]
        starts = [entries[0], *(1 - self._scale(entry) * (1 - entry) for entry in entries[1:])]
        # Each level has a share of the table's times as long as the way from its start to its end.
        lengths = [start - end for start, end in zip(starts, ends, strict=True)]
        total = sum(lengths)
        bounds = [0.0, *(sum(lengths[:level]) / total for level in range(1, self.count)), 1.0]
        times = [min(float(STEPS * table[min(int(bound * STEPS), STEPS - 1)]), STEPS * TOP) for bound in bounds]
        lasts = [first + (STEPS - 1) / STEPS * (final - first) for first, final in zip(times[:-1], times[1:], strict=True)]
        return tuple(Level(*values) for values in zip(starts, ends, entries, times[:-1], lasts, strict=True))

    def _scale(self, entry: float) -> float:
        return 1 / (math.sqrt(1 + 1 / self.gamma) * entry + 1 - entry)

    def renoise_factors(self, level: int) -> tuple[float, float]:
        """(alpha, beta) of `alpha doubled(x) + beta block_noise`, x the end of the level before; level >= 1.

        The noise of the sum is white: beta^2 gamma = (alpha entry)^2 cancels the correlation, and start^2 is its variance.
        """
        if not 1 <= level < self.count:
            raise ValueError(f"nothing is renoised on the way to level {level} of {self.count}")
        entry = self.levels[level].entry
        alpha = self._scale(entry)
        return alpha, alpha * entry / math.sqrt(self.gamma)

    def renoise(self, level: int, x_BCTHW: Tensor, noise_BCTHW: Tensor) -> Tensor:
        """The start point of `level` >= 1 out of the end of the one before, and `block_noise` of twice its sides."""
        alpha, beta = self.renoise_factors(level)
        return alpha * doubled(x_BCTHW) + beta * noise_BCTHW

    def steps(self, level: int, count: int, factor: float | None = None) -> tuple[np.ndarray, np.ndarray]:
        """What HeliosScheduler walks through: sigmas [count + 1], the last one 0, and times [count], not truncated.

        A single level has the grid of its own which that scheduler has for base models: from 1, times 1000 sigma, in fp32.
        """
        if self.count == 1:
            sigma = np.linspace(1, 1 / STEPS, count + 1)[:-1].astype(np.float32)
            if factor is not None:
                sigma = shift(sigma.astype(float), factor).astype(np.float32)
            times = STEPS * sigma
        else:
            sigma, times = self.levels[level].at(np.linspace(0, STEPS - 1, count), factor)
        return np.append(sigma, 0.0), times

    def few_steps(self, level: int, count: int, factor: float | None = None) -> tuple[np.ndarray, np.ndarray]:
        """What HeliosDMDScheduler, of few-step students, walks through: sigmas [count] and times [count], not truncated.

        The grid has one step more than is walked, so that the last step still starts well above the end of the level.
        """
        sigmas, times = self.steps(level, count + 1, factor)
        return sigmas[:count], times[:count]

    def table(self, level: int, factor: float | None = None) -> tuple[np.ndarray, np.ndarray]:
        """A level's 1000 sigmas and their times, falling. Of a single level: 1, .999 ... .001, shifted; times are 1000 sigma."""
        if self.count > 1:
            return self.levels[level].at(np.arange(float(STEPS)), factor)
        sigma = 1 - np.arange(STEPS) / STEPS
        sigma = sigma if factor is None else shift(sigma, factor)
        return sigma, STEPS * sigma

    def sizes(self, rows: int, columns: int) -> list[tuple[int, int]]:
        """Rows and columns of each level, coarse to fine. InputError for sides that do not divide names sides that do."""
        unit = PATCH * 2 ** (self.count - 1)  # every level is made of whole patches
        if rows % unit or columns % unit or not rows or not columns:
            fitting = product(_multiples(rows, unit), _multiples(columns, unit))
            named = ", ".join(f"{height * PIXELS}x{width * PIXELS}" for height, width in fitting)
            raise InputError(
                f"a size of {rows * PIXELS}x{columns * PIXELS} pixels ({rows}x{columns} latents) does not go through "
                f"{self.count} levels: sides must be multiples of {unit * PIXELS} pixels; sizes nearby that are: {named}"
            )
        return [(rows >> level, columns >> level) for level in reversed(range(self.count))]

    def tokens(self, frames: int, rows: int, columns: int) -> list[int]:
        """Noisy tokens of each level, coarse to fine; InputError as of `sizes`."""
        return [token_count(frames, *size) for size in self.sizes(rows, columns)]

    def factors(
        self, kind: str, frames: int, rows: int, columns: int, cap: float | None = None, behind: bool = False
    ) -> list[float | None]:
        """The dynamic shift of each level, by its own tokens, as `Level.at` takes it: None throughout for kind `none`.

        behind: all but the first by the tokens of the level before, as HeliosPyramidPipeline has it (diffusers 0.42): it counts
        before it doubles.
        """
        tokens = self.tokens(frames, rows, columns)
        tokens = [tokens[0], *tokens[:-1]] if behind else tokens
        return [None if kind == "none" else dynamic_factor(kind, number, cap) for number in tokens]

    def points(self, clean_BCTHW: Tensor, noise_BCTHW: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Start and end point of each level, coarse to fine, shaped as the level; both share the level's noise.

        Takes full-resolution latents and noise. InputError as of `sizes`.
        """
        self.sizes(*clean_BCTHW.shape[-2:])
        cleans, noises = pyramid(clean_BCTHW, self.count), noise_pyramid(noise_BCTHW, self.count)
        starts = [noises[0]]
        for level, below, noise in zip(self.levels[1:], cleans, noises[1:], strict=False):
            starts.append(level.start * noise + (1 - level.start) * doubled(below))
        mixed = zip(self.levels[:-1], cleans, noises, strict=False)
        ends = [*(level.end * noise + (1 - level.end) * clean for level, clean, noise in mixed), cleans[-1]]
        return list(zip(starts, ends, strict=True))


def halved(x_BCTHW: Tensor) -> Tensor:
    """Bilinear at half of both sides, every frame alone: for even sides the mean of 2x2."""
    rows, columns = x_BCTHW.shape[-2:]
    frames = F.interpolate(x_BCTHW.flatten(1, 2), size=(rows // 2, columns // 2), mode="bilinear")
    return frames.unflatten(1, x_BCTHW.shape[1:3])


def doubled(x_BCTHW: Tensor) -> Tensor:
    """Nearest neighbour at twice both sides."""
    frames = F.interpolate(x_BCTHW.flatten(1, 2), scale_factor=2, mode="nearest")
    return frames.unflatten(1, x_BCTHW.shape[1:3])


def pyramid(x_BCTHW: Tensor, count: int) -> list[Tensor]:
    """`count` resolutions of clean latents, coarse to fine; the last is `x_BCTHW` itself."""
    return _reduced(x_BCTHW, count, 1.0)


def noise_pyramid(noise_BCTHW: Tensor, count: int) -> list[Tensor]:
    """`count` resolutions of noise, coarse to fine: twice the mean of 2x2 white values is white with variance 1 again."""
    return _reduced(noise_BCTHW, count, 2.0)


def _reduced(x_BCTHW: Tensor, count: int, scale: float) -> list[Tensor]:
    fine_to_coarse = [x_BCTHW]
    for _ in range(count - 1):
        fine_to_coarse.append(scale * halved(fine_to_coarse[-1]))
    return fine_to_coarse[::-1]


def block_noise(white: Tensor, gamma: float = 1 / 3) -> Tensor:
    """Noise with variance 1 and correlation -gamma inside each 2x2 block, out of standard normal `white` [..., H, W], H W even.

    `sqrt(1 + gamma) (z - mean) + sqrt(1 - 3 gamma) mean`, mean that of the block: its covariance is (1 + gamma) I - gamma 11^T.
    At gamma = 1/3 that is singular, the sum of a block is 0, and the published sampler's Cholesky factor does not exist.
    """
    blocks = white.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2))  # [..., H/2, 2, W/2, 2]
    mean = blocks.mean(dim=(-3, -1), keepdim=True)
    noise = math.sqrt(1 + gamma) * (blocks - mean) + math.sqrt(max(0.0, 1 - 3 * gamma)) * mean
    return noise.flatten(-4, -3).flatten(-2, -1)


def _multiples(side: int, unit: int) -> list[int]:
    """The multiples of `unit` next to `side`, at least one unit."""
    return sorted({max(1, side // unit) * unit, max(1, -(-side // unit)) * unit})
