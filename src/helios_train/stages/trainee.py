"""What one optimizer trains: fp32 masters, gradients added up over the parts of an iteration, one step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer

from helios_train.memory.places import HOST, Places, placing, read
from helios_train.models.precision import Masters

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


@dataclass(frozen=True)
class Training:
    """How a trainee is stepped: its optimizer, learning rate, and the global norm its gradients are clipped to.

    host: where masters, moments and gradients live on the host; without, on the device.
    """

    optimizer: OptimizerFactory
    rate: LearningRate
    clip: float
    host: Places | None = None


class Trainee:
    """The weights of one optimizer. `names`: of the columns of the sums that come with the losses; the last is the whole loss.

    `name` stands before what it logs; none where a stage trains one thing.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], how: Training, names: Sequence[str], name: str = ""):
        self.masters = Masters(weights, how.host.stow, partial(placing, HOST)) if how.host else Masters(weights)
        self.how, self.names, self.name = how, list(names), name
        self.skipped = 0  # updates left out because a loss or gradient was not finite, in the whole run
        self.skipped_in_a_row = 0
        self._sums: Tensor | None = None

    def optimizer(self) -> Optimizer:
        """A new optimizer over the fp32 masters."""
        return self.how.optimizer(self.masters)

    def add(self, loss: Tensor, sums: Tensor, parts: int) -> None:
        """Adds one part of `parts` to the gradients, and its detached `sums` [2, names] (losses, counts) to what is logged."""
        (loss / parts).backward()  # type: ignore[no-untyped-call]
        self._sums = sums if self._sums is None else self._sums + sums

    def step(
        self, optimizer: Optimizer | LightningOptimizer, iteration: int, asleep: Iterable[str] = (), more: bool = False
    ) -> dict[str, Any]:
        """One optimizer step over all devices' gradients; what is not finite leaves weights and moments as they are.

        asleep: weights that are not stepped. more: of what was summed up to now another step is to follow in this iteration.
        Returns what is to be logged.
        """
        gradients = self.masters.fill()
        assert self._sums is not None
        sums, self._sums = self._sums, self._sums.clone() if more else None
        _average_over_devices(gradients, sums)
        norm = nn.utils.clip_grad_norm_(list(self.masters), self.how.clip)
        finite = bool(read(torch.isfinite(norm).to(sums.device) & torch.isfinite(sums[0, -1]), planned=True))
        if not finite:
            self.masters.clear()  # the step below then changes nothing, and still counts
            self.skipped += 1
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        self.masters.leave_out(asleep)
        rate = self.how.rate(iteration)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with self.masters.there():
            optimizer.step()
        self.masters.publish()
        self.masters.clear()
        means = {name: sums[0, column] / sums[1, column] for column, name in enumerate(self.names)}  # NaN: no sample seen
        logged = {"lr": rate, "gradient_norm": norm.detach(), "skipped": self.skipped, **means}
        return {f"{self.name}/{key}" if self.name else key: value for key, value in logged.items()}


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
