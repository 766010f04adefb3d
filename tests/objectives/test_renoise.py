"""How teacher and critic look at a section: times, sigmas, what the networks are handed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from helios_train import rng
from helios_train.diffusion.schedule import dynamic_mu, shift
from helios_train.objectives.renoise import Renoise

SHAPE = (16, 9, 48, 80)
SMALL = (3, 9, 4, 6)


def test_draws_do_not_depend_on_the_split_and_belong_to_who_looks() -> None:
    for density in ("uniform", "beta"):
        renoise = Renoise(density)  # type: ignore[arg-type]
        whole = renoise.draw(1, "student", 2, range(8), SMALL)
        parts = [renoise.draw(1, "student", 2, [position], SMALL) for position in range(8)]
        np.testing.assert_array_equal(np.concatenate([part.time for part in parts]), whole.time)
        np.testing.assert_array_equal(np.concatenate([part.sigma for part in parts]), whole.sigma)
        assert torch.equal(torch.cat([part.noise for part in parts]), whole.noise)
        for seed, who, iteration in ((2, "student", 2), (1, "critic", 2), (1, "student", 3)):
            other = renoise.draw(seed, who, iteration, range(8), SMALL)
            assert (other.time != whole.time).any() and not torch.equal(other.noise, whole.noise)


def test_table_and_exact_sigmas() -> None:
    """In the table of 1000 shifted sigmas neighbours are up to 2e-3 apart."""
    exact, table = (Renoise(sigmas=kind).draw(0, "student", 0, range(200), (1, 9, 48, 80)) for kind in ("exact", "table"))
    np.testing.assert_array_equal(exact.time, table.time)
    np.testing.assert_allclose(exact.sigma, exact.time / 1000)
    assert 0 < np.abs(exact.sigma - table.sigma).max() < 1e-3
    entries = shift(1 - np.arange(1000) / 1000, dynamic_mu(8640))
    assert all(np.abs(entries - sigma).min() < 1e-12 for sigma in table.sigma)


def test_bounds_shift_and_a_lower_top() -> None:
    renoise = Renoise(low=100, high=600)
    times = renoise.times(0, "student", 0, range(2000), 8640)
    assert times.min() == 100 and times.max() == 600
    lower = Renoise().times(0, "student", 0, range(2000), 8640, top=565)
    highest = 1000 * shift(np.array(0.565), dynamic_mu(8640))
    assert highest - 5 < lower.max() <= highest
    plain = Renoise(dynamic="none").times(0, "student", 0, range(2000), 8640)
    shifted = Renoise().times(0, "student", 0, range(2000), 8640)
    inside = (shifted > 20) & (shifted < 980) & (plain > 20) & (plain < 980)
    np.testing.assert_allclose(shifted[inside], 1000 * shift(plain[inside] / 1000, dynamic_mu(8640)), atol=1.6)


def test_beta_turns_uniform() -> None:
    """Level with the uniform draws from the end of the annealing on, and at once where there is none."""
    for iteration, anneal in ((500, 500), (9000, 500), (0, 0)):
        times = Renoise("beta", anneal=anneal).times(0, "student", iteration, range(2000), 8640)
        assert abs(times.mean() - 607) < 4 * 279 / 2000**0.5
    assert Renoise("beta").times(0, "student", 0, range(2000), 8640).mean() > 800


def test_looking() -> None:
    draw = Renoise(sigmas="exact").draw(0, "student", 0, range(3), SMALL)
    x, seen = rng.normal(rng.generator(0, "x"), (3, *SMALL)), []

    def network(x_t: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return draw.noise - x

    x_t = draw.noised(x)
    torch.testing.assert_close(draw.denoised(network, x_t), x)
    assert seen[0].tolist() == draw.time.tolist() and seen[0].dtype == torch.float32
    for b, sigma in enumerate(draw.sigma.tolist()):
        torch.testing.assert_close(x_t[b], sigma * draw.noise[b] + (1 - sigma) * x[b])


@pytest.mark.parametrize(
    "keys", [{"density": "normal"}, {"sigmas": "nearest"}, {"low": 0}, {"low": 990}, {"high": 1001}, {"anneal": -1}]
)
def test_settings_that_mean_nothing(keys: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="uniform or beta|within 1 to 1000"):
        Renoise(**keys)  # type: ignore[arg-type]
