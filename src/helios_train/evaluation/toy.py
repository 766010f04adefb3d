"""A tracker for the toy world: where is the object, what is it, how does it move, does it jump at a section's border?

It follows ONE object over a plain background. A frame that shows none, or several apart from each other, counts as a frame
without an object. Axes: F frames, H W rows and columns. Positions are pixels, (x, y), x to the right, y down, the centre of the
top left pixel at (0, 0), as in the toy clips' truth.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from helios_train.data.toy import BACKGROUNDS, COLOURS, DIRECTIONS, SECTION_FRAMES, SHAPES, UNIT_AREA, bounce, reach
from helios_train.errors import InputError

Colour = tuple[int, int, int]

RIM = 2  # pixels of the picture's rim that show the background
MIN_CONTRAST = 50.0  # RGB distance: the codec's own error stays below, an object is 150 and more from its background
MIN_AREA = 0.005  # of the picture: less is a speckle
NEAR = 1.5  # radii of a disc of the same area: a square's corner is at 1.25
MIN_NEAR = 0.8  # share of what stands out that lies near its middle: of two equal objects apart from each other it is less
MIN_FIT = 0.85  # overlap with a shape of the same area: between circle and square it is 0.83
NAME_WITHIN = 100.0  # RGB distance: farther from every named colour is none of them
TRACKING_ERROR = 0.1  # pixels a frame: motion below this is not told from none
AHEAD = 4  # frames between which speed is measured: as many as a codec's group, in which motion is uneven
FIRST_FRAMES = 12  # frames that tell the first direction


@dataclass(frozen=True, eq=False)
class ToyTrack:
    """What the tracker saw of a video of `size` (H, W) pixels and sections of `section` frames.

    Names are None where no named colour is near or no object was found. centres: [F, 2], NaN where there is no object; area:
    pixels [F]; fit: [F, shapes], intersection over union of the object and each of SHAPES of its area in its place, NaN where
    there is no object. Figures without frames to measure them in are NaN.
    """

    size: tuple[int, int]
    section: int
    background: Colour
    background_name: str | None
    colour: Colour | None
    colour_name: str | None
    centres: NDArray[np.float64]
    area: NDArray[np.int64]
    fit: NDArray[np.float64]

    @cached_property
    def found(self) -> float:
        """Share of frames with one object."""
        return float(self._seen.mean())

    @cached_property
    def shape(self) -> str | None:
        """The name of the shape that fits best over all frames, None where none fits."""
        if not self._seen.any():
            return None
        fit = self.fit[self._seen].mean(axis=0)
        return SHAPES[int(fit.argmax())] if fit.max() >= MIN_FIT else None

    @cached_property
    def radius(self) -> float:
        """Pixels, half the side of a square; of a circle of the same area where the shape has no name."""
        return math.sqrt(_mean(self.area[self._seen]) / UNIT_AREA[self.shape or "circle"])

    @cached_property
    def motion(self) -> float:
        """Mean step between successive frames inside sections, pixels a frame."""
        return _mean(self._steps[np.isfinite(self._steps) & ~self._at_border])

    @cached_property
    def border_jump(self) -> float:
        """Mean step across section borders, pixels."""
        return _mean(self._border_steps)

    @cached_property
    def border_jump_max(self) -> float:
        """Largest step across a section border, pixels."""
        return float(max(self._border_steps, default=np.nan))

    @cached_property
    def velocity(self) -> tuple[float, float]:
        """(x, y) in pixels a frame as the video begins: how fast from the whole video, where to from its first frames.

        Along each axis, how fast is the median way of frames 4 apart (1 where objects bounce often), which bounces and single
        wrong frames leave as it is. Of the two ways to set off at that pace and bounce off the picture's borders, the one closer
        to the first frames is taken. Through the default codec, speeds up to 1 come out within 0.1, of 2 to 3 at 64 pixels up to
        0.4 too low.
        """
        across, down = (self._velocity(axis, side) for axis, side in enumerate(reversed(self.size)))
        return across, down

    @cached_property
    def speed(self) -> float:
        """Pixels a frame between bounces. Unlike `motion` it does not count trembling as motion."""
        return math.hypot(*self.velocity)

    @cached_property
    def angle(self) -> float:
        """Degrees of the first direction: 0 to the right, 90 down; NaN where there is no motion to speak of."""
        across, down = self.velocity
        return math.degrees(math.atan2(down, across)) % 360 if self.speed >= TRACKING_ERROR else math.nan

    @cached_property
    def direction(self) -> str | None:
        """The name of the first direction, None where nothing moves."""
        return DIRECTIONS[round(self.angle / 45) % 8] if math.isfinite(self.angle) else None

    @cached_property
    def _seen(self) -> NDArray[np.bool_]:
        return np.isfinite(self.centres[:, 0])

    @cached_property
    def _steps(self) -> NDArray[np.float64]:
        return np.linalg.norm(np.diff(self.centres, axis=0), axis=1)

    @cached_property
    def _at_border(self) -> NDArray[np.bool_]:
        return np.arange(1, len(self.centres)) % self.section == 0

    @cached_property
    def _border_steps(self) -> NDArray[np.float64]:
        return self._steps[np.isfinite(self._steps) & self._at_border]

    def _velocity(self, axis: int, side: int) -> float:
        """Along one axis of the picture, `side` pixels long."""
        place = self.centres[:, axis]
        if not np.isfinite(self.motion):
            return math.nan
        radius = min(self.radius, side / 2 - 1)
        ahead = AHEAD if 2 * AHEAD * self.motion < side - 2 * radius else 1
        frame = np.arange(len(place) - ahead)
        way = np.abs(place[ahead:] - place[:-ahead])[frame // self.section == (frame + ahead) // self.section]
        if not np.isfinite(way).any():
            return math.nan
        pace = float(np.nanmedian(way)) / ahead
        first = int(self._seen.argmax())
        shown = place[first : first + FIRST_FRAMES]
        start = float(np.clip((shown[0] - radius + 0.5) / (side - 2 * radius), 0, 1))
        error = [np.nansum((bounce(start, sign * pace * np.arange(len(shown)), radius, side) - shown) ** 2) for sign in (1, -1)]
        return pace if error[0] <= error[1] else -pace


def track(frames: Tensor | NDArray[np.uint8], section: int = SECTION_FRAMES) -> ToyTrack:
    """Follow the one object of uint8 `frames` [F, H, W, 3] whose sections are `section` frames long.

    A frame's background is the median colour of its rim. What lies more than half as far from the background as the video's
    most distant colours do stands out; the object is that, less the specks far from its middle, and there is none where these are
    more than a fifth. Its centre is the mean position weighted by distance from the background. InputError for frames of another
    shape.
    """
    pixels = np.asarray(frames).astype(np.float32)
    if pixels.ndim != 4 or pixels.shape[-1] != 3 or not len(pixels) or min(pixels.shape[1:3]) <= 2 * RIM:
        raise InputError(
            f"frames {list(pixels.shape)}: the toy tracker takes [F, H, W, 3] with sides of more than {2 * RIM} pixels"
        )
    background_F3 = np.median(_rim(pixels), axis=1)
    away = np.linalg.norm(pixels - background_F3[:, None, None], axis=-1)
    contrast = float(np.quantile(away, 0.99))
    weight = np.where(away > max(contrast, MIN_CONTRAST) / 2, away, 0)
    standing_out = np.count_nonzero(weight, axis=(1, 2))
    weight *= _near_middle(weight > 0)
    area = np.count_nonzero(weight, axis=(1, 2))
    present = (area >= MIN_AREA * weight[0].size) & (contrast >= MIN_CONTRAST) & (area >= MIN_NEAR * standing_out)
    centres = np.stack([_mean_position(weight, axis) for axis in (1, 2)], axis=1)
    centres[~present] = np.nan
    background = _rounded(np.median(background_F3, axis=0))
    seen = away[present]
    plain = 0.75 * min(contrast, seen.max(initial=0))  # the frames with the object may be the paler ones
    colour = _rounded(np.median(pixels[present][seen >= plain], axis=0)) if present.any() else None
    return ToyTrack(
        size=(pixels.shape[1], pixels.shape[2]),
        section=section,
        background=background,
        background_name=_nearest(background, BACKGROUNDS),
        colour=colour,
        colour_name=_nearest(colour, COLOURS) if colour else None,
        centres=centres,
        area=area,
        fit=_fit(weight > 0, centres, area),
    )


def join_tracks(tracks: Sequence[ToyTrack]) -> ToyTrack:
    """The track of a video whose sections were followed one by one, so that no more than one has to be held.

    Colours are those of the name that most sections have. InputError without a track, and for tracks of several sizes.
    """
    if len({(part.size, part.section) for part in tracks}) != 1:
        raise InputError(f"{len(tracks)} tracks of sizes {sorted({part.size for part in tracks})}: not the sections of one video")
    background_name = Counter(part.background_name for part in tracks).most_common(1)[0][0]
    colour_name = Counter(part.colour_name for part in tracks).most_common(1)[0][0]
    return ToyTrack(
        size=tracks[0].size,
        section=tracks[0].section,
        background=next(part.background for part in tracks if part.background_name == background_name),
        background_name=background_name,
        colour=next(part.colour for part in tracks if part.colour_name == colour_name),
        colour_name=colour_name,
        centres=np.concatenate([part.centres for part in tracks]),
        area=np.concatenate([part.area for part in tracks]),
        fit=np.concatenate([part.fit for part in tracks]),
    )


def _rim(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """The rim's pixels of each frame: [F, H, W, 3] to [F, P, 3]."""
    rim = np.ones(pixels.shape[1:3], dtype=bool)
    rim[RIM:-RIM, RIM:-RIM] = False
    return pixels[:, rim]


