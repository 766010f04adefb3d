"""Noise levels: the table, the densities, the strata and the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

from helios_train import rng
from helios_train.diffusion.schedule import STEPS, NoiseLevels, dynamic_factor, dynamic_mu, shift, token_count

TOKENS = token_count(9, 48, 80)
MODE_SCALE = 1.29
Feed = Callable[[Sequence[float]], None]


@pytest.fixture
def feed(monkeypatch: pytest.MonkeyPatch) -> Feed:
    """Makes position i of the global batch draw the i-th of the given quantiles."""

    class Given:
        def __init__(self, number: float):
            self.number = number

        def random(self) -> float:
            return self.number

    def put(quantiles: Sequence[float]) -> None:
        monkeypatch.setattr(rng, "generator", lambda seed, purpose, iteration, position: Given(quantiles[position]))

    return put


def level_of(u: np.ndarray) -> np.ndarray:
    """The level of the table at floor(1000 u)."""
    return (1 - np.floor(u * 1000) / 1000).astype(np.float32)


def distance(found: np.ndarray, cdf: Callable[[np.ndarray], np.ndarray]) -> float:
    """Kolmogorov-Smirnov distance times the root of n: above 1.95 once in a thousand."""
    found = np.sort(found)
    steps = np.arange(len(found) + 1) / len(found)
    wanted = cdf(found)
    return float(max(np.abs(wanted - steps[:-1]).max(), np.abs(steps[1:] - wanted).max()) * len(found) ** 0.5)


def draws(levels: NoiseLevels, count: int = 4000) -> np.ndarray:
    return levels.draw(0, 0, list(range(count)), count, TOKENS)


def test_the_table_has_1000_levels_from_1_to_a_thousandth(feed: Feed) -> None:
    feed([(i + 0.5) / STEPS for i in range(STEPS)])
    sigma = draws(NoiseLevels(density="uniform"), STEPS)
    assert sigma.dtype == np.float32 and sigma[0] == 1.0 and sigma[-1] == np.float32(0.001)
    np.testing.assert_allclose(sigma, FlowMatchEulerDiscreteScheduler().sigmas[:STEPS].numpy(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("density", ["uniform", "logit_normal", "mode"])
@pytest.mark.parametrize("stratified", [False, True])
def test_the_ends_of_a_density_stay_inside_the_table(density: str, stratified: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Ends:
        def random(self) -> float:
            return self.number

        def __init__(self, number: float):
            self.number = number

        def permutation(self, count: int) -> np.ndarray:
            return np.arange(count)

    last = 1 - 2.0**-53
    monkeypatch.setattr(rng, "generator", lambda *place: Ends(0.0 if place[-1] % 2 == 0 else last))
    sigma = NoiseLevels(density=density, stratified=stratified).draw(0, 0, [0, 1, 2, 3], 4, TOKENS)
    assert (sigma > 0).all() and (sigma <= 1).all() and (sigma >= np.float32(0.001)).all()


def test_uniform_density(feed: Feed) -> None:
    assert distance(draws(NoiseLevels(density="uniform")), lambda s: s - 0.0005) < 1.95
    u = np.random.Generator(np.random.Philox(1)).random(500)
    feed(u)
    np.testing.assert_array_equal(draws(NoiseLevels(density="uniform"), 500), level_of(u))


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.5, 0.7), (-1.0, 2.0)])
def test_logit_normal_density(mean: float, std: float, feed: Feed) -> None:
    levels, normal = NoiseLevels(density="logit_normal", mean=mean, std=std), NormalDist(mean, std)

    def cdf(sigma: np.ndarray) -> np.ndarray:
        u = np.clip(1 - sigma + 0.0005, 1e-9, 1 - 1e-9)  # half a level up: the table rounds u down
        return 1 - np.array([normal.cdf(math.log(one / (1 - one))) for one in u])

    assert distance(draws(levels), cdf) < 1.95
    quantiles = np.random.Generator(np.random.Philox(2)).random(500)
    feed(quantiles)
    wanted = level_of(np.array([1 / (1 + math.exp(-normal.inv_cdf(quantile))) for quantile in quantiles]))
    np.testing.assert_array_equal(draws(levels, 500), wanted)


def test_logit_normal_has_the_moments_of_diffusers() -> None:
    wanted = compute_density_for_timestep_sampling("logit_normal", 200_000, 0.3, 0.8, generator=torch.Generator().manual_seed(0))
    found = 1 - draws(NoiseLevels(density="logit_normal", mean=0.3, std=0.8), 8000)
    assert found.mean() == pytest.approx(wanted.mean().item(), abs=0.006)
    assert found.std() == pytest.approx(wanted.std().item(), abs=0.005)


@pytest.mark.parametrize("scale", [MODE_SCALE, 0.0, -0.8])
def test_mode_density(scale: float, feed: Feed) -> None:
    """Source: `compute_density_for_timestep_sampling` of diffusers (SD3, arXiv 2403.03206, section 3.1), fed the same numbers."""
    u = torch.rand(size=(500,), generator=torch.Generator().manual_seed(0))
    feed(u.double().tolist())
    found = 1 - draws(NoiseLevels(density="mode", mode_scale=scale), 500)
    wanted = compute_density_for_timestep_sampling(
        "mode", 500, mode_scale=scale, generator=torch.Generator().manual_seed(0)
    ).numpy()
    assert (wanted - found).min() > -1e-6 and (wanted - found).max() < 0.001 + 1e-6  # floor to the table


def test_an_unknown_density_or_weighting_is_refused() -> None:
    with pytest.raises(ValueError, match="density 'beta'"):
        draws(NoiseLevels(density="beta"), 1)
    with pytest.raises(ValueError, match="weighting 'beta'"):
        NoiseLevels(weighting="beta").weights(np.ones(1))
    with pytest.raises(ValueError, match="dynamic shift 'beta'"):
        dynamic_factor("beta", TOKENS)


@pytest.mark.parametrize("density", ["uniform", "logit_normal", "mode"])
@pytest.mark.parametrize("batch", [1, 8, 40])
def test_strata_of_the_global_batch_hold_one_draw_each(density: str, batch: int, feed: Feed) -> None:
    levels = NoiseLevels(density=density, stratified=True)
    drawn = [np.sort(levels.draw(0, iteration, list(range(batch)), batch, TOKENS)) for iteration in range(5)]
    feed([i / batch for i in range(batch)] + [1 - 1e-12])
    edges = np.sort(NoiseLevels(density=density).draw(0, 0, list(range(batch + 1)), batch + 1, TOKENS))
    for sigma in drawn:
        assert (sigma >= edges[:-1] - 1e-6).all() and (sigma <= edges[1:] + 1e-6).all()


def test_uniform_strata_are_hit_exactly_once_and_by_any_position() -> None:
    levels, batch = NoiseLevels(density="uniform", stratified=True), 8
    strata = np.stack(
        [np.round((1 - levels.draw(0, i, list(range(batch)), batch, TOKENS)) * STEPS) * batch // STEPS for i in range(60)]
    )
    assert (np.sort(strata) == np.arange(batch)).all()
    assert all(len(set(strata[:, position])) == batch for position in range(batch))  # no position owns a stratum
    free = NoiseLevels(density="uniform")
    missed = [len({int(s * batch) for s in free.draw(0, i, list(range(batch)), batch, TOKENS)}) < batch for i in range(20)]
    assert all(missed)


def test_strata_leave_the_density_as_it_is() -> None:
    levels = NoiseLevels(density="uniform", stratified=True)
    sigma = np.concatenate([levels.draw(0, iteration, [3], 8, TOKENS) for iteration in range(2000)])  # one position alone
    assert distance(sigma, lambda s: s - 0.0005) < 1.95


@pytest.mark.parametrize("stratified", [False, True])
def test_draws_do_not_depend_on_the_split(stratified: bool) -> None:
    levels = NoiseLevels(stratified=stratified, dynamic="exponential")
    whole = levels.draw(5, 9, list(range(16)), 16, TOKENS)
    for size in (1, 2, 4, 8):
        parts = [levels.draw(5, 9, list(range(at, at + size)), 16, TOKENS) for at in range(0, 16, size)]
        np.testing.assert_array_equal(np.concatenate(parts), whole)
    np.testing.assert_array_equal(levels.draw(5, 9, [11, 2], 16, TOKENS), whole[[11, 2]])
    for seed, iteration in ((6, 9), (5, 10)):
        assert (levels.draw(seed, iteration, list(range(16)), 16, TOKENS) != whole).any()


def test_shifts_are_composed(feed: Feed) -> None:
    u = np.linspace(0.01, 0.99, 50)
    feed(u)
    plain = draws(NoiseLevels(density="uniform"), 50).astype(np.float64)
    shifted = draws(NoiseLevels(density="uniform", fixed=3.0, dynamic="linear"), 50)
    once = 3 / (3 + 1 / plain - 1)
    factor = dynamic_mu(TOKENS)
    np.testing.assert_allclose(shifted, factor / (factor + 1 / once - 1), rtol=1e-6)
    capped = draws(NoiseLevels(density="uniform", dynamic="exponential", cap=2.0), 50)
    np.testing.assert_allclose(capped, 2 / (2 + 1 / plain - 1), rtol=1e-6)


def test_shift_and_its_factors() -> None:
    assert TOKENS == 8640 and dynamic_mu(TOKENS) == pytest.approx(1.9191666667)
    assert (dynamic_mu(256), dynamic_mu(4096)) == (0.5, pytest.approx(1.15))
    assert dynamic_factor("none", TOKENS) == 1 and dynamic_factor("linear", TOKENS) == dynamic_mu(TOKENS)
    assert dynamic_factor("exponential", TOKENS) == pytest.approx(math.exp(dynamic_mu(TOKENS)))
    assert dynamic_factor("exponential", TOKENS, cap=5) == 5
    assert dynamic_factor("exponential", 256, cap=5) == pytest.approx(math.exp(0.5))
    sigma = np.linspace(0, 1, 11)
    np.testing.assert_array_equal(shift(sigma, 1.0), sigma)
    assert shift(sigma, 3.0)[[0, -1]].tolist() == [0, 1] and (np.diff(shift(sigma, 3.0)) > 0).all()
    np.testing.assert_allclose(shift(shift(sigma, 4.0), 0.25), sigma, atol=1e-12)


@pytest.mark.parametrize("weighting", ["none", "sigma_sqrt", "cosmap"])
def test_weights_of_diffusers(weighting: str) -> None:
    """Source: `compute_loss_weighting_for_sd3` of diffusers."""
    sigma = (1 - np.arange(STEPS) / STEPS).astype(np.float32)
    wanted = compute_loss_weighting_for_sd3(weighting, torch.from_numpy(sigma))
    found = NoiseLevels(weighting=weighting).weights(sigma)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-5)


class TestQuantiles:
    """Levels that share the draws equally, rising."""

    def test_uniform(self) -> None:
        found = NoiseLevels(density="uniform").quantiles(4, TOKENS)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, [0.125, 0.375, 0.625, 0.875], rtol=1e-6)

    @pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 0.7)])
    def test_logit_normal(self, mean: float, std: float) -> None:
        found = NoiseLevels(density="logit_normal", mean=mean, std=std).quantiles(5, TOKENS)
        normal = [NormalDist(mean, std).inv_cdf((i + 0.5) / 5) for i in range(5)]  # of u; the level is 1 - u
        wanted = sorted(1 - 1 / (1 + math.exp(-value)) for value in normal)
        np.testing.assert_allclose(found, wanted, atol=1.001 / STEPS)
        assert (found >= np.array(wanted, dtype=np.float32)).all()  # the table rounds u down

    def test_the_shift_of_these_tokens_is_in_them(self) -> None:
        plain, moved = (NoiseLevels(density="uniform", fixed=2.0, dynamic=kind) for kind in ("none", "exponential"))
        for tokens in (256, TOKENS):
            factor = math.exp(dynamic_mu(tokens))
            np.testing.assert_allclose(moved.quantiles(3, tokens), shift(plain.quantiles(3, tokens), factor), rtol=1e-6)

    @pytest.mark.parametrize("density", ["uniform", "logit_normal", "mode"])
    def test_each_has_an_equal_share_of_the_draws_around_it(self, density: str) -> None:
        levels = NoiseLevels(density=density, dynamic="exponential", mode_scale=MODE_SCALE)
        found, drawn = levels.quantiles(4, TOKENS), draws(levels)
        below = [(drawn < level).mean() for level in found]
        np.testing.assert_allclose(below, [0.125, 0.375, 0.625, 0.875], atol=0.03)

    def test_none(self) -> None:
        assert NoiseLevels().quantiles(0, TOKENS).shape == (0,)
