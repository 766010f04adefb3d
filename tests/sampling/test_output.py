"""The three files of a sample."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helios_train.data.toy import ToySpec, render
from helios_train.data.video import probe
from helios_train.errors import InputError
from helios_train.sampling.output import BORDER, COLUMNS, contact_sheet, save_video

CAPTION = "a red circle on a blue background"


def test_files_and_facts(tmp_path: Path) -> None:
    frames, _ = render(0, 0, ToySpec(size=(64, 64), sections=2))
    figures = {"jump": float("nan"), "colour_right": True, "list": [1.5, float("inf")]}
    saved = save_video(tmp_path / "videos", "0", torch.from_numpy(frames), 25, CAPTION, {"steps": 3, "figures": figures})
    assert [path.name for path in saved] == ["0.mp4", "0.png", "0.json"] and all(path.is_file() for path in saved)
    assert probe(saved.mp4)[:3] == (66, 64, 64)
    assert json.loads(saved.facts.read_text()) == {
        "caption": CAPTION,
        "frames": 66,
        "height": 64,
        "width": 64,
        "fps": 25,
        "steps": 3,
        "figures": {"jump": None, "colour_right": True, "list": [1.5, None]},
    }
    again = save_video(tmp_path / "again", "0", frames, 25, CAPTION, {"steps": 3, "figures": figures})
    assert [path.read_bytes() for path in saved] == [path.read_bytes() for path in again]


def test_sheet_has_a_row_a_section_and_marks_borders() -> None:
    frames = np.zeros((99, 64, 64, 3), dtype=np.uint8)
    frames[:33, ..., 0] = frames[33:66, ..., 1] = frames[66:, ..., 2] = 200
    pixels = np.asarray(contact_sheet(frames, CAPTION))
    for channel in range(3):
        colour = np.zeros(3, dtype=np.uint8)
        colour[channel] = 200
        rows = np.flatnonzero((pixels == colour).all(-1).sum(1) >= COLUMNS * 64)
        assert len(rows) and rows.min() > 0
        assert (rows.max() - rows.min() + 1) == len(rows)  # one band, below the section before it
    borders = np.flatnonzero((pixels == np.array(BORDER)).all((1, 2)))
    assert len(np.split(borders, np.flatnonzero(np.diff(borders) > 1) + 1)) == 2


@pytest.mark.parametrize("shape", [(33, 384, 640, 3), (30, 16, 64, 3), (129, 64, 128, 3), (3, 64, 64, 3)])
def test_sheet_of_other_sizes(shape: tuple[int, ...]) -> None:
    page = contact_sheet(np.full(shape, 90, dtype=np.uint8), CAPTION * 20)
    assert isinstance(page, Image.Image) and page.height > 96 * -(-shape[0] // 33)


def test_frames_no_video_can_hold(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="odd side"):
        save_video(tmp_path, "x", np.zeros((33, 63, 64, 3), dtype=np.uint8), 25, CAPTION, {})
