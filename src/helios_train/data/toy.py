"""The toy world: one shape moves over a plain background and bounces off the borders, with its truth written down.

Every clip is a function of (seed, index). Coordinates are pixels, x to the right, y down, the centre of the top left pixel at
(0, 0), so a tracker's mean of column indices can be compared with the truth as it stands.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from helios_train.data.video import write_mp4
from helios_train.errors import InputError
from helios_train.rng import generator

SECTION_FRAMES = 33
NOMINAL_SIDE = 64  # radius and speed are given for a shorter side of this many pixels

# No object colour is near a background: 150 or more apart in RGB, so the crudest tracker tells them apart.
COLOURS: Mapping[str, tuple[int, int, int]] = {
    "red": (225, 35, 35),
    "green": (40, 190, 60),
    "yellow": (245, 215, 40),
    "magenta": (215, 60, 215),
}
BACKGROUNDS: Mapping[str, tuple[int, int, int]] = {
    "blue": (35, 65, 200),
    "black": (15, 15, 15),
    "white": (240, 240, 240),
}
SHAPES = ("circle", "square")
UNIT_AREA: Mapping[str, float] = {"circle": math.pi, "square": 4.0}  # of a shape of radius 1
DIRECTIONS = ("right", "down-right", "down", "down-left", "left", "up-left", "up", "up-right")  # by angle, in steps of 45 degrees
PACES = ("slowly", "quickly")  # below and above the middle of the speed range

_CAPTION = re.compile(
    rf"an? (?P<colour>{'|'.join(COLOURS)}) (?P<shape>{'|'.join(SHAPES)})"
    rf"(?: moving (?P<direction>{'|'.join(sorted(DIRECTIONS, key=len, reverse=True))}) (?P<pace>{'|'.join(PACES)}))?"
    rf" on an? (?P<background>{'|'.join(BACKGROUNDS)}) background"
)


@dataclass(frozen=True)
class ToySpec:
    """What a set of toy clips looks like. Lengths in pixels and speeds in pixels a frame, both for a shorter side of 64.

    `size` is (rows, columns) in pixels; `sections` of 33 frames a clip; `fps` frames a second. InputError on a value that
    cannot be drawn.
    """

    size: tuple[int, int] = (64, 128)
    sections: int = 4
    clips: int = 400
    shapes: tuple[str, ...] = ("circle",)
    colours: tuple[str, ...] = tuple(COLOURS)
    backgrounds: tuple[str, ...] = tuple(BACKGROUNDS)
    radius: tuple[float, float] = (13.0, 18.0)
    speed: tuple[float, float] = (0.4, 1.0)
    motion_in_caption: bool = False
    fps: int = 25
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("shapes", SHAPES), ("colours", COLOURS), ("backgrounds", BACKGROUNDS)):
            given = getattr(self, name)
            wrong = [value for value in given if value not in known]
            if wrong or not given:
                raise InputError(f"toy {name}: {wrong or 'an empty list'} cannot be drawn; choose among {', '.join(known)}")
        if min(self.size) < 32 or any(side % 2 for side in self.size):
            raise InputError(f"toy size {self.size}: both sides must be even and at least 32 pixels")
        if self.sections < 1 or self.clips < 1 or self.fps < 1:
            raise InputError("toy sections, clips and fps must be at least 1")
        if not 1 <= self.radius[0] <= self.radius[1] <= NOMINAL_SIDE / 2 - 1:
            raise InputError(f"toy radius {self.radius}: must be a range within 1 to {NOMINAL_SIDE / 2 - 1:.0f} pixels")
        if not 0 <= self.speed[0] <= self.speed[1] <= NOMINAL_SIDE / 8:
            raise InputError(f"toy speed {self.speed}: must be a range within 0 to {NOMINAL_SIDE / 8:.0f} pixels a frame")

    @property
    def scale(self) -> float:
        """Pixels of this size to one pixel of a shorter side of 64."""
        return min(self.size) / NOMINAL_SIDE


@dataclass(frozen=True)
class ToyTruth:
    """What one clip shows: names; `radius` in pixels (half the side of a square); `speed` in pixels a frame; `direction` and
    `pace` of the first frame; `positions` the centre (x, y) of every frame."""

    colour: str
    shape: str
    background: str
    direction: str
    pace: str
    speed: float
    radius: float
    positions: tuple[tuple[float, float], ...]


def caption_of(truth: ToyTruth, motion: bool = False) -> str:
    """The caption of a clip, with its first direction and pace when `motion`."""
    moving = f" moving {truth.direction} {truth.pace}" if motion else ""
    return f"a {truth.colour} {truth.shape}{moving} on a {truth.background} background"


def parse_caption(caption: str) -> dict[str, str] | None:
    """The names in a toy caption (colour, shape, background, and direction and pace if said), None for any other text."""
    match = _CAPTION.fullmatch(" ".join(caption.lower().split()).rstrip("."))
    return {name: word for name, word in match.groupdict().items() if word} if match else None


def render(seed: int, index: int, spec: ToySpec) -> tuple[NDArray[np.uint8], ToyTruth]:
    """Clip `index` of `seed`: uint8 [33 * sections, H, W, 3] frames and the truth they show."""
    draw = generator(seed, "toy", index)
    low, high = spec.speed
    radius = draw.uniform(*spec.radius) * spec.scale
    pixels_a_frame = draw.uniform(low, high) * spec.scale
    angle = draw.uniform(0, 2 * math.pi)
    start = draw.uniform(size=2)
    colour, shape, background = (str(draw.choice(names)) for names in (spec.colours, spec.shapes, spec.backgrounds))
    time = np.arange(SECTION_FRAMES * spec.sections)
    height, width = spec.size
    paths = [
        bounce(part, velocity * time, radius, side)
        for part, velocity, side in zip(
            start, (pixels_a_frame * math.cos(angle), pixels_a_frame * math.sin(angle)), (width, height), strict=True
        )
    ]
    truth = ToyTruth(
        colour=colour,
        shape=shape,
        background=background,
        direction=DIRECTIONS[round(angle / (math.pi / 4)) % 8],
        pace=PACES[int(pixels_a_frame > (low + high) / 2 * spec.scale)],
        speed=round(pixels_a_frame, 3),
        radius=round(radius, 3),
        positions=tuple((round(float(x), 3), round(float(y), 3)) for x, y in zip(*paths, strict=True)),
    )
    return _draw(truth, spec.size), truth


def bounce(start: float, travelled: np.ndarray, radius: float, side: int) -> np.ndarray:
    """A centre's path along one axis of `side` pixels, folded at both ends of the free way, so the shape stays in view.

    `start` in [0, 1] of the free way; `travelled` pixels at each time, were there no borders; all in pixels.
    """
    first, last = radius - 0.5, side - 0.5 - radius  # pixels reach half a pixel past their centres
    free = last - first
    there = np.mod(start * free + travelled, 2 * free)
    return first + np.where(there > free, 2 * free - there, there)


def reach(shape: str, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """The radius at which a shape's outline passes (`dx`, `dy`) pixels, not below 0, from its centre."""
    return np.sqrt(dx * dx + dy * dy) if shape == "circle" else np.maximum(dx, dy)


