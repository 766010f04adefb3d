"""Noise levels: the table of training, the shift that depends on the number of tokens, the densities levels are drawn from.

Everywhere `x_t = sigma noise + (1 - sigma) x0` and `v = noise - x0`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from helios_train import rng

STEPS = 1000
# Flux's line through (256 tokens, .5) and (4096 tokens, 1.15), which diffusers' pipelines use.
BASE_TOKENS, MAX_TOKENS, BASE_SHIFT, MAX_SHIFT = 256, 4096, 0.5, 1.15


def token_count(frames: int, rows: int, columns: int) -> int:
    """Tokens of a latent of that many frames, rows and columns under 1x2x2 patches."""
    return frames * rows * columns // 4


def dynamic_mu(tokens: int) -> float:
    """The exponent of the shift for that many noisy tokens: 1.9192 for 9 x 48 x 80."""
    slope = (MAX_SHIFT - BASE_SHIFT) / (MAX_TOKENS - BASE_TOKENS)
    return BASE_SHIFT + slope * (tokens - BASE_TOKENS)


def dynamic_factor(kind: str, tokens: int, cap: float | None = None) -> float:
    """The factor of `shift`: mu itself (`linear`), e^mu (`exponential`, at most `cap`), 1 (`none`)."""
    mu = dynamic_mu(tokens)
    if kind == "none":
        return 1.0
    if kind == "linear":
        return mu
    if kind == "exponential":
        return min(math.exp(mu), cap) if cap else math.exp(mu)
    raise ValueError(f"dynamic shift {kind!r}: none, linear or exponential")


def shift(sigma: np.ndarray, factor: float) -> np.ndarray:
    """`f / (f + 1/sigma - 1)`: moves levels toward noise for f > 1. Keeps 0 and 1."""
    return factor * sigma / (1 + (factor - 1) * sigma)


def nearest(table: tuple[np.ndarray, np.ndarray], times: np.ndarray) -> np.ndarray:
    """The sigmas of a `table` (sigmas, times) at the entries whose times are nearest; of two as near the first. As `times`."""
    sigmas, known = table
    return sigmas[np.abs(known - np.asarray(times, dtype=float)[..., None]).argmin(axis=-1)]


@dataclass(frozen=True)
class NoiseLevels:
    """How a training step draws its noise levels.

    density: `uniform`, `logit_normal` (u = sigmoid of a normal with mean and std) or `mode` (SD3, section 3.1), all as
    densities of u in (0, 1); the level is the table's at floor(1000 u): 1.0, .999, ... .001. stratified: the global batch's
    quantiles are spread evenly. fixed: a shift by that factor. dynamic: one by the number of tokens on top. weighting: of
    the squared error at sigma.
    """

    density: str = "logit_normal"
    mean: float = 0.0
    std: float = 1.0
    mode_scale: float = 1.29
    stratified: bool = False
    fixed: float = 1.0
    dynamic: str = "none"
    cap: float | None = None
    weighting: str = "none"

    def draw(self, seed: int, iteration: int, positions: list[int], global_batch: int, tokens: int) -> np.ndarray:
        """Sigmas of these positions of the global batch, fp32 `[len(positions)]`, in (0, 1]."""
        own = np.array([rng.generator(seed, "sigma", iteration, position).random() for position in positions])
        if self.stratified:
            strata = rng.generator(seed, "sigma strata", iteration).permutation(global_batch)[positions]
            own = (strata + own) / global_batch
        return self._sigma(own, tokens)

    def quantiles(self, count: int, tokens: int) -> np.ndarray:
        """Levels that share the draws equally: the (i + 1/2) / count quantiles of sigma, rising. fp32 `[count]`"""
        return np.sort(self._sigma((np.arange(count) + 0.5) / count, tokens))

    def _sigma(self, quantile: np.ndarray, tokens: int) -> np.ndarray:
        index = np.minimum(np.floor(self._u(quantile) * STEPS), STEPS - 1)
        sigma = shift(1 - index / STEPS, self.fixed)
        return shift(sigma, dynamic_factor(self.dynamic, tokens, self.cap)).astype(np.float32)

    def _u(self, quantile: np.ndarray) -> np.ndarray:
        if self.density == "logit_normal":
            return 1 / (1 + np.exp(-(self.mean + self.std * _normal_quantile(quantile))))
        if self.density == "mode":
            return 1 - quantile - self.mode_scale * (np.cos(np.pi * quantile / 2) ** 2 - 1 + quantile)
        if self.density == "uniform":
            return quantile
        raise ValueError(f"density {self.density!r}: uniform, logit_normal or mode")

    def weights(self, sigma: np.ndarray) -> np.ndarray:
        """Loss weight at each sigma (SD3, section 3.1): 1, sigma^-2, or 2 / (pi (1 - 2 sigma + 2 sigma^2))."""
        if self.weighting == "none":
            return np.ones_like(sigma)
        if self.weighting == "sigma_sqrt":
            return sigma**-2.0
        if self.weighting == "cosmap":
            return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
        raise ValueError(f"weighting {self.weighting!r}: none, sigma_sqrt or cosmap")


def _normal_quantile(quantile: np.ndarray) -> np.ndarray:
    clipped = np.clip(quantile, 1e-9, 1 - 1e-9)
    return np.array([NormalDist().inv_cdf(float(one)) for one in clipped])
