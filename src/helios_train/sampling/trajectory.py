"""A many-step teacher's ways through noise, kept where a few-step student will pass: what ODE regression learns from.

In every level the teacher walks the union of its own grid and the student's steps, both shifted alike, so that the states before
the student's steps are states of the teacher's own way, at exactly the student's times. Sections follow one another on the
teacher's own output.

Axis letters: B batch, C latent channels, T latent frames, H W latent rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from diffusers import HeliosScheduler
from torch import Tensor

from helios_train.data.pairs import Walk
from helios_train.diffusion.pyramid import noise_pyramid
from helios_train.diffusion.rollout import Rollout, RolloutDraw
from helios_train.history import History
from helios_train.sampling.pipeline import SamplerSettings

Velocity = Callable[[Tensor, Tensor, Tensor, History], Tensor]
SAME = 9  # decimals to which sigmas of the two grids are compared


@dataclass(frozen=True)
class Teacher:
    """Walks by a pyramid's (or one level's) scheduler in `steps` a level, with classifier-free guidance against null text.

    settings: how the teacher is sampled. rollout: of the student, whose steps are kept.
    """

    velocity: Velocity
    settings: SamplerSettings
    rollout: Rollout
    steps: int = 20
    guidance: float = 5.0

    def __post_init__(self) -> None:
        pyramid = self.rollout.pyramid
        own = (self.settings.levels, self.settings.edges, self.settings.gamma)
        if own != (pyramid.count, pyramid.edges, pyramid.gamma) or self.settings.dynamic_shift != self.rollout.dynamic:
            raise ValueError(f"teacher of levels, edges, gamma {own}, {self.settings.dynamic_shift}; student {self.rollout}")

    @torch.no_grad()
    def sections(self, draws: Sequence[RolloutDraw], text: Tensor) -> list[list[list[Walk]]]:
        """One video a sample [B], from nothing, over as many sections as there are draws: walks by sample, section and level."""
        start = draws[0].start
        history = History.none(len(start), start.shape[1], *start.shape[-2:]).to(text.device)
        found: list[list[list[Walk]]] = [[] for _ in range(len(start))]
        for draw in draws:
            walks = self._section(draw.to(text.device), text, history)
            for sample, own in enumerate(found):
                own.append([Walk(states[sample].cpu(), times) for states, times in walks])
            history = history.followed_by(walks[-1][0][:, -1])
        return found

    def _section(self, draw: RolloutDraw, text: Tensor, history: History) -> list[tuple[Tensor, np.ndarray]]:
        """Of each level: states kept [B, n + 1, C, T, h, w], the last its end point, and times [n]."""
        pyramid, scheduler = self.rollout.pyramid, self.settings.scheduler()
        kept = replace(self.rollout, sigmas="exact", timesteps="float").schedule(draw.start.shape, all(history.empty))
        frames, rows, columns = draw.start.shape[-3:]
        factors = pyramid.factors(self.rollout.dynamic, frames, rows, columns, self.rollout.cap, self.rollout.behind)
        x = noise_pyramid(draw.start, pyramid.count)[0]
        found = []
        for level, (steps, factor) in enumerate(zip(kept, factors, strict=True)):
            if level:
                x = pyramid.renoise(level, x, draw.blocks[level - 1])
            own = zip(*(numbers[: self.steps] for numbers in pyramid.steps(level, self.steps, factor)), strict=True)
            grid = {round(float(sigma), SAME): float(time) for sigma, time in own}
            grid |= {round(step.sigma, SAME): step.time for step in steps}
            states, x = self._walk(scheduler, level, grid, x, (text, history))
            wanted = [states[round(step.sigma, SAME)] for step in steps]
            found.append((torch.stack([*wanted, x], dim=1), np.array([step.time for step in steps], dtype=np.float32)))
        return found

    def _walk(
        self, scheduler: HeliosScheduler, level: int, grid: dict[float, float], x: Tensor, told: tuple[Tensor, History]
    ) -> tuple[dict[float, Tensor], Tensor]:
        """States by sigma, and the end point."""
        sigmas = sorted(grid, reverse=True)
        scheduler.set_timesteps(len(sigmas), level, device=x.device, mu=1.0)  # its own grid is replaced
        scheduler.sigmas = torch.tensor([*sigmas, 0.0], dtype=torch.float64, device=x.device)
        scheduler.timesteps = torch.tensor([grid[sigma] for sigma in sigmas], dtype=torch.float64, device=x.device)
        states = {}
        for sigma in sigmas:
            states[sigma] = x
            x = scheduler.step(self._guided(x, grid[sigma], *told), grid[sigma], x, return_dict=False)[0].to(x.dtype)
        return states, x

    def _guided(self, x: Tensor, time: float, text: Tensor, history: History) -> Tensor:
        """The pipelines of several levels feed whole times, that of one level does not."""
        fed = float(np.trunc(time)) if self.settings.levels > 1 else time
        t = torch.full((len(x),), fed, dtype=torch.float32, device=x.device)
        given = self.velocity(x, t, text, history)
        if self.guidance <= 1:
            return given
        null = self.velocity(x, t, torch.zeros_like(text), history)
        return null + self.guidance * (given - null)
