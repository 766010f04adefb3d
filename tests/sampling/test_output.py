"""The three files of a sample."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helios_train.data.toy import ToySpec, render
from helios_train.data.video import probe, read_frames
from helios_train.errors import InputError
from helios_train.sampling.output import BORDER, COLUMNS, ROWS, ContactSheet, SavedVideo, VideoFiles

CAPTION = "a red circle on a blue background"


def sections_of(frames: np.ndarray) -> Iterator[np.ndarray]:
    yield from np.split(frames, range(33, len(frames), 33))


def save(folder: Path, frames: np.ndarray, extra: dict[str, object]) -> SavedVideo:
    with VideoFiles(folder, "0", 25, -(-len(frames) // 33)) as files:
        for section in sections_of(frames):
            files.add(torch.from_numpy(section))
        return files.finish(CAPTION, extra)


def sheet_of(frames: np.ndarray, caption: str = CAPTION) -> np.ndarray:
    sheet = ContactSheet(-(-len(frames) // 33))
    for section in sections_of(frames):
        sheet.add(section)
    return np.asarray(sheet.page(caption))


def toy_frames(sections: int) -> np.ndarray:
    return render(0, 0, ToySpec(size=(64, 64), sections=sections))[0]


def test_files_and_facts(tmp_path: Path) -> None:
    frames = toy_frames(2)
    figures = {"jump": float("nan"), "colour_right": True, "list": [1.5, float("inf")]}
    saved = save(tmp_path / "videos", frames, {"steps": 3, "figures": figures})
    assert [path.name for path in saved] == ["0.mp4", "0.png", "0.json"]
    assert sorted(path.name for path in (tmp_path / "videos").iterdir()) == ["0.json", "0.mp4", "0.png"]
    assert probe(saved.mp4)[:3] == (66, 64, 64)
    assert np.abs(read_frames(saved.mp4, range(66)).numpy().astype(int) - frames).mean() < 4
    assert json.loads(saved.facts.read_text()) == {
        "caption": CAPTION,
        "frames": 66,
        "height": 64,
        "width": 64,
        "fps": 25,
        "steps": 3,
        "figures": {"jump": None, "colour_right": True, "list": [1.5, None]},
    }
    again = save(tmp_path / "again", frames, {"steps": 3, "figures": figures})
    assert [path.read_bytes() for path in saved] == [path.read_bytes() for path in again]


def test_nothing_has_its_name_before_the_end(tmp_path: Path) -> None:
    frames = toy_frames(2)
    with VideoFiles(tmp_path, "0", 25, 2) as files:
        for section in sections_of(frames):
            files.add(torch.from_numpy(section))
            assert not any(path.exists() for path in files.saved)
        files.finish(CAPTION, {})
    assert all(path.is_file() for path in files.saved)


def test_nothing_is_left_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="out of luck"):
        with VideoFiles(tmp_path, "0", 25, 2) as files:
            files.add(torch.from_numpy(toy_frames(1)))
            raise RuntimeError("out of luck")
    assert not list(tmp_path.iterdir())


def test_killed_while_it_writes(tmp_path: Path) -> None:
    """What an earlier sample left under the name stays whole, and what was killed has no name."""
    before = save(tmp_path, toy_frames(1), {}).mp4.read_bytes()
    code = """
import sys, time, torch
from pathlib import Path
from helios_train.sampling.output import VideoFiles
with VideoFiles(Path(sys.argv[1]), sys.argv[2], 25, 100) as files:
    for section in range(100):
        files.add(torch.randint(256, (33, 64, 64, 3), dtype=torch.uint8))
        print(section, flush=True)
        time.sleep(600 if section == 3 else 0)
"""
    for name in ("0", "1"):
        child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), name], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        while child.stdout.readline().strip() != "3":
            assert child.poll() is None
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
    assert (tmp_path / "0.mp4").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".tmp") == ["0.json", "0.mp4", "0.png"]


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/videos: cannot be written .*sample.output"):
        VideoFiles(tmp_path / "file" / "videos", "0", 25, 1)


def test_sheet_has_a_row_a_section_and_marks_borders() -> None:
    frames = np.zeros((99, 64, 64, 3), dtype=np.uint8)
    frames[:33, ..., 0] = frames[33:66, ..., 1] = frames[66:, ..., 2] = 200
    pixels = sheet_of(frames)
    for channel in range(3):
        colour = np.zeros(3, dtype=np.uint8)
        colour[channel] = 200
        rows = np.flatnonzero((pixels == colour).all(-1).sum(1) >= COLUMNS * 64)
        assert len(rows) and rows.min() > 0
        assert (rows.max() - rows.min() + 1) == len(rows)  # one band, below the section before it
    borders = np.flatnonzero((pixels == np.array(BORDER)).all((1, 2)))
    assert len(np.split(borders, np.flatnonzero(np.diff(borders) > 1) + 1)) == 2


def test_a_sheet_of_a_minute_shows_some_sections_and_says_which() -> None:
    """Section n has brightness 5 n: the rows found are 12 of 44, evenly spaced, first and last among them."""
    frames = np.repeat(np.arange(44, dtype=np.uint8) * 5, 33)[:, None, None, None] + np.zeros((1, 32, 32, 3), dtype=np.uint8)
    pixels = sheet_of(frames)
    assert pixels.shape[0] < 1600
    shown = [value // 5 for value in range(0, 220, 5) if (pixels == value).all(-1).sum(1).max() >= COLUMNS * 96]
    assert len(shown) == ROWS and shown[0] == 0 and shown[-1] == 43
    assert set(np.diff(shown)) == {3, 4} or set(np.diff(shown)) == {4}
    short = sheet_of(frames[: 33 * ROWS])
    assert pixels.shape[0] == short.shape[0] + 16  # the line that says which
    sheet = ContactSheet(44)
    for section in sections_of(frames):
        sheet.add(section)
    assert sorted(sheet.shown) == shown and len(sheet._rows) == ROWS  # no more is kept


@pytest.mark.parametrize("shape", [(33, 384, 640, 3), (30, 16, 64, 3), (129, 64, 128, 3), (3, 64, 64, 3)])
def test_sheet_of_other_sizes(shape: tuple[int, ...]) -> None:
    page = sheet_of(np.full(shape, 90, dtype=np.uint8), CAPTION * 20)
    assert Image.fromarray(page).height > 96 * -(-shape[0] // 33)


def test_frames_no_video_can_hold(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="odd side"):
        save(tmp_path, np.zeros((33, 63, 64, 3), dtype=np.uint8), {})
    assert not list(tmp_path.iterdir())
