"""What all stages share: manual optimization; one Lightning batch is one iteration, and global_step the only counter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer

from helios_train.memory.places import read
from helios_train.models.adapters import trainable
from helios_train.models.precision import Masters
from helios_train.models.transformer import HeliosTransformer

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]


@dataclass(frozen=True)
class LearningRate:
    """Learning rate as a function of the iteration: linear warm-up, then constant, linear or cosine decay over the last share.

    `base`: rate at its height. `warmup`: iterations. `decay`: last share of `total` iterations over which it falls to 0.
    """

    base: float
    schedule: str = "constant"
    warmup: int = 0
    decay: float = 0.0
    total: int = 1

    def __call__(self, iteration: int) -> float:
        """The rate of the step that ends iteration `iteration`, counted from 0."""
        rate = self.base * min(1.0, (iteration + 1) / self.warmup) if self.warmup else self.base
        tail = self.decay * self.total
        if self.schedule == "constant" or tail == 0:
            return rate
        left = min(1.0, max(0.0, (self.total - iteration) / tail))
        return rate * (left if self.schedule == "linear" else 0.5 - 0.5 * math.cos(math.pi * left))


class Stage(L.LightningModule):
    """A LightningModule whose weights are what trains, by name, in fp32; frozen weights are in no checkpoint.

    A subclass's `training_step` calls `backward_part` for each micro-batch and `update` once.
    """

    def __init__(self, transformer: HeliosTransformer, optimizer: OptimizerFactory, rate: LearningRate, clip: float):
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False  # load_state_dict audits instead: exactly the trainable set
        self.transformer = transformer
        self.masters = Masters(trainable(transformer))
        self.optimizer_factory, self.rate, self.clip = optimizer, rate, clip
        self.skipped = 0  # updates left out because a loss or gradient was not finite, in the whole run
        self.skipped_in_a_row = 0
        self._sums: Tensor | None = None
        self._alone: Optimizer | None = None
        self._steps_alone = 0

    def alone(self) -> Self:
        """For iterations without a Trainer, such as a plan's: the stage keeps its own optimizer and counter."""
        self._alone = self.configure_optimizers()
        return self

    @property
    def iteration(self) -> int:
        """The iteration being worked on, counted from 0; after its update, how many are done."""
        return int(self.trainer.global_step) if self._alone is None else self._steps_alone

    def configure_optimizers(self) -> Optimizer:
        """The one optimizer that Lightning wraps, over the fp32 masters."""
        return self.optimizer_factory(self.masters)

    def backward_part(self, loss: Tensor, sums: Tensor, parts: int) -> None:
        """Adds one micro-batch of `parts` to the gradients, and its detached `sums` to what is logged."""
        (loss / parts).backward()  # type: ignore[no-untyped-call]
        self._sums = sums if self._sums is None else self._sums + sums

    def update(self) -> None:
        """One optimizer step over all devices' gradients; a norm that is not finite leaves weights and moments as they are."""
        gradients = self.masters.fill()
        assert self._sums is not None
        sums, self._sums = self._sums, None
        _average_over_devices(gradients, sums)
        norm = nn.utils.clip_grad_norm_(list(self.masters), self.clip)
        finite = bool(read(torch.isfinite(norm) & torch.isfinite(sums[0, -1]), planned=True))
        if not finite:
            self.masters.clear()  # the step below then changes nothing, and still counts
            self.skipped += 1
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        rate = self.rate(self.iteration)
        optimizer = self.optimizers() if self._alone is None else self._alone
        assert isinstance(optimizer, LightningOptimizer | Optimizer)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        self._steps_alone += 1
        self.masters.publish()
        self.masters.clear()
        self.last = {"lr": rate, "gradient_norm": norm.detach(), "skipped": self.skipped, **self._means(sums)}

    def _means(self, sums: Tensor) -> dict[str, Tensor]:
        """What a stage makes of its summed losses: names and values, NaN where a bin saw no sample."""
        return {name: sums[0, column] / sums[1, column] for column, name in enumerate(self.log_names())}

    def log_names(self) -> list[str]:
        """Names of the columns of the sums a subclass hands to `backward_part`."""
        raise NotImplementedError

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
        return self.masters.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Takes exactly the trainable set; InputError names what does not fit."""
        self.masters.load_state_dict(state_dict, "the checkpoint")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what is counted."""
        checkpoint["counters"] = {"skipped": self.skipped}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes back what is counted."""
        self.skipped = int(checkpoint["counters"]["skipped"])


def _average_over_devices(gradients: list[Tensor], sums: Tensor) -> None:
    """Averages gradients, and adds up `sums`, over all devices in one flat buffer."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    flat = torch.cat([*(gradient.flatten() for gradient in gradients), sums.flatten().float()])
    dist.all_reduce(flat)
    parts = flat.split([gradient.numel() for gradient in gradients] + [sums.numel()])
    for gradient, part in zip(gradients, parts[:-1], strict=True):
        gradient.copy_((part / dist.get_world_size()).view_as(gradient))
    sums.copy_(parts[-1].view_as(sums))
