"""Do the First-Frame Anchor and Frame-Aware Corrupt keep a Base model from drifting, three times as far as its clips reach?

Trains Base with both, without the anchor, without the corruption, without either (arms.py), samples 12 sections for held-out
captions (clips have 4), and follows the toy object section by section. Drift is what the last section differs from the first in:
colour    RGB distance of the background's colours, and of the object's, of 255
position  how far the object jumps at a border, pixels: the mean of the last four less that of the first four
identity  share of videos whose object has lost the colour it began with, and how much its radius changed, of the first
A caption names both colours, in every section. So that nothing but the history tells them, each model is sampled untold as well:
from the second section on with an empty caption.
Writes results/evidence/drift_with_and_without_SEED.json, arm by arm; an arm that is there is not made again.

Usage: python benchmarks/evidence/drift_with_and_without.py SEED [ARM ...]
"""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
from arms import merged
from quality import Plan, Real, Results, interval, sample

from helios_train.conf.compose import compose
from helios_train.evaluation.toy import ToyTrack, join_tracks

MODELS = {"both": "base", "no_anchor": "no_anchor", "no_corrupt": "no_corrupt", "neither": "neither"}
UNTOLD = "_untold"
ARMS = [*MODELS, *(f"{name}{UNTOLD}" for name in MODELS)]
VIDEOS, SECTIONS, EDGE = 16, 12, 4  # captions; sections of a video; borders at either end
PLAN = Plan(25)


def _apart(one: tuple[int, ...] | None, other: tuple[int, ...] | None) -> float:
    return math.dist(one, other) / 255 if one and other else math.nan


def _jumps(parts: list[ToyTrack]) -> float:
    return join_tracks(parts).border_jump


def drift(parts: list[ToyTrack]) -> dict[str, float]:
    """Of one video, from its sections' tracks; NaN where the object is lost."""
    first, last = parts[0], parts[-1]
    kept = first.colour_name is not None and first.colour_name == last.colour_name
    return {
        "background": _apart(first.background, last.background),
        "object": _apart(first.colour, last.colour),
        "jump_more": _jumps(parts[-EDGE - 1 :]) - _jumps(parts[: EDGE + 1]),
        "jump": _jumps(parts),
        "lost": float(not kept) if first.colour_name else math.nan,
        "radius": abs(last.radius / first.radius - 1),
    }


def figures(by_section: list[list[ToyTrack]]) -> dict[str, Any]:
    """Means with intervals, and section by section the distance of the background's colour from the first section's."""
    each = [drift(parts) for parts in by_section]
    found: dict[str, Any] = {name: interval([one[name] for one in each]) for name in each[0]}
    way = [[_apart(parts[0].background, part.background) for part in parts] for parts in by_section]
    return found | {"background_by_section": np.nanmean(way, axis=0).tolist()}


def main() -> None:
    """One seed."""
    results = Results("drift_with_and_without", int(sys.argv[1]), VIDEOS)
    for name in sys.argv[2:] or ARMS:
        if name in results.known:
            continue
        folder, told = merged(results.seed, MODELS[name.removesuffix(UNTOLD)]), 1 if name.endswith(UNTOLD) else None
        config = compose(["experiment=toy_base", "data.size=[64,128]", f"init={folder}", f"seed={results.seed}"])
        made = sample(config, folder, Real.of(config, VIDEOS).captions, PLAN, SECTIONS, told=told)
        results.add(name, figures(made["by_section"]))
    for what in ("", UNTOLD):
        if {f"both{what}", f"neither{what}"} <= results.known.keys():
            both, neither = (results.known[f"{name}{what}"] for name in ("both", "neither"))
            print(what, {name: (both[name]["mean"], neither[name]["mean"]) for name in ("background", "object", "radius")})


if __name__ == "__main__":
    main()
