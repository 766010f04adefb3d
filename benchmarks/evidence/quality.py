"""What the toy experiments measure: videos for held-out captions, beside the held-out clips themselves.

Every arm samples the same captions from the same noise. Figures are the tracker's (the object's colour and background as the
caption has them, motion inside sections, jumps across borders) and the energy distance of latent patches to the real clips.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from helios_train import rng
from helios_train.conf.compose import compose
from helios_train.conf.schema import Config
from helios_train.evaluation.energy import energy_distance
from helios_train.evaluation.toy import ToyTrack, join_tracks, track
from helios_train.evaluation.toy_verdict import judge
from helios_train.models.text import pad
from helios_train.run import write
from helios_train.sampling.pipeline import Sections, build_pipeline, grown, pixels
from helios_train.sampling.start import from_image, from_nothing
from helios_train.tasks import build, weights

RESULTS = Path(__file__).parent.parent / "results" / "evidence"
CLIPS = 32  # held-out captions of a seed
BATCH = 8  # videos at once
SECTIONS = 4  # of a video: three borders


@dataclass(frozen=True)
class Plan:
    """How an arm is sampled."""

    steps: int | tuple[int, ...]
    guidance: float = 3.0


@dataclass(frozen=True)
class Real:
    """Held-out clips: latents [S, C, 9, H, W] and captions."""

    latents: list[Tensor]
    captions: list[str]

    @classmethod
    def of(cls, config: Config, count: int) -> Real:
        """The first `count` held-out clips of a config's dataset."""
        data = build.data(config)
        chosen = data.held_out[:count]
        latents = [data.store.sections(sample, 0, SECTIONS).float() for sample in chosen]
        return cls(latents, [data.store.meta(sample)["caption"][0] for sample in chosen])


class Results:
    """The figures of a question and seed in results/evidence, arm by arm; what is there is not measured again."""

    def __init__(self, question: str, seed: int, clips: int = CLIPS):
        self.path, self.seed, self.clips = RESULTS / f"{question}_{seed}.json", seed, clips
        self.known = self._read()

    def _read(self) -> dict[str, Any]:
        known = json.loads(self.path.read_text()) if self.path.is_file() else {}
        return {"seed": self.seed, "clips": self.clips} | known

    def add(self, name: str, found: Any) -> None:
        """An arm's figures, kept at once beside what other processes have found meanwhile."""
        print(name, json.dumps(found), flush=True)
        self.known = self._read() | {name: found}
        RESULTS.mkdir(parents=True, exist_ok=True)
        write(self.path, json.dumps(self.known, indent=1) + "\n")

    def measure(self, name: str, folder: Path, experiment: str, plan: Plan, known: Mapping[str, Any] | None = None) -> None:
        """Samples the model in `folder` for the held-out captions, and keeps its figures with what is `known` of it."""
        config = compose([f"experiment={experiment}", "data.size=[64,128]", f"init={folder}", f"seed={self.seed}"])
        real = Real.of(config, CLIPS)
        made = sample(config, folder, real.captions, plan)
        spec = build.toy_spec(config)
        assert spec is not None
        found = figures(real, made["latents"], made["tracks"], spec.speed) | {"seconds_a_section": made["seconds"]}
        self.add(name, {**found, **(known or {})})


