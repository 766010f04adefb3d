"""The ODE stage: a few-step student learns the ends of a teacher's ways through noise, before it is matched in distribution."""

from __future__ import annotations

from collections.abc import Sequence

from helios_train.data.pairs import Pair
from helios_train.models.adapters import trainable
from helios_train.models.transformer import HeliosTransformer
from helios_train.objectives.ode import OdeObjective
from helios_train.stages.stage import Stage
from helios_train.stages.trainee import Trainee, Training


class OdeStage(Stage):
    """Trains `velocity(x_t, t, text, history)` on trajectories; each term is differentiated alone."""

    def __init__(self, objective: OdeObjective, seed: int, transformer: HeliosTransformer, how: Training):
        super().__init__(transformer, [Trainee(trainable(transformer), how, objective.log_names())])
        self.objective, self.seed = objective, seed

    def training_step(self, samples: Sequence[Pair], batch_idx: int) -> None:
        """One iteration over this device's trajectories of a global batch."""
        for sample in samples:
            draw = self.objective.draw(self.seed, sample.ref.iteration, sample.ref.position, sample.trajectory)
            for loss in self.objective.losses(self.transformer.velocity, sample.trajectory, draw):
                self.backward_part(loss.total, loss.sums, len(samples))
        self.update()
