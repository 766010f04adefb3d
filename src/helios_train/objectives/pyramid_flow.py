"""Flow matching at every level of a pyramid, given the history (Helios, Mid stage).

`x = sigma start + (1 - sigma) end`, loss `(v - (start - end))^2`. History enters at full resolution at every level. A level is
trained as often as its ratio says; each of these passes is one forward, whose loss is differentiated before the next begins, so
that one pass's activations are alive at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from helios_train import rng
from helios_train.diffusion.pyramid import TOP, Pyramid
from helios_train.diffusion.schedule import STEPS
from helios_train.history import History
from helios_train.objectives.flow import BINS, Loss, Velocity


@dataclass(frozen=True)
class Pass:
    """One forward of a micro-batch at one level: local sigmas and times, fp64 `[B]`, on the host."""

    level: int
    sigma: np.ndarray
    time: np.ndarray


@dataclass(frozen=True)
class PyramidDraw:
    """What is random in one micro-batch: its passes, coarse to fine, and the noise all of them share, shaped like the target."""

    passes: tuple[Pass, ...]
    noise: Tensor


@dataclass(frozen=True)
class PyramidFlowObjective:
    """The Mid objective. Knows the network as `velocity(x_t, t, text, history)`.

    ratios: passes of each level, coarse to fine (published: 1 2 1, then 1 1 1). dynamic, cap: the shift of sigma by the level's
    tokens, as of NoiseLevels (published training: none). timesteps: `float`, or `int`, truncated as diffusers' pyramid pipeline
    feeds them, at unchanged sigma. sigmas: `table`, one of a level's 1000, or `exact`, anything between. stratified: the
    quantiles of a global batch are spread evenly, in each pass.
    """

    pyramid: Pyramid
    ratios: tuple[int, ...] = (1, 1, 1)
    dynamic: Literal["none", "exponential", "linear"] = "none"
    cap: float | None = None
    timesteps: Literal["float", "int"] = "float"
    sigmas: Literal["table", "exact"] = "table"
    stratified: bool = False

    def __post_init__(self) -> None:
        if len(self.ratios) != self.pyramid.count or min(self.ratios) < 1:
            raise ValueError(f"{self.pyramid.count} levels need as many ratios of at least 1, got {self.ratios}")
        if self.timesteps not in ("float", "int") or self.sigmas not in ("table", "exact"):
            raise ValueError(f"timesteps {self.timesteps!r}: float or int; sigmas {self.sigmas!r}: table or exact")

    def draw(self, seed: int, iteration: int, positions: Sequence[int], shape: Sequence[int], global_batch: int) -> PyramidDraw:
        """Draws for these positions of the global batch; `shape` is (C, 9, H, W) of a target. InputError as of Pyramid.sizes."""
        passes = [
            self._pass(level, STEPS * self._uniform(seed, (iteration, level, turn), positions, global_batch), factor)
            for level, (ratio, factor) in enumerate(zip(self.ratios, self._factors(shape), strict=True))
            for turn in range(ratio)
        ]
        noise = torch.stack([rng.normal(rng.generator(seed, "noise", iteration, position), shape) for position in positions])
        return PyramidDraw(tuple(passes), noise)

    @property
    def parts(self) -> tuple[str, ...]:
        """The levels, measured apart."""
        return tuple(f"level_{level}" for level in range(self.pyramid.count))

    def at_sigma(self, sigma: float, noise: Tensor) -> PyramidDraw:
        """One pass a level, every sample at that local sigma (of the table: the entry above), unshifted: for measuring."""
        factors = [None if factor is None else 1.0 for factor in self._factors(noise.shape[1:])]
        return self._at(min(max(STEPS * (1 - sigma / TOP), 0.0), STEPS - 1.0), factors, noise)

    def at_quantiles(self, count: int, noise: Tensor) -> list[PyramidDraw]:
        """`count` draws, each with one pass a level and all samples at one quantile, rising, of the sigmas trained on."""
        factors = self._factors(noise.shape[1:])
        return [self._at(STEPS * (1 - (number + 0.5) / count), factors, noise) for number in range(count)]

    def _at(self, place: float, factors: Sequence[float | None], noise: Tensor) -> PyramidDraw:
        places = np.full(len(noise), place)
        return PyramidDraw(tuple(self._pass(level, places, factor) for level, factor in enumerate(factors)), noise)

    def losses(self, velocity: Velocity, target: Tensor, text: Tensor, history: History, draw: PyramidDraw) -> Iterator[Loss]:
        """The loss of one pass after the other, each computed when it is asked for; their totals add up to the objective.

        That is the mean over passes of the mean squared error: a level's share is its ratio over the ratios' sum.
        """
        for one, (start, end) in self._points(target, draw):
            yield self._loss(velocity, one, (start, end), text, history)

    def errors(self, velocity: Velocity, target: Tensor, text: Tensor, history: History, draw: PyramidDraw) -> Tensor:
        """Mean squared error of the velocity of each sample in each pass. [passes, B]"""
        points = self._points(target, draw)
        return torch.stack([_errors(velocity, one, ends, text, history) for one, ends in points])

    def log_names(self) -> list[str]:
        """Names of the columns of `Loss.sums`: for each level its bins of sigma and all of it; then all levels."""
        edges = [f"/sigma_{low / BINS:.1f}-{(low + 1) / BINS:.1f}" for low in range(BINS)]
        return [f"loss/level_{level}{part}" for level in range(self.pyramid.count) for part in (*edges, "")] + ["loss"]

    def _uniform(self, seed: int, where: tuple[int, ...], positions: Sequence[int], global_batch: int) -> np.ndarray:
        """Numbers in [0, 1) of these positions in the pass `where`. [len(positions)]"""
        own = np.array([rng.generator(seed, "level sigma", *where, position).random() for position in positions])
        if not self.stratified:
            return own
        strata = rng.generator(seed, "level sigma strata", *where).permutation(global_batch)[list(positions)]
        return (strata + own) / global_batch

    def _factors(self, shape: Sequence[int]) -> list[float | None]:
        return self.pyramid.factors(self.dynamic, shape[1], shape[2], shape[3], self.cap)

    def _pass(self, level: int, place: np.ndarray, factor: float | None) -> Pass:
        place = np.minimum(np.floor(place), STEPS - 1) if self.sigmas == "table" else place
        sigma, time = self.pyramid.levels[level].at(place, factor)
        return Pass(level, sigma, np.trunc(time) if self.timesteps == "int" else time)

    def _points(self, target: Tensor, draw: PyramidDraw) -> Iterator[tuple[Pass, tuple[Tensor, Tensor]]]:
        points = self.pyramid.points(target, draw.noise.to(target))
        return ((one, points[one.level]) for one in draw.passes)

    def _loss(self, velocity: Velocity, one: Pass, points: tuple[Tensor, Tensor], text: Tensor, history: History) -> Loss:
        errors = _errors(velocity, one, points, text, history)
        return Loss(errors.mean() / sum(self.ratios), self._sums(errors.detach(), one))

    def _sums(self, errors: Tensor, one: Pass) -> Tensor:
        sums = errors.new_zeros(2, len(self.log_names()))
        bins = np.minimum((one.sigma * BINS).astype(int), BINS - 1)
        first = one.level * (BINS + 1)
        for sample, number in enumerate(bins):  # the bin is known on the host
            for column in (first + int(number), first + BINS, -1):
                sums[0, column] += errors[sample]
                sums[1, column] += 1
        return sums


def _errors(velocity: Velocity, one: Pass, points: tuple[Tensor, Tensor], text: Tensor, history: History) -> Tensor:
    """Mean squared error of each sample. [B]"""
    start, end = points
    sigma = torch.from_numpy(one.sigma).to(end)[:, None, None, None, None]
    x_t = sigma * start + (1 - sigma) * end
    predicted = velocity(x_t, torch.from_numpy(one.time).to(end), text, history)
    return (predicted - (start - end)).square().flatten(1).mean(dim=1)
