"""Frame-Aware Corrupt: history as the model's own drifting output would look, so that it learns not to follow the drift.

Per sample one mode (noise, blur, saturation, clean), and saturation on top of any mode with a share of its own. Frames that
do not exist stay exactly zero. Noise: `x <- s eps + (1 - s) x`, s ~ U(0, noise_max) for each frame alone. Blur: antialiased
bilinear down to a ratio in U(blur_min, 1) and back, in space only, one ratio a segment. Saturation: `x <- m + f (x - m)`, m the
mean over the channels at each pixel, f from U(.3, .999) or U(1.001, 1.7) with equal odds, one f a segment; never on the anchor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from helios_train import rng
from helios_train.history import FRAMES, History

MODES = ("noise", "blur", "saturation", "clean")
DULL, VIVID = (0.3, 0.999), (1.001, 1.7)
# Slices of the 19 frames that share one blur ratio and one saturation: as the patches see them, or as published (1 | 9 | 2 + 7).
SEGMENTS = {
    "own": (slice(0, 16), slice(16, 18), slice(18, 19)),
    "published": (slice(0, 1), slice(1, 10), slice(10, 19)),
}


@dataclass(frozen=True)
class Corrupt:
    """Shares of the modes (they sum to 1), the share that is saturated on top, and how strong each is."""

    noise: float
    blur: float
    saturation: float
    clean: float
    saturation_on_top: float = 0.0
    noise_max: float = 1 / 3
    blur_min: float = 0.9
    segments: str = "own"
    group: int = 1

    def __post_init__(self) -> None:
        if min(self.shares) < 0 or abs(sum(self.shares) - 1) > 1e-6:
            raise ValueError(
                f"shares of the corruption must be >= 0 and sum to 1, got {dict(zip(MODES, self.shares, strict=True))}"
            )

    @property
    def shares(self) -> tuple[float, float, float, float]:
        """In the order of MODES."""
        return self.noise, self.blur, self.saturation, self.clean

    def draw(self, seed: int, iteration: int, positions: Sequence[int], shape: Sequence[int], who: str = "") -> list[CorruptDraw]:
        """One draw for each position in the global batch; `shape` is (C, H, W) of a latent frame. `who`: draws of their own."""
        return [self._draw(seed, iteration, position, shape, who) for position in positions]

    def _draw(self, seed: int, iteration: int, position: int, shape: Sequence[int], who: str) -> CorruptDraw:
        modes = rng.generator(seed, f"{who}corrupt", iteration, position // self.group)
        mode = MODES[int(np.searchsorted(np.cumsum(self.shares)[:-1], modes.random(), side="right"))]
        on_top = bool(modes.random() < self.saturation_on_top)
        levels = rng.generator(seed, f"{who}corrupt level", iteration, position)
        segments = len(SEGMENTS[self.segments])
        channels, rows, columns = shape
        return CorruptDraw(
            mode=mode,
            saturated=on_top or mode == "saturation",
            segments=self.segments,
            sigmas=levels.uniform(0, self.noise_max, FRAMES + 1).astype(np.float32),
            ratios=tuple(levels.uniform(self.blur_min, 1, segments + 1)),
            factors=tuple(_factor(levels) for _ in range(segments)),
            noise=rng.normal(levels, (channels, FRAMES + 1, rows, columns)) if mode == "noise" else None,
        )


@dataclass(frozen=True)
class CorruptDraw:
    """Everything random in one sample's corruption; the last of `sigmas`, `ratios` and `noise` is the anchor's."""

    mode: str
    saturated: bool
    segments: str
    sigmas: np.ndarray  # [20]
    ratios: tuple[float, ...]
    factors: tuple[float, ...]
    noise: Tensor | None  # [C, 20, H, W]


def apply(history: History, draws: Sequence[CorruptDraw]) -> History:
    """The corrupted history; samples drawn clean, and absent frames, pass bit for bit."""
    samples = [_one(history.frames[b], history.anchor[b], draw) for b, draw in enumerate(draws)]
    corrupted = replace(history, frames=torch.stack([s[0] for s in samples]), anchor=torch.stack([s[1] for s in samples]))
    return corrupted.keep(history.counts, history.anchored)  # noise must not fill what does not exist


def _one(frames: Tensor, anchor: Tensor, draw: CorruptDraw) -> tuple[Tensor, Tensor]:
    """One sample: frames [C, 19, H, W], anchor [C, 1, H, W]."""
    segments = SEGMENTS[draw.segments]
    if draw.noise is not None:
        sigmas = torch.from_numpy(draw.sigmas).to(frames)[None, :, None, None]
        noise = draw.noise.to(frames)
        frames = sigmas[:, :FRAMES] * noise[:, :FRAMES] + (1 - sigmas[:, :FRAMES]) * frames
        anchor = sigmas[:, FRAMES:] * noise[:, FRAMES:] + (1 - sigmas[:, FRAMES:]) * anchor
    if draw.mode == "blur":
        parts = [blur(frames[:, part], ratio) for part, ratio in zip(segments, draw.ratios, strict=False)]
        frames, anchor = torch.cat(parts, dim=1), blur(anchor, draw.ratios[-1])
    if draw.saturated:
        parts = [saturate(frames[:, part], factor) for part, factor in zip(segments, draw.factors, strict=True)]
        frames = torch.cat(parts, dim=1)
    return frames, anchor


def blur(latents_CTHW: Tensor, ratio: float) -> Tensor:
    """Antialiased bilinear down to `ratio` of each side and back; every frame alone. Shape kept."""
    size = latents_CTHW.shape[-2:]
    small = [max(1, round(side * ratio)) for side in size]
    frames = latents_CTHW.transpose(0, 1)
    frames = F.interpolate(frames, size=small, mode="bilinear", antialias=True)
    return F.interpolate(frames, size=size, mode="bilinear", antialias=True).transpose(0, 1)


def saturate(latents_CTHW: Tensor, factor: float) -> Tensor:
    """`m + factor (x - m)`, m the mean over the channels of each pixel. Shape kept."""
    mean = latents_CTHW.mean(dim=0, keepdim=True)
    return mean + factor * (latents_CTHW - mean)


def _factor(generator: np.random.Generator) -> float:
    low, high = DULL if generator.random() < 0.5 else VIVID
    return float(generator.uniform(low, high))
