"""What a toy track is worth: against the caption a video was made for, and against the truth of a rendered clip."""

from __future__ import annotations

import math

import numpy as np

from helios_train.data.toy import DIRECTIONS, NOMINAL_SIDE, PACES, ToySpec, ToyTruth, parse_caption
from helios_train.errors import InputError
from helios_train.evaluation.toy import TRACKING_ERROR, ToyTrack

MAX_JUMP_RATIO = 3.0  # border jump over motion inside sections
DIRECTION_WITHIN = 32.5  # degrees of the named direction: half the 45 it stands for, and 10 that the tracker may err


def judge(seen: ToyTrack, caption: str, speed: tuple[float, float] = ToySpec.speed) -> dict[str, bool | float | None]:
    """Whether the video keeps what its toy caption says, and moves on across borders; figures in pixels (a frame), degrees.

    `speed`: the range of the videos learned from, whose middle parts slow from quick, in pixels a frame for a shorter side of
    64. What a caption does not speak of is None, as is `jump_ok` for a video without a border to judge: the mean border jump is
    at most 3 times (`ratio`) the motion inside sections. Speeds within 0.1 pixels a frame of the middle pass for both.
    InputError for a caption outside the toy grammar.
    """
    said = parse_caption(caption)
    if said is None:
        raise InputError(f"caption {caption!r} is not of the toy world ('a red circle on a blue background'); nothing to judge")
    ratio = seen.border_jump / max(seen.motion, TRACKING_ERROR)
    off = _apart(seen.angle, 45.0 * DIRECTIONS.index(said["direction"])) if "direction" in said else None
    return {
        "colour_right": seen.colour_name == said["colour"],
        "shape_right": seen.shape == said["shape"],
        "background_right": seen.background_name == said["background"],
        "direction_right": None if off is None else off <= DIRECTION_WITHIN,
        "direction_error": off,
        "pace_right": _pace_right(seen, said["pace"], speed) if "pace" in said else None,
        "speed": seen.speed,
        "border_jump": seen.border_jump,
        "border_jump_max": seen.border_jump_max,
        "motion": seen.motion,
        "ratio": ratio,
        "jump_ok": bool(ratio <= MAX_JUMP_RATIO) if np.isfinite(ratio) else None,
        "found": seen.found,
    }


def compare(seen: ToyTrack, truth: ToyTruth) -> dict[str, bool | float]:
    """How far the tracker is from the truth of a clip of the same size and length, or a copy of the clip from the clip.

    Names right; `position_error` and `position_error_max`, mean and largest over the frames with an object, pixels;
    `radius_error` in pixels and `speed_error` in pixels a frame, seen less true; `direction_error`, degrees between the first
    directions seen and true; `found`, the share of frames with an object. InputError for another number of frames.
    """
    if len(seen.centres) != len(truth.positions):
        raise InputError(f"the video has {len(seen.centres)} frames and the toy truth {len(truth.positions)}; not of one clip")
    off = np.linalg.norm(seen.centres - np.asarray(truth.positions), axis=1)
    off = off[np.isfinite(off)]
    return {
        "colour_right": seen.colour_name == truth.colour,
        "shape_right": seen.shape == truth.shape,
        "background_right": seen.background_name == truth.background,
        "position_error": float(off.mean()) if len(off) else math.nan,
        "position_error_max": float(off.max()) if len(off) else math.nan,
        "radius_error": seen.radius - truth.radius,
        "speed_error": seen.speed - truth.speed,
        "direction_error": _apart(seen.angle, 45.0 * DIRECTIONS.index(truth.direction)),
        "found": seen.found,
    }


def _apart(angle: float, other: float) -> float:
    """Degrees between two directions, 0 to 180; NaN for NaN."""
    return abs((angle - other + 180) % 360 - 180)


def _pace_right(seen: ToyTrack, pace: str, speed: tuple[float, float]) -> bool:
    middle = sum(speed) / 2 * min(seen.size) / NOMINAL_SIDE
    slow = pace == PACES[0]
    return seen.speed <= middle + TRACKING_ERROR if slow else seen.speed >= middle - TRACKING_ERROR
