"""What all stages share: manual optimization; one Lightning batch is one iteration, and global_step the only counter."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import lightning as L
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.optim import Optimizer

from helios_train.models.checkpoint import audit
from helios_train.models.precision import Masters
from helios_train.models.transformer import HeliosTransformer
from helios_train.stages.trainee import Trainee


class Stage(L.LightningModule):
    """A LightningModule whose weights are what trains, by name, in fp32; frozen weights are in no checkpoint.

    A subclass's `training_step` calls `backward_part` for each part of an iteration and `update` once for each trainee. The
    first trainee is what validation, moving average and merging mean; the last is stepped in every iteration, through
    Lightning's wrapper, which counts; others are stepped raw.
    """

    def __init__(self, transformer: HeliosTransformer, trainees: Sequence[Trainee]):
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False  # load_state_dict audits instead: exactly the trainable set
        self.transformer = transformer
        self.trainees = tuple(trainees)
        self.last: dict[str, Any] = {}  # what was logged of each trainee's last update
        self._alone: list[Optimizer] = []
        self._steps_alone = 0

    @property
    def masters(self) -> Masters:
        """The fp32 weights of the first trainee."""
        return self.trainees[0].masters

    @property
    def skipped(self) -> int:
        """Updates left out in the whole run."""
        return sum(trainee.skipped for trainee in self.trainees)

    @property
    def skipped_in_a_row(self) -> int:
        """Updates left out one after the other, of the trainee that is worst off."""
        return max(trainee.skipped_in_a_row for trainee in self.trainees)

    @property
    def averages_now(self) -> bool:
        """Whether the iteration just done updated what a moving average follows."""
        return True

    def alone(self) -> Self:
        """For iterations without a Trainer, such as a plan's: the stage keeps its own optimizers and counter."""
        self._alone = self.configure_optimizers()
        return self

    @property
    def iteration(self) -> int:
        """The iteration being worked on, counted from 0; after its last update, how many are done."""
        return self._steps_alone if self._alone else int(self.trainer.global_step)

    def configure_optimizers(self) -> list[Optimizer]:
        """An optimizer a trainee, in their order."""
        return [trainee.optimizer() for trainee in self.trainees]

    def backward_part(self, loss: Tensor, sums: Tensor, parts: int, trainee: int = 0) -> None:
        """Adds one part of `parts` to a trainee's gradients, and its detached `sums` to what is logged."""
        self.trainees[trainee].add(loss, sums, parts)

    def update(self, trainee: int = 0, asleep: Iterable[str] = (), more: bool = False) -> None:
        """One optimizer step of a trainee, but for the weights that are `asleep`; the iteration ends with the last trainee's,
        unless it has `more` to come."""
        last = trainee == len(self.trainees) - 1 and not more
        self.last |= self.trainees[trainee].step(self._optimizer(trainee, wrapped=last), self.iteration, asleep, more)
        self._steps_alone += last

    def _optimizer(self, trainee: int, wrapped: bool) -> Optimizer | LightningOptimizer:
        if self._alone:
            return self._alone[trainee]
        given = self.optimizers()
        optimizer = given[trainee] if isinstance(given, list) else given
        assert isinstance(optimizer, LightningOptimizer)
        return optimizer if wrapped else optimizer.optimizer

    def report(self, metrics: Mapping[str, Any]) -> None:
        """Sends metrics to every logger at the current iteration, and makes them available to `monitor=`."""
        values = {name: float(value) for name, value in metrics.items()}
        for logger in self.trainer.loggers:
            logger.log_metrics(values, step=self.iteration)
        for name, value in values.items():
            if not math.isnan(value):
                self.log(name, value, logger=False, prog_bar=name == "loss")

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The trainable weights in fp32, nothing frozen."""
        return {name: value for trainee in self.trainees for name, value in trainee.masters.state_dict().items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Takes exactly the trainable set; InputError names what does not fit."""
        audit({name: tuple(value.shape) for name, value in self.state_dict().items()}, state_dict, "the checkpoint")
        for trainee in self.trainees:
            own = trainee.masters.state_dict()
            trainee.masters.load_state_dict({name: state_dict[name] for name in own}, "the checkpoint")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what is counted."""
        checkpoint["counters"] = {"skipped": [trainee.skipped for trainee in self.trainees]}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes back what is counted."""
        for trainee, skipped in zip(self.trainees, checkpoint["counters"]["skipped"], strict=True):
            trainee.skipped = int(skipped)
