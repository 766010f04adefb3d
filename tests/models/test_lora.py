"""Adapted layers against PEFT's own, and gradients that arrive call by call."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from helios_train.memory.live import LiveCounter
from helios_train.memory.places import DEVICE
from helios_train.memory.quantized import quantize
from helios_train.models.lora import Adapted, by_input, by_weights, gathered, now


def pair(scale: float = 2.0, adapters: int = 2) -> tuple[nn.Sequential, nn.Sequential]:
    """PEFT's layer with adapters, and ours with the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = nn.Sequential(nn.Linear(12, 20))
        theirs.requires_grad_(False)
        for number in range(adapters):
            config = LoraConfig(r=4, lora_alpha=int(4 * scale), target_modules=["0"], init_lora_weights=False)
            inject_adapter_in_model(config, theirs, adapter_name=f"link{number}")
    theirs[0]._active_adapter = [f"link{number}" for number in range(adapters)]
    ours = copy.deepcopy(theirs)
    assert type(theirs[0]) is LoraLinear
    ours[0].__class__ = Adapted
    for one in (theirs, ours):
        for name, weight in one.named_parameters():
            weight.requires_grad = ".lora_" in name
    return theirs, ours


def gradients(layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    layer(x).square().sum().backward()
    assert x.grad is not None
    return {"x": x.grad} | {name: weight.grad for name, weight in layer.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("adapters", [1, 2])
def test_output_and_gradients_are_pefts(adapters: int) -> None:
    theirs, ours = pair(adapters=adapters)
    x = torch.linspace(-1, 1, 2 * 5 * 12).view(2, 5, 12)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-6)
    expected, found = gradients(theirs, x), gradients(ours, x)
    assert expected.keys() == found.keys() and len(found) == 1 + 2 * adapters
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def test_by_hand_is_by_autograd() -> None:
    _, ours = pair()
    x, dy = torch.linspace(-1, 1, 60).view(5, 12), torch.linspace(2, -1, 100).view(5, 20)
    weights = [weight for weight in ours.parameters() if weight.requires_grad]
    leaf = x.clone().requires_grad_()
    with gathered():
        expected = torch.autograd.grad(ours(leaf), [leaf, *weights], dy)
    dx, found = by_input(ours[0], dy), by_weights(ours[0], x, dy)
    for one, other in zip([dx, *(found[id(weight)] for weight in weights)], expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    whole = nn.Linear(12, 20)
    expected = torch.autograd.grad(whole(leaf), [leaf, whole.weight, whole.bias], dy)
    dx, found = by_input(whole, dy), by_weights(whole, x, dy)
    for one, other in zip([dx, found[id(whole.weight)], found[id(whole.bias)]], expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_no_adapter_in_use_is_the_base_to_the_bit() -> None:
    theirs, ours = pair()
    ours[0]._active_adapter = []
    x = torch.linspace(-1, 1, 60).view(5, 12)
    assert torch.equal(ours(x), theirs[0].base_layer(x))


def test_on_a_quantized_layer() -> None:
    _, ours = pair()
    x = torch.linspace(-1, 1, 60).view(5, 12)
    whole, exact = ours(x).detach(), gradients(ours, x)
    ours.zero_grad()
    assert quantize(ours, "int8") == 1
    assert 0 < (ours(x) - whole).abs().max() < 0.02
    rounded = gradients(ours, x)
    assert exact.keys() == rounded.keys()
    assert all((rounded[name] - gradient).norm() < 0.02 * gradient.norm() for name, gradient in exact.items())


def test_each_call_hands_its_gradient_over() -> None:
    """A weight of three calls in a row, as a rollout has it: three gradients, each added as it comes."""
    weight, arrived, peaks = nn.Parameter(torch.full((64, 64), 1 / 64)), list[float](), []

    def taken(weight: Tensor) -> None:
        if weight.grad is None:  # torch calls once more, at the end of a backward that left nothing
            return
        arrived.append(weight.grad.sum().item())
        weight.grad = None

    weight.register_post_accumulate_grad_hook(taken)
    for use in (now, lambda weight: weight):
        arrived.clear()
        x = torch.full((1, 64), 1 / 64)
        for _ in range(3):
            x = x @ use(weight)
        counter = LiveCounter()
        with counter:
            x.sum().backward()
        peaks.append(counter.report().peak[DEVICE])
        assert sum(arrived) == pytest.approx(3 * 64) and len(arrived) == (3 if use is now else 1)
    assert peaks[0] + 4 * 64 * 64 <= peaks[1] + 8 * 64  # one gradient less alive at a time


def test_gathered_and_frozen_weights_are_themselves() -> None:
    weight = nn.Parameter(torch.ones(2))
    assert now(weight) is not weight
    with gathered():
        assert now(weight) is weight
    weight.requires_grad = False
    assert now(weight) is weight
