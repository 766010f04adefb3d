"""Precision, in one place. The Trainer always runs 32-true; what is narrower is said here.

Frozen weights have the model's dtype; norms, modulation tables and the time embedder stay fp32 (diffusers' own list). Trainable
weights have fp32 masters: where the model computes in bf16 the module holds a bf16 copy of each, gradients are added up and
the optimizer steps in fp32. In an fp32 model a weight is its own master.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

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

    While a backward runs, each finished gradient is added to its master's and freed.
    """

    def __init__(self, trainable: Mapping[str, nn.Parameter]):
        self.weights = dict(trainable)
        self.masters: dict[str, nn.Parameter] = {}
        for name, weight in self.weights.items():
            if weight.dtype == torch.float32:
                self.masters[name] = weight
                continue
            self.masters[name] = nn.Parameter(weight.detach().float())
            weight.register_post_accumulate_grad_hook(_Collect(self.masters[name]))

    def __iter__(self) -> Iterator[nn.Parameter]:
        return iter(self.masters.values())

    def clear(self) -> None:
        """No gradients: a step with none changes no weight and no moment, yet counts."""
        for master in self:
            master.grad = None

    def fill(self) -> list[Tensor]:
        """The gradients, in the order of the names; a missing one counts as zeros."""
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


class _Collect:
    """Hook: adds a finished bf16 gradient to its fp32 master's, and frees it."""

    def __init__(self, master: nn.Parameter):
        self.master = master

    def __call__(self, weight: Tensor) -> None:
        if weight.grad is None:
            return
        if self.master.grad is None:
            self.master.grad = weight.grad.float()
        else:
            self.master.grad += weight.grad
        weight.grad = None