def _draw(truth: ToyTruth, size: tuple[int, int]) -> NDArray[np.uint8]:
    """The frames: an edge pixel mixes both colours by how much of it the shape covers."""
    centres = np.asarray(truth.positions, dtype=np.float32)
    dx = np.abs(np.arange(size[1], dtype=np.float32) - centres[:, :1])[:, None, :]
    dy = np.abs(np.arange(size[0], dtype=np.float32) - centres[:, 1:])[:, :, None]
    covered = np.clip((np.float32(truth.radius + 0.5) - reach(truth.shape, dx, dy)) * 255, 0, 255).astype(np.uint8)
    share = np.arange(256)[:, None] / 255
    palette = share * np.array(COLOURS[truth.colour]) + (1 - share) * np.array(BACKGROUNDS[truth.background])
    return np.rint(palette).astype(np.uint8)[covered]


def read_truth(path: Path) -> ToyTruth:
    """What the JSON beside a toy video says of it. InputError for a file that is missing or holds something else."""
    try:
        told = json.loads(path.read_text())
        return ToyTruth(**{**told, "positions": tuple((float(x), float(y)) for x, y in told["positions"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: not the truth of a toy video ({error})") from None


def render_folder(folder: Path, spec: ToySpec) -> None:
    """Write every clip of `spec` as NAME.mp4, its caption as NAME.txt and its truth as NAME.json.

    `toy_spec.json`, written last, says that the folder is whole: the same spec again does nothing, another one is an
    InputError, for a folder must not mix two.
    """
    mark, wanted = folder / "toy_spec.json", json.dumps(asdict(spec), indent=1) + "\n"
    if mark.exists():
        if mark.read_text() == wanted:
            return
        raise InputError(f"{folder} holds toy videos of another spec ({mark.name}); delete it or choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(spec.clips):
        frames, truth = render(spec.seed, index, spec)
        stem = folder / f"{index:06d}"
        write_mp4(stem.with_suffix(".mp4"), frames, spec.fps)
        stem.with_suffix(".txt").write_text(caption_of(truth, spec.motion_in_caption) + "\n")
        stem.with_suffix(".json").write_text(json.dumps(asdict(truth)) + "\n")
    part = mark.with_suffix(".tmp")
    part.write_text(wanted)
    part.replace(mark)
