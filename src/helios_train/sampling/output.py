"""What a sample leaves on disk: NAME.mp4, NAME.png (a contact sheet, one row a section) and NAME.json (caption and figures)."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from helios_train.data.video import write_mp4
from helios_train.models.codecs import SECTION_FRAMES

COLUMNS = 8  # frames shown of a section, its first and last among them
THUMB_HEIGHT = 96  # pixels
GUTTER, GAP, LINE = 72, 4, 16  # pixels: row labels, space between frames, a line of text
PAPER, INK, BORDER = (255, 255, 255), (30, 30, 30), (200, 40, 40)


class SavedVideo(NamedTuple):
    """The three files of one sample."""

    mp4: Path
    sheet: Path
    facts: Path


def save_video(
    folder: Path, name: str, frames: Tensor | NDArray[np.uint8], fps: float, caption: str, extra: Mapping[str, Any]
) -> SavedVideo:
    """Write uint8 `frames` [F, H, W, 3] at `fps` frames a second under `folder` as NAME.mp4, .png and .json.

    `extra` (settings, figures: what JSON can hold) joins the caption and the video's measures; a number that is not finite
    becomes null. The same input gives the same bytes. InputError for frames no video can hold.
    """
    folder.mkdir(parents=True, exist_ok=True)
    saved = SavedVideo(*(folder / f"{name}{suffix}" for suffix in (".mp4", ".png", ".json")))
    array = np.asarray(frames)
    write_mp4(saved.mp4, array, fps)
    contact_sheet(array, caption).save(saved.sheet)
    count, height, width = array.shape[:3]
    facts = {"caption": caption, "frames": count, "height": height, "width": width, "fps": fps, **extra}
    saved.facts.write_text(json.dumps(_finite(facts), indent=1) + "\n")
    return saved


def contact_sheet(frames: NDArray[np.uint8], caption: str) -> Image.Image:
    """Frames [F, H, W, 3] as a page: the caption, then a row of evenly spaced frames for each section of 33, a red line at
    each border between sections."""
    height, width = frames.shape[1:3]
    thumb = (max(1, round(width * THUMB_HEIGHT / height)), THUMB_HEIGHT)
    sections = [np.arange(first, min(first + SECTION_FRAMES, len(frames))) for first in range(0, len(frames), SECTION_FRAMES)]
    page_width = GUTTER + COLUMNS * (thumb[0] + GAP)
    lines = textwrap.wrap(caption, width=max(10, (page_width - 2 * GAP) // 7)) or [""]
    top, row_height = GAP + LINE * len(lines) + GAP, thumb[1] + LINE + 2 * GAP
    page = Image.new("RGB", (page_width, top + row_height * len(sections)), PAPER)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=12)
    for number, line in enumerate(lines):
        draw.text((GAP, GAP + LINE * number), line, INK, font)
    for number, members in enumerate(sections):
        y = top + row_height * number
        if number:
            draw.line([(0, y - GAP // 2), (page_width, y - GAP // 2)], BORDER, 2)
        draw.text((GAP, y + thumb[1] // 2), f"section {number}", INK, font)
        shown = members[np.linspace(0, len(members) - 1, min(COLUMNS, len(members))).round().astype(int)]
        for column, index in enumerate(shown):
            x = GUTTER + column * (thumb[0] + GAP)
            page.paste(_thumbnail(frames[index], thumb), (x, y))
            draw.text((x, y + thumb[1]), str(index), INK, font)
    return page


def _thumbnail(frame: NDArray[np.uint8], size: tuple[int, int]) -> Image.Image:
    """Small frames grow unsmoothed, so that their pixels show; large ones shrink smoothly."""
    grows = size[1] >= frame.shape[0]
    return Image.fromarray(frame).resize(size, Image.Resampling.NEAREST if grows else Image.Resampling.LANCZOS)


def _finite(value: Any) -> Any:
    """`value` as strict JSON has it: NaN and infinities become null, at any depth."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
