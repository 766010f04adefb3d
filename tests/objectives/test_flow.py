"""The Base objective with networks whose loss is known in closed form."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from helios_train import rng
from helios_train.diffusion.schedule import NoiseLevels, dynamic_factor, shift
from helios_train.history import History
from helios_train.objectives.flow import BINS, FlowDraw, FlowObjective, Loss

SHAPE = (3, 9, 4, 6)
# With shifted levels, which lie between those of the table.
SIGMAS = np.array([1.0, 0.98765, 0.8, 0.51234, 0.4, 0.2, 0.1996, 0.001], dtype=np.float32)
OF_BIN = [4, 4, 4, 2, 2, 1, 0, 0]  # 0.8 opens the last bin, 1.0 belongs to it
PLAIN = FlowObjective(NoiseLevels())


def batch(size: int) -> tuple[Tensor, Tensor, History]:
    """Target, text, history."""
    draw = rng.generator(0, "a batch of the tests")
    history = History(torch.zeros(size, 3, 19, 4, 6), torch.zeros(size, 3, 1, 4, 6), (0,) * size, (False,) * size)
    return rng.normal(draw, (size, *SHAPE)), rng.normal(draw, (size, 5, 7)), history


def drawn(sigma: np.ndarray) -> FlowDraw:
    return FlowDraw(sigma, rng.normal(rng.generator(0, "noise of the tests"), (len(sigma), *SHAPE)))


def exact(target: Tensor, draw: FlowDraw, off: float | Tensor = 0.0) -> Callable[..., Tensor]:
    return lambda x_t, t, text, history: draw.noise - target + off


def loss_of(velocity: Callable[..., Tensor], objective: FlowObjective = PLAIN, sigma: np.ndarray = SIGMAS) -> Loss:
    target, text, history = batch(len(sigma))
    return objective(velocity, target, text, history, drawn(sigma))


def test_the_exact_velocity_costs_nothing() -> None:
    target, _, _ = batch(len(SIGMAS))
    loss = loss_of(exact(target, drawn(SIGMAS)))
    assert loss.total.item() == 0 and loss.sums[0].tolist() == [0.0] * (BINS + 1)


def test_a_network_that_knows_the_target_finds_the_velocity_in_x_t() -> None:
    """v = (x_t - x0) / sigma, so x_t and t are what they are said to be."""
    target, _, _ = batch(6)

    def velocity(x_t: Tensor, t: Tensor, text: Tensor, history: History) -> Tensor:
        return (x_t - target) / (t / 1000)[:, None, None, None, None]

    assert loss_of(velocity, sigma=SIGMAS[:6]).total.item() < 1e-11


def test_what_the_network_is_handed() -> None:
    seen: list[object] = []
    target, text, history = batch(len(SIGMAS))
    draw = drawn(SIGMAS)

    def velocity(*given: object) -> Tensor:
        seen.extend(given)
        return torch.zeros_like(target)

    PLAIN(velocity, target, text, history, draw)
    x_t, t = seen[0], seen[1]
    assert isinstance(x_t, Tensor) and isinstance(t, Tensor) and seen[2] is text and seen[3] is history
    assert t.dtype == torch.float32 and t.tolist() == (1000 * torch.from_numpy(SIGMAS)).tolist()
    for b, sigma in enumerate(SIGMAS.tolist()):
        torch.testing.assert_close(x_t[b], sigma * draw.noise[b] + (1 - sigma) * target[b])
    assert torch.equal(x_t[0], draw.noise[0])  # sigma 1 is pure noise


@pytest.mark.parametrize("off", [0.5, -3.0])
def test_a_constant_error_costs_its_square(off: float) -> None:
    target, _, _ = batch(len(SIGMAS))
    loss = loss_of(exact(target, drawn(SIGMAS), off))
    assert loss.total.item() == pytest.approx(off**2, rel=1e-5)


def test_sums_by_bin_of_sigma() -> None:
    target, _, _ = batch(len(SIGMAS))
    off = torch.arange(1.0, 9.0)
    loss = loss_of(exact(target, drawn(SIGMAS), off[:, None, None, None, None]))
    wanted = torch.zeros(2, BINS + 1)
    for b, number in enumerate(OF_BIN):
        wanted[:, number] += torch.tensor([off[b].item() ** 2, 1.0])
    wanted[:, BINS] = torch.tensor([off.square().sum().item(), len(SIGMAS)])
    torch.testing.assert_close(loss.sums, wanted, rtol=1e-5, atol=1e-5)
    assert not loss.sums.requires_grad
    edges = ["0.0-0.2", "0.2-0.4", "0.4-0.6", "0.6-0.8", "0.8-1.0"]
    assert PLAIN.log_names() == [f"loss/sigma_{edge}" for edge in edges] + ["loss"]


@pytest.mark.parametrize("weighting", ["none", "sigma_sqrt", "cosmap"])
def test_weights_multiply_each_samples_error_but_not_the_log(weighting: str) -> None:
    sigma = SIGMAS[2:6]
    target, _, _ = batch(len(sigma))
    off = torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None, None, None, None]
    levels = NoiseLevels(weighting=weighting)
    loss = loss_of(exact(target, drawn(sigma), off), FlowObjective(levels), sigma)
    s = sigma.astype(np.float64)
    by_hand = {"none": np.ones(4), "sigma_sqrt": 1 / s**2, "cosmap": 2 / (np.pi * (1 - 2 * s + 2 * s**2))}[weighting]
    wanted = np.mean(by_hand * np.array([1, 4, 9, 16]))
    assert loss.total.item() == pytest.approx(wanted, rel=1e-5)
    assert loss.sums[:, BINS].tolist() == pytest.approx([30.0, 4.0], rel=1e-5)


@pytest.mark.parametrize("weighting", ["none", "cosmap"])
def test_gradient_equals_the_closed_form(weighting: str) -> None:
    """With v = a x_t + b: d/da mean_b w_b mean (v - y)^2 = mean_b w_b 2 mean (v - y) x_t, and d/db without x_t."""
    target, text, history = batch(len(SIGMAS))
    target = target.double()
    draw = FlowDraw(SIGMAS, drawn(SIGMAS).noise.double())
    a, b = torch.tensor(0.3, dtype=torch.float64, requires_grad=True), torch.tensor(-0.1, dtype=torch.float64, requires_grad=True)
    levels = NoiseLevels(weighting=weighting)
    FlowObjective(levels)(lambda x_t, t, text, history: a * x_t + b, target, text, history, draw).total.backward()
    sigma = torch.from_numpy(SIGMAS).double()[:, None, None, None, None]
    x_t, y = sigma * draw.noise + (1 - sigma) * target, draw.noise - target
    weights = torch.from_numpy(levels.weights(SIGMAS)).double()
    residual = 0.3 * x_t - 0.1 - y
    for found, wanted in ((a.grad, residual * x_t), (b.grad, residual)):
        closed = (weights * 2 * wanted.flatten(1).mean(dim=1)).mean()
        assert found is not None
        torch.testing.assert_close(found, closed, rtol=1e-6, atol=0)


def test_accumulated_micro_batches_equal_the_whole_batch() -> None:
    objective = FlowObjective(NoiseLevels(stratified=True, weighting="cosmap"))
    target, text, history = batch(8)

    def velocity(x_t: Tensor, t: Tensor, text: Tensor, history: History) -> Tensor:
        return 0.3 * x_t + (t / 1000)[:, None, None, None, None] + text.mean(dim=(1, 2))[:, None, None, None, None]

    whole = objective(velocity, target, text, history, objective.draw(1, 2, range(8), SHAPE, 8))
    total, sums = 0.0, torch.zeros(2, BINS + 1)
    for at in range(0, 8, 2):
        rows = slice(at, at + 2)
        own = History(history.frames[rows], history.anchor[rows], history.counts[rows], history.anchored[rows])
        part = objective(velocity, target[rows], text[rows], own, objective.draw(1, 2, range(at, at + 2), SHAPE, 8))
        total, sums = total + part.total.item() / 4, sums + part.sums
    assert total == pytest.approx(whole.total.item(), rel=1e-6)
    torch.testing.assert_close(sums, whole.sums, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("stratified", [False, True])
def test_draws_do_not_depend_on_the_split(stratified: bool) -> None:
    objective = FlowObjective(NoiseLevels(stratified=stratified, dynamic="exponential"))
    whole = objective.draw(1, 2, range(8), SHAPE, 8)
    for size in (1, 2, 4):
        parts = [objective.draw(1, 2, range(at, at + size), SHAPE, 8) for at in range(0, 8, size)]
        np.testing.assert_array_equal(np.concatenate([part.sigma for part in parts]), whole.sigma)
        assert torch.equal(torch.cat([part.noise for part in parts]), whole.noise)
    for seed, iteration in ((1, 3), (2, 2)):
        other = objective.draw(seed, iteration, range(8), SHAPE, 8)
        assert not torch.equal(other.noise, whole.noise) and (other.sigma != whole.sigma).any()


def test_the_noise_of_a_draw() -> None:
    draw = PLAIN.draw(0, 0, range(16), (16, 9, 8, 8), 16)
    noise = draw.noise.flatten(1)
    assert draw.noise.shape == (16, 16, 9, 8, 8) and draw.noise.dtype == torch.float32 and draw.sigma.shape == (16,)
    assert noise.mean().abs() < 4 / noise.numel() ** 0.5 and (noise.std() - 1).abs() < 4 / (2 * noise.numel()) ** 0.5
    assert torch.corrcoef(noise)[~torch.eye(16, dtype=torch.bool)].abs().max() < 4.5 / noise.shape[1] ** 0.5


def test_the_shift_counts_the_targets_tokens() -> None:
    plain = PLAIN.draw(0, 0, range(4), (16, 9, 12, 20), 4)
    shifted = FlowObjective(NoiseLevels(dynamic="exponential")).draw(0, 0, range(4), (16, 9, 12, 20), 4)
    wanted = shift(plain.sigma.astype(np.float64), dynamic_factor("exponential", 9 * 6 * 10))
    np.testing.assert_allclose(shifted.sigma, wanted, rtol=1e-6)
    assert torch.equal(shifted.noise, plain.noise)