def _near_middle(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """What of masks [F, H, W] lies around their median position, as near as one object of their area would."""
    offsets = []
    for other_axis in (2, 1):
        profile = np.cumsum(mask.sum(axis=other_axis), axis=1)
        middle = (2 * profile >= profile[:, -1:]).argmax(axis=1)
        offsets.append(np.arange(profile.shape[1]) - middle[:, None])
    reached = reach("circle", offsets[1][:, None, :], offsets[0][:, :, None])
    return mask & (reached <= NEAR * np.sqrt(np.count_nonzero(mask, axis=(1, 2)) / UNIT_AREA["circle"])[:, None, None])


def _mean_position(weight: NDArray[np.float32], other_axis: int) -> NDArray[np.float64]:
    """Weighted mean index along the axis of [F, H, W] that is neither frames nor `other_axis`; NaN without weight."""
    profile = weight.sum(axis=other_axis, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        return profile @ np.arange(profile.shape[1]) / profile.sum(axis=1)


def _fit(mask: NDArray[np.bool_], centres: NDArray[np.float64], area: NDArray[np.int64]) -> NDArray[np.float64]:
    """Intersection over union of masks [F, H, W] and each shape of the same area around the same centre: [F, shapes]."""
    dx = np.abs(np.arange(mask.shape[2]) - centres[:, :1])[:, None, :]
    dy = np.abs(np.arange(mask.shape[1]) - centres[:, 1:])[:, :, None]
    fit = np.full((len(mask), len(SHAPES)), np.nan)
    seen = np.isfinite(centres[:, 0])
    for number, shape in enumerate(SHAPES):
        ideal = reach(shape, dx, dy) <= np.sqrt(area / UNIT_AREA[shape])[:, None, None]
        both, either = (np.count_nonzero(joint, axis=(1, 2)) for joint in (mask & ideal, mask | ideal))
        fit[seen, number] = both[seen] / either[seen]
    return fit


def _nearest(colour: Colour, names: Mapping[str, Colour]) -> str | None:
    """The nearest named colour, None where even that is far."""
    distance = {name: float(np.linalg.norm(np.subtract(colour, rgb))) for name, rgb in names.items()}
    name = min(distance, key=distance.__getitem__)
    return name if distance[name] <= NAME_WITHIN else None


def _rounded(rgb: NDArray[np.float32]) -> Colour:
    red, green, blue = (round(float(value)) for value in rgb)
    return red, green, blue


def _mean(values: NDArray[np.float64] | NDArray[np.int64]) -> float:
    return float(values.mean()) if len(values) else math.nan
