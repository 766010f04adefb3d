"""From a picture, does a model trained by the released recipe start slowly, and one by the corrected recipe not?

The released mix never trains on a picture alone (i2v 0); the corrected one does, in one sample of ten. Trains Base by the mix and
corruption of both (arms.py), begins videos of held-out captions from the first frame of their clips, and follows the toy object:
its motion in the first third of the first section, as a share of that in sections 1 to 3. 1 is no slow start. Writes
results/evidence/released_against_corrected_SEED.json, arm by arm; an arm that is there is not made again.

Usage: python benchmarks/evidence/released_against_corrected.py SEED [ARM ...]
"""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import torch
from arms import merged
from quality import Plan, Real, Results, interval, sample
from torch import Tensor

from helios_train.conf.compose import compose
from helios_train.conf.schema import Config
from helios_train.evaluation.toy import TRACKING_ERROR, ToyTrack
from helios_train.sampling.pipeline import pixels
from helios_train.tasks import build

ARMS = ("released", "corrected")
VIDEOS, SECTIONS = 32, 4
EARLY = 12  # frames of the first section: of three latent frames
PLAN = Plan(25)


def first_frames(config: Config, real: Real) -> Tensor:
    """The first frame of every clip, [clips, 3, H, W] in [-1, 1]."""
    codec = build.codec(config)
    frames = torch.cat([pixels(codec, clip[:1])[:, 0] for clip in real.latents])
    return frames.permute(0, 3, 1, 2).float() / 127.5 - 1


def way(seen: ToyTrack, frames: int) -> float:
    """How far the object got in the first `frames`, pixels a frame; bounces are rare in so few. NaN without one."""
    where = np.flatnonzero(np.isfinite(seen.centres[:frames, 0]))
    if len(where) < 2:
        return math.nan
    first, last = where[0], where[-1]
    return float(np.linalg.norm(seen.centres[last] - seen.centres[first]) / (last - first))


def figures(by_section: list[list[ToyTrack]]) -> dict[str, Any]:
    """Pixels a frame early and later, and their ratio of the medians, video by video with its interval."""
    early = [way(parts[0], EARLY) for parts in by_section]
    later = [float(np.nanmedian([way(part, EARLY) for part in parts[1:]] or [math.nan])) for parts in by_section]
    ratio = [one / max(other, TRACKING_ERROR) for one, other in zip(early, later, strict=True)]
    return {"early": interval(early), "later": interval(later), "ratio": interval(ratio)}


def main() -> None:
    """One seed."""
    results = Results("released_against_corrected", int(sys.argv[1]), VIDEOS)
    for name in sys.argv[2:] or ARMS:
        if name in results.known:
            continue
        folder = merged(results.seed, name)
        config = compose(["experiment=toy_base", "data.size=[64,128]", f"init={folder}", f"seed={results.seed}"])
        real = Real.of(config, VIDEOS)
        made = sample(config, folder, real.captions, PLAN, SECTIONS, first_frames(config, real))
        results.add(name, figures(made["by_section"]))


if __name__ == "__main__":
    main()
