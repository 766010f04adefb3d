"""task=sample: videos from a trained model."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from helios_train import rng
from helios_train.conf.schema import Config
from helios_train.data.toy import ToySpec, caption_of, parse_caption, render
from helios_train.errors import InputError
from helios_train.evaluation import toy
from helios_train.models import manifest
from helios_train.models.codecs import Codec
from helios_train.models.text import HashText, pad
from helios_train.models.transformer import HeliosTransformer
from helios_train.sampling.output import SavedVideo, save_video
from helios_train.sampling.pipeline import SamplerSettings, build_pipeline, sample_t2v
from helios_train.tasks import build

SHOWN = 60  # characters of a caption in a file's name


def run(config: Config, raw: dict[str, Any]) -> None:
    """Samples `sample.prompt` (or captions of toy videos) from the weights `init`."""
    wanted = config.sample
    assert wanted is not None
    if config.init is None:
        raise InputError("task=sample needs init=<merged folder, run folder or checkpoints/<iteration>.ckpt>")
    begun = build.start(config, wanted.weights)
    _same_encoders(config)
    prompts = [wanted.prompt] if isinstance(wanted.prompt, str) else list(wanted.prompt or toy_captions(config, wanted.count))
    settings = SamplerSettings((begun.sampler or build.sampler(config)).dynamic_shift, wanted.solver)
    sampler = VideoSampler(build.codec(config), build.text(config), settings, config.data.size, wanted.fps, config.seed)
    figures: list[dict[str, Any]] = []
    paths: list[str] = []
    for number, prompt in enumerate(prompts):
        print(f"sampling {number + 1} of {len(prompts)}: {prompt}", flush=True)
        plan = wanted.sections, wanted.steps, wanted.guidance
        saved, judged = sampler.sample(begun.transformer, prompt, number, *plan, Path(wanted.output))
        figures += [judged] if judged else []
        paths += [str(saved.mp4), str(saved.sheet)]
    if figures:
        print(summary(figures))
    print("\n".join(paths))


def _same_encoders(config: Config) -> None:
    known = manifest.read_manifest(Path(str(config.init)))
    if known and known.text["fingerprint"] != build.text(config).fingerprint():
        raise InputError(f"init={config.init}: was trained with text {known.text['name']!r}, not this config's; choose that one")
    if known and known.codec["fingerprint"] != build.codec(config).fingerprint():
        raise InputError(
            f"init={config.init}: was trained with codec {known.codec['name']!r}, not this config's; choose that one"
        )


class VideoSampler:
    """Samples prompts with one codec, text encoder and sampler, `size` = (H, W) in pixels.

    A video's noise is a function of (seed, number).
    """

    def __init__(self, codec: Codec, text: HashText, settings: SamplerSettings, size: tuple[int, int], fps: float, seed: int):
        self.codec, self.text, self.settings = codec, text, settings
        self.size, self.fps, self.seed = size, fps, seed

    def sample(
        self, transformer: HeliosTransformer, prompt: str, number: int, sections: int, steps: int, guidance: float, folder: Path
    ) -> tuple[SavedVideo, dict[str, Any]]:
        """One video into `folder`; toy captions are judged, others give no figures."""
        embeds = pad(self.text.encode([prompt]), self.text.rows).to(transformer.device)
        pipeline = build_pipeline(transformer, self.codec, self.settings)
        generator = rng.torch_generator(self.seed, "sample", number)
        frames = sample_t2v(pipeline, embeds, self.size, sections, steps, guidance, generator).frames[0]
        judged = dict(toy.judge(toy.track(frames), prompt)) if parse_caption(prompt) else {}
        facts = {"seed": self.seed, "number": number, "steps": steps, "guidance": guidance, "toy": judged}
        name = f"{number:03d}_{re.sub(r'[^a-z0-9]+', '_', prompt.lower()).strip('_')[:SHOWN] or 'no_prompt'}"
        return save_video(folder, name, frames, self.fps, prompt, facts), judged


def toy_captions(config: Config, count: int) -> list[str]:
    """Captions as toy videos have them, drawn by seed."""
    spec = build.toy_spec(config) or ToySpec()
    truths = [render(config.seed + 1, number, spec)[1] for number in range(count)]
    return [caption_of(truth, spec.motion_in_caption) for truth in truths]


def summary(figures: list[dict[str, Any]]) -> str:
    """The crude tracker's figures over all videos, a line: names right, and the mean step across section borders beside the
    mean step inside sections (pixels a frame)."""
    right = sum(bool(f["colour_right"] and f["background_right"]) for f in figures)
    line = f"toy tracker: colour and background right in {right} of {len(figures)}"
    moving = [f for f in figures if math.isfinite(f["ratio"]) and math.isfinite(f["motion"])]
    if not moving:
        return line
    jump, motion = (sum(f[name] for f in moving) / len(moving) for name in ("border_jump", "motion"))
    ratios = f"ratio {jump / motion:.2f} (worst video {max(f['ratio'] for f in moving):.2f})"
    return f"{line}; border jump {jump:.2f} px, motion {motion:.2f} px a frame, {ratios}"
