"""What the tracker says of clips through the default codec, against their captions and their truth."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from helios_train.data.toy import DIRECTIONS, SHAPES, ToySpec, ToyTruth, caption_of, read_truth, render, render_folder
from helios_train.data.video import read_frames
from helios_train.errors import InputError
from helios_train.evaluation.toy import ToyTrack, track
from helios_train.evaluation.toy_verdict import compare, judge
from helios_train.models.codecs import dct_codec
from helios_train.sampling.pipeline import pixels

CLIPS = 24


def through_the_codec(frames: np.ndarray) -> np.ndarray:
    """uint8 [33 k, H, W, 3] to latents and back."""
    sections = torch.from_numpy(frames).view(-1, 33, *frames.shape[1:]).permute(0, 4, 1, 2, 3) / 127.5 - 1
    codec = dct_codec()
    return pixels(codec, codec.encode(sections)).flatten(0, 1).numpy()


@cache
def followed(size: tuple[int, int]) -> list[tuple[ToyTrack, ToyTruth]]:
    spec = ToySpec(size=size, sections=2, shapes=SHAPES)
    clips = [render(11, index, spec) for index in range(CLIPS)]
    return [(track(through_the_codec(frames)), truth) for frames, truth in clips]


@pytest.mark.parametrize("size", [(64, 64), (64, 128)])
def test_the_truth_comes_back(size: tuple[int, int]) -> None:
    """Nearly all that is left of the position's error is the codec's."""
    figures = [compare(seen, truth) for seen, truth in followed(size)]
    for name in ("colour_right", "shape_right", "background_right"):
        assert all(figure[name] for figure in figures), name
    assert min(figure["found"] for figure in figures) == 1
    assert max(abs(figure["speed_error"]) for figure in figures) < 0.1
    assert max(abs(figure["radius_error"]) for figure in figures) < 0.5
    assert max(figure["position_error"] for figure in figures) < 1 and max(figure["position_error_max"] for figure in figures) < 2
    assert np.mean([figure["position_error"] for figure in figures]) < 0.5
    assert sum(figure["direction_error"] <= 32.5 for figure in figures) >= CLIPS - 1  # one may bounce before it is seen to move


@pytest.mark.parametrize("size", [(64, 64), (64, 128)])
def test_captions_with_motion(size: tuple[int, int]) -> None:
    verdicts = [judge(seen, caption_of(truth, motion=True)) for seen, truth in followed(size)]
    assert all(verdict["shape_right"] and verdict["pace_right"] for verdict in verdicts)
    assert sum(bool(verdict["direction_right"]) for verdict in verdicts) >= CLIPS - 1


def test_wrong_motion_is_told() -> None:
    for seen, truth in followed((64, 64)):
        turned = replace(truth, direction=DIRECTIONS[(DIRECTIONS.index(truth.direction) + 2) % 8])
        verdict = judge(seen, caption_of(turned, motion=True))
        assert verdict["direction_right"] is False and verdict["direction_error"] > 60
        other = {"slowly": "quickly", "quickly": "slowly"}[truth.pace]
        wrong = judge(seen, caption_of(replace(truth, pace=other), motion=True))["pace_right"]
        assert wrong is False or abs(truth.speed - 0.7) < 0.15
        shape = {"circle": "square", "square": "circle"}[truth.shape]
        assert judge(seen, caption_of(replace(truth, shape=shape)))["shape_right"] is False


def test_slow_and_quick_depend_on_the_range_and_the_size() -> None:
    seen, _ = next(pair for pair in followed((64, 64)) if 0.8 < pair[1].speed < 0.9)
    quick, slow = (f"a red circle moving left {pace} on a blue background" for pace in ("quickly", "slowly"))
    assert judge(seen, quick)["pace_right"] and not judge(seen, slow, (0.2, 0.8))["pace_right"]
    assert judge(seen, slow, (0.8, 1.6))["pace_right"] and not judge(seen, quick, (0.8, 1.6))["pace_right"]
    larger = ToySpec(size=(128, 128), sections=1, speed=(0.5, 0.5))
    frames, truth = render(0, 0, larger)
    assert truth.speed == 1 and judge(track(frames), slow)["pace_right"] and not judge(track(frames), quick)["pace_right"]


def test_what_is_not_said_is_not_judged() -> None:
    seen, truth = followed((64, 64))[0]
    verdict = judge(seen, caption_of(truth))
    assert verdict["direction_right"] is verdict["pace_right"] is verdict["direction_error"] is None
    still = track(np.repeat(render(0, 0, ToySpec(size=(64, 64), sections=1))[0][:1], 33, axis=0))
    verdict = judge(still, "a red circle moving left quickly on a blue background")
    assert verdict["direction_right"] is False and verdict["pace_right"] is False and verdict["speed"] == 0


def test_other_captions_are_refused() -> None:
    with pytest.raises(InputError, match="not of the toy world"):
        judge(followed((64, 64))[0][0], "a dog on a beach")


def test_the_truth_beside_a_video(tmp_path: Path) -> None:
    render_folder(tmp_path, ToySpec(size=(64, 64), sections=1, clips=2, shapes=SHAPES))
    for name in ("000000", "000001"):
        truth = read_truth(tmp_path / f"{name}.json")
        figures = compare(track(read_frames(tmp_path / f"{name}.mp4", range(33))), truth)
        assert figures["colour_right"] and figures["shape_right"] and figures["position_error_max"] < 0.5
    assert compare(track(read_frames(tmp_path / "000000.mp4", range(33))), truth)["position_error"] > 1  # another clip's truth


def test_a_truth_of_another_length() -> None:
    seen, truth = followed((64, 64))[0]
    with pytest.raises(InputError, match="66 frames and the toy truth 65"):
        compare(seen, replace(truth, positions=truth.positions[1:]))


def test_errors_are_those_of_the_track() -> None:
    seen, truth = followed((64, 64))[0]
    moved = replace(seen, centres=seen.centres + np.array([3, 4]))
    before, after = compare(seen, truth), compare(moved, truth)
    assert after["position_error"] == pytest.approx(5, abs=1) and after["position_error_max"] > before["position_error_max"] + 3
    gone = compare(replace(seen, centres=np.full_like(seen.centres, np.nan)), truth)
    assert np.isnan(gone["position_error"]) and gone["found"] == 0 and gone["shape_right"] is False
