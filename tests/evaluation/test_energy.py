"""Energy distance against closed forms, its interval against a simulation, and what it refuses."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from helios_train.errors import InputError
from helios_train.evaluation import energy
from helios_train.evaluation.energy import EnergyDistance, energy_between, energy_distance, latent_patches

TRIALS = 120


def normal(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def mean_norm(dimensions: int) -> float:
    """E|Z| of a standard normal vector: the mean of the chi distribution."""
    return math.sqrt(2) * math.gamma((dimensions + 1) / 2) / math.gamma(dimensions / 2)


def mean_folded(shift: float, std: float) -> float:
    """E|N(shift, std^2)|: the mean of the folded normal distribution."""
    return std * math.sqrt(2 / math.pi) * math.exp(-(shift**2) / (2 * std**2)) + shift * math.erf(shift / (std * math.sqrt(2)))


def of_shifted(shift: float, std: float = 1.0) -> float:
    """Energy distance of N(0, std^2) and N(shift, std^2)."""
    return 2 * (mean_folded(shift, std * math.sqrt(2)) - mean_folded(0, std * math.sqrt(2)))


def test_by_hand() -> None:
    """Distances 3, 4, 5 between, 1 and 3 within: three points and two."""
    x, y = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[4.0], [4.0]])
    assert energy_between(x, y) == pytest.approx(2 * (4 + 3 + 1) / 3 - (1 + 3 + 2) / 3 - 0)


@pytest.mark.parametrize("shift", [0.0, 0.5, 1.0, 3.0])
def test_shifted_normals(shift: float) -> None:
    assert energy_between(normal(0, 4000, 1), normal(1, 4000, 1) + shift) == pytest.approx(of_shifted(shift), abs=0.06)


@pytest.mark.parametrize(("dimensions", "scale"), product((1, 2, 16), (0.5, 2.0)))
def test_wider_and_narrower_normals(dimensions: int, scale: float) -> None:
    expected = mean_norm(dimensions) * (2 * math.sqrt(1 + scale**2) - math.sqrt(2) - math.sqrt(2) * scale)
    found = energy_between(normal(0, 3000, dimensions), normal(1, 3000, dimensions) * scale)
    assert found == pytest.approx(expected, rel=0.1)


def test_a_shift_in_the_plane() -> None:
    """Far apart, the distance grows by 2 for each unit of the shift."""
    x, y = normal(0, 1000, 2), normal(1, 1000, 2)
    found = [energy_between(x, y + torch.tensor([3.0, 4.0]) * factor) for factor in (0, 0.2, 1, 10, 11)]
    assert found == sorted(found) and abs(found[0]) < 0.01
    assert found[4] - found[3] == pytest.approx(10, rel=0.01)


def test_equal_distributions_give_zero_on_average() -> None:
    """The biased form would give 2 E|X - X'| / n = 0.23."""
    found = [energy_between(normal(seed, 10, 1), normal(seed + 1000, 10, 1)) for seed in range(300)]
    assert abs(np.mean(found)) < 3 * np.std(found) / math.sqrt(300) < 0.04 and min(found) < 0


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = normal(0, 50, 3), normal(1, 41, 3) + 0.3
    clips = [normal(seed, 2, 4, 4, 4, 4) for seed in range(12)]
    whole = energy_between(x, y), energy_distance(clips[:6], clips[6:])
    monkeypatch.setattr(energy, "BLOCK", 97)
    assert energy_between(x, y) == pytest.approx(whole[0], rel=1e-12)
    assert energy_distance(clips[:6], clips[6:]).value == pytest.approx(whole[1].value, rel=1e-9)


def clips_of(seed: int, count: int, shift: float = 0.0) -> list[Tensor]:
    """Clips of one channel whose eight numbers share most of what sets them apart: N(shift, 1.25) each."""
    draw = np.random.default_rng(seed)
    return [torch.from_numpy(shift + draw.standard_normal() + 0.5 * draw.standard_normal((1, 1, 1, 2, 4))) for _ in range(count)]


def of_clips(seed: int, shift: float, count: int = 24) -> tuple[EnergyDistance, float]:
    """The estimate and the truth in the estimate's unit."""
    reference, samples = clips_of(2 * seed, count), clips_of(2 * seed + 1, count, shift)
    unit = float(torch.stack(reference).std(correction=0))
    return energy_distance(reference, samples, (1, 1, 1), seed=seed), of_shifted(shift, math.sqrt(1.25)) / unit


