"""The toy world: what the truth says is what the pixels show."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from helios_train.data.toy import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    ToySpec,
    ToyTruth,
    caption_of,
    parse_caption,
    read_truth,
    render,
    render_folder,
)
from helios_train.data.video import probe
from helios_train.errors import InputError

BOTH = ToySpec(shapes=SHAPES)


def cover(frames: np.ndarray, truth: ToyTruth) -> np.ndarray:
    """How much of each pixel the shape covers, [F, H, W] in [0, 1]."""
    fore, back = (np.array(rgb, dtype=float) for rgb in (COLOURS[truth.colour], BACKGROUNDS[truth.background]))
    axis = fore - back
    return np.clip((frames - back) @ axis / (axis @ axis), 0, 1)


@pytest.mark.parametrize("size", [(64, 64), (64, 128), (128, 96)])
def test_truth_is_what_is_drawn(size: tuple[int, int]) -> None:
    spec = ToySpec(size=size, shapes=SHAPES)
    for index in range(8):
        frames, truth = render(3, index, spec)
        assert frames.shape == (132, *size, 3) and frames.dtype == np.uint8
        covered, where = cover(frames, truth), np.array(truth.positions)
        area = covered.sum((1, 2))
        centre = np.stack([(covered * grid).sum((1, 2)) for grid in np.mgrid[: size[0], : size[1]][::-1]], axis=1) / area[:, None]
        assert np.abs(centre - where).max() < 0.05
        # Never cut off: the area is whole in every frame.
        full = np.pi * truth.radius**2 if truth.shape == "circle" else 4 * truth.radius**2
        assert np.abs(area / full - 1).max() < 0.02
        step = np.linalg.norm(np.diff(where, axis=0), axis=1)
        assert step.max() <= truth.speed + 2e-3 and np.median(step) == pytest.approx(truth.speed, abs=2e-3)
        assert 13 <= truth.radius / spec.scale <= 18 and 0.4 <= truth.speed / spec.scale <= 1.0
        first = where[1] - where[0]
        assert ("left" in truth.direction) <= (first[0] < 0) and ("right" in truth.direction) <= (first[0] > 0)
        assert ("up" in truth.direction) <= (first[1] < 0) and ("down" in truth.direction) <= (first[1] > 0)


def test_bounces_happen() -> None:
    turned = [
        np.diff(np.sign(np.diff(np.array(render(0, index, ToySpec())[1].positions), axis=0)), axis=0).any() for index in range(12)
    ]
    assert sum(turned) >= 6


def test_a_clip_is_a_function_of_seed_and_index() -> None:
    once, again = render(7, 5, BOTH), render(7, 5, BOTH)
    assert np.array_equal(once[0], again[0]) and once[1] == again[1]
    assert render(7, 6, BOTH)[1] != once[1] and render(8, 5, BOTH)[1] != once[1]


def test_every_name_occurs() -> None:
    truths = [render(0, index, ToySpec(sections=1, shapes=SHAPES))[1] for index in range(60)]
    assert {truth.colour for truth in truths} == set(COLOURS)
    assert {truth.background for truth in truths} == set(BACKGROUNDS)
    assert {truth.shape for truth in truths} == set(SHAPES)
    assert len({truth.direction for truth in truths}) == 8 and len({truth.pace for truth in truths}) == 2


def test_colours_are_far_from_backgrounds_and_each_other() -> None:
    everything = {**COLOURS, **BACKGROUNDS}
    assert len(everything) == len(COLOURS) + len(BACKGROUNDS)
    apart = [np.linalg.norm(np.subtract(everything[a], everything[b])) for a, b in product(everything, everything) if a != b]
    assert min(apart) >= 150


def test_captions_parse_back() -> None:
    for index, motion in product(range(10), (False, True)):
        truth = render(1, index, BOTH)[1]
        names = ("colour", "shape", "background", *(("direction", "pace") if motion else ()))
        assert parse_caption(caption_of(truth, motion)) == {name: getattr(truth, name) for name in names}
    assert parse_caption("A red  circle on a blue background.") == {"colour": "red", "shape": "circle", "background": "blue"}
    for other in ("", "a red circle", "a red circle moving left on a blue background", "a purple cow on a blue background"):
        assert parse_caption(other) is None


def test_folder(tmp_path: Path) -> None:
    spec = ToySpec(size=(32, 48), sections=1, clips=3, motion_in_caption=True)
    render_folder(tmp_path, spec)
    assert len(list(tmp_path.glob("*.mp4"))) == 3 and probe(tmp_path / "000002.mp4")[:3] == (33, 32, 48)
    truth = json.loads((tmp_path / "000002.json").read_text())
    assert parse_caption((tmp_path / "000002.txt").read_text())["direction"] == truth["direction"]
    assert len(truth["positions"]) == 33 and truth["positions"] == [[round(x, 3), round(y, 3)] for x, y in truth["positions"]]
    assert read_truth(tmp_path / "000002.json") == render(0, 2, spec)[1]
    before = {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    render_folder(tmp_path, spec)
    assert before == {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    with pytest.raises(InputError, match="another spec"):
        render_folder(tmp_path, ToySpec(size=(32, 48), sections=1, clips=4))


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"positions": [[1]]}', '{"positions": [[1, 2]], "colour": "red"}'])
def test_another_truth_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match="truth.json: not the truth of a toy video"):
        read_truth(tmp_path / "truth.json")  # not there
    (tmp_path / "truth.json").write_text(text)
    with pytest.raises(InputError, match="truth.json: not the truth of a toy video"):
        read_truth(tmp_path / "truth.json")


@pytest.mark.parametrize(
    "wrong",
    [
        {"shapes": ("star",)},
        {"colours": ()},
        {"size": (64, 31)},
        {"radius": (20, 10)},
        {"radius": (5, 40)},
        {"speed": (-1, 1)},
        {"clips": 0},
    ],
)
def test_what_cannot_be_drawn_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InputError, match="toy"):
        ToySpec(**wrong)
