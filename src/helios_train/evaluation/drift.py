"""Drift without networks: does a video, section by section, change its colours, blur, freeze, jump at borders or go blank?

Figures of pixels are shares of the full range, 0 to 1. Frames are looked at as they come and not kept: of each, a row of nine
numbers stays, and of the whole video the first and the newest frame.

Axes: F frames, S sections, H W pixel rows and columns; C latent channels, T latent frames, h w latent rows and columns.
"""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from helios_train.errors import InputError
from helios_train.models.codecs import SECTION_FRAMES

WINDOW = 0.15  # of the frames: what counts as the start and as the end, as HeliosBench has it
MIN_FRAMES = {"motion": 4}  # in such a window; motion needs frames that follow one another
LUMA = np.array([0.2126, 0.7152, 0.0722], dtype=np.float32)  # of red, green, blue: Rec. ITU-R BT.709
# Student's t that leaves 2.5 % on either side, by degrees of freedom from 1; with more, the first terms of its series in 1/df.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
NORMAL_95, T_SERIES = 1.95996, (2.3723, 2.8226, 2.556)
STILL = 0.05 / 255  # motion below a twentieth of a grey level is none; what a border jump is measured against is at least that

MEASURES = ("saturation", "luma", "red_green", "yellow_blue", "contrast", "sharpness", "spread", "similarity")
OF_LATENTS = ("latent_mean", "latent_variance")


@dataclass(frozen=True)
class Drift:
    """What `DriftMeter` found: figures by name, and the means of each section, by measure without the prefix `drift/`.

    NaN where there is nothing to measure: a slope of one section, its interval of two, a border of one.
    """

    figures: dict[str, float]
    sections: dict[str, list[float]]

    def facts(self) -> dict[str, Any]:
        """As JSON holds it; NaN is None."""
        return {
            "figures": {name: _or_none(value) for name, value in self.figures.items()},
            "sections": {name: [_or_none(value) for value in values] for name, values in self.sections.items()},
        }


class DriftMeter:
    """Looks at one video whose sections are `section` frames long, as it comes.

    Of each frame, by name:
    saturation    mean of the largest less the smallest of red, green, blue (HSV's chroma: its saturation divides by the largest,
                  which makes noise of black)
    luma          mean
    red_green     mean red less mean green
    yellow_blue   mean of red and green less mean blue: above 0 is a yellow tint
    contrast      standard deviation of luma
    sharpness     mean absolute difference of luma between neighbours in a row and in a column
    spread        standard deviation over the picture, root mean square of the three colours: 0 is a solid colour
    similarity    1 less the mean absolute difference to the first frame
    motion        mean absolute difference to the frame before, inside a section; across a border it is the `border` jump
    """

    def __init__(self, section: int = SECTION_FRAMES):
        if section < 2:
            raise InputError(f"sections of {section} frames: drift is measured in sections of at least 2")
        self.section = section
        self._rows = array("d")  # one piece of memory: small objects between large ones that go keep the heap from shrinking
        self._first: NDArray[np.uint8] | None = None
        self._newest: NDArray[np.uint8] | None = None
        self._latents = array("d")  # of each section: variance, share that is not finite, channel means
        self._channels = 0

    def add(self, frames: Tensor | NDArray[np.uint8]) -> None:
        """The next uint8 frames [F, H, W, 3], any number. InputError for others, and for another size than before."""
        pixels = np.asarray(frames)
        if pixels.ndim != 4 or pixels.shape[-1] != 3 or pixels.dtype != np.uint8 or min(pixels.shape[1:3]) < 2:
            raise InputError(f"frames {pixels.dtype}{list(pixels.shape)}: drift is measured on uint8 [F, H, W, 3], 2x2 or more")
        for frame in pixels:
            if self._first is None or self._newest is None:
                self._first, self._newest = frame.copy(), frame.copy()
            if frame.shape != self._first.shape:
                raise InputError(f"a frame of {frame.shape[:2]} in a video of {self._first.shape[:2]} pixels")
            self._rows.extend((*_look(frame), 1 - _apart(frame, self._first), _apart(frame, self._newest)))
            np.copyto(self._newest, frame)

    def add_latents(self, latents: Tensor) -> None:
        """The next sections' latents, [S, C, T, h, w] or of one section [C, T, h, w]. InputError for others."""
        channels = latents.shape[-4] if latents.dim() in (4, 5) and latents.numel() else 0
        if not channels or self._channels not in (0, channels):
            kept = f" of {self._channels} channels" if self._channels else ""
            raise InputError(f"latents {list(latents.shape)}: drift is measured on [S, C, T, h, w] or [C, T, h, w]{kept}")
        self._channels = channels
        for section in latents.detach().view(-1, *latents.shape[-4:]).to("cpu", torch.float32).numpy():
            broken = 1 - float(np.isfinite(section).mean())
            with np.errstate(invalid="ignore"):  # a broken section has no mean; its share is told
                means = section.mean(axis=(1, 2, 3), dtype=np.float64).tolist()
                self._latents.extend((float(section.var(dtype=np.float64)), broken, *means))

    def result(self) -> Drift:
        """Of all that was added, for each measure `m` (those of a frame, and latent_mean, latent_variance):
        `drift/m_start`, `drift/m_end`, `drift/m_change`: mean over the first and the last 15 % of the frames (of motion at least
        4 frames; of latents the first and last section), and last less first.
        `drift/m_slope`, `drift/m_slope_low`, `drift/m_slope_high`: change a section by least squares through the sections'
        means, and the ends of its 95 % interval (Student's t, sections taken as independent).

        Then `drift/motion` and `drift/border`, the means inside sections and across borders; `drift/border_ratio`, of the
        second to the first; `drift/motion_least` and `drift/spread_least`, of the section that has least;
        `drift/latent_shift`, how far the last section's channel means are from the first's (root mean square);
        `drift/latent_nonfinite`, the share of numbers that are not. InputError where there is no frame.
        """
        if not self._rows:
            raise InputError("a video without frames has no drift")
        rows = np.array(self._rows).reshape(-1, len(MEASURES) + 1)
        frame = np.arange(len(rows))
        border = frame % self.section == 0
        inside = np.where(border, np.nan, rows[:, -1])
        across = np.where(border & (frame > 0), rows[:, -1], np.nan)
        measured = dict(zip(MEASURES, rows[:, :-1].T, strict=True)) | {"motion": inside}
        number = frame // self.section
        middle = np.array([frame[number == one].mean() for one in range(number[-1] + 1)]) / self.section
        figures: dict[str, float] = {}
        sections: dict[str, list[float]] = {}
        for name, values in measured.items():
            k = min(len(values), max(MIN_FRAMES.get(name, 1), int(WINDOW * len(values))))
            means = np.array([_mean(values[number == one]) for one in range(number[-1] + 1)])
            figures |= _named(name, _mean(values[:k]), _mean(values[-k:]), slope(middle, means))
            sections[name] = means.tolist()
        sections["border"] = [_mean(across[number == one]) for one in range(number[-1] + 1)]
        motion, jump = _mean(inside), _mean(across)
        figures |= {
            "drift/motion": motion,
            "drift/border": jump,
            "drift/border_ratio": jump / max(motion, STILL),
            "drift/motion_least": _least(sections["motion"]),
            "drift/spread_least": _least(sections["spread"]),
        }
        return Drift(figures | self._of_latents(sections), sections)

    def _of_latents(self, sections: dict[str, list[float]]) -> dict[str, float]:
        """Figures of the latents, if there were any; adds their sections."""
        if not self._latents:
            return {}
        rows = np.array(self._latents).reshape(-1, 2 + self._channels)
        channels = rows[:, 2:]
        shift = np.sqrt(np.square(channels - channels[0]).mean(axis=1))
        series = {"latent_mean": channels.mean(axis=1), "latent_variance": rows[:, 0]}
        figures: dict[str, float] = {}
        for name in OF_LATENTS:
            values = series[name]
            figures |= _named(name, float(values[0]), float(values[-1]), slope(np.arange(len(values)), values))
            sections[name] = values.tolist()
        sections["latent_shift"] = shift.tolist()
        figures["drift/latent_shift"] = float(shift[-1])
        figures["drift/latent_nonfinite"] = float(rows[:, 1].mean())
        return figures


