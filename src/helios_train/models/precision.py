"""Precision, in one place. The Trainer always runs 32-true; what is narrower is said here.

Frozen weights have the model's dtype; norms, modulation tables and the time embedder stay fp32 (diffusers' own list). Trainable
weights have fp32 masters: where the model computes in bf16 the module holds a bf16 copy of each, gradients are added up and
the optimizer steps in fp32. In an fp32 model a weight is its own master.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from diffusers import HeliosTransformer3DModel
from torch import Tensor, nn

from helios_train.models.checkpoint import audit

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
KEPT_FP32 = tuple(HeliosTransformer3DModel._keep_in_fp32_modules)


def dtype_of(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of one weight in a model of `dtype`."""
    return torch.float32 if any(part in KEPT_FP32 for part in name.split(".")) else dtype


def cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Gives every floating weight its dtype, before training; the same Parameter objects stay."""
    for name, parameter in module.named_parameters():
        parameter.data = parameter.data.to(dtype_of(name, dtype))


class Masters:
    """fp32 masters of the trainable weights of a module, by name.

    While a backward runs, each finished gradient is added to its master's and freed. `host`: masters and gradients live on the
    host; `to_host` copies a gradient there, and the step's own work is done inside `there()`.
    """

    def __init__(
        self,
        trainable: Mapping[str, nn.Parameter],
        to_host: Callable[[Tensor], Tensor] | None = None,
        there: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ):
        self.weights, self.there = dict(trainable), there
        self.masters: dict[str, nn.Parameter] = {}
        arriving = _Arriving()
        self._arriving = arriving
        for name, weight in self.weights.items():
            if weight.dtype == torch.float32 and to_host is None:
                self.masters[name] = weight
                continue
            wide = weight.detach().float()
            self.masters[name] = nn.Parameter(to_host(wide) if to_host else wide)
            weight.register_post_accumulate_grad_hook(_Collect(self.masters[name], to_host, arriving, there))
        if to_host and any(weight.is_cuda for weight in self.weights.values()):
            torch.cuda.synchronize()  # the copies were only begun

    def __iter__(self) -> Iterator[nn.Parameter]:
        return iter(self.masters.values())

    def clear(self) -> None:
        """No gradients: a step with none changes no weight and no moment, yet counts."""
        for master in self:
            master.grad = None

    def fill(self) -> list[Tensor]:
        """The gradients, in the order of the names; a missing one counts as zeros."""
        self._arriving.wait()
        with self.there():
            for master in self:
                if master.grad is None:
                    master.grad = torch.zeros_like(master)
        return [master.grad for master in self if master.grad is not None]

    def leave_out(self, names: Iterable[str]) -> None:
        """No gradient for these: the step leaves them, and what the optimizer remembers of them, as they are."""
        for name in names:
            self.masters[name].grad = None

    @torch.no_grad()
    def publish(self) -> None:
        """After a step: the module computes with the new weights."""
        for name, weight in self.weights.items():
            if weight is not self.masters[name]:
                weight.copy_(self.masters[name])

    def state_dict(self) -> dict[str, Tensor]:
        """The fp32 masters by name."""
        return {name: master.detach() for name, master in self.masters.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor], where: str) -> None:
        """Takes exactly these weights; InputError names a missing, extra or misshapen key of `where`."""
        audit({name: tuple(master.shape) for name, master in self.masters.items()}, state, where)
        for name, master in self.masters.items():
            master.copy_(state[name])
        self.publish()


class _Arriving:
    """Gradients on their way to the host, oldest first: each is added when its copy is done."""

    def __init__(self) -> None:
        self._under_way: deque[tuple[torch.cuda.Event, Callable[[], None]]] = deque()

    def add(self, from_gpu: bool, then: Callable[[], None]) -> None:
        """Does `then` once the copy that was begun last may be read: now, unless it comes from a GPU."""
        if not from_gpu:
            then()
            return
        event = torch.cuda.Event()
        event.record()
        self._under_way.append((event, then))
        while self._under_way and self._under_way[0][0].query():
            self._under_way.popleft()[1]()

    def wait(self) -> None:
        """For all of them."""
        while self._under_way:
            event, then = self._under_way.popleft()
            event.synchronize()
            then()


class _Collect:
    """Hook: adds a finished gradient to its fp32 master's, and frees it."""

    def __init__(
        self,
        master: nn.Parameter,
        to_host: Callable[[Tensor], Tensor] | None,
        arriving: _Arriving,
        there: Callable[[], AbstractContextManager[Any]],
    ):
        self.master, self.to_host, self.arriving, self.there = master, to_host, arriving, there

    def __call__(self, weight: Tensor) -> None:
        if weight.grad is None:
            return
        gradient, weight.grad = weight.grad, None
        if self.to_host is None:
            self._take(gradient)
            return
        copied = self.to_host(gradient)
        self.arriving.add(gradient.device.type == "cuda", partial(self._take, copied))

    @torch.no_grad()
    def _take(self, gradient: Tensor) -> None:
        with self.there():
            if self.master.grad is None:
                self.master.grad = gradient.float()
            else:
                self.master.grad += gradient
