"""How far do healthy videos drift? What the limits of the alarms (conf/watch) stand on.

Measures videos by name: sampled ones of trained toy models (of several stages and seeds), real footage; and toy clips through the
default codec. For each figure that an alarm looks at, the worst video of each name, and the share of the limit that the worst of
all takes. Writes results/healthy_drift.json.

Usage: python benchmarks/healthy_drift.py NAME=GLOB [NAME=GLOB ...]
    python benchmarks/healthy_drift.py base='runs/*/videos/*.mp4' mid='samples/mid_*/*.mp4'
"""

from __future__ import annotations

import glob
import json
import math
import platform
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from helios_train.conf.compose import compose
from helios_train.data.toy import ToySpec, render
from helios_train.data.video import probe, read_frames
from helios_train.evaluation.alarms import RULES, judge
from helios_train.evaluation.drift import Drift, measure
from helios_train.models.codecs import dct_codec
from helios_train.sampling.pipeline import pixels

RESULT = Path(__file__).parent / "results" / "healthy_drift.json"
CLIPS, SECTIONS = 24, 4  # toy clips rendered


def toy_clips() -> list[Drift]:
    """Clips of the toy world, encoded and decoded."""
    codec, spec, found = dct_codec(), ToySpec(size=(64, 128), sections=SECTIONS), []
    for number in range(CLIPS):
        frames = torch.from_numpy(render(7, number, spec)[0]).view(SECTIONS, 33, 64, 128, 3)
        latents = codec.encode(frames.permute(0, 4, 1, 2, 3) / 127.5 - 1)
        found.append(measure(pixels(codec, latents).flatten(0, 1), latents))
    return found


def of_file(path: str) -> Drift:
    """A video on disk."""
    return measure(read_frames(Path(path), range(probe(Path(path)).frames)))


def worst(drifts: Iterable[Drift]) -> dict[str, float]:
    """By alarm, the figure nearest to its limit."""
    found = {}
    for name, rule in RULES.items():
        values = np.array([drift.figures[figure] for drift in drifts for figure in rule.figures])
        values = values[np.isfinite(values)]
        found[name] = float(values.min() if rule.least else np.abs(values).max()) if len(values) else math.nan
    return found


def main() -> None:
    """All names."""
    groups = {"toy_clips": toy_clips()}
    for argument in sys.argv[1:]:
        name, _, pattern = argument.partition("=")
        groups.setdefault(name, []).extend(of_file(path) for path in sorted(glob.glob(pattern)))
        print(name, len(groups[name]), json.dumps(worst(groups[name])), flush=True)
    alarms = compose().watch.alarms
    limits = {name: getattr(alarms, name) for name in RULES}
    every = [drift for drifts in groups.values() for drift in drifts]
    taken = {name: limits[name] / value if RULES[name].least else value / limits[name] for name, value in worst(every).items()}
    raised = sum(any(judge(drift.figures, limits).values()) for drift in every)
    result: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(),
        "limits": limits,
        "share_of_the_limit": taken,
        "videos_that_raise_an_alarm": raised,
        "worst": {name: {"videos": len(drifts), **worst(drifts)} for name, drifts in groups.items()},
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
