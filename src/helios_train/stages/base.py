"""The Base stage: flow matching on one section given its history, with the history mix and Frame-Aware Corrupt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from helios_train.data.batch import Window
from helios_train.history import History, corrupt, mix
from helios_train.models.adapters import trainable
from helios_train.models.transformer import HeliosTransformer
from helios_train.objectives.flow import Objective
from helios_train.stages.stage import Stage
from helios_train.stages.trainee import Trainee, Training


@dataclass(frozen=True)
class Draws:
    """Every random number of one micro-batch, by purpose."""

    mix: list[mix.MixDraw]
    corrupt: list[corrupt.CorruptDraw]
    flow: Any  # what the objective draws


@dataclass(frozen=True)
class BaseRecipe:
    """What a run does to its history and what it trains, the seed of it all, and the samples an iteration."""

    objective: Objective
    mix: mix.Mix
    corrupt: corrupt.Corrupt
    seed: int
    global_batch: int


class BaseStage(Stage):
    """Trains `velocity(x_t, t, text, history)`."""

    def __init__(self, recipe: BaseRecipe, transformer: HeliosTransformer, how: Training):
        """Trains what of the transformer requires a gradient."""
        super().__init__(transformer, [Trainee(trainable(transformer), how, recipe.objective.log_names())])
        self.recipe = recipe

    def training_step(self, micro_batches: list[Window], batch_idx: int) -> None:
        """One iteration over this device's micro-batches of a global batch."""
        for window in micro_batches:
            draws = self.draws(window)
            history = self.history(window, draws)
            given = window.target, window.text, history, draws.flow
            for loss in self.recipe.objective.losses(self.transformer.velocity, *given):
                self.backward_part(loss.total, loss.sums, len(micro_batches))
        self.update()

    def draws(self, window: Window) -> Draws:
        """The window's draws: functions of (seed, purpose, iteration, position), whoever computes them."""
        recipe, (_, channels, _, rows, columns) = self.recipe, window.target.shape
        where = recipe.seed, window.iteration, window.positions
        return Draws(
            mix=recipe.mix.draw(*where),
            corrupt=recipe.corrupt.draw(*where, (channels, rows, columns)),
            flow=recipe.objective.draw(*where, window.target.shape[1:], recipe.global_batch),
        )

    def history(self, window: Window, draws: Draws) -> History:
        """What the network sees of the past: the mix first, then the corruption."""
        return corrupt.apply(mix.apply(window.history, draws.mix), draws.corrupt)
