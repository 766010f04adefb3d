"""Cache-Grad: values and gradients of direct autograd, with the function's graph gone; coupled samples one after the other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from helios_train import rng
from helios_train.memory.cache_grad import cache_grad, in_turn
from helios_train.memory.live import LiveCounter
from helios_train.memory.places import DEVICE

WIDTH = 64


def numbers(name: str, *shape: int) -> Tensor:
    return rng.normal(rng.generator(0, name), shape)


def network() -> nn.Sequential:
    with rng.forked(0, "network"):
        return nn.Sequential(nn.Linear(WIDTH, 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU(), nn.Linear(256, 3))


def test_values_and_gradients_are_those_of_autograd() -> None:
    """Scaled by what reaches the value, through what the inputs came from, for several inputs; the network's weights get none."""
    judge = network().double()
    leaf = [numbers(name, 4, WIDTH).double().requires_grad_() for name in ("one", "other")]

    def function(one: Tensor, other: Tensor) -> Tensor:
        return nn.functional.softplus(judge(one * other)).mean() + other.square().sum()

    direct = function(leaf[0].sin(), 2 * leaf[1])
    wanted = torch.autograd.grad(3 * direct.square(), leaf)
    value, gradients = cache_grad(function, leaf[0].sin(), 2 * leaf[1])
    (3 * value.square()).backward()
    torch.testing.assert_close(value, direct, rtol=1e-6, atol=0)
    for tensor, gradient in zip(leaf, wanted, strict=True):
        torch.testing.assert_close(tensor.grad, gradient, rtol=1e-6, atol=1e-9)
    assert all(weight.grad is None for weight in judge.parameters())
    assert len(gradients) == 2 and not any(gradient.requires_grad for gradient in gradients)


def test_an_input_that_is_not_used_and_one_that_needs_no_gradient() -> None:
    used, unused, fixed = numbers("used", 3).requires_grad_(), numbers("unused", 3).requires_grad_(), numbers("fixed", 3)
    value, gradients = cache_grad(lambda a, b, c: (a * c).sum(), used, unused, fixed)
    value.backward()
    assert torch.equal(used.grad, fixed) and torch.count_nonzero(unused.grad) == 0 and fixed.grad is None
    assert torch.equal(gradients[2], used.detach())


def test_a_second_derivative_is_refused_by_name() -> None:
    x = numbers("x", 3).requires_grad_()
    value, _ = cache_grad(lambda x: x.pow(3).sum(), x)
    with pytest.raises(RuntimeError, match=r"cache_grad: a second derivative was asked for \(create_graph=True\)"):
        torch.autograd.grad(value, x, create_graph=True)
    with pytest.raises(ValueError, match=r"gave \(3,\), not a scalar"):
        cache_grad(lambda x: x.pow(3), x)


def test_no_activation_outlives_the_call() -> None:
    """What is left: the value, its copy, and a gradient shaped like the input; directly, the network's activations stay."""
    x = numbers("x", 512, WIDTH).requires_grad_()
    judge = network().requires_grad_(False)
    with LiveCounter() as counter:
        counter.claim([x, list(judge.parameters())], "given")
        before = counter.live()
        value, gradients = cache_grad(lambda x: judge(x).mean(), x)
        after = counter.live() - before
        direct = judge(x).mean()
        kept = counter.live() - before - after
    size = x.numel() * x.element_size()
    assert size <= after <= size + 64 and kept > 4 * size, (after, kept, direct, value, gradients)


def test_on_fake_tensors() -> None:
    with FakeTensorMode():
        judge = nn.Linear(WIDTH, 1)
        x = torch.zeros(4, WIDTH, requires_grad=True)
        value, _ = cache_grad(lambda x: judge(x).mean(), x.sin())
        value.backward()
        assert x.grad is not None and x.grad.shape == x.shape and value.shape == ()


def coupled(outputs: Tensor) -> Tensor:
    """Each sample by itself, and a term that couples the last two, as R1 does."""
    return nn.functional.softplus(-outputs[0]).mean() + outputs[1].exp().mean() + 100 * (outputs[1] - outputs[2]).square().mean()


@pytest.mark.parametrize("replay", [True, False])
def test_in_turn_is_the_batch(replay: bool) -> None:
    judge, batch = network(), numbers("batch", 3, 5, WIDTH)
    loss = coupled(torch.stack([judge(sample) for sample in batch]))
    loss.backward()
    wanted = {name: weight.grad.clone() for name, weight in judge.named_parameters()}
    judge.zero_grad()
    values = []
    for surrogate, value in in_turn([lambda sample=sample: judge(sample) for sample in batch], coupled, replay):
        surrogate.backward()
        values.append(value)
    torch.testing.assert_close(torch.stack(values), loss.detach().expand(3), rtol=1e-6, atol=0)
    for name, weight in judge.named_parameters():
        torch.testing.assert_close(weight.grad, wanted[name], rtol=1e-6, atol=1e-6 * wanted[name].abs().max().item())


def test_in_turn_has_the_activations_of_one() -> None:
    def peak(samples: int, replay: bool = True) -> int:
        judge, batch = network(), numbers("batch", samples, 512, WIDTH)
        with LiveCounter() as counter:
            counter.claim([batch, list(judge.parameters())], "given")
            for weight in judge.parameters():
                weight.grad = torch.zeros_like(weight)
            before = counter.live()
            for surrogate, _ in in_turn(
                [lambda sample=sample: judge(sample) for sample in batch], lambda x: x.square().mean(), replay
            ):
                surrogate.backward()
                del surrogate
        return counter.report().peak[DEVICE] - before

    one, three = peak(1), peak(3)
    logits = 512 * 3 * 4
    assert three <= one + 3 * 3 * logits, (one, three)
    assert peak(3, replay=False) > 2 * one
