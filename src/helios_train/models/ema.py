"""Exponential moving average of the trainable weights: named fp32 tensors on the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from helios_train.models.checkpoint import audit


class Ema:
    """Average of named weights: a copy up to update `start`, then decay min((1 + k) / (10 + k), decay) at the k-th after it."""

    def __init__(
        self, weights: Mapping[str, Tensor], decay: float, start: int = 0, to_host: Callable[[Tensor], Tensor] = Tensor.cpu
    ):
        """`to_host` brings a weight to where the averages are."""
        self.decay, self.start, self.updates, self._to_host = decay, start, 0, to_host
        self.average = {name: to_host(weight.detach()).float().clone() for name, weight in weights.items()}

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor]) -> None:
        """Takes the weights after one optimizer step."""
        averaged = self.updates - self.start
        decay = min((1 + averaged) / (10 + averaged), self.decay) if averaged > 0 else 0.0
        for name, average in self.average.items():
            average.lerp_(self._to_host(weights[name].detach()).float(), 1 - decay)
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        """The averages and how many updates they have seen."""
        return {"average": self.average, "updates": self.updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the averages back; InputError names a key that does not fit."""
        audit({name: tuple(average.shape) for name, average in self.average.items()}, state["average"], "EMA of the checkpoint")
        self.average = {name: state["average"][name].clone() for name in self.average}
        self.updates = int(state["updates"])

    @contextmanager
    @torch.no_grad()
    def swapped_in(self, weights: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """Inside, the module computes with the averages; afterwards with its own weights, bit for bit."""
        own = {name: weights[name].detach().clone() for name in self.average}
        try:
            for name, average in self.average.items():
                weights[name].copy_(average)
            yield
        finally:
            for name, weight in own.items():
                weights[name].copy_(weight)
