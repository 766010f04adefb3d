"""A crude tracker for the toy world: where is the object, which colours, does it jump at a section's border?

Axes: F frames, H W rows and columns, S sections. Positions are pixels, (x, y), x to the right, y down, the centre of the top left
pixel at (0, 0), as in the toy clips' truth.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from helios_train.data.toy import BACKGROUNDS, COLOURS, parse_caption
from helios_train.errors import InputError
from helios_train.models.codecs import SECTION_FRAMES

Colour = tuple[int, int, int]

RIM = 2  # pixels of the picture's rim that show the background
MIN_CONTRAST = 50.0  # RGB distance: the codec's own error stays below, an object is 150 and more from its background
MIN_AREA = 0.005  # of the picture: less is a speckle
NAME_WITHIN = 100.0  # RGB distance: farther from every named colour is none of them
MAX_JUMP_RATIO = 3.0  # border jump over motion inside sections
TRACKING_ERROR = 0.1  # pixels: motion below this is not told from none


@dataclass(frozen=True, eq=False)
class ToyTrack:
    """What the tracker saw. Names are None where no named colour is near or no object was found.

    centres: [F, 2], NaN where there is no object; area: pixels [F]; motion: mean step between successive frames inside
    sections, pixels a frame; border_jump and border_jump_max: mean and largest step across section borders, pixels; found:
    share of frames with an object. Figures without a frame pair to measure are NaN.
    """

    background: Colour
    background_name: str | None
    colour: Colour | None
    colour_name: str | None
    centres: NDArray[np.float64]
    area: NDArray[np.int64]
    motion: float
    border_jump: float
    border_jump_max: float
    found: float


def track(frames: Tensor | NDArray[np.uint8], section: int = SECTION_FRAMES) -> ToyTrack:
    """Follow the one object of uint8 `frames` [F, H, W, 3] whose sections are `section` frames long.

    A frame's background is the median colour of its rim. The object is what lies more than half as far from the background
    as the video's most distant colours do; its centre is the mean position weighted by that distance.
    """
    pixels = np.asarray(frames).astype(np.float32)
    background_F3 = np.median(_rim(pixels), axis=1)
    away = np.linalg.norm(pixels - background_F3[:, None, None], axis=-1)
    contrast = float(np.quantile(away, 0.99))
    weight = np.where(away > max(contrast, MIN_CONTRAST) / 2, away, 0)
    area = np.count_nonzero(weight, axis=(1, 2))
    present = (area >= MIN_AREA * weight[0].size) & (contrast >= MIN_CONTRAST)
    centres = np.stack([_mean_position(weight, axis) for axis in (1, 2)], axis=1)
    centres[~present] = np.nan
    background = _rounded(np.median(background_F3, axis=0))
    colour = _rounded(np.median(pixels[present][away[present] > 0.75 * contrast], axis=0)) if present.any() else None
    steps = np.linalg.norm(np.diff(centres, axis=0), axis=1)
    at_border = np.arange(1, len(pixels)) % section == 0
    seen = np.isfinite(steps)
    return ToyTrack(
        background=background,
        background_name=_nearest(background, BACKGROUNDS),
        colour=colour,
        colour_name=_nearest(colour, COLOURS) if colour else None,
        centres=centres,
        area=area,
        motion=_mean(steps[seen & ~at_border]),
        border_jump=_mean(steps[seen & at_border]),
        border_jump_max=float(max(steps[seen & at_border], default=np.nan)),
        found=float(present.mean()),
    )


def judge(seen: ToyTrack, caption: str) -> dict[str, bool | float | None]:
    """Whether the video keeps what its toy caption says, and moves on across borders; figures in pixels.

    `ratio` is the mean border jump over the motion inside sections; `jump_ok` where it is at most 3, and None for a video
    without a border to judge. InputError for a caption outside the toy grammar.
    """
    said = parse_caption(caption)
    if said is None:
        raise InputError(f"caption {caption!r} is not of the toy world ('a red circle on a blue background'); nothing to judge")
    ratio = seen.border_jump / max(seen.motion, TRACKING_ERROR)
    return {
        "colour_right": seen.colour_name == said["colour"],
        "background_right": seen.background_name == said["background"],
        "border_jump": seen.border_jump,
        "border_jump_max": seen.border_jump_max,
        "motion": seen.motion,
        "ratio": ratio,
        "jump_ok": bool(ratio <= MAX_JUMP_RATIO) if np.isfinite(ratio) else None,
        "found": seen.found,
    }


def _rim(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """The rim's pixels of each frame: [F, H, W, 3] to [F, P, 3]."""
    rim = np.ones(pixels.shape[1:3], dtype=bool)
    rim[RIM:-RIM, RIM:-RIM] = False
    return pixels[:, rim]


def _mean_position(weight: NDArray[np.float32], other_axis: int) -> NDArray[np.float64]:
    """Weighted mean index along the axis of [F, H, W] that is neither frames nor `other_axis`; NaN without weight."""
    profile = weight.sum(axis=other_axis, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        return profile @ np.arange(profile.shape[1]) / profile.sum(axis=1)


def _nearest(colour: Colour, names: Mapping[str, Colour]) -> str | None:
    """The nearest named colour, None where even that is far."""
    distance = {name: float(np.linalg.norm(np.subtract(colour, rgb))) for name, rgb in names.items()}
    name = min(distance, key=distance.__getitem__)
    return name if distance[name] <= NAME_WITHIN else None


def _rounded(rgb: NDArray[np.float32]) -> Colour:
    red, green, blue = (round(float(value)) for value in rgb)
    return red, green, blue


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if len(values) else float("nan")
