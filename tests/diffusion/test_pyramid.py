"""The pyramid's arithmetic against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from helios_train import rng
from helios_train.diffusion.pyramid import PATCH, TOP, Pyramid, block_noise, doubled, halved, noise_pyramid, pyramid
from helios_train.errors import InputError

GAMMAS = [1 / 3, 0.25, 0.1, 0.01]


def normal(*shape: int, purpose: str = "pyramid") -> Tensor:
    return rng.normal(rng.generator(0, purpose), shape)


def covariance(noise: Tensor) -> Tensor:
    """Of the four values of the 2x2 blocks. [4, 4]"""
    blocks = noise.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2)).movedim(-3, -2)
    return torch.cov(blocks.reshape(-1, 4).T.double())


def test_constants_of_three_levels() -> None:
    """Ends at .999 (1 - i/1000) for i = 333 and 666; at gamma 1/3 a level entered with e of noise starts with 2e / (1 + e)."""
    first, second, third = Pyramid().levels
    entry, second_entry = TOP * 0.667, TOP * 0.334
    assert [first.start, first.end, first.entry] == pytest.approx([TOP, entry, TOP], rel=1e-12)
    assert [second.start, second.end, second.entry] == pytest.approx([2 * entry / (1 + entry), second_entry, entry], rel=1e-12)
    assert [third.start, third.end, third.entry] == pytest.approx(
        [2 * second_entry / (1 + second_entry), 0, second_entry], rel=1e-12
    )


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_levels_join(count: int, gamma: float) -> None:
    """Each begins where the one before ends, in noise and in time, and with more noise than that: renoising adds some."""
    levels = Pyramid(count, gamma=gamma).levels
    assert len(levels) == count and levels[0].start == TOP and levels[-1].end == 0
    assert levels[0].first == 999 and 0 < levels[-1].last < 4
    for above, below in zip(levels[1:], levels[:-1], strict=True):
        assert above.entry == below.end < above.start < below.start
        assert 0 < below.last - above.first < 1  # one step of the table
    lengths = [level.start - level.end for level in levels]
    for level, length in zip(levels, lengths, strict=True):
        assert level.first - level.last == pytest.approx(998 * length / sum(lengths), abs=2)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"count": 0}, "1 to 4 levels, not 0"),
        ({"count": 5}, "1 to 4 levels, not 5"),
        ({"gamma": 0.0}, "gamma must be above 0"),
        ({"gamma": 0.4}, "at most 1/3, got 0.4"),
        ({"shift": 0.0}, "shift must be above 0"),
        ({"edges": (0.0, 1.0)}, "need 4 edges"),
        ({"edges": (0.0, 0.6, 0.4, 1.0)}, "edges that rise"),
        ({"edges": (0.0, 0.4, 0.4001, 1.0)}, ".001 apart"),
        ({"edges": (0.1, 0.4, 0.6, 1.0)}, "from 0 to 1"),
        ({"edges": (0.0, 0.4, 0.6, 0.9)}, "from 0 to 1"),
    ],
)
def test_constants_that_give_no_pyramid(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Pyramid(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("level", [0, 1, 2])
def test_sigma_and_time_of_a_place(level: int) -> None:
    own = Pyramid().levels[level]
    places = np.array([0.0, 250.0, 250.5, 999.0])
    sigma, time = own.at(places)
    np.testing.assert_allclose(sigma, [0.999, 0.74925, 0.7487505, 0.000999], rtol=1e-12)
    np.testing.assert_allclose(time, own.first + places / 999 * (own.last - own.first), rtol=1e-12)
    assert time[0] == own.first and time[-1] == pytest.approx(own.last, rel=1e-12)
    shifted, moved = own.at(places, 2.0)
    np.testing.assert_allclose(shifted, 2 * sigma / (1 + sigma), rtol=1e-12)
    np.testing.assert_allclose(moved, own.last + shifted * (own.first - own.last), rtol=1e-12)


def test_steps_of_a_level_and_of_a_single_one() -> None:
    sigmas, times = Pyramid().steps(1, 4)
    level = Pyramid().levels[1]
    np.testing.assert_allclose(sigmas, [*np.linspace(0.999, 0.000999, 4), 0.0], atol=1e-12)
    np.testing.assert_allclose(times, np.linspace(level.first, level.last, 4), rtol=1e-12)
    sigmas, times = Pyramid(1).steps(0, 4)  # as base models are sampled
    np.testing.assert_allclose(sigmas, [1, 0.75025, 0.5005, 0.25075, 0], rtol=1e-6)
    np.testing.assert_allclose(times, 1000 * sigmas[:-1], rtol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_sizes_and_tokens(count: int) -> None:
    sizes = Pyramid(count).sizes(48, 80 if count < 4 else 96)
    assert sizes[-1] == (48, 80 if count < 4 else 96) and len(sizes) == count
    for (rows, columns), (more_rows, more_columns) in zip(sizes[:-1], sizes[1:], strict=True):
        assert (more_rows, more_columns) == (2 * rows, 2 * columns) and rows % PATCH == 0 == columns % PATCH


def test_three_levels_have_seven_sixteenths_of_the_noisy_tokens() -> None:
    """At equal steps a level: 2.29 times fewer, as the report says."""
    tokens = Pyramid().tokens(9, 48, 80)
    assert sum(tokens) / (3 * tokens[-1]) == 0.4375 and 1 / 0.4375 == pytest.approx(2.29, abs=0.005)


@pytest.mark.parametrize(
    ("count", "rows", "columns", "named"),
    [
        (3, 47, 80, "376x640 pixels .47x80 latents. does not .* 3 levels: .* multiples of 64 .* that are: 320x640, 384x640"),
        (3, 48, 81, "384x640, 384x704$"),
        (2, 6, 6, "multiples of 32 pixels; sizes nearby that are: 32x32, 32x64, 64x32, 64x64$"),
        (4, 8, 16, "multiples of 128 pixels; sizes nearby that are: 128x128$"),
        (1, 3, 4, "16x32, 32x32$"),
        (3, 0, 8, "64x64$"),
    ],
)
def test_sizes_that_do_not_divide_name_sizes_that_do(count: int, rows: int, columns: int, named: str) -> None:
    with pytest.raises(InputError, match=named) as caught:
        Pyramid(count).sizes(rows, columns)
    for size in str(caught.value).rpartition(": ")[2].split(", "):
        height, width = map(int, size.split("x"))
        assert len(Pyramid(count).sizes(height // 8, width // 8)) == count
    with pytest.raises(InputError):
        Pyramid(count).points(torch.zeros(1, 1, 9, rows, columns), torch.zeros(1, 1, 9, rows, columns))


def test_halved_and_doubled_keep_frames_and_channels_apart() -> None:
    x = normal(2, 3, 9, 4, 6)
    half = halved(x)
    assert half.shape == (2, 3, 9, 2, 3) and doubled(x).shape == (2, 3, 9, 8, 12)
    torch.testing.assert_close(half, x.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2)).mean(dim=(-3, -1)))
    assert torch.equal(doubled(x), x.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2))


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_pyramids(count: int) -> None:
    clean, noise = normal(1, 16, 9, 32, 48), normal(1, 16, 9, 32, 48, purpose="noise")
    cleans, noises = pyramid(clean, count), noise_pyramid(noise, count)
    assert cleans[-1] is clean and noises[-1] is noise and len(cleans) == len(noises) == count
    for level, (one, other) in enumerate(zip(cleans, noises, strict=True)):
        side = 2 ** (count - 1 - level)
        means = clean.unflatten(-1, (-1, side)).unflatten(-3, (-1, side)).mean(dim=(-3, -1))
        torch.testing.assert_close(one, means)
        assert (other.std() - 1).abs() < 4 / (2 * other.numel()) ** 0.5
        next_to = (other[..., 1:] * other[..., :-1]).mean()
        assert next_to.abs() < 4 / other.numel() ** 0.5  # white


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_start_and_end_points(count: int) -> None:
    chosen = Pyramid(count)
    clean, noise = normal(2, 3, 9, 32, 16), normal(2, 3, 9, 32, 16, purpose="noise")
    cleans, noises, points = pyramid(clean, count), noise_pyramid(noise, count), chosen.points(clean, noise)
    assert [tuple(start.shape[-2:]) for start, _ in points] == chosen.sizes(32, 16)
    assert torch.equal(points[0][0], noises[0]) and torch.equal(points[-1][1], clean)
    for number, (start, end) in enumerate(points):
        level = chosen.levels[number]
        torch.testing.assert_close(end, level.end * noises[number] + (1 - level.end) * cleans[number])
        if number:
            below = cleans[number - 1].repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2)
            torch.testing.assert_close(start, level.start * noises[number] + (1 - level.start) * below)


def test_block_noise_over_a_million_draws() -> None:
    """Variance 1, correlation -1/3 inside a block, block sum 0, nothing between blocks."""
    noise = block_noise(normal(1_000, 2_000, 2), 1 / 3)  # a million blocks
    blocks = noise.unflatten(-2, (-1, 2)).flatten(0, 1).flatten(1)
    assert len(blocks) == 1_000_000 and blocks.sum(dim=1).abs().max() < 1e-5
    covariances = torch.cov(blocks.T.double())
    wanted = torch.where(torch.eye(4, dtype=torch.bool), 1.0, -1 / 3).double()
    torch.testing.assert_close(covariances, wanted, rtol=0, atol=7e-3)  # five standard errors of a variance
    torch.testing.assert_close(torch.corrcoef(blocks.T.double()), wanted, rtol=0, atol=5e-3)
    assert blocks.mean(dim=0).abs().max() < 5e-3
    assert torch.cov(torch.cat([blocks[:-1], blocks[1:]], dim=1).T)[:4, 4:].abs().max() < 5e-3


@pytest.mark.parametrize("gamma", GAMMAS)
def test_block_noise_of_any_gamma(gamma: float) -> None:
    wanted = (1 + gamma) * torch.eye(4) - gamma * torch.ones(4, 4)
    noise = block_noise(normal(2, 16, 9, 100, 150), gamma)
    assert noise.shape == (2, 16, 9, 100, 150)
    torch.testing.assert_close(covariance(noise), wanted.double(), rtol=0, atol=5 * (2 / (noise.numel() / 4)) ** 0.5)


def test_block_noise_is_the_linear_map_it_says() -> None:
    """Its matrix, read off the 4 unit vectors, is a square root of the covariance."""
    for gamma in GAMMAS:
        units = torch.eye(4, dtype=torch.float64).view(4, 2, 2)
        root = block_noise(units, gamma).flatten(1)
        torch.testing.assert_close(root @ root.T, (1 + gamma) * torch.eye(4).double() - gamma, rtol=0, atol=1e-12)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("count", [2, 3, 4])
def test_renoised_ends_are_distributed_as_start_points(count: int, gamma: float) -> None:
    """Mean (1 - start) of the doubled clean latents; white noise of standard deviation `start`."""
    chosen = Pyramid(count, gamma=gamma)
    below = normal(1, 4, 9, 1, 1).expand(1, 4, 9, 64, 64)
    for number in range(1, count):
        alpha, beta = chosen.renoise_factors(number)
        level, before = chosen.levels[number], chosen.levels[number - 1]
        assert alpha * (1 - before.end) == pytest.approx(1 - level.start, rel=1e-12)
        assert beta**2 * (1 + gamma) == pytest.approx(level.start**2, rel=1e-12)
        assert beta**2 * gamma == pytest.approx((alpha * before.end) ** 2, rel=1e-12)
        noise = normal(1, 4, 9, 64, 64, purpose="noise")
        white = normal(1, 4, 9, 128, 128, purpose="block noise")
        found = chosen.renoise(number, before.end * noise + (1 - before.end) * below, block_noise(white, gamma))
        rest = (found - (1 - level.start) * doubled(below)) / level.start
        torch.testing.assert_close(covariance(rest), torch.eye(4).double(), rtol=0, atol=0.025)  # 147,456 blocks, six errors


def test_nothing_is_renoised_before_the_first_level_or_after_the_last() -> None:
    for level in (0, 3):
        with pytest.raises(ValueError, match=f"level {level} of 3"):
            Pyramid().renoise(level, torch.zeros(1, 1, 9, 4, 4), torch.zeros(1, 1, 9, 8, 8))


def test_the_shift_is_the_levels_own() -> None:
    chosen = Pyramid()
    assert chosen.factors("none", 9, 48, 80) == [None] * 3
    assert chosen.factors("linear", 9, 48, 80) == pytest.approx([0.548073, 0.822292, 1.919167], abs=1e-6)
    exponential = chosen.factors("exponential", 9, 48, 80)
    assert exponential == pytest.approx([1.730, 2.276, 6.815], abs=1e-3)
    assert chosen.factors("exponential", 9, 48, 80, cap=2.0) == pytest.approx([1.730, 2.0, 2.0], abs=1e-3)


def test_a_shift_that_lags_a_level_behind() -> None:
    """As diffusers' pipeline counts tokens: .548, .548, .822 at 384 x 640, where training has .548, .822, 1.919."""
    for count in (1, 2, 3, 4):
        own = Pyramid(count).factors("linear", 9, 48, 80)
        assert Pyramid(count).factors("linear", 9, 48, 80, behind=True) == [own[0], *own[:-1]]
    assert Pyramid().factors("none", 9, 48, 80, behind=True) == [None] * 3
