"""Energy distance: how far a set of samples is from a set of references, as distributions.

2 E|X - Y| - E|X - X'| - E|Y - Y'| with Euclidean distances and independent X, X' of one and Y, Y' of the other distribution; 0
where the two are equal and above 0 otherwise (Szekely and Rizzo, "Energy statistics: a class of statistics based on distances",
2013). The unbiased estimate here can fall below 0 for distributions that are equal or nearly so.

Axes: S sections, C channels, T latent frames, H W latent rows and columns, N M points, P patches, D numbers a point.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from helios_train.errors import InputError
from helios_train.rng import generator

BLOCK = 2**22  # distances held at a time: 32 MiB
PATCH = (3, 2, 2)  # latent frames, rows, columns: 12 video frames of 16 x 16 pixels, an edge and its motion
MIN_CLIPS = 5  # of fewer, resampling says nothing


@dataclass(frozen=True)
class EnergyDistance:
    """The estimate, and the ends of its bootstrap interval."""

    value: float
    low: float
    high: float


def energy_between(x_ND: Tensor, y_MD: Tensor) -> float:
    """Unbiased energy distance between independent points [N, D] and [M, D], in the unit of the points.

    Time grows with (N + M) squared, memory does not. InputError for fewer than 2 points a side, points of different lengths and
    numbers that are not finite.
    """
    x, y = (points.detach().to("cpu", torch.float64) for points in (x_ND, y_MD))
    for name, points in (("first", x), ("second", y)):
        if points.dim() != 2 or len(points) < 2:
            raise InputError(f"{name} points {list(points.shape)}: the energy distance takes [N, D] with at least 2 points")
        _check_finite(points, f"{name} points")
    if x.shape[1] != y.shape[1]:
        raise InputError(f"points of {x.shape[1]} and of {y.shape[1]} numbers have no distance")
    centre = x.mean(dim=0)  # the distances lose fewest digits near 0
    x, y = x - centre, y - centre
    n, m = len(x), len(y)
    return 2 * _total(x, y) / (n * m) - _total(x, x) / (n * (n - 1)) - _total(y, y) / (m * (m - 1))


def energy_distance(
    reference: Sequence[Tensor],
    samples: Sequence[Tensor],
    patch: tuple[int, int, int] = PATCH,
    patches: int = 64,
    place: float = 0.0,
    resamples: int = 200,
    seed: int = 0,
    confidence: float = 0.95,
) -> EnergyDistance:
    """Unbiased energy distance between patches of two sets of clips [S, C, T, H, W] (or sections [C, T, H, W]) and its interval.

    The unit is the standard deviation of a channel over all of `reference`, for each channel its own. `patches` places are drawn
    of a clip, the same for clips of a shape; `patch`, `place` and `seed` are those of `latent_patches`. Patches of one clip
    depend on each other: pairs within a clip are left out, and the interval comes from drawing whole clips again, `resamples`
    times, with the unit kept. It is wider than `confidence` asks where the distributions are equal, and elsewhere somewhat narrow
    with few clips: of 24 a side, 0.95 covers the truth in about 0.9 of cases.
    Time grows with (clips x patches) squared; 2 x 32 clips of 64 patches take half a second.
    InputError for fewer than 5 clips a side, clips that differ in channels, numbers that are not finite, a channel that does not
    vary, and a patch larger than the latents.
    """
    if resamples < 1 or not 0 < confidence < 1:
        raise InputError(f"resamples {resamples}, confidence {confidence}: at least 1 resample, and a confidence between 0 and 1")
    sets = [_checked(name, clips) for name, clips in (("reference", reference), ("sample", samples))]
    channels = {clip.shape[1] for clips in sets for clip in clips}
    if len(channels) > 1:
        raise InputError(f"clips of {' and '.join(map(str, sorted(channels)))} channels have no distance")
    mean, std = _channel_scale(sets[0])
    count = min([patches, *(math.prod(_places(clip, patch)) for clips in sets for clip in clips)])
    points = torch.stack(
        [latent_patches((clip - mean) / std, patch, count, seed, place) for clips in sets for clip in clips]
    )  # [clips, P, D]
    between, split = _mean_distances(points), len(sets[0])
    value = _energy(between, np.ones((1, split)), np.ones((1, len(points) - split)))[0]
    draw = generator(seed, "energy bootstrap")
    again = [_counts(draw, len(clips), resamples) for clips in sets]
    low, high = np.quantile(_energy(between, *again), ((1 - confidence) / 2, (1 + confidence) / 2))
    return EnergyDistance(float(value), float(low), float(high))


def latent_patches(
    latents: Tensor, patch: tuple[int, int, int] = PATCH, count: int = 64, seed: int = 0, place: float = 0.0
) -> Tensor:
    """Patches of all channels and `patch` = (frames, rows, columns) of latents [S, C, T, H, W] or [C, T, H, W]: fp64 [P, D].

    A patch lies within one section. Of all places, overlapping ones included, `count` different ones are drawn (all, where there
    are fewer), by the seed and the latents' shape alone. `place` appends where in its section a patch is (time, row, column, each
    of variance 1 over the section): 0 leaves it out, 1 gives it as much of the squared distance as latents of variance 1 have.
    InputError for another number of axes and for a patch larger than the latents.
    """
    clip = _as_clip(latents, "latents")
    shape = _places(clip, patch)
    total = math.prod(shape)
    if count < 1 or place < 0:
        raise InputError(f"count {count}, place {place}: at least 1 patch, and a weight of at least 0")
    drawn = generator(seed, "energy patches", *shape).choice(total, min(count, total), replace=False)
    where = np.stack(np.unravel_index(np.sort(drawn), shape), axis=1)  # [P, 4]: section, frame, row, column
    section, frame, row, column = torch.from_numpy(where).unbind(1)
    windows = clip.to(torch.float64)
    for axis, side in zip((2, 3, 4), patch, strict=True):
        windows = windows.unfold(axis, side, 1)
    points = windows[section, :, frame, row, column].flatten(1)
    if not place:
        return points
    ends = np.maximum(np.array(shape[1:]) - 1, 1)
    unit = torch.from_numpy((where[:, 1:] / ends - 0.5) * math.sqrt(12))
    return torch.cat([points, unit * (place * math.sqrt(points.shape[1] / 3))], dim=1)


def _as_clip(latents: Tensor, name: str) -> Tensor:
    """[S, C, T, H, W] of either form, on the host."""
    if latents.dim() not in (4, 5) or not latents.numel():
        raise InputError(f"{name} {list(latents.shape)}: the energy distance takes latents [S, C, T, H, W] or [C, T, H, W]")
    return latents.detach().cpu().view(-1, *latents.shape[-4:])


def _checked(name: str, clips: Sequence[Tensor]) -> list[Tensor]:
    if len(clips) < MIN_CLIPS:
        raise InputError(f"{len(clips)} {name} clips: the energy distance takes at least {MIN_CLIPS}")
    whole = [_as_clip(clip, f"{name} clip {number}") for number, clip in enumerate(clips)]
    for number, clip in enumerate(whole):
        _check_finite(clip, f"{name} clip {number}")
    return whole


def _check_finite(values: Tensor, name: str) -> None:
    broken = int((~values.isfinite()).sum())
    if broken:
        raise InputError(f"{name}: {broken} of {values.numel()} numbers are not finite")


def _places(clip: Tensor, patch: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """How many sections, frames, rows and columns a patch can begin at."""
    frames, rows, columns = (side - part + 1 for side, part in zip(clip.shape[2:], patch, strict=True))
    if min(patch) < 1 or min(frames, rows, columns) < 1:
        raise InputError(f"patch {patch} does not fit latents of {list(clip.shape[2:])} (frames, rows, columns)")
    return clip.shape[0], frames, rows, columns


def _channel_scale(clips: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel over all of `clips`, fp64 [C, 1, 1, 1]."""
    count = sum(clip.numel() // clip.shape[1] for clip in clips)
    mean = sum((clip.double().sum(dim=(0, 2, 3, 4)) for clip in clips), torch.zeros(())).div(count).view(-1, 1, 1, 1)
    square = sum(((clip - mean).square().sum(dim=(0, 2, 3, 4)) for clip in clips), torch.zeros(()))
    std = square.div(count).sqrt().view(-1, 1, 1, 1)
    flat = (std.flatten() <= 1e-12 * (1 + mean.flatten().abs())).nonzero().flatten().tolist()
    if flat:
        raise InputError(f"reference clips: channels {flat} do not vary, which gives distances no unit")
    return mean, std


def _blocks(x_ND: Tensor, y_MD: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Distances of all pairs, some rows at a time."""
    rows = max(1, BLOCK // len(y_MD))
    for first in range(0, len(x_ND), rows):
        block = slice(first, min(first + rows, len(x_ND)))
        yield block, torch.cdist(x_ND[block], y_MD)


def _total(x_ND: Tensor, y_MD: Tensor) -> float:
    """Sum of the distances of all pairs; of a point to itself, 0."""
    own = x_ND is y_MD
    return sum(float(far.sum() - (far.diagonal(block.start).sum() if own else 0)) for block, far in _blocks(x_ND, y_MD))


def _mean_distances(points: Tensor) -> NDArray[np.float64]:
    """Mean distance of the patches of each clip to those of each, of [clips, P, D]: [clips, clips]."""
    clips, count, _ = points.shape
    flat = points.flatten(0, 1)
    rows = torch.cat([far.view(len(far), clips, count).mean(dim=2) for _, far in _blocks(flat, flat)])
    return rows.view(clips, count, clips).mean(dim=1).numpy()


def _counts(draw: np.random.Generator, clips: int, resamples: int) -> NDArray[np.float64]:
    """How often each clip occurs in each resample, [resamples, clips]. One clip alone is no pair: that is drawn again."""
    counts = draw.multinomial(clips, np.full(clips, 1 / clips), size=resamples)
    while (alone := counts.max(axis=1) == clips).any():
        counts[alone] = draw.multinomial(clips, np.full(clips, 1 / clips), size=int(alone.sum()))
    return counts.astype(np.float64)


def _energy(between: NDArray[np.float64], x_RN: NDArray[np.float64], y_RM: NDArray[np.float64]) -> NDArray[np.float64]:
    """Energy distances [R] with clips weighted by `x_RN` and `y_RM`; a pair of a clip and itself never counts, however often the
    clip was drawn: its distance is not that of independent clips."""
    split = x_RN.shape[1]
    own = between * (1 - np.eye(len(between)))

    def within(weight: NDArray[np.float64], block: NDArray[np.float64]) -> NDArray[np.float64]:
        return ((weight @ block) * weight).sum(axis=1) / (weight.sum(axis=1) ** 2 - (weight**2).sum(axis=1))

    across = ((x_RN @ between[:split, split:]) * y_RM).sum(axis=1) / (x_RN.sum(axis=1) * y_RM.sum(axis=1))
    return 2 * across - within(x_RN, own[:split, :split]) - within(y_RM, own[split:, split:])
