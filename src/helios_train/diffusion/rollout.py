"""A few-step student's way from noise to a section, coarse to fine: what distillation trains on and, run to the end, the sampler.

At every step of a level the network's velocity gives an estimate of the level's end point, `x - sigma v`; the next step starts
from that estimate, mixed with the level's own start point: `(1 - sigma) estimate + sigma start`, never with new noise. The last
estimate goes on to the next level, doubled and renoised as everywhere (`diffusion.pyramid`).

In training each level is left at a random step, its exit, so that every step learns to end a level. Gradient flows through the
exit calls alone. It passes from a level to the one before only where the later one exits at its first step, which starts from
what the earlier gave; any later step starts from an estimate without gradient. Exits are known beforehand, so a call whose
gradient would reach nothing builds no graph.

The published system is PKU-YuanGroup/Helios; diffusers has its sampler as HeliosPyramidPipeline with HeliosDMDScheduler. Its way
of generating while training is that of Self Forcing (Huang et al., 2025).

Axis letters: B batch, C latent channels, T latent frames, H W latent rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from helios_train import rng
from helios_train.diffusion.pyramid import Pyramid, block_noise, noise_pyramid
from helios_train.diffusion.schedule import nearest

BoundVelocity = Callable[[Tensor, Tensor], Tensor]  # (x_t, t [B]) -> v, the rest of what the network is told bound into it


class Step(NamedTuple):
    """One call of the network: the level's share of noise, and the time the network is fed."""

    sigma: float
    time: float


@dataclass(frozen=True)
class RolloutDraw:
    """What is random in one rollout.

    start: white noise at full resolution [B, C, T, H, W]. blocks: block noise of each level but the first, at its own size.
    exits: the step at which each level is left, from 0, or None: every step is run.
    """

    start: Tensor
    blocks: tuple[Tensor, ...]
    exits: tuple[int, ...] | None

    def to(self, device: torch.device | str) -> RolloutDraw:
        """The same draw elsewhere."""
        return replace(self, start=self.start.to(device), blocks=tuple(noise.to(device) for noise in self.blocks))


@dataclass(frozen=True)
class Rolled:
    """What a rollout gives: clean latents [B, C, T, H, W], and, if asked to align, the estimates of each level's end point.

    estimates: of each level those of its steps in turn, the exit's last; without gradient but for the exit's.
    """

    output: Tensor
    estimates: tuple[tuple[Tensor, ...], ...] = ()


