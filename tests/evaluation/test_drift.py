"""Drift against closed forms: ramps, constants, pans, noise; chunks of any size; intervals that hold the truth."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from helios_train.errors import InputError
from helios_train.evaluation import drift
from helios_train.evaluation.drift import Drift, DriftMeter, measure, slope, student_t

SIZE = (8, 12)


def plain(colours: list[tuple[int, int, int]]) -> np.ndarray:
    """A frame of one colour each: [F, H, W, 3]."""
    return np.broadcast_to(np.array(colours, dtype=np.uint8)[:, None, None], (len(colours), *SIZE, 3))


def figure(seen: Drift, name: str) -> float:
    return seen.figures[f"drift/{name}"]


def test_a_constant_video_does_not_drift() -> None:
    seen = measure(plain([(90, 60, 30)] * 132))
    for name in (*drift.MEASURES, "motion"):
        for what in ("slope", "slope_low", "slope_high", "change"):
            assert figure(seen, f"{name}_{what}") == pytest.approx(0, abs=1e-12), name
    assert figure(seen, "saturation_start") == pytest.approx(60 / 255)
    assert figure(seen, "luma_end") == pytest.approx((0.2126 * 90 + 0.7152 * 60 + 0.0722 * 30) / 255)
    assert figure(seen, "red_green_start") == pytest.approx(30 / 255)
    assert figure(seen, "yellow_blue_start") == pytest.approx(45 / 255)
    assert figure(seen, "similarity_end") == 1
    for name in ("motion", "motion_least", "border", "border_ratio", "spread_least", "contrast_end", "sharpness_end"):
        assert figure(seen, name) == pytest.approx(0, abs=1e-9), name


@pytest.mark.parametrize(
    ("step", "changes"),
    [
        ((1, 1, 1), {"luma": 1, "motion": 0, "saturation": 0, "similarity": -1}),
        ((1, 1, 0), {"luma": 0.9278, "saturation": 1, "yellow_blue": 1, "red_green": 0, "similarity": -2 / 3}),
        ((1, 0, 0), {"luma": 0.2126, "saturation": 1, "yellow_blue": 0.5, "red_green": 1, "similarity": -1 / 3}),
    ],
)
def test_a_colour_that_grows_by_a_grey_level_a_frame(step: tuple[int, int, int], changes: dict[str, float]) -> None:
    """132 frames from level 40: the slope a section is 33 levels times the measure's share; windows are of 19 frames."""
    seen = measure(plain([tuple(40 + frame * each for each in step) for frame in range(132)]))  # type: ignore[misc]
    for name, a_level in changes.items():
        assert figure(seen, f"{name}_slope") == pytest.approx(33 * a_level / 255, abs=1e-6), name
        assert figure(seen, f"{name}_slope_high") - figure(seen, f"{name}_slope_low") == pytest.approx(0, abs=1e-5), name
        assert figure(seen, f"{name}_change") == pytest.approx((132 - 19) * a_level / 255, abs=1e-6), name
    assert figure(seen, "motion") == pytest.approx(sum(step) / 3 / 255) and figure(seen, "border_ratio") == pytest.approx(1)
    assert seen.sections["luma"] == pytest.approx([(0.2126, 0.7152, 0.0722) @ np.array(step) * (16 + 33 * s) / 255
                                                   + 40 / 255 for s in range(4)])  # fmt: skip


def test_a_last_section_that_is_cut_has_its_place() -> None:
    seen = measure(plain([(frame, frame, frame) for frame in range(80)]))
    assert len(seen.sections["luma"]) == 3 and figure(seen, "luma_slope") == pytest.approx(33 / 255, abs=1e-6)


