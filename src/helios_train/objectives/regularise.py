"""What may be added to the student's loss.

Axis letters: B batch, C latent channels, T latent frames, H W latent rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def saturation(x_BCTHW: Tensor) -> Tensor:
    """How far the channels are from their mean at each pixel, root mean square: what Frame-Aware Corrupt calls saturation. [B]"""
    return (x_BCTHW - x_BCTHW.mean(dim=1, keepdim=True)).flatten(1).square().mean(dim=1).sqrt()


def alignment(estimates: Sequence[Sequence[Tensor]]) -> Tensor | None:
    """`0.5 (exit - sg[earlier])^2` between the estimates of a level's end point, a mean over earlier steps, then over levels.

    Takes those of each level, the exit's last. Levels left at their first step have no such term; None if no level has one.
    """
    terms = [
        torch.stack([0.5 * (found[-1] - earlier.detach()).square().mean() for earlier in found[:-1]]).mean()
        for found in estimates
        if len(found) > 1
    ]
    return torch.stack(terms).mean() if terms else None


@dataclass(frozen=True)
class MeanVariance:
    """Divergence of a normal with a sample's mean and variance, over all its latents, from the normal of real ones.

    mean, variance: of real latents (published: of Wan's). first_mean, first_variance: of a section's first frame, which codecs
    encode alone; it enters with `share`, the whole section with the rest.
    """

    weight: float = 1.0
    mean: float = 0.00657
    variance: float = 0.85127
    first_mean: float = -0.01618
    first_variance: float = 0.27996
    share: float = 0.3

    def __post_init__(self) -> None:
        if min(self.variance, self.first_variance) <= 0 or not 0 <= self.share <= 1:
            raise ValueError(
                f"variances {self.variance}, {self.first_variance} must be above 0, the share within 0 to 1: {self.share}"
            )

    def __call__(self, x_BCTHW: Tensor) -> Tensor:
        """Mean over the samples, unweighted."""
        whole = divergence(x_BCTHW, self.mean, self.variance)
        first = divergence(x_BCTHW[:, :, :1], self.first_mean, self.first_variance)
        return ((1 - self.share) * whole + self.share * first).mean()


def divergence(x_BCTHW: Tensor, mean: float, variance: float) -> Tensor:
    """`0.5 (v/V + (m - M)^2/V - 1 - ln(v/V))`, m and v of each sample, v at least 1e-6. [B]"""
    own_variance, own_mean = torch.var_mean(x_BCTHW.flatten(1), dim=1, correction=0)
    ratio = own_variance.clamp_min(1e-6) / variance
    return 0.5 * (ratio + (own_mean - mean).square() / variance - 1 - ratio.log())
