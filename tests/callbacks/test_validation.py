"""Held-out loss: the right things are dropped and swapped, and every validation sees the same noise."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from helios_train.callbacks.validation import HeldOut, other_captions
from helios_train.data.batch import Window
from helios_train.data.order import Ref
from helios_train.diffusion.pyramid import Pyramid
from helios_train.diffusion.schedule import NoiseLevels, dynamic_mu, shift
from helios_train.history import History
from helios_train.objectives.flow import FlowObjective
from helios_train.objectives.pyramid_flow import PyramidFlowObjective


def window(batch: int = 3) -> Window:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    history = History(normal(batch, 2, 19, 2, 2), normal(batch, 2, 1, 2, 2), (19,) * batch, (True,) * batch)
    refs = tuple(Ref(0, position, 0, 10 + position) for position in range(batch))
    return Window(normal(batch, 2, 9, 2, 2), history, normal(batch, 4, 3), refs, (3,) * batch)


def test_other_captions_are_others() -> None:
    text = torch.tensor([1.0, 1.0, 2.0, 3.0])[:, None, None].expand(4, 2, 2)
    assert other_captions(text)[:, 0, 0].tolist() == [2.0, 2.0, 3.0, 1.0]
    assert torch.equal(other_captions(text[:2]), text[:2])  # there is no other


class Seen:
    """A network that notes what it is given."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor, Tensor, History]] = []

    def velocity(self, x_t: Tensor, t: Tensor, text: Tensor, history: History) -> Tensor:
        self.calls.append((x_t, t, text, history))
        return torch.zeros_like(x_t) + history.frames.mean() + text.mean()


def measured(seed: int = 0) -> tuple[dict[str, float], Seen]:
    network = Seen()
    stage: Any = SimpleNamespace(transformer=network, device=torch.device("cpu"))
    levels = NoiseLevels(density="uniform", dynamic="exponential")
    callback = HeldOut(FlowObjective(levels), (0.5, 0.9), quantiles=2, clips=3, every=1, seed=seed, ema=None)
    return callback.measure(stage, [window()]), network


def test_cases_see_full_dropped_and_swapped_conditions() -> None:
    metrics, network = measured()
    given = window()
    assert len(network.calls) == 6 + 2
    for first in (0, 3):
        full, dropped, wrong = network.calls[first : first + 3]
        assert torch.equal(full[0], dropped[0]) and torch.equal(full[0], wrong[0])  # the same noise in all cases
        assert torch.equal(full[3].frames, given.history.frames) and torch.equal(full[2], given.text)
        assert dropped[3].frames.abs().max() == 0 and dropped[3].anchor.abs().max() == 0 and torch.equal(dropped[2], given.text)
        assert torch.equal(wrong[2], given.text[[1, 2, 0]]) and torch.equal(wrong[3].frames, given.history.frames)
    for call, time in ((0, 500.0), (3, 900.0)):
        assert torch.allclose(network.calls[call][1], torch.full((3,), time))
    x_t, target = network.calls[3][0], given.target
    noise = (x_t - 0.1 * target) / 0.9
    constant = float(given.history.frames.mean() + given.text.mean())
    assert metrics["held_out/full/sigma_0.9"] == pytest.approx(float((constant - (noise - target)).square().mean()), rel=1e-4)
    assert metrics["held_out/full"] == pytest.approx(np.mean([metrics[f"held_out/full/sigma_{s}"] for s in (0.5, 0.9)]))


def test_quantiles_are_measured_at_the_levels_of_training_with_everything_given() -> None:
    metrics, network = measured()
    given = window()
    constant = given.history.frames.mean() + given.text.mean()
    for number, quantile in ((1, 0.25), (2, 0.75)):
        sigma = float(shift(np.array(quantile), math.exp(dynamic_mu(9))))  # 9 tokens: latents of 9 x 2 x 2
        x_t, time, text, history = network.calls[5 + number]
        assert torch.allclose(time, torch.full((3,), 1000 * sigma)) and torch.equal(text, given.text)
        assert torch.equal(history.frames, given.history.frames) and torch.equal(history.anchor, given.history.anchor)
        noise = (x_t - (1 - sigma) * given.target) / sigma
        error = float((constant - (noise - given.target)).square().mean())
        assert metrics[f"held_out/full/quantile_{number}"] == pytest.approx(error, rel=1e-4)
    assert not any("quantile" in name for name in metrics if not name.startswith("held_out/full/"))


def test_levels_are_measured_apart() -> None:
    """A network that is right about one level, and sees history at another."""
    network, given = Seen(), window()
    given = replace(given, target=given.target.repeat(1, 1, 1, 4, 8))
    frames, anchor = (part.repeat(1, 1, 1, 4, 8) for part in (given.history.frames, given.history.anchor))
    given = replace(given, history=replace(given.history, frames=frames, anchor=anchor))
    stage: Any = SimpleNamespace(transformer=network, device=torch.device("cpu"))
    objective = PyramidFlowObjective(Pyramid(2), ratios=(1, 2))
    metrics = HeldOut(objective, (0.5, 0.9), quantiles=2, clips=3, every=1, seed=0, ema=None).measure(stage, [given])
    assert len(network.calls) == 2 * (3 * 2 + 2)
    assert [tuple(call[0].shape[-2:]) for call in network.calls[:2]] == [(4, 8), (8, 16)]
    for case in ("full", "dropped", "wrong_caption"):
        levels = [metrics[f"held_out/{case}/level_{level}"] for level in (0, 1)]
        assert levels[0] == pytest.approx(np.mean([metrics[f"held_out/{case}/level_0/sigma_{s}"] for s in (0.5, 0.9)]))
        assert metrics[f"held_out/{case}"] == pytest.approx(np.mean(levels))
    assert {f"held_out/full/level_{level}/quantile_{number}" for level in (0, 1) for number in (1, 2)} < metrics.keys()


def test_noise_is_a_function_of_seed_and_clip() -> None:
    assert measured()[0] == measured()[0]
    assert measured(seed=1)[0] != measured()[0]