def test_colours_that_jump_at_borders_alone() -> None:
    """Of 4 sections that each stand still 20 levels higher; motion inside is none, and counts as a twentieth of a level."""
    seen = measure(plain([(20 * (frame // 33),) * 3 for frame in range(132)]))
    assert figure(seen, "border") == pytest.approx(20 / 255) and figure(seen, "motion") == 0
    assert figure(seen, "border_ratio") == pytest.approx(20 / 0.05)
    assert seen.sections["border"][1:] == pytest.approx([20 / 255] * 3) and math.isnan(seen.sections["border"][0])


def ramp(slope_x: int, slope_y: int = 0) -> np.ndarray:
    """A grey frame that rises to the right and down."""
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    return np.repeat((slope_x * columns + slope_y * rows)[..., None], 3, axis=2).astype(np.uint8)


def test_sharpness_contrast_and_spread_of_a_ramp() -> None:
    seen = measure(np.stack([ramp(4, 2)] * 5), section=5)
    assert figure(seen, "sharpness_start") == pytest.approx((4 + 2) / 2 / 255)
    std = math.sqrt(16 * (SIZE[1] ** 2 - 1) / 12 + 4 * (SIZE[0] ** 2 - 1) / 12) / 255
    assert figure(seen, "contrast_start") == pytest.approx(std) == figure(seen, "spread_least")
    assert figure(seen, "saturation_start") == 0


def test_a_pan() -> None:
    """A ramp of 4 levels a pixel that moves 2 pixels a frame, and 6 across the border."""
    wide = np.repeat((4 * np.arange(60))[None, :, None], 3, axis=2).astype(np.uint8)
    starts = np.cumsum([0, 2, 2, 2, 6, 2, 2, 2])
    seen = measure(np.stack([np.broadcast_to(wide[:, at : at + SIZE[1]], (*SIZE, 3)) for at in starts]), section=4)
    assert figure(seen, "motion") == pytest.approx(8 / 255) and figure(seen, "border") == pytest.approx(24 / 255)
    assert figure(seen, "border_ratio") == pytest.approx(3)
    assert figure(seen, "similarity_end") == pytest.approx(1 - 4 * starts[-1] / 255)


def test_noise() -> None:
    """Even noise of 0 to 255: what its mean differences are is known."""
    video = np.random.default_rng(0).integers(0, 256, (40, 64, 64, 3), dtype=np.uint8)
    seen = measure(video, section=10)
    levels = 256
    apart = (levels**2 - 1) / (3 * levels) / 255  # mean of |a - b| for two even draws
    assert figure(seen, "motion") == pytest.approx(apart, rel=0.01) == pytest.approx(1 - figure(seen, "similarity_end"), rel=0.02)
    assert figure(seen, "border_ratio") == pytest.approx(1, rel=0.01)
    assert figure(seen, "spread_least") == pytest.approx(math.sqrt((levels**2 - 1) / 12) / 255, rel=0.01)
    assert figure(seen, "saturation_start") == pytest.approx(0.5, rel=0.01)  # largest less smallest of three: 3/4 - 1/4
    weights = float(np.square(drift.LUMA).sum())
    assert figure(seen, "contrast_start") == pytest.approx(math.sqrt(weights * (levels**2 - 1) / 12) / 255, rel=0.01)


def test_a_video_that_freezes() -> None:
    moving = np.random.default_rng(0).integers(0, 256, (33, *SIZE, 3), dtype=np.uint8)
    seen = measure(np.concatenate([moving, np.repeat(moving[-1:], 33, axis=0), moving]))
    assert figure(seen, "motion_least") == 0 and seen.sections["motion"][0] > 0.3 and seen.sections["motion"][2] > 0.3
    assert figure(seen, "motion_start") > 0.3


def test_the_windows_are_those_of_the_specification() -> None:
    """k = max(1, int(.15 T)), of motion max(4, ...): A.4."""
    for frames, k in ((5, 1), (20, 3), (81, 12), (132, 19)):
        seen = measure(plain([(frame, frame, frame) for frame in range(frames)]))
        assert figure(seen, "luma_start") == pytest.approx((k - 1) / 2 / 255, abs=1e-6)
        assert figure(seen, "luma_end") == pytest.approx((frames - (k + 1) / 2) / 255, abs=1e-6)
    squares = plain([(frame**2,) * 3 for frame in range(10)])  # motion 1, 3, 5 ...
    assert figure(measure(squares), "motion_start") == pytest.approx(3 / 255)  # of frames 1 to 3
    assert figure(measure(squares), "motion_end") == pytest.approx(14 / 255)  # of frames 6 to 9


@pytest.mark.parametrize("chunk", [1, 7, 33, 50])
def test_chunks_of_any_size_give_the_same(chunk: int) -> None:
    video = np.random.default_rng(1).integers(0, 256, (100, *SIZE, 3), dtype=np.uint8)
    latents = torch.randn(3, 16, 9, 2, 2, generator=torch.Generator().manual_seed(0))
    whole, meter = measure(video, latents), DriftMeter()
    for at in range(0, 100, chunk):
        part = video[at : at + chunk].copy()
        meter.add(torch.from_numpy(part))
        part[:] = 0  # what was handed in may be used again
    for section in latents:
        meter.add_latents(section)
    assert json.dumps(meter.result().facts()) == json.dumps(whole.facts())


def test_what_is_kept_does_not_hold_the_frames() -> None:
    meter, video = DriftMeter(), np.zeros((10, *SIZE, 3), dtype=np.uint8)
    for _ in range(3):
        meter.add(video)
    arrays = [value for value in vars(meter).values() if isinstance(value, np.ndarray)]
    assert [value.shape for value in arrays] == [(*SIZE, 3)] * 2 and all(value.base is None for value in arrays)
    assert len(meter._rows) == 30 * 9 and meter._rows.itemsize == 8


def test_latents() -> None:
    """Sections whose mean rises by .5 and whose scale by 1: variance (1 + s)^2; channels that part are seen in the shift."""
    base = torch.tensor([-1.0, 1.0]).repeat(16, 9, 2, 1)  # mean 0, variance 1 in every channel
    seen = measure(plain([(0, 0, 0)] * 99), torch.stack([base * (1 + s) + 0.5 * s for s in range(3)]))
    assert figure(seen, "latent_mean_slope") == pytest.approx(0.5) and figure(seen, "latent_mean_change") == pytest.approx(1)
    assert seen.sections["latent_variance"] == pytest.approx([1, 4, 9])
    assert figure(seen, "latent_variance_slope") == pytest.approx(4) and figure(seen, "latent_shift") == pytest.approx(1)
    apart = torch.stack([base, base])
    apart[1, 3] += 2
    apart[1, 4] -= 2
    seen = measure(plain([(0, 0, 0)] * 66), apart)
    assert figure(seen, "latent_mean_change") == pytest.approx(0)
    assert figure(seen, "latent_shift") == pytest.approx(math.sqrt(2 * 4 / 16)) and figure(seen, "latent_nonfinite") == 0
    apart[0, 0, 0, 0, 0] = math.nan
    assert figure(measure(plain([(0, 0, 0)] * 66), apart), "latent_nonfinite") == pytest.approx(1 / apart.numel())


def test_what_cannot_be_measured_is_null_in_json() -> None:
    for sections, missing in ((1, {"slope", "slope_low", "slope_high"}), (2, {"slope_low", "slope_high"}), (3, set())):
        facts = measure(plain([(1, 2, 3)] * 33 * sections)).facts()
        assert json.loads(json.dumps(facts, allow_nan=False)) == facts
        names = {name.removeprefix("drift/luma_") for name, value in facts["figures"].items() if value is None and "luma" in name}
        assert names == missing
        assert (facts["figures"]["drift/border_ratio"] is None) == (sections == 1)
        assert len(facts["sections"]["luma"]) == sections


def test_the_slope_and_its_interval_are_those_of_the_textbook() -> None:
    """x 0 to 4, y 1 3 2 5 4: slope 8/10; residuals' squares sum to 3.6; t of 3 degrees 3.182."""
    found, low, high = slope(np.arange(5), np.array([1.0, 3, 2, 5, 4]))
    assert found == pytest.approx(0.8)
    half = 3.182 * math.sqrt(3.6 / 3 / 10)
    assert (low, high) == (pytest.approx(0.8 - half), pytest.approx(0.8 + half))


@pytest.mark.parametrize("count", [3, 5, 16])
def test_the_interval_holds_the_truth_in_95_of_100(count: int) -> None:
    draw = np.random.default_rng(0)
    held = [low <= 0.3 <= high for _, low, high in (slope(np.arange(count), 0.3 * np.arange(count) + draw.normal(size=count))
                                                    for _ in range(4000))]  # fmt: skip
    assert np.mean(held) == pytest.approx(0.95, abs=0.012)


def test_students_t() -> None:
    """Against published tables."""
    for freedom, value in ((1, 12.706), (10, 2.228), (11, 2.201), (15, 2.131), (20, 2.086), (30, 2.042), (120, 1.980)):
        assert student_t(freedom) == pytest.approx(value, abs=1.5e-3)


def test_what_is_no_video_is_refused() -> None:
    good = np.zeros((2, *SIZE, 3), dtype=np.uint8)
    for frames in (good.astype(float), good[0], good[..., :1], good[:, :1]):
        with pytest.raises(InputError, match="uint8 \\[F, H, W, 3\\]"):
            measure(frames)
    meter = DriftMeter()
    with pytest.raises(InputError, match="without frames"):
        meter.result()
    meter.add(good)
    with pytest.raises(InputError, match="in a video of \\(8, 12\\)"):
        meter.add(good[:, :4])
    with pytest.raises(InputError, match="latents \\[2, 3\\]"):
        meter.add_latents(torch.zeros(2, 3))
    meter.add_latents(torch.zeros(16, 9, 2, 2))
    with pytest.raises(InputError, match="latents \\[8, 9, 2, 2\\].* of 16 channels"):
        meter.add_latents(torch.zeros(8, 9, 2, 2))
    with pytest.raises(InputError, match="at least 2"):
        DriftMeter(1)