@pytest.mark.parametrize("shift", [0.0, 0.5, 2.0])
def test_the_interval_covers_the_truth(shift: float) -> None:
    """Nine times in ten or more; were each number of a clip taken for a clip, in half."""
    found = [of_clips(seed, shift) for seed in range(TRIALS)]
    assert np.mean([estimate.low <= truth <= estimate.high for estimate, truth in found]) >= 0.85
    values = np.array([estimate.value - truth for estimate, truth in found])
    assert abs(values.mean()) < 3.5 * values.std() / math.sqrt(TRIALS)
    width = np.mean([estimate.high - estimate.low for estimate, _ in found])
    assert width < (0.5, 0.8, 2.2)[(0.0, 0.5, 2.0).index(shift)]


def test_resamples_average_to_the_estimate() -> None:
    """A clip drawn twice is no pair of clips, however near to itself it is."""
    between = normal(0, 11, 11).abs().numpy()
    between += between.T
    draw = np.random.default_rng(0)
    counts = energy._counts(draw, 5, 20000), energy._counts(draw, 6, 20000)
    assert counts[0].shape == (20000, 5) and (counts[0].sum(axis=1) == 5).all() and counts[0].max() == 4  # never one clip alone
    resampled = energy._energy(between, *counts)
    (estimate,) = energy._energy(between, np.ones((1, 5)), np.ones((1, 6)))
    pairs = 2 * between[:5, 5:].mean() - sum(
        (own.sum() - own.trace()) / (len(own) ** 2 - len(own)) for own in (between[:5, :5], between[5:, 5:])
    )
    assert estimate == pytest.approx(pairs)
    assert resampled.mean() == pytest.approx(estimate, abs=4 * resampled.std() / math.sqrt(20000))
    np.testing.assert_allclose(energy._energy(between + np.diag(np.full(11, 9.0)), *counts), resampled)


def test_more_confidence_and_fewer_clips_are_wider() -> None:
    sets = clips_of(0, 40), clips_of(1, 40, 1.0)
    half, most = (energy_distance(*sets, (1, 1, 1), confidence=confidence) for confidence in (0.5, 0.95))
    assert most.low < half.low < half.value == most.value < half.high < most.high
    few = energy_distance(sets[0][:8], sets[1][:8], (1, 1, 1))
    assert few.high - few.low > 1.3 * (most.high - most.low)


def latents(seed: int, count: int, shift: float = 0.0, shape: tuple[int, ...] = (2, 16, 9, 8, 8)) -> list[Tensor]:
    return [(normal(1000 * seed + number, *shape) + shift).float() for number in range(count)]


def test_latents() -> None:
    """Rises with a shift, holds 0 within the interval for equal distributions, and knows no order."""
    reference = latents(0, 8)
    found = [energy_distance(reference, latents(1, 8, shift), patches=16) for shift in (0.0, 0.1, 0.3, 1.0)]
    assert [each.value for each in found] == sorted(each.value for each in found)
    assert found[0].low < 0 < found[0].high and found[2].low > 0
    mixed = energy_distance(reference[::-1], latents(1, 8, 0.3)[::-1], patches=16)
    assert mixed.value == pytest.approx(found[2].value, rel=1e-9)


def test_a_seed_decides() -> None:
    sets = latents(0, 6), latents(1, 6)
    first, again, other = (energy_distance(*sets, patches=8, seed=seed) for seed in (3, 3, 4))
    assert first == again and first.value != other.value and first.low != other.low


def test_channels_count_by_what_they_vary_in_the_reference() -> None:
    """A channel in another unit changes nothing, and neither does an offset of both sets."""
    reference, samples = latents(0, 6), latents(1, 6, 0.3)
    unit = torch.logspace(-2, 2, 16).view(-1, 1, 1, 1)
    plain = energy_distance(reference, samples, patches=8)
    scaled = energy_distance([x * unit + 5 * unit for x in reference], [x * unit + 5 * unit for x in samples], patches=8)
    assert scaled.value == pytest.approx(plain.value, rel=1e-4)
    swapped = energy_distance([3 * x for x in reference], samples, patches=8)
    assert swapped.value != pytest.approx(energy_distance(samples, [3 * x for x in reference], patches=8).value, rel=0.1)


def test_clips_of_several_lengths_and_single_sections() -> None:
    long, short = latents(0, 6, shape=(3, 16, 9, 8, 8)), latents(1, 6, shape=(16, 3, 4, 2))
    assert abs(energy_distance(long, short, patches=32).value) < 0.5  # 3 places in the short ones
    assert energy_distance(long, [clip + 1 for clip in short], patches=32).value > 2


def test_patches_are_cut_out_of_one_section() -> None:
    """Each number tells where it stands."""
    section, channel, frame, row, column = torch.meshgrid(*(torch.arange(float(side)) for side in (2, 3, 4, 5, 6)), indexing="ij")
    clip = 10000 * section + 1000 * channel + 100 * frame + 10 * row + column
    points = latent_patches(clip, (3, 2, 2), 1000)
    assert points.shape == (2 * 2 * 4 * 5, 3 * 3 * 2 * 2) and points.dtype == torch.float64
    offsets = torch.tensor([1000 * c + 100 * t + 10 * y + x for c, t, y, x in product(range(3), range(3), range(2), range(2))])
    assert torch.equal(points - points[:, :1], offsets.expand(80, -1).double())
    assert set(points[:, 0].tolist()) == {10000 * s + 100 * t + 10 * y + x for s, t, y, x in product(*map(range, (2, 2, 4, 5)))}


