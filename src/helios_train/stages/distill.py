"""The Distill stage: a few-step student learns from a teacher by distribution matching, a critic follows the student.

Every iteration trains the critic on what the student makes; every few the student goes first. The two learn from sections drawn
independently from the same clips.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from helios_train import rng
from helios_train.data.batch import Window, WindowPair
from helios_train.history import History, corrupt, mix
from helios_train.models.heads import Heads
from helios_train.models.roles import CRITIC, STUDENT, TEACHER, Roles
from helios_train.objectives.dmd import Cast, CriticObjective, StudentObjective, Told
from helios_train.objectives.gan import Adversary
from helios_train.stages.stage import Stage
from helios_train.stages.trainee import Trainee, Training

TRAINED, FOLLOWING = 0, 1  # trainees: the student, and the critic, whose step counts the iterations


@dataclass(frozen=True)
class SectionCount:
    """How many sections a rollout has in an iteration: from `low` to `high`.

    Before `cold_start` it is `low`. Then it is drawn, with few sections likelier (Beta(1.5, 4) of the range), evenly in the end,
    along half a cosine over `anneal` iterations.
    """

    low: int = 1
    high: int = 1
    anneal: int = 0
    cold_start: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.low <= self.high:
            raise ValueError(f"rollouts of {self.low} to {self.high} sections: at least 1, and the fewest first")

    def __call__(self, seed: int, iteration: int) -> int:
        """The number of this iteration."""
        if iteration < self.cold_start or self.low == self.high:
            return self.low
        skew = 1 - rng.half_cosine(iteration - self.cold_start, self.anneal)
        share = rng.generator(seed, "sections", iteration).beta(1 + 0.5 * skew, 1 + 3 * skew)
        return self.low + min(int(share * (self.high - self.low + 1)), self.high - self.low)


@dataclass(frozen=True)
class Drift:
    """What is seen of history in one sample's step: corrupted alike by all roles, with its saturation changed by the student.

    Of the own sections of a rollout each is corrupted anew.
    """

    corrupt: corrupt.Corrupt
    seed: int
    who: str
    iteration: int
    position: int

    def __call__(self, section: int, history: History) -> tuple[History, History]:
        """(as all roles see it, as the student does)."""
        _, channels, _, rows, columns = history.frames.shape
        who = f"{self.who} section {section} "
        (draw,) = self.corrupt.draw(self.seed, self.iteration, [self.position], (channels, rows, columns), who)
        seen = corrupt.apply(history, [replace(draw, saturated=False)])
        return seen, corrupt.apply(history, [draw]) if draw.saturated else seen


@dataclass(frozen=True)
class DistillRecipe:
    """What is trained, what is done to the history, and the seed of it all.

    every: the student has its turn in one of so many iterations. given: rollouts go on from the clip's own history; else from
    nothing, over `sections` of their own. negative: the text [rows, dim] that guidance leads away from; None: zeros. With an
    adversary: own_real: the heads see the real section that belongs to the history shown; else, as published, that of the pair's
    other window. one_step: the critic is stepped once for both its losses; else, as published, once for each. heads_wait: the
    heads are not stepped before the adversary's start; else, as published, with zero gradients.
    """

    student: StudentObjective
    critic: CriticObjective
    mix: mix.Mix
    corrupt: corrupt.Corrupt
    seed: int
    every: int = 5
    sections: SectionCount = SectionCount()
    given: bool = True
    negative: Tensor | None = None
    own_real: bool = True
    one_step: bool = True
    heads_wait: bool = True

    @property
    def adversary(self) -> Adversary | None:
        """The one of both objectives."""
        return self.critic.adversary


class DistillStage(Stage):
    """Trains the adapters of student and critic; the teacher and all bases stay as they are."""

    def __init__(self, recipe: DistillRecipe, roles: Roles, student: Training, critic: Training, heads: Heads | None = None):
        if (heads is None) != (recipe.adversary is None):
            raise ValueError("an adversary has heads, and nobody else")
        own_heads = {f"heads.{CRITIC}.{name}": weight for name, weight in heads.named_parameters()} if heads else {}
        trainees = [
            Trainee(roles.trainable(STUDENT), student, recipe.student.log_names(), STUDENT),
            Trainee(roles.trainable(CRITIC) | own_heads, critic, recipe.critic.log_names(), CRITIC),
        ]
        super().__init__(roles.student.transformer, trainees)
        self.recipe, self.roles = recipe, roles
        self.scores = roles.scores.transformer  # registered, so that they move with the stage
        self.lineage_layers = nn.ModuleList(roles.lineage.layers.values())
        self.heads, self._of_heads = heads, tuple(own_heads)
        logits = roles.logits(CRITIC, heads) if heads else None
        student_v, teacher_v, critic_v = (roles.velocity(role) for role in (STUDENT, TEACHER, CRITIC))
        self.cast = Cast(student_v, teacher_v, critic_v, logits)
        self._student_turn = False

    @property
    def averages_now(self) -> bool:
        """The average follows the student, in its turns."""
        return self._student_turn

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what was last logged of the student, which stands in the log's rows until its next turn."""
        super().on_save_checkpoint(checkpoint)
        own = {name: float(value) for name, value in self.last.items() if not name.startswith(f"{CRITIC}/")}
        checkpoint["counters"]["last"] = {name: value for name, value in own.items() if math.isfinite(value)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes that back."""
        super().on_load_checkpoint(checkpoint)
        unseen = {f"{STUDENT}/{name}": math.nan for name in self.trainees[TRAINED].names}
        self.last |= unseen | checkpoint["counters"]["last"]

    def training_step(self, micro_batches: list[WindowPair], batch_idx: int) -> None:
        """One iteration over this device's pairs of windows of a global batch."""
        self._student_turn = self.iteration % self.recipe.every == 0
        if self._student_turn:
            self.train_student([sample for pair in micro_batches for sample in pair.first.samples()])
            self.update(TRAINED)
        self.train_critic(
            [two for pair in micro_batches for two in zip(pair.second.samples(), pair.first.samples(), strict=True)]
        )

    def train_student(self, samples: Sequence[Window]) -> None:
        """Adds the student's gradients of all samples, one after the other: one sample's graphs are alive at a time."""
        objective = self.recipe.student
        for sample in samples:
            told, sections = self.told(sample, STUDENT)
            draw = objective.draw(*self.where(sample), told.history.empty[0], sections)
            loss = objective(self.cast, told, draw)
            self.roles.present(STUDENT)
            self.backward_part(loss.total, loss.sums, len(samples), TRAINED)

    def train_critic(self, samples: Sequence[tuple[Window, Window]]) -> None:
        """The critic's gradients of all samples, each with its pair's other window, and its step, or one for each of its
        losses."""
        objective, recipe, kept = self.recipe.critic, self.recipe, []
        for sample, other in samples:
            told, sections = self.told(sample, CRITIC)
            told = told if recipe.own_real else replace(told, real=other.target)
            draw = objective.draw(*self.where(sample), told.history.empty[0], sections)
            section = objective.made(self.cast.student, told, draw)
            loss = objective.denoising(self.cast.critic, told, section, draw)
            self.backward_part(loss.total, loss.sums, len(samples), FOLLOWING)
            kept.append((told, section, draw))
        started = recipe.adversary is not None and self.iteration >= recipe.adversary.start
        if started and not recipe.one_step:
            self.update(FOLLOWING, more=True)
        if self.cast.logits is not None:
            for told, section, draw in kept:
                for loss in objective.judging(self.cast.logits, told, section, draw):
                    self.backward_part(loss.total, loss.sums, len(samples), FOLLOWING)
        self.update(FOLLOWING, asleep=() if started or not recipe.heads_wait else self._of_heads)

    def where(self, sample: Window) -> tuple[int, int, int, torch.Size]:
        """Seed, iteration, position and shape (C, 9, H, W): what a sample's draws are functions of."""
        return self.recipe.seed, sample.iteration, sample.positions[0], sample.target.shape[1:]

    def told(self, sample: Window, who: str) -> tuple[Told, int]:
        """What the networks are told in one sample's step, and how many sections its rollout has."""
        recipe, (seed, iteration, position, (channels, _, rows, columns)) = self.recipe, self.where(sample)
        if recipe.given:
            history = mix.apply(sample.history, recipe.mix.draw(seed, iteration, [position], f"{who} "))
            sections = 1
        else:
            history = History.none(1, channels, rows, columns).to(sample.target.device)
            sections = recipe.sections(seed, iteration)
        negative = torch.zeros_like(sample.text) if recipe.negative is None else recipe.negative.to(sample.text)[None]
        views = Drift(recipe.corrupt, seed, who, iteration, position)
        return Told(sample.text, negative, history, views, sample.target), sections
