"""The student's own sections, which distillation trains on: one after given history, or several, each after those before it.

Of several sections the last one is trained on; those before are run to the end without gradient, as the sampler would.

Axis letters: B batch, C latent channels, T latent frames, H W latent rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from helios_train.diffusion.rollout import BoundVelocity, Rolled, Rollout, RolloutDraw
from helios_train.history import History
from helios_train.objectives.flow import Velocity

# What is seen of the history of the n-th section of a rollout, counted from 0: by all roles, and by the student.
Views = Callable[[int, History], tuple[History, History]]


@dataclass(frozen=True)
class Section:
    """A section of the student's and what preceded it, as all roles see it. `estimates`: as of a rollout."""

    latents: Tensor  # [B, C, T, H, W]
    history: History
    estimates: tuple[tuple[Tensor, ...], ...] = ()


def as_it_is(section: int, history: History) -> tuple[History, History]:
    """History that nobody corrupts."""
    return history, history


def bound(velocity: Velocity, text: Tensor, history: History) -> BoundVelocity:
    """The network told its text and history."""
    return lambda x_t, t: velocity(x_t, t, text, history)


def draw_sections(
    rollout: Rollout, seed: int, who: str, where: Sequence[int], shape: Sequence[int], empty: bool, sections: int = 1
) -> tuple[RolloutDraw, ...]:
    """Draws for one sample, section by section, the last with exits; `shape` is (C, T, H, W), `where` (iteration, position).

    empty: nothing precedes the first section. ValueError without a section; InputError as of Pyramid.sizes.
    """
    if sections < 1:
        raise ValueError(f"a rollout of {sections} sections")
    last = sections - 1
    return tuple(
        rollout.draw(seed, who, (*where, section), shape, empty and section == 0, early=section == last)
        for section in range(sections)
    )


def roll(
    rollout: Rollout,
    velocity: Velocity,
    text: Tensor,
    history: History,
    draws: Sequence[RolloutDraw],
    views: Views = as_it_is,
    align: bool = False,
) -> Section:
    """The last of as many sections as there are draws, the first after `history`; gradient reaches the last one's calls alone.

    Samples of a batch share steps and exits. ValueError if history is empty for some of them only.
    """
    for section, draw in enumerate(draws):
        last = section == len(draws) - 1
        seen, own = views(section, history)
        with torch.set_grad_enabled(torch.is_grad_enabled() and last):
            rolled = _one(rollout, velocity, text, own, draw, align and last)
        history = history if last else history.followed_by(rolled.output)
    return Section(rolled.output, seen, rolled.estimates)


def _one(rollout: Rollout, velocity: Velocity, text: Tensor, history: History, draw: RolloutDraw, align: bool) -> Rolled:
    empty = set(history.empty)
    if len(empty) != 1:
        raise ValueError(f"samples of one rollout share its steps, but history is empty for some only: {history.empty}")
    return rollout(bound(velocity, text, history), draw.to(history.frames.device), empty.pop(), align)