def test_patches_drawn() -> None:
    clip = torch.arange(2.0 * 1 * 3 * 8 * 8).view(2, 1, 3, 8, 8)
    few = latent_patches(clip, (1, 1, 1), 50)
    assert len(set(few.flatten().tolist())) == 50  # none twice
    assert torch.equal(few, latent_patches(clip, (1, 1, 1), 50)) and torch.equal(few + 1, latent_patches(clip + 1, (1, 1, 1), 50))
    assert not torch.equal(few, latent_patches(clip, (1, 1, 1), 50, seed=1))
    assert torch.equal(latent_patches(clip[:1], (1, 1, 1), 20), latent_patches(clip[0], (1, 1, 1), 20))
    many = torch.cat([latent_patches(clip, (1, 1, 1), 50, seed) for seed in range(100)])
    assert len(set(many.flatten().tolist())) == clip.numel()  # every place has its turn


def test_the_place_of_a_patch() -> None:
    """Clips whose halves changed sides are told apart by the place alone."""
    left = [clip + torch.cat([torch.zeros(4), torch.full((4,), 2.0)]) for clip in latents(0, 8)]
    right = [clip + torch.cat([torch.full((4,), 2.0), torch.zeros(4)]) for clip in latents(1, 8)]
    without, along = (energy_distance(left, right, (1, 1, 1), place=place) for place in (0.0, 1.0))
    assert along.value > 10 * abs(without.value) and along.low > 0
    points = latent_patches(latents(0, 1)[0], (3, 2, 2), 10**6, place=0.5)
    assert points.shape == (2 * 7 * 7 * 7, 192 + 3)
    share = points[:, 192:].var(dim=0).sum() / points[:, :192].var(dim=0).sum()
    assert share == pytest.approx(0.5**2 * 8 / 6, rel=0.05)  # seven evenly spaced numbers vary by 8/6 of the interval they span
    assert latent_patches(torch.ones(1, 1, 1, 1), (1, 1, 1), 1, place=1.0).isfinite().all()  # one place alone


def broken(value: float) -> list[Tensor]:
    clips = latents(0, 6, shape=(1, 16, 3, 2, 2))
    clips[4][0, 3, 1, 1, 1] = value
    return clips


GOOD = latents(0, 6, shape=(1, 16, 3, 2, 2))


@pytest.mark.parametrize(
    ("reference", "samples", "more", "message"),
    [
        (GOOD[:4], GOOD, {}, "4 reference clips: the energy distance takes at least 5"),
        (GOOD, [], {}, "0 sample clips"),
        (GOOD, [clip[:, :15] for clip in GOOD], {}, "clips of 15 and 16 channels"),
        (GOOD, broken(math.nan), {}, "sample clip 4: 1 of 192 numbers are not finite"),
        (broken(math.inf), GOOD, {}, "reference clip 4: 1 of 192"),
        ([torch.cat([clip[:, :15], torch.full((1, 1, 3, 2, 2), 7.1)], 1) for clip in GOOD], GOOD, {}, r"channels \[15\] do not"),
        (GOOD, [clip[0, 0] for clip in GOOD], {}, r"sample clip 0 \[3, 2, 2\]"),
        (GOOD, GOOD, {"patch": (4, 2, 2)}, r"patch \(4, 2, 2\) does not fit latents of \[3, 2, 2\]"),
        (GOOD, GOOD, {"patch": (0, 2, 2)}, "does not fit"),
        (GOOD, GOOD, {"patches": 0}, "at least 1 patch"),
        (GOOD, GOOD, {"place": -1.0}, "weight of at least 0"),
        (GOOD, GOOD, {"resamples": 0}, "at least 1 resample"),
        (GOOD, GOOD, {"confidence": 1.0}, "between 0 and 1"),
    ],
)
def test_what_is_refused(reference: list[Tensor], samples: list[Tensor], more: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        energy_distance(reference, samples, **more)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.zeros(1, 2), torch.zeros(3, 2), r"first points \[1, 2\]"),
        (torch.zeros(3, 2), torch.zeros(3), r"second points \[3\]"),
        (torch.zeros(3, 2), torch.zeros(3, 1), "points of 2 and of 1 numbers"),
        (torch.zeros(3, 2), torch.full((3, 2), math.nan), "second points: 6 of 6 numbers"),
    ],
)
def test_points_that_are_refused(x: Tensor, y: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        energy_between(x, y)
