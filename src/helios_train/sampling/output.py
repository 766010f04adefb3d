"""What a sample leaves on disk: NAME.mp4, NAME.png (a contact sheet) and NAME.json (caption and figures).

Frames come section by section and go to the file at once; of each, only what the sheet shows is kept.
"""

from __future__ import annotations

import json
import math
import os
import textwrap
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from helios_train.data.video import Mp4Writer
from helios_train.errors import InputError

COLUMNS = 8  # frames shown of a section, its first and last among them
ROWS = 12  # sections shown of a video, its first and last among them
THUMB_HEIGHT = 96  # pixels
GUTTER, GAP, LINE = 72, 4, 16  # pixels: row labels, space between frames, a line of text
PAPER, INK, BORDER = (255, 255, 255), (30, 30, 30), (200, 40, 40)


class SavedVideo(NamedTuple):
    """The three files of one sample."""

    mp4: Path
    sheet: Path
    facts: Path


class VideoFiles:
    """Writes the three files of a video of `sections` sections at `fps` frames a second, under `folder`.

    A context manager. No file has its name before it is whole, and the facts come last; after an error none of them appears. The
    same input gives the same bytes.
    """

    def __init__(self, folder: Path, name: str, fps: float, sections: int):
        self.saved = SavedVideo(*(folder / f"{name}{suffix}" for suffix in (".mp4", ".png", ".json")))
        self.fps, self.sheet = fps, ContactSheet(sections)
        self.shape = (0, 0, 0)  # frames, rows, columns
        self._open = ExitStack()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _cannot_write(folder, error) from None

    def __enter__(self) -> Self:
        self._video = self._open.enter_context(Mp4Writer(self.saved.mp4, self.fps))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        self._open.__exit__(kind, error, where)

    def add(self, frames: Tensor) -> None:
        """The next section, uint8 [F, H, W, 3]. InputError for frames no video can hold."""
        array = frames.numpy()
        self._video.add(array)
        self.sheet.add(array)
        self.shape = (self.shape[0] + len(array), *array.shape[1:3])

    def finish(self, caption: str, extra: Mapping[str, Any]) -> SavedVideo:
        """Ends the video and writes sheet and facts. `extra` (settings, figures: what JSON can hold) joins the caption and the
        video's measures; a number that is not finite becomes null."""
        frames, height, width = self.shape
        self._open.close()
        facts = {"caption": caption, "frames": frames, "height": height, "width": width, "fps": self.fps, **extra}
        sheet, text = (path.with_name(path.name + ".tmp") for path in self.saved[1:])
        try:
            self.sheet.page(caption).save(sheet, format="png")
            text.write_text(json.dumps(_finite(facts), indent=1) + "\n", encoding="utf-8")
            os.replace(sheet, self.saved.sheet)
            os.replace(text, self.saved.facts)
        except OSError as error:
            raise _cannot_write(self.saved.facts, error) from None
        return self.saved


class ContactSheet:
    """A page of evenly spaced frames: the caption, then a row a section, a red line at each border between sections.

    Of more than 12 sections it shows 12, evenly spaced, the first and the last among them, and says so.
    """

    def __init__(self, sections: int):
        self.sections = sections
        self.shown = frozenset(np.linspace(0, sections - 1, min(ROWS, sections)).round().astype(int).tolist())
        self._rows: list[tuple[int, list[tuple[int, Image.Image]]]] = []  # section, (frame, thumbnail)s
        self._seen, self._frames = 0, 0

    def add(self, frames: NDArray[np.uint8]) -> None:
        """The next section's frames [F, H, W, 3]."""
        if self._seen in self.shown:
            height, width = frames.shape[1:3]
            thumb = (max(1, round(width * THUMB_HEIGHT / height)), THUMB_HEIGHT)
            places = np.linspace(0, len(frames) - 1, min(COLUMNS, len(frames))).round().astype(int).tolist()
            self._rows.append((self._seen, [(self._frames + place, _thumbnail(frames[place], thumb)) for place in places]))
        self._seen, self._frames = self._seen + 1, self._frames + len(frames)

    def page(self, caption: str) -> Image.Image:
        """The page of what was added so far."""
        thumb_width = self._rows[0][1][0][1].width
        page_width = GUTTER + COLUMNS * (thumb_width + GAP)
        if self._seen > len(self._rows):
            caption += f"\n{len(self._rows)} of {self._seen} sections: {', '.join(str(section) for section, _ in self._rows)}"
        wide = max(10, (page_width - 2 * GAP) // 7)
        lines = [line for part in caption.split("\n") for line in textwrap.wrap(part, width=wide) or [""]]
        top, row_height = GAP + LINE * len(lines) + GAP, THUMB_HEIGHT + LINE + 2 * GAP
        page = Image.new("RGB", (page_width, top + row_height * len(self._rows)), PAPER)
        draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=12)
        for number, line in enumerate(lines):
            draw.text((GAP, GAP + LINE * number), line, INK, font)
        for number, (section, row) in enumerate(self._rows):
            y = top + row_height * number
            if number:
                draw.line([(0, y - GAP // 2), (page_width, y - GAP // 2)], BORDER, 2)
            draw.text((GAP, y + THUMB_HEIGHT // 2), f"section {section}", INK, font)
            for column, (index, thumb) in enumerate(row):
                x = GUTTER + column * (thumb_width + GAP)
                page.paste(thumb, (x, y))
                draw.text((x, y + THUMB_HEIGHT), str(index), INK, font)
        return page


def _thumbnail(frame: NDArray[np.uint8], size: tuple[int, int]) -> Image.Image:
    """Small frames grow unsmoothed, so that their pixels show; large ones shrink smoothly."""
    grows = size[1] >= frame.shape[0]
    return Image.fromarray(frame).resize(size, Image.Resampling.NEAREST if grows else Image.Resampling.LANCZOS)


def _cannot_write(path: Path, error: OSError) -> InputError:
    return InputError(f"{path}: cannot be written ({error.strerror or error}); make room, or choose another sample.output")


def _finite(value: Any) -> Any:
    """`value` as strict JSON has it: NaN and infinities become null, at any depth."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
