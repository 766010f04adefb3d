"""The toy tracker against the truth of rendered clips, and against jumps made on purpose."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from helios_train.data.toy import BACKGROUNDS, COLOURS, SHAPES, ToySpec, caption_of, render
from helios_train.errors import InputError
from helios_train.evaluation.toy import ToyTrack, join_tracks, track
from helios_train.evaluation.toy_verdict import judge


@pytest.mark.parametrize("size", [(64, 64), (64, 128)])
@pytest.mark.parametrize("shape", SHAPES)
def test_positions_are_true_to_a_pixel(size: tuple[int, int], shape: str) -> None:
    frames, truth = render(3, 1, ToySpec(size=size, sections=2, shapes=(shape,)))
    seen = track(frames)
    assert seen.found == 1
    assert np.abs(seen.centres - truth.positions).max() < 0.5
    assert seen.shape == shape and seen.radius == pytest.approx(truth.radius, abs=0.3)
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


def test_sections_followed_one_by_one_give_the_track_of_the_video() -> None:
    frames = render(1, 0, ToySpec(size=(64, 64), sections=4))[0]
    whole, parts = track(frames), join_tracks([track(part) for part in np.split(frames, 4)])
    np.testing.assert_allclose(parts.centres, whole.centres, atol=0.01)
    for name in ("background", "background_name", "colour", "colour_name", "found", "shape", "direction"):
        assert getattr(parts, name) == getattr(whole, name)
    for name in ("motion", "border_jump", "border_jump_max", "speed", "radius"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name), abs=0.01)


def test_a_track_of_sections_that_differ() -> None:
    """Two sections of three show another world; the object jumps between them, and one has none."""
    world = np.full((3, 33, 64, 64, 3), (35, 65, 200), dtype=np.uint8)
    world[0, :, 10:30, 10:30] = world[1, :, 10:30, 20:40] = (225, 35, 35)
    found = join_tracks([track(part) for part in world])
    assert (found.background_name, found.colour_name) == ("blue", "red")
    assert (found.motion, found.border_jump, found.border_jump_max) == (0, 10, 10)
    assert found.found == pytest.approx(2 / 3) and len(found.centres) == 99 and np.isnan(found.centres[66:]).all()


def test_tracks_of_several_videos_do_not_join() -> None:
    tracks = [track(render(0, 0, ToySpec(size=size, sections=1))[0]) for size in ((64, 64), (32, 64))]
    with pytest.raises(InputError, match="not the sections of one video"):
        join_tracks(tracks)
    with pytest.raises(InputError, match="0 tracks"):
        join_tracks([])


def canvas(*boxes: tuple[int, int, int, int], frames: int = 33, size: tuple[int, int] = (64, 128)) -> np.ndarray:
    """Red boxes (top, bottom, left, right) on blue."""
    picture = np.full((frames, *size, 3), BACKGROUNDS["blue"], dtype=np.uint8)
    for top, bottom, left, right in boxes:
        picture[:, top:bottom, left:right] = COLOURS["red"]
    return picture


def test_several_objects_are_no_object() -> None:
    seen = track(canvas((20, 44, 10, 34), (20, 44, 70, 94)))
    assert seen.found == 0 and seen.shape is None and seen.colour_name is None and np.isnan(seen.speed)
    touching = track(canvas((20, 40, 30, 50), (20, 40, 50, 70)))
    assert touching.found == 1 and touching.shape is None  # one object, of no shape
    assert track(canvas((20, 44, 10, 34))).shape == "square"


def test_specks_far_away_move_nothing() -> None:
    clean, specked = track(canvas((20, 44, 10, 34))), track(canvas((20, 44, 10, 34), (0, 8, 100, 108)))
    assert specked.found == 1 and specked.shape == "square"
    np.testing.assert_array_equal(specked.centres, clean.centres)
    np.testing.assert_array_equal(specked.area, clean.area)


def test_an_object_paler_than_what_is_none() -> None:
    """Scattered bright specks set the contrast; the frames with the object reach no three quarters of it."""
    frames = np.zeros((33, 64, 128, 3), np.uint8)
    frames[:11, 20:44, 40:64] = (150, 0, 0)
    frames[11:, 4::5, 4::5] = (240, 0, 0)
    seen = track(frames)
    assert seen.found == pytest.approx(1 / 3) and seen.colour == (150, 0, 0)


def test_shapes_that_have_no_name() -> None:
    y, x = np.mgrid[:64, :128]
    for inside in (
        np.hypot((x - 60) / 1.5, y - 30) < 14,
        abs(x - 60) + abs(y - 30) < 20,
        (x - 60 < y - 12) & (y < 48) & (x > 40),
    ):
        frames = canvas()
        frames[:, inside] = COLOURS["red"]
        seen = track(frames)
        assert seen.found == 1 and seen.shape is None and seen.fit.max() < 0.85


def straight(velocity: tuple[float, float], start: tuple[float, float] = (40, 20), frames: int = 66) -> ToyTrack:
    """A track of a box that goes straight on."""
    where = np.outer(np.arange(frames), velocity) + start
    across, down = (
        np.clip(8.5 - np.abs(np.arange(side) - where[:, axis : axis + 1]), 0, 1) for axis, side in enumerate((128, 64))
    )
    share = (down[:, :, None] * across[:, None])[..., None]
    red, blue = np.array(COLOURS["red"]), np.array(BACKGROUNDS["blue"])
    return track(np.rint(share * red + (1 - share) * blue).astype(np.uint8))


@pytest.mark.parametrize(
    ("velocity", "direction", "angle"),
    [
        ((0.5, 0), "right", 0),
        ((0.5, 0.5), "down-right", 45),
        ((0, 0.5), "down", 90),
        ((-0.25, 0.25), "down-left", 135),
        ((-0.5, 0), "left", 180),
        ((-0.125, -0.125), "up-left", 225),
        ((0, -0.125), "up", 270),
        ((0.5, -0.125), "right", 346),
    ],
)
def test_directions_and_speed(velocity: tuple[float, float], direction: str, angle: float) -> None:
    seen = straight(velocity)
    assert seen.direction == direction and seen.angle == pytest.approx(angle, abs=6)
    assert seen.velocity == pytest.approx(velocity, abs=0.03) and seen.speed == pytest.approx(np.hypot(*velocity), abs=0.03)


def test_what_stands_still_has_no_direction() -> None:
    seen = straight((0, 0))
    assert seen.speed == 0 and seen.direction is None and np.isnan(seen.angle)
    assert np.isnan(straight((0, 0), frames=1).speed)


def test_the_first_direction_is_that_before_a_bounce() -> None:
    """The object meets the border after a few frames; most of what follows goes the other way."""
    spec = ToySpec(size=(64, 128), sections=1, speed=(1, 1))
    turned = 0
    for index in range(60):
        frames, truth = render(5, index, spec)
        path = np.array(truth.positions)
        if np.any(np.sign(path[1] - path[0]) * np.sign(path[16] - path[12]) < 0) and np.abs(path[4] - path[0]).min() > 1:
            assert judge(track(frames), caption_of(truth, motion=True))["direction_right"], index
            turned += 1
    assert turned >= 5


def test_other_frames_are_refused() -> None:
    for shape in ((33, 64, 64), (33, 64, 64, 4), (0, 64, 64, 3), (33, 4, 64, 3)):
        with pytest.raises(InputError, match="the toy tracker takes"):
            track(np.zeros(shape, dtype=np.uint8))
