"""The toy tracker against the truth of rendered clips, and against jumps made on purpose."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from helios_train.data.toy import BACKGROUNDS, COLOURS, SHAPES, ToySpec, caption_of, render
from helios_train.errors import InputError
from helios_train.evaluation.toy import judge, track


@pytest.mark.parametrize("size", [(64, 64), (64, 128)])
@pytest.mark.parametrize("shape", SHAPES)
def test_positions_are_true_to_a_pixel(size: tuple[int, int], shape: str) -> None:
    frames, truth = render(3, 1, ToySpec(size=size, sections=2, shapes=(shape,)))
    seen = track(frames)
    assert seen.found == 1
    assert np.abs(seen.centres - truth.positions).max() < 0.5
    np.testing.assert_allclose(seen.area, np.pi * truth.radius**2 if shape == "circle" else 4 * truth.radius**2, rtol=0.1)


@pytest.mark.parametrize(("colour", "background"), product(COLOURS, BACKGROUNDS))
def test_names_of_every_pair(colour: str, background: str) -> None:
    spec = ToySpec(size=(64, 64), sections=2, colours=(colour,), backgrounds=(background,))
    frames, truth = render(0, 5, spec)
    seen = track(frames)
    assert (seen.colour, seen.background) == (COLOURS[colour], BACKGROUNDS[background])
    verdict = judge(seen, caption_of(truth))
    assert verdict["colour_right"] and verdict["background_right"] and verdict["jump_ok"]


def test_wrong_names_are_told() -> None:
    frames, _ = render(0, 0, ToySpec(size=(64, 64), sections=1, colours=("red",), backgrounds=("blue",)))
    verdict = judge(track(frames), "a green circle on a white background")
    assert verdict["colour_right"] is False and verdict["background_right"] is False
    assert verdict["jump_ok"] is None  # one section has no border
    grey = np.full_like(frames, 128)
    assert track(grey).background_name is None


def test_motion_is_the_speed() -> None:
    frames, truth = render(0, 4, ToySpec(size=(64, 128), sections=3, radius=(8, 8)))
    seen = track(frames)
    assert seen.motion == pytest.approx(truth.speed, rel=0.1)  # a bounce shortens a few steps
    assert seen.border_jump == pytest.approx(truth.speed, abs=0.3)


def test_a_shifted_section_is_flagged() -> None:
    frames, truth = render(7, 2, ToySpec(size=(64, 128), sections=4))
    assert judge(track(frames), caption_of(truth))["jump_ok"] is True
    jumping = frames.copy()
    jumping[66:99] = np.roll(jumping[66:99], 12, axis=2)
    seen = track(jumping)
    verdict = judge(seen, caption_of(truth))
    assert verdict["jump_ok"] is False
    assert seen.border_jump_max == pytest.approx(12, abs=2)
    assert seen.motion == pytest.approx(track(frames).motion, rel=0.5)


def test_frames_without_an_object() -> None:
    frames, truth = render(0, 0, ToySpec(size=(64, 64), sections=2))
    gone = frames.copy()
    gone[33:] = BACKGROUNDS[truth.background]
    seen = track(gone)
    assert seen.found == 0.5 and np.isnan(seen.centres[33:]).all() and np.isfinite(seen.centres[:33]).all()
    assert np.isnan(seen.border_jump) and seen.motion > 0
    noise = np.random.default_rng(0).integers(100, 120, frames.shape).astype(np.uint8)
    nothing = track(noise)
    assert nothing.found == 0 and nothing.colour is None and np.isnan(nothing.motion)
    assert judge(nothing, caption_of(truth))["colour_right"] is False


def test_the_codec_s_error_does_not_mislead() -> None:
    frames, truth = render(1, 6, ToySpec(size=(64, 64), sections=2))
    noisy = frames + np.random.default_rng(0).normal(0, 12, frames.shape)
    seen = track(noisy.clip(0, 255).astype(np.uint8))
    assert np.abs(seen.centres - truth.positions).max() < 1
    assert seen.colour_name == truth.colour and seen.background_name == truth.background


def test_other_captions_are_refused() -> None:
    frames, _ = render(0, 0, ToySpec(size=(64, 64), sections=1))
    with pytest.raises(InputError, match="not of the toy world"):
        judge(track(frames), "a dog on a beach")
