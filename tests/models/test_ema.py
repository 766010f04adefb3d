"""The moving average: diffusers' law, exact swaps, a state that comes back."""

from __future__ import annotations

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from helios_train import rng
from helios_train.errors import InputError
from helios_train.models.ema import Ema


def weights(step: int) -> dict[str, Tensor]:
    return {"a": rng.normal(rng.generator(0, "a", step), (3, 2)), "b": rng.normal(rng.generator(0, "b", step), (4,))}


@pytest.mark.parametrize(("decay", "start"), [(0.999, 0), (0.3, 0), (0.999, 4), (0.5, 3)])
def test_it_is_diffusers(decay: float, start: int) -> None:
    parameters = [nn.Parameter(value) for value in weights(0).values()]
    theirs = EMAModel(parameters, decay=decay, update_after_step=start)
    mine = Ema(weights(0), decay, start)
    for step in range(1, 15):
        for parameter, value in zip(parameters, weights(step).values(), strict=True):
            parameter.data.copy_(value)
        theirs.step(parameters)
        mine.update(weights(step))
        for average, expected in zip(mine.average.values(), theirs.shadow_params, strict=True):
            torch.testing.assert_close(average, expected, rtol=1e-6, atol=1e-6)


def test_the_law() -> None:
    """Copies up to update `start`; then the k-th update moves by 1 - min((1 + k) / (10 + k), decay)."""
    ema = Ema({"a": torch.zeros(1)}, decay=0.25, start=2)
    for step in range(3):
        ema.update({"a": torch.full((1,), 7.0 + step)})
        assert ema.average["a"] == 7.0 + step
    for decay in (2 / 11, 3 / 12, 0.25, 0.25):
        before = ema.average["a"].item()
        ema.update({"a": torch.ones(1)})
        assert ema.average["a"].item() == pytest.approx(decay * before + (1 - decay), rel=1e-6)


def test_it_is_a_copy_in_fp32_on_the_host() -> None:
    weight = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    ema = Ema({"a": weight}, 0.9)
    with torch.no_grad():
        weight.zero_()
    assert torch.equal(ema.average["a"], torch.ones(2)) and not ema.average["a"].requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swapping_restores_every_bit(dtype: torch.dtype) -> None:
    own = {name: nn.Parameter(value.to(dtype)) for name, value in weights(1).items()}
    before = {name: value.detach().clone() for name, value in own.items()}
    ema = Ema(weights(2), 0.9)
    with pytest.raises(KeyboardInterrupt), ema.swapped_in(own):
        assert all(torch.equal(own[name], ema.average[name].to(dtype)) for name in own)
        raise KeyboardInterrupt
    assert all(torch.equal(own[name], before[name]) and own[name].requires_grad for name in own)


def test_its_state_comes_back() -> None:
    straight, first = Ema(weights(0), 0.9, 1), Ema(weights(0), 0.9, 1)
    for step in range(6):
        straight.update(weights(step))
    for step in range(3):
        first.update(weights(step))
    second = Ema(weights(9), 0.9, 1)
    second.load_state_dict(first.state_dict())
    first.update(weights(9))  # the second has its own tensors
    for step in range(3, 6):
        second.update(weights(step))
    assert second.updates == straight.updates == 6
    assert all(torch.equal(second.average[name], straight.average[name]) for name in straight.average)
    with pytest.raises(InputError, match="missing b"):
        second.load_state_dict({"average": {"a": torch.zeros(3, 2)}, "updates": 1})
