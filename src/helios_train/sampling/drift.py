"""Drift detection: a section that leaves the running mean and variance of a video's latents is looked at through noise.

A student trained on corrupted history does not follow the drift of what it sees (Frame-Aware Corrupt); this makes the history
look corrupted where drift is seen, as the published inference can.

Axes: B videos, C latent channels, T latent frames, H W rows and columns.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from helios_train.history import History
from helios_train.history.corrupt import Corrupt, apply

NOISE = Corrupt(noise=1.0, blur=0.0, saturation=0.0, clean=0.0)


class DriftGuard:
    """Told each section of a batch of videos, gives the history that the next one is to see.

    A video whose mean AND variance are more than `threshold` from their running averages (weight `momentum` on the past) sees its
    history noised; the others, and what is kept of the history, stay as they are. Noise is a function of (seed, section, video).
    """

    def __init__(self, seed: int, threshold: float = 0.15, momentum: float = 0.9):
        self.seed, self.threshold, self.momentum = seed, threshold, momentum
        self.drifted: list[tuple[bool, ...]] = []  # a section: which videos
        self._running: Tensor | None = None  # [2, B]: mean, variance

    def __call__(self, latents_BCTHW: Tensor, history: History) -> History:
        """What the section after `latents` sees of `history`."""
        variance, mean = torch.var_mean(latents_BCTHW.float().flatten(1), dim=1, correction=0)
        now = torch.stack([mean, variance])
        before = now if self._running is None else self._running
        away = ((now - before).abs() > self.threshold).all(dim=0)
        self._running = self.momentum * before + (1 - self.momentum) * now
        drifted = tuple(away.tolist())
        self.drifted.append(drifted)
        if not any(drifted):
            return history
        channels, rows, columns = (history.frames.shape[axis] for axis in (1, 3, 4))
        draws = NOISE.draw(self.seed, len(self.drifted), range(len(drifted)), (channels, rows, columns), "drift ")
        clean = [draw if is_off else replace(draw, mode="clean", noise=None) for draw, is_off in zip(draws, drifted, strict=True)]
        return apply(history, clean)
