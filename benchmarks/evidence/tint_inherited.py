"""How much of a tint that its history has got does a model hand on to the next section? What drift is made of.

A wrong colour of which each section hands on the share g comes to 1 / (1 - g) times what one section adds: at g near 1 it grows
with every section, below it levels off. The models are those of drift_with_and_without.py. Held-out clips are the history of
their fourth section, as they are and with sections 2 and 3 a little lighter and redder (the first, and with it the anchor, is
left as it is); both are sampled from the same noise, with the caption (told) and with an empty one (untold), and the difference
is measured along the tint, in the latents. Writes results/evidence/tint_inherited_SEED.json, arm by arm; what is there is not
made again.

Usage: python benchmarks/evidence/tint_inherited.py SEED [ARM ...]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from arms import merged
from drift_with_and_without import MODELS
from quality import BATCH, Plan, Real, Results, interval
from torch import Tensor

from helios_train import rng
from helios_train.conf.compose import compose
from helios_train.conf.schema import Config
from helios_train.models.codecs import SECTION_FRAMES, Codec
from helios_train.models.text import pad
from helios_train.sampling.pipeline import Sections, build_pipeline
from helios_train.sampling.start import from_nothing
from helios_train.tasks import build, weights

TINT = (0.2, 0.1, 0.1)  # red, green, blue of pixels in [-1, 1]: 25 and 13 of 255 levels
VIDEOS, BEFORE = 16, 3  # clips; sections of a clip's history
PLAN = Plan(25)


def shift(codec: Codec, size: tuple[int, int]) -> Tensor:
    """What the tint adds to the latents of a section, [C, 9, h, w]: the toy's codec is linear."""
    tint = torch.tensor(TINT).view(1, 3, 1, 1, 1).expand(1, 3, SECTION_FRAMES, *size)
    return (codec.encode(tint.contiguous()) - codec.encode(torch.zeros_like(tint)))[0]


@torch.no_grad()
def handed_on(config: Config, folder: Path) -> dict[str, Any]:
    """Told and untold: the share of the tint that the next section has, over clips."""
    begun, real = weights.start(config), Real.of(config, VIDEOS)
    build.computes(config, begun.transformer, trains=False)
    codec, text, settings = build.codec(config), build.text(config), begun.sampler
    assert settings is not None, f"{folder} was not merged by helios_train"
    tint, found = shift(codec, config.data.size), {"told": list[float](), "untold": list[float]()}
    for first in range(0, VIDEOS, BATCH):
        clips = torch.stack(real.latents[first : first + BATCH])
        for how, captions in (("told", real.captions[first : first + BATCH]), ("untold", [""] * len(clips))):
            embeddings, made = pad(text.encode(captions), text.rows), []
            for wrong in (0.0, 1.0):
                history = from_nothing(len(clips), codec.channels, config.data.size)
                for number in range(BEFORE):
                    history = history.followed_by(clips[:, number] + (wrong * tint if number else 0))
                draws = [rng.torch_generator(config.seed, "sample", first + number) for number in range(len(clips))]
                pipeline, steps = build_pipeline(begun.transformer, codec, settings), settings.steps(PLAN.steps)
                made.append(
                    Sections(pipeline, steps, PLAN.guidance, draws, settings.amplify, settings.anchor)(
                        BEFORE, embeddings, history
                    )
                )
            along = ((made[1] - made[0]) * tint).flatten(1).sum(1) / tint.square().sum()
            found[how] += along.tolist()
    return {how: interval(shares) for how, shares in found.items()}


def main() -> None:
    """One seed."""
    results = Results("tint_inherited", int(sys.argv[1]), VIDEOS)
    for name in sys.argv[2:] or MODELS:
        if name in results.known:
            continue
        folder = merged(results.seed, MODELS[name])
        config = compose(["experiment=toy_base", "data.size=[64,128]", f"init={folder}", f"seed={results.seed}"])
        results.add(name, handed_on(config, folder))


if __name__ == "__main__":
    main()
