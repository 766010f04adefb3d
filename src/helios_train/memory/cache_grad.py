"""Cache-Grad: the gradient of a scalar by its inputs, taken at once and given back later.

A loss that hangs on a large network (a discriminator of 14 B) would keep that network's activations until the outer backward
comes by. Here the network is run and differentiated inside the forward: what stays is the value and one gradient shaped like
each input, which the outer backward multiplies by what reaches the value. The idea is the published system's
(PKU-YuanGroup/Helios), for any scalar function of tensors.

The same on the other side, where parameters learn: `in_turn` takes a loss over the outputs of several samples that may be
coupled, and differentiates one sample at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


class CacheGrad(torch.autograd.Function):
    """Gives `value`, whose gradient by `inputs` is known already. Called as apply(value, count, *gradients, *inputs)."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, count: int, *tensors: Tensor) -> Tensor:
        """The value itself."""
        ctx.save_for_backward(*tensors[:count])
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Each gradient, scaled. RuntimeError where a second derivative is asked for: the graph that has it is gone."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "cache_grad: a second derivative was asked for (create_graph=True), but the function's graph is freed at once; "
                "differentiate the function itself"
            )
        gradients = ctx.saved_tensors
        return (None, None, *(None for _ in gradients), *(upstream.to(gradient) * gradient for gradient in gradients))


def cache_grad(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A scalar function of tensors: its value, through which gradient flows to the inputs, and its gradients by them, detached.

    The function's graph is freed before this returns; parameters it uses get no gradient. An input the function does not use gets
    zeros. Under no_grad the function is differentiated all the same. ValueError for a value that is no scalar.
    """
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        value = function(*leaves)
        if value.numel() != 1:
            raise ValueError(f"cache_grad: the function gave {tuple(value.shape)}, not a scalar")
        gradients = torch.autograd.grad(value, leaves, materialize_grads=True)
    return CacheGrad.apply(value.detach(), len(gradients), *gradients, *inputs), gradients


def in_turn(
    samples: Sequence[Callable[[], Tensor]], loss: Callable[[Tensor], Tensor], replay: bool = True
) -> Iterator[tuple[Tensor, Tensor]]:
    """A loss over the stacked outputs [samples, ...] of samples that are each computed by a call, differentiated one by one.

    With `replay` the calls are made without a graph first; the loss and its gradient by the outputs then are known, whatever
    couples the samples, and each is called again: the activations of one sample are alive at a time, for a forward more. They
    must give the same outputs twice. Without it the graphs of all are kept from the one call of each, for less work.

    Yields for each sample a surrogate whose gradient by the parameters is that sample's share of the loss's, with the loss's
    value (the same each time, detached). Differentiate and drop the surrogate before the next.
    """
    with torch.set_grad_enabled(not replay):
        outputs = [sample() for sample in samples]
    with torch.enable_grad():
        leaf = torch.stack([output.detach() for output in outputs]).requires_grad_()
        value = loss(leaf)
        (gradient,) = torch.autograd.grad(value, leaf)
    for number, share in enumerate(gradient):
        output = samples[number]() if replay else outputs[number]
        outputs[number] = share  # so that its graph goes with the surrogate
        surrogate = (output * share).sum()
        del output
        yield surrogate, value.detach()
        del surrogate