@torch.no_grad()
def sample(
    config: Config,
    folder: Path,
    captions: list[str],
    plan: Plan,
    sections: int = SECTIONS,
    images: Tensor | None = None,
    told: int | None = None,
) -> dict[str, Any]:
    """Videos of the model in `folder`: latents a video, tracks, those of each section, and seconds a section of one video.

    images: [videos, 3, H, W] in [-1, 1], what each begins from. told: sections that are given the caption, the later ones an
    empty one; None: all.
    """
    begun = weights.start(config)
    build.computes(config, begun.transformer, trains=False)
    codec, text = build.codec(config), build.text(config)
    settings = begun.sampler
    assert settings is not None, f"{folder} was not merged by helios_train"
    latents: list[Tensor] = []
    tracks: list[list[ToyTrack]] = []
    begin = time.perf_counter()
    for first in range(0, len(captions), BATCH):
        some = captions[first : first + BATCH]
        numbers = range(first, first + len(some))
        embeddings, nothing = (pad(text.encode(said), text.rows) for said in (some, [""] * len(some)))
        texts = [embeddings if told is None or section < told else nothing for section in range(sections)]
        generators = [rng.torch_generator(config.seed, "sample", number) for number in numbers]
        pipeline, steps = build_pipeline(begun.transformer, codec, settings), settings.steps(plan.steps)
        denoise = Sections(pipeline, steps, plan.guidance, generators, settings.amplify, settings.anchor)
        history = from_nothing(len(some), codec.channels, config.data.size)
        if images is not None:
            history = from_image(codec, images[list(numbers)], rng.torch_generator(config.seed, "image", first))
        made = list(grown(denoise, texts, history))
        latents += torch.stack(made, dim=1).unbind(0)
        seen = [[track(frames) for frames in pixels(codec, part)] for part in made]
        tracks += [list(parts) for parts in zip(*seen, strict=True)]
    seconds = (time.perf_counter() - begin) / (len(captions) * sections)
    whole = [join_tracks(parts) for parts in tracks]
    return {"latents": latents, "tracks": whole, "by_section": tracks, "seconds": seconds, "settings": asdict(settings)}


def cost(experiment: str, folder: Path, plan: Plan) -> float:
    """GFLOP of a section, the mean of one video's: what a way of sampling costs on any machine, beside any other work."""
    config = compose([f"experiment={experiment}", "data.size=[64,128]", f"init={folder}"])
    with FlopCounterMode(display=False) as counter:
        sample(config, folder, [""], plan)
    return counter.get_total_flops() / SECTIONS / 1e9


def figures(real: Real, latents: list[Tensor], tracks: list[ToyTrack], speed: tuple[float, float]) -> dict[str, Any]:
    """Shares of videos that are right, medians and means in pixels (a frame), energy distance with its interval."""
    verdicts = [judge(seen, caption, speed) for seen, caption in zip(tracks, real.captions, strict=True)]
    right = [bool(v["colour_right"] and v["background_right"]) for v in verdicts]
    distance = energy_distance(real.latents, latents)
    return {
        "right": sum(right) / len(right),
        "shape": sum(bool(v["shape_right"]) for v in verdicts) / len(verdicts),
        "found": _mean([v["found"] for v in verdicts]),
        "motion": _mean([v["motion"] for v in verdicts]),
        "speed": _mean([v["speed"] for v in verdicts]),
        "border_jump": _mean([v["border_jump"] for v in verdicts]),
        "border_jump_median": _median([v["border_jump"] for v in verdicts]),
        "radius": _mean([seen.radius for seen in tracks]),
        "energy": distance.value,
        "energy_interval": [distance.low, distance.high],
    }


def interval(values: list[float], draws: int = 2000) -> dict[str, Any]:
    """The mean over videos, those that are not finite left out, and its 95 % interval by resampling them."""
    kept = np.array([value for value in values if math.isfinite(value)])
    if not len(kept):
        return {"mean": None, "interval": None, "videos": 0}
    picked = rng.generator(0, "bootstrap").integers(len(kept), size=(draws, len(kept)))
    low, high = np.percentile(kept[picked].mean(axis=1), [2.5, 97.5])
    return {"mean": float(kept.mean()), "interval": [float(low), float(high)], "videos": len(kept)}


def _finite(values: list[Any]) -> list[float]:
    return sorted(value for value in values if value is not None and math.isfinite(value))


def _mean(values: list[Any]) -> float:
    kept = _finite(values)
    return sum(kept) / len(kept) if kept else math.nan


def _median(values: list[Any]) -> float:
    kept = _finite(values)
    return kept[len(kept) // 2] if kept else math.nan
