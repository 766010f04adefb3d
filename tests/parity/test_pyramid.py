"""The pyramid against the published training code (golden numbers), diffusers' scheduler and diffusers' pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import HeliosPyramidPipeline, HeliosScheduler
from safetensors.torch import load_file
from torch import Tensor

from helios_train import rng
from helios_train.diffusion.pyramid import TOP, Pyramid, block_noise, noise_pyramid
from helios_train.diffusion.schedule import STEPS, dynamic_mu, token_count
from helios_train.history import History
from helios_train.objectives.pyramid_flow import Pass, PyramidDraw, PyramidFlowObjective

GOLDEN = Path(__file__).parent / "golden"
SCHEDULE = json.loads((GOLDEN / "schedules.json").read_text())["pyramid_schedule"]
TARGETS = load_file(GOLDEN / "pyramid_targets.safetensors")
ROLLOUT = load_file(GOLDEN / "rollout.safetensors")
PYRAMID = Pyramid()
SHAPE = tuple(TARGETS["latents"].shape)
LATENT_SIZES = [(48, 80), (16, 16), (64, 112)]


def scheduler(pyramid: Pyramid, **keys: object) -> HeliosScheduler:
    edges = pyramid.edges or [level / pyramid.count for level in range(pyramid.count + 1)]
    return HeliosScheduler(stages=pyramid.count, stage_range=list(edges), gamma=pyramid.gamma, shift=pyramid.shift, **keys)


@pytest.mark.parametrize("level", [0, 1, 2])
def test_constants_of_the_published_training_code(level: int) -> None:
    """Source: `schedules.json`."""
    key, own = str(level), PYRAMID.levels[level]
    sigma, time = own.at(np.arange(float(SCHEDULE["n"])))
    found = [own.start, own.end, own.entry, own.first, own.last, time[0], time[-1], sigma[0], sigma[-1]]
    names = ["start_sigmas", "end_sigmas", "ori_start_sigmas", *["timesteps_first", "timesteps_last"] * 2]
    wanted = [SCHEDULE[name][key] for name in [*names, "sigmas_first", "sigmas_last"]]
    np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=0)
    share = [
        0.0,
        *np.cumsum([one.start - one.end for one in PYRAMID.levels]) / sum(one.start - one.end for one in PYRAMID.levels),
    ]
    np.testing.assert_allclose(share[level : level + 2], SCHEDULE["timestep_ratios"][key], rtol=1e-12, atol=0)


def drawn(kind: str) -> PyramidDraw:
    """The golden draw `plain` or `shifted`, at the golden levels."""
    numbers = [(TARGETS[f"{kind}.level{n}.sigma"].double().numpy(), TARGETS[f"{kind}.level{n}.timestep"]) for n in range(3)]
    passes = tuple(Pass(n, sigma, time.double().numpy()) for n, (sigma, time) in enumerate(numbers))
    return PyramidDraw(passes, TARGETS["noise"])


@pytest.mark.parametrize("kind", ["plain", "shifted"])
def test_inputs_and_targets_of_the_published_training_code(kind: str) -> None:
    """Source: `pyramid_targets.safetensors`. The network sees the golden x_t, and 0 costs the golden target's mean square."""
    history = History(torch.zeros(2, 16, 19, 8, 16), torch.zeros(2, 16, 1, 8, 16), (0, 0), (False, False))
    level = iter(range(3))
    points = PYRAMID.points(TARGETS["latents"], TARGETS["noise"])

    def velocity(x_t: Tensor, t: Tensor, text: Tensor, history: History) -> Tensor:
        number = next(level)
        torch.testing.assert_close(x_t, TARGETS[f"{kind}.level{number}.x_t"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(t, TARGETS[f"{kind}.level{number}.timestep"], rtol=1e-7, atol=0)
        torch.testing.assert_close(points[number][0] - points[number][1], target(number), rtol=1e-5, atol=1e-6)
        return torch.zeros_like(x_t)

    def target(number: int) -> Tensor:
        return TARGETS[f"{kind}.level{number}.target"]

    errors = PyramidFlowObjective(PYRAMID).errors(velocity, TARGETS["latents"], torch.zeros(2, 1, 1), history, drawn(kind))
    wanted = torch.stack([target(number).square().flatten(1).mean(dim=1) for number in range(3)])
    torch.testing.assert_close(errors, wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["plain", "shifted"])
def test_sigmas_and_times_of_the_published_training_code(kind: str) -> None:
    """The golden sigmas are entries of the level's table, shifted by the level's own tokens, and give the golden times."""
    factors = PYRAMID.factors("none" if kind == "plain" else "linear", *SHAPE[2:])
    for one, plain, level, factor in zip(drawn(kind).passes, drawn("plain").passes, PYRAMID.levels, factors, strict=True):
        place = STEPS * (1 - plain.sigma / TOP)
        np.testing.assert_allclose(place, np.round(place), rtol=0, atol=1e-3)
        sigma, time = level.at(np.round(place), factor)
        np.testing.assert_allclose(sigma, one.sigma, rtol=1e-6, atol=0)
        np.testing.assert_allclose(time, one.time, rtol=1e-6, atol=0)


@pytest.mark.parametrize("seed", range(24))
def test_constants_and_tables_of_diffusers(seed: int) -> None:
    """Source: `HeliosScheduler`, with 1 to 4 levels of any range, gamma and fixed shift. Truncated times agree exactly."""
    draw = rng.generator(seed, "a pyramid of the tests")
    count = 1 + seed % 4
    edges = None if seed < 4 else (0.0, *np.sort(draw.choice(np.arange(1, 100), count - 1, replace=False) / 100).tolist(), 1.0)
    shift, gamma = (1.0, 1 / 3) if seed < 8 else (float(draw.uniform(0.5, 5)), float(draw.uniform(0.01, 1 / 3)))
    pyramid = Pyramid(count, edges, gamma=gamma, shift=shift)
    theirs = scheduler(pyramid)
    for number, level in enumerate(pyramid.levels):
        constants = [theirs.start_sigmas[number], theirs.end_sigmas[number], theirs.ori_start_sigmas[number]]
        np.testing.assert_allclose([level.start, level.end, level.entry], constants, rtol=1e-12, atol=0)
        sigma, time = level.at(np.arange(float(STEPS)))
        np.testing.assert_allclose(sigma, theirs.sigmas_per_stage[number], rtol=1e-9, atol=0)
        np.testing.assert_allclose(time, theirs.timesteps_per_stage[number], rtol=1e-12, atol=0)
        np.testing.assert_array_equal(np.trunc(time), theirs.timesteps_per_stage[number].to(torch.int64))


@pytest.mark.parametrize("kind", ["none", "linear", "exponential"])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_steps_of_diffusers(count: int, kind: str) -> None:
    """Source: `HeliosScheduler.set_timesteps`; of a single level, in fp32, its truncated times are left out."""
    pyramid = Pyramid(count)
    theirs = scheduler(pyramid, use_dynamic_shifting=kind != "none", time_shift_type="linear" if kind == "none" else kind)
    for rows, columns in LATENT_SIZES:
        factors, tokens = pyramid.factors(kind, 9, rows, columns), pyramid.tokens(9, rows, columns)
        for level in range(count):
            for steps in (1, 2, 4, 20, 33, 50):
                theirs.set_timesteps(steps, level, mu=dynamic_mu(tokens[level]))
                sigmas, times = pyramid.steps(level, steps, factors[level])
                close = 1e-6 if count == 1 else 1e-12
                np.testing.assert_allclose(sigmas, theirs.sigmas, rtol=close, atol=1e-13)
                np.testing.assert_allclose(times, theirs.timesteps, rtol=close, atol=0)
                if count > 1:
                    np.testing.assert_array_equal(np.trunc(times), theirs.timesteps.to(torch.int64))


def test_shifts_of_the_levels_at_384x640() -> None:
    """Source: the published figures .548073, .822292 and 1.919167 for 540, 2160 and 8640 tokens."""
    assert PYRAMID.tokens(9, 48, 80) == [540, 2160, 8640] == [token_count(9, 48 >> n, 80 >> n) for n in (2, 1, 0)]
    assert PYRAMID.factors("linear", 9, 48, 80) == pytest.approx([0.548073, 0.822292, 1.919167], abs=5e-7)


@pytest.mark.parametrize(("level", "alpha", "beta"), [(1, 0.600120, 0.692612), (2, 0.749813, 0.433337)])
def test_renoise_factors_of_the_published_rollout(level: int, alpha: float, beta: float) -> None:
    assert PYRAMID.renoise_factors(level) == pytest.approx((alpha, beta), abs=5e-7)


@pytest.mark.parametrize("case", ["a", "b", "c", "d", "amplified"])
def test_start_points_of_the_published_rollout(case: str) -> None:
    """Source: `rollout.safetensors`: its analytic network, walked over the levels, gives its output to 1e-4.

    Few-step schedule: a grid of one step more, its last point dropped; sigma is the shifted table's at the nearest time. A level
    ends at its exit step; steps before it are renoised toward the level's own start point.
    """
    given = {key.partition(".")[2]: value for key, value in ROLLOUT.items() if key.startswith(case + ".")}
    exits = [int(number) for number in given["exits"]]
    steps = 4 if case == "amplified" else 2
    x = noise_pyramid(given["start_noise"], 3)[0]
    factors = PYRAMID.factors("linear", *given["start_noise"].shape[2:])
    for number, (level, factor) in enumerate(zip(PYRAMID.levels, factors, strict=True)):
        if number:
            x = PYRAMID.renoise(number, x, given[f"block_noise{number}"])
        start = x
        table, times = level.at(np.arange(float(STEPS)), factor)
        _, walked = level.at(np.linspace(0, STEPS - 1, steps + 1)[:-1], factor)
        sigmas = [float(table[np.abs(times - time).argmin()]) for time in walked]
        for step in range(exits[number] + 1):
            x = start if step == 0 else (1 - sigmas[step]) * x + sigmas[step] * start
            x = x - sigmas[step] * (0.8 * x + 0.2 * torch.sin(2 * x) - 5e-4 * walked[step])
    torch.testing.assert_close(x, given["output"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gamma", [0.05, 0.2, 0.32])
def test_block_noise_has_the_covariance_of_the_pipelines(gamma: float) -> None:
    """Source: `HeliosPyramidPipeline.sample_block_noise`, which a CPU can run for gamma below 1/3."""
    pipeline = HeliosPyramidPipeline(None, None, None, HeliosScheduler(gamma=gamma), None)
    theirs = pipeline.sample_block_noise(1, 1, 50, 64, 64, generator=torch.Generator().manual_seed(0))
    ours = block_noise(rng.normal(rng.generator(0, "white"), theirs.shape), gamma)
    for left, right in zip(covariance(theirs).flatten(), covariance(ours).flatten(), strict=True):
        assert abs(left - right) < 0.035  # 51,200 blocks: five standard errors of the difference


def covariance(noise: Tensor) -> Tensor:
    """Of the four values of the 2x2 blocks. [4, 4]"""
    blocks = noise.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2)).movedim(-3, -2)
    return torch.cov(blocks.reshape(-1, 4).T)