@dataclass(frozen=True)
class Rollout:
    """Rollouts over `pyramid` in `steps` of each level, coarse to fine, twice as many where history is empty with `amplify`.

    dynamic, cap, behind: the shift of sigma by a level's tokens, as of Pyramid.factors. sigmas: the `exact` ones of the steps,
    as diffusers' sampler has them, or those of the `table` entries nearest in time, as published training has them. timesteps:
    the network is fed the steps' times as `float`, or cut to `int`, as diffusers' sampler feeds them; sigma stays the step's.
    leave: the exits that `draw` gives: `random` ones, or none, so that every level is run to its `last` step, as in sampling.
    """

    pyramid: Pyramid
    steps: tuple[int, ...] = (2, 2, 2)
    amplify: bool = True
    dynamic: Literal["none", "exponential", "linear"] = "linear"
    cap: float | None = None
    timesteps: Literal["float", "int"] = "float"
    sigmas: Literal["table", "exact"] = "table"
    behind: bool = False
    leave: Literal["random", "last"] = "random"

    def __post_init__(self) -> None:
        if len(self.steps) != self.pyramid.count or min(self.steps) < 1:
            raise ValueError(f"{self.pyramid.count} levels need as many numbers of steps of at least 1, got {self.steps}")
        if self.timesteps not in ("float", "int") or self.sigmas not in ("table", "exact"):
            raise ValueError(f"timesteps {self.timesteps!r}: float or int; sigmas {self.sigmas!r}: table or exact")

    def counts(self, empty: bool) -> tuple[int, ...]:
        """How many steps each level has, for a sample whose history is empty or not."""
        return tuple(count * (2 if self.amplify and empty else 1) for count in self.steps)

    def schedule(self, shape: Sequence[int], empty: bool) -> list[list[Step]]:
        """The steps of each level for latents `shape` = (..., T, H, W). InputError as of Pyramid.sizes."""
        factors = self.pyramid.factors(self.dynamic, shape[-3], shape[-2], shape[-1], self.cap, self.behind)
        counted = enumerate(zip(self.counts(empty), factors, strict=True))
        return [self._steps(level, count, factor) for level, (count, factor) in counted]

    def _steps(self, level: int, count: int, factor: float | None) -> list[Step]:
        sigmas, times = self.pyramid.few_steps(level, count, factor)
        if self.sigmas == "table":
            sigmas = nearest(self.pyramid.table(level, factor), times)
        fed = np.trunc(times) if self.timesteps == "int" else times
        return [Step(float(sigma), float(time)) for sigma, time in zip(sigmas, fed, strict=True)]

    def exits(self, seed: int, who: str, where: Sequence[int], empty: bool) -> tuple[int, ...]:
        """The exits of one rollout: uniform over the steps of each level, independent. `who`, `where`: as of `draw`."""
        draw = rng.generator(seed, f"{who} exit", *where)
        return tuple(int(draw.integers(count)) for count in self.counts(empty))

    def draw(
        self, seed: int, who: str, where: Sequence[int], shape: Sequence[int], empty: bool, early: bool = True
    ) -> RolloutDraw:
        """Draws for one sample, on the host; `shape` is (C, T, H, W). InputError as of Pyramid.sizes.

        who: what the rollout is for (student and critic each have their own). where: (iteration, position, ...). early: with
        exits; else every step is run.
        """
        channels, frames = shape[:2]
        sizes = self.pyramid.sizes(*shape[2:])
        white = [
            rng.normal(rng.generator(seed, f"{who} level noise", *where, level), (1, channels, frames, *size))
            for level, size in enumerate(sizes[1:], start=1)
        ]
        return RolloutDraw(
            start=rng.normal(rng.generator(seed, f"{who} start noise", *where), (1, *shape)),
            blocks=tuple(block_noise(noise, self.pyramid.gamma) for noise in white),
            exits=self.exits(seed, who, where, empty) if early and self.leave == "random" else None,
        )

    def __call__(self, velocity: BoundVelocity, draw: RolloutDraw, empty: bool, align: bool = False) -> Rolled:
        """One rollout; all samples of a batch share steps and exits, so they are alike in `empty`: nothing precedes them.

        Under no_grad nothing has a graph. align: estimates are kept, and every exit call that has earlier ones keeps its graph.
        ValueError for exits or noise that do not fit.
        """
        schedule = self.schedule(draw.start.shape, empty)
        exits = self._checked(draw, schedule)
        x, estimates = noise_pyramid(draw.start, self.pyramid.count)[0], []
        for level, (steps, stop) in enumerate(zip(schedule, exits, strict=True)):
            if level:
                x = self.pyramid.renoise(level, x, draw.blocks[level - 1])
            graph = not any(exits[level + 1 :]) or (align and stop > 0)
            found = _walk(velocity, x if stop == 0 else x.detach(), steps[: stop + 1], graph)
            x = found[-1]
            estimates.append(tuple(found))
        return Rolled(x, tuple(estimates) if align else ())

    def _checked(self, draw: RolloutDraw, schedule: list[list[Step]]) -> tuple[int, ...]:
        counts = [len(steps) for steps in schedule]
        exits = tuple(count - 1 for count in counts) if draw.exits is None else draw.exits
        if len(exits) != len(counts) or not all(0 <= stop < count for stop, count in zip(exits, counts, strict=True)):
            raise ValueError(f"exits {exits} of levels of {counts} steps")
        if len(draw.blocks) != len(counts) - 1:
            raise ValueError(f"{len(counts)} levels take block noise for all but the first, got {len(draw.blocks)}")
        return exits


def _walk(velocity: BoundVelocity, start: Tensor, steps: Sequence[Step], graph: bool) -> list[Tensor]:
    """Estimates of a level's end point at each of its steps; the last one's call may have a graph."""
    x = start
    found: list[Tensor] = []
    for number, (sigma, time) in enumerate(steps):
        last = number == len(steps) - 1
        with torch.set_grad_enabled(torch.is_grad_enabled() and graph and last):
            if number:
                x = (1 - sigma) * found[-1] + sigma * start
            t = torch.full((len(x),), time, dtype=torch.float32, device=x.device)
            found.append(x - sigma * velocity(x, t))
    return found