def measure(video: Tensor | NDArray[np.uint8], latents: Tensor | None = None, section: int = SECTION_FRAMES) -> Drift:
    """The drift of a whole uint8 video [F, H, W, 3], and of its latents [S, C, T, h, w], where they are there: see DriftMeter."""
    meter = DriftMeter(section)
    meter.add(video)
    if latents is not None:
        meter.add_latents(latents)
    return meter.result()


def slope(x: NDArray[Any], y: NDArray[np.float64]) -> tuple[float, float, float]:
    """Least squares slope of y [S] over x [S], and the ends of its 95 % interval; NaN of one point, an interval of two."""
    if len(x) < 2:
        return math.nan, math.nan, math.nan
    away, off = x - x.mean(), y - y.mean()
    square = float(away @ away)
    found = float(away @ off) / square
    freedom = len(x) - 2
    if not freedom:
        return found, math.nan, math.nan
    left = off - found * away
    half = student_t(freedom) * math.sqrt(float(left @ left) / freedom / square)
    return found, found - half, found + half


def student_t(freedom: int) -> float:
    """The t of `freedom` degrees that 95 % lie within, to 0.1 %."""
    if freedom <= len(T_95):
        return T_95[freedom - 1]
    return NORMAL_95 + sum(term / freedom**power for power, term in enumerate(T_SERIES, start=1))


def _look(frame: NDArray[np.uint8]) -> tuple[float, ...]:
    """The measures of one frame [H, W, 3] that need no other: all of MEASURES but similarity."""
    red, green, blue = frame.mean(axis=(0, 1)) / 255
    luma = frame.astype(np.float32) @ LUMA / 255
    steps = [np.abs(np.diff(luma, axis=axis)).mean(dtype=np.float64) for axis in (0, 1)]
    return (
        float((frame.max(axis=2) - frame.min(axis=2)).mean()) / 255,
        float(luma.mean(dtype=np.float64)),
        float(red - green),
        float((red + green) / 2 - blue),
        float(luma.std(dtype=np.float64)),
        float(np.mean(steps)),
        float(np.sqrt(frame.var(axis=(0, 1)).mean())) / 255,
    )


def _apart(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    return float(np.abs(one.astype(np.int16) - other).mean()) / 255


def _named(name: str, start: float, end: float, trend: tuple[float, float, float]) -> dict[str, float]:
    keys = ("start", "end", "change", "slope", "slope_low", "slope_high")
    return {f"drift/{name}_{key}": value for key, value in zip(keys, (start, end, end - start, *trend), strict=True)}


def _mean(values: NDArray[np.float64]) -> float:
    """Of what is there; NaN of nothing."""
    there = values[np.isfinite(values)]
    return float(there.mean()) if len(there) else math.nan


def _least(values: list[float]) -> float:
    """Of what is there; NaN of nothing."""
    return min((value for value in values if math.isfinite(value)), default=math.nan)


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
