"""ODE regression: the few-step student learns the ends of a teacher's many-step ways through noise.

A teacher's way through a level is kept as the states before the few steps the student has, their times, and the level's end
point. At such a state the student's estimate of the end point, `x - sigma v`, costs half its mean squared error. History is the
teacher's own earlier sections (published system: PKU-YuanGroup/Helios, its ODE phase; the loss is that of CausVid, Yin et al.,
2025).

Axis letters: B batch (1), C latent channels, T latent frames, H W latent rows and columns, h w those of a level.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from helios_train import rng
from helios_train.data.pairs import Trajectory
from helios_train.diffusion.pyramid import Pyramid
from helios_train.diffusion.schedule import nearest
from helios_train.objectives.flow import Loss, Velocity


@dataclass(frozen=True)
class OdeDraw:
    """What is random in one trajectory: its sections, rising, and for each of them the step of each level."""

    sections: tuple[int, ...]
    steps: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class OdeObjective:
    """The loss over `sections` different sections of a trajectory and all their levels, one step each.

    dynamic, cap, behind: the shift the teacher was run with, as of Pyramid.factors. timesteps: the network is fed the stored
    times as `float` or cut to `int`. sigmas: at a stored time that of the `table` entry nearest (the teacher's own, where its
    times are the table's), or `exact`.
    """

    pyramid: Pyramid
    sections: int = 3
    weight: float = 80.0
    dynamic: Literal["none", "exponential", "linear"] = "linear"
    cap: float | None = None
    timesteps: Literal["float", "int"] = "float"
    sigmas: Literal["table", "exact"] = "table"
    behind: bool = False

    def __post_init__(self) -> None:
        if self.sections < 1:
            raise ValueError(f"ODE regression over {self.sections} sections")
        if self.timesteps not in ("float", "int") or self.sigmas not in ("table", "exact"):
            raise ValueError(f"timesteps {self.timesteps!r}: float or int; sigmas {self.sigmas!r}: table or exact")

    def draw(self, seed: int, iteration: int, position: int, trajectory: Trajectory) -> OdeDraw:
        """Draws for the trajectory at one position of the global batch; all its sections, where it has no more than asked for.

        ValueError for one of another number of levels.
        """
        levels = {len(walks) for walks in trajectory.sections}
        if levels != {self.pyramid.count}:
            raise ValueError(f"a trajectory of {sorted(levels)} levels, of a pyramid of {self.pyramid.count}")
        draw = rng.generator(seed, "ode", iteration, position)
        count = len(trajectory.sections)
        chosen = np.sort(draw.choice(count, min(self.sections, count), replace=False)).tolist()
        steps = [[int(draw.integers(len(walk.times))) for walk in trajectory.sections[section]] for section in chosen]
        return OdeDraw(tuple(chosen), tuple(map(tuple, steps)))

    def losses(self, velocity: Velocity, trajectory: Trajectory, draw: OdeDraw) -> Iterator[Loss]:
        """The terms one after the other, each computed when it is asked for; their totals add up to the objective.

        That is `weight` times the mean over the terms of `0.5 mean((x - sigma v - end)^2)`.
        """
        terms = len(draw.sections) * self.pyramid.count
        frames, rows, columns = trajectory.final(0).shape[2:]
        factors = self.pyramid.factors(self.dynamic, frames, rows, columns, self.cap, self.behind)
        chosen = dict(zip(draw.sections, draw.steps, strict=True))
        for section, history in enumerate(trajectory.histories()):
            for level, step in enumerate(chosen.get(section, ())):
                walk = trajectory.sections[section][level]
                sigma, time = self._at(level, float(walk.times[step]), factors[level])
                x, end = walk.latents[step : step + 1], walk.latents[-1:]
                t = torch.full((1,), time, dtype=torch.float32, device=x.device)
                estimate = x - sigma * velocity(x, t, trajectory.text, history)
                value = self.weight * 0.5 * (estimate - end).square().mean()
                yield Loss(value / terms, self._sums(value.detach(), level))

    def log_names(self) -> list[str]:
        """Names of the columns of `Loss.sums`: each level, and all of it."""
        return [*(f"loss/level_{level}" for level in range(self.pyramid.count)), "loss"]

    def _at(self, level: int, time: float, factor: float | None) -> tuple[float, float]:
        """Sigma at a stored time, and the time the network is fed."""
        table = self.pyramid.table(level, factor)
        known = np.array([time])
        sigma = nearest(table, known) if self.sigmas == "table" else np.interp(known, table[1][::-1], table[0][::-1])
        return float(sigma[0]), float(np.trunc(time)) if self.timesteps == "int" else time

    def _sums(self, value: Tensor, level: int) -> Tensor:
        sums = value.new_zeros(2, self.pyramid.count + 1)
        for column in (level, -1):
            sums[0, column], sums[1, column] = value, 1
        return sums
