"""Flow matching on one section, given its history (Helios, Base stage).

`x_t = sigma eps + (1 - sigma) x0`, loss `(v - (eps - x0))^2`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from helios_train import rng
from helios_train.diffusion.schedule import STEPS, NoiseLevels, token_count
from helios_train.history import History

Velocity = Callable[[Tensor, Tensor, Tensor, History], Tensor]
BINS = 5  # of sigma, in which the loss is logged


@dataclass(frozen=True)
class FlowDraw:
    """What is random in one micro-batch: the levels `[B]` on the host, and the noise, shaped like the target."""

    sigma: np.ndarray
    noise: Tensor


@dataclass(frozen=True)
class Loss:
    """`total` is differentiated. `sums` [2, BINS + 1] are for the log: losses and counts, by bin of sigma and overall."""

    total: Tensor
    sums: Tensor


class Objective(Protocol):
    """What a stage that trains on one section given its history, and its validation, ask of an objective.

    `parts` names what is measured apart (levels of a pyramid; one without a name where there is nothing to tell apart).
    """

    @property
    def parts(self) -> tuple[str, ...]: ...

    def draw(self, seed: int, iteration: int, positions: Sequence[int], shape: Sequence[int], global_batch: int) -> Any: ...

    def losses(self, velocity: Velocity, target: Tensor, text: Tensor, history: History, draw: Any) -> Iterator[Loss]: ...

    def errors(self, velocity: Velocity, target: Tensor, text: Tensor, history: History, draw: Any) -> Tensor: ...

    def at_sigma(self, sigma: float, noise: Tensor) -> Any: ...

    def at_quantiles(self, count: int, noise: Tensor) -> list[Any]: ...

    def log_names(self) -> list[str]: ...


class FlowObjective:
    """The Base objective. Knows the network as `velocity(x_t, t, text, history)`."""

    parts = ("",)

    def __init__(self, levels: NoiseLevels):
        self.levels = levels

    def draw(self, seed: int, iteration: int, positions: Sequence[int], shape: Sequence[int], global_batch: int) -> FlowDraw:
        """Draws for these positions of the global batch; `shape` is (C, 9, H, W) of a target."""
        sigma = self.levels.draw(seed, iteration, list(positions), global_batch, token_count(*shape[1:]))
        noise = torch.stack([rng.normal(rng.generator(seed, "noise", iteration, position), shape) for position in positions])
        return FlowDraw(sigma, noise)

    def at_sigma(self, sigma: float, noise: Tensor) -> FlowDraw:
        """Every sample at that level, with that noise [B, C, 9, H, W]: for measuring."""
        return FlowDraw(np.full(len(noise), sigma, dtype=np.float32), noise)

    def at_quantiles(self, count: int, noise: Tensor) -> list[FlowDraw]:
        """`count` draws, each with all samples at one level, rising, that share the density trained on equally."""
        return [self.at_sigma(sigma, noise) for sigma in self.levels.quantiles(count, token_count(*noise.shape[2:])).tolist()]

    def losses(self, velocity: Velocity, target: Tensor, text: Tensor, history: History, draw: FlowDraw) -> Iterator[Loss]:
        """The one loss, computed when it is asked for."""
        yield self(velocity, target, text, history, draw)

    def __call__(self, velocity: Velocity, target: Tensor, text: Tensor, history: History, draw: FlowDraw) -> Loss:
        """The weighted squared error, a mean over each sample and then over the batch; times are 1000 sigma, not rounded."""
        (errors,) = self.errors(velocity, target, text, history, draw)
        weights = torch.from_numpy(self.levels.weights(draw.sigma)).to(errors)
        return Loss((weights * errors).mean(), sums_by_sigma(errors.detach(), draw.sigma))

    def errors(self, velocity: Velocity, target: Tensor, text: Tensor, history: History, draw: FlowDraw) -> Tensor:
        """Mean squared error of the velocity of each sample, unweighted. [1, B]"""
        noise = draw.noise.to(target)
        sigma = torch.from_numpy(draw.sigma).to(target)
        level = sigma[:, None, None, None, None]
        x_t = level * noise + (1 - level) * target
        predicted = velocity(x_t, STEPS * sigma, text, history)
        return (predicted - (noise - target)).square().flatten(1).mean(dim=1)[None]

    def log_names(self) -> list[str]:
        """Names of the columns of `Loss.sums`: the bins of sigma, and all of it."""
        return names_by_sigma("loss")


def names_by_sigma(name: str) -> list[str]:
    """Names of the columns of `sums_by_sigma`: the bins of sigma, and all of it."""
    edges = [f"{low / BINS:.1f}-{(low + 1) / BINS:.1f}" for low in range(BINS)]
    return [*(f"{name}/sigma_{edge}" for edge in edges), name]


def sums_by_sigma(errors: Tensor, sigma: np.ndarray) -> Tensor:
    """Sums and counts [2, BINS + 1] of errors [B] at sigmas [B], which are known on the host: by bin of sigma, and overall."""
    bins = np.minimum((sigma * BINS).astype(int), BINS - 1)
    sums = errors.new_zeros(2, BINS + 1)
    for sample, number in enumerate(bins):
        for column in (int(number), BINS):
            sums[0, column] += errors[sample]
            sums[1, column] += 1
    return sums
