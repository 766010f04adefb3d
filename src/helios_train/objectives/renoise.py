"""At which noise level teacher and critic look at the student's sections.

Times are whole numbers of the table of one full-resolution level, 1000 sigma, whatever the student's own schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from helios_train import rng
from helios_train.diffusion.rollout import BoundVelocity
from helios_train.diffusion.schedule import STEPS, dynamic_factor, nearest, shift, token_count


@dataclass(frozen=True)
class RenoiseDraw:
    """What is random in one look at B samples: time and sigma on the host, fp64 `[B]`, and the noise, shaped like the samples."""

    time: np.ndarray
    sigma: np.ndarray
    noise: Tensor

    def noised(self, x_BCTHW: Tensor) -> Tensor:
        """`(1 - sigma) x + sigma noise`."""
        sigma = self._sigma(x_BCTHW)
        return (1 - sigma) * x_BCTHW + sigma * self.noise.to(x_BCTHW)

    def velocity(self, network: BoundVelocity, x_t: Tensor) -> Tensor:
        """What the network answers at these times."""
        return network(x_t, torch.from_numpy(self.time).to(x_t)).to(x_t.dtype)

    def denoised(self, network: BoundVelocity, x_t: Tensor) -> Tensor:
        """The network's estimate of what `x_t` is a noised version of: `x_t - sigma v`."""
        return x_t - self._sigma(x_t) * self.velocity(network, x_t)

    def _sigma(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.sigma).to(x)[:, None, None, None, None]


@dataclass(frozen=True)
class Renoise:
    """How these levels are drawn: a share of `top` times, shifted towards noise, kept within `low` and `high`, rounded.

    density: of the share, `uniform`, or `beta`: Beta(4, 1.5), which turns uniform along half a cosine over `anneal` iterations.
    dynamic, cap: the shift by the number of tokens, as of NoiseLevels. sigmas: `exact`, a thousandth of the time, or of the
    `table` of 1000 shifted sigmas the one nearest, as published: at most 1e-3 from it.
    """

    density: Literal["uniform", "beta"] = "uniform"
    anneal: int = 500
    dynamic: Literal["none", "exponential", "linear"] = "linear"
    cap: float | None = None
    low: int = 20
    high: int = 980
    sigmas: Literal["table", "exact"] = "table"

    def __post_init__(self) -> None:
        if self.density not in ("uniform", "beta") or self.sigmas not in ("table", "exact"):
            raise ValueError(f"density {self.density!r}: uniform or beta; sigmas {self.sigmas!r}: table or exact")
        if not 0 < self.low <= self.high <= STEPS or self.anneal < 0:
            raise ValueError(
                f"times from {self.low} to {self.high}, annealed over {self.anneal}: within 1 to 1000, and at least 0"
            )

    def draw(
        self, seed: int, who: str, iteration: int, positions: Sequence[int], shape: Sequence[int], top: float = STEPS
    ) -> RenoiseDraw:
        """Draws for these positions of the global batch; `shape` is (C, T, H, W) of a section. who: whose look it is."""
        tokens = token_count(*shape[1:])
        time = self.times(seed, who, iteration, positions, tokens, top)
        noise = [rng.normal(rng.generator(seed, f"{who} noise", iteration, position), shape) for position in positions]
        return RenoiseDraw(time, self.sigma(time, tokens), torch.stack(noise))

    def times(self, seed: int, who: str, iteration: int, positions: Sequence[int], tokens: int, top: float = STEPS) -> np.ndarray:
        """The times alone: whole numbers, fp64 `[len(positions)]`."""
        shares = [self._share(rng.generator(seed, f"{who} time", iteration, position), iteration) for position in positions]
        shifted = STEPS * shift(top / STEPS * np.array(shares), self._factor(tokens))
        return np.round(np.clip(shifted, self.low, self.high))

    def sigma(self, time: np.ndarray, tokens: int) -> np.ndarray:
        """The sigma of each time."""
        if self.sigmas == "exact":
            return time / STEPS
        table = shift(1 - np.arange(STEPS) / STEPS, self._factor(tokens))
        return nearest((table, STEPS * table), time)

    def _share(self, draw: np.random.Generator, iteration: int) -> float:
        if self.density == "uniform":
            return float(draw.uniform(1 / STEPS, 1))
        skew = 1 - rng.half_cosine(iteration, self.anneal)
        return float(draw.beta(1 + 3 * skew, 1 + 0.5 * skew))

    def _factor(self, tokens: int) -> float:
        return dynamic_factor(self.dynamic, tokens, self.cap)
