"""task=sample: videos from a trained model."""

from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from helios_train import rng
from helios_train.conf import compose
from helios_train.conf.schema import Config, Sample
from helios_train.data.toy import ToySpec, caption_of, parse_caption, render
from helios_train.errors import InputError
from helios_train.evaluation.drift import Drift, DriftMeter
from helios_train.evaluation.toy import ToyTrack, join_tracks, track
from helios_train.evaluation.toy_verdict import judge
from helios_train.models import manifest
from helios_train.models.codecs import Codec
from helios_train.models.text import pad
from helios_train.models.transformer import HeliosTransformer
from helios_train.run import RunFolder
from helios_train.sampling.drift import DriftGuard
from helios_train.sampling.inputs import ImageStart, VideoStart, load_image, load_video
from helios_train.sampling.output import SavedVideo, VideoFiles
from helios_train.sampling.pipeline import SamplerSettings, Sections, build_pipeline, grown, pixels
from helios_train.sampling.script import Script
from helios_train.sampling.start import from_nothing
from helios_train.tasks import build, recipes, weights

SHOWN = 60  # characters of a caption in a file's name


def run(config: Config, raw: dict[str, Any]) -> None:
    """Samples `sample.prompt`, `sample.script` (or captions of toy videos) from the weights `init`."""
    assert config.sample is not None
    made = list(sampled(config, jobs(config), Path(config.sample.output)))
    figures = [each.seen.toy for each in made if each.seen.toy]
    if figures:
        print(summary(figures))
    print(drift_summary([each.seen.drift for each in made]))
    print("\n".join(f"{each.saved.mp4}\n{each.saved.sheet}" for each in made))


@dataclass(frozen=True)
class Job:
    """One video to sample: its number (of which its noise is a function), caption or script, sections, the name of its files."""

    number: int
    prompt: str | Script
    sections: int
    name: str

    @property
    def caption(self) -> str:
        """What people read, and what stands in its facts."""
        return _caption(self.prompt)


class Made(NamedTuple):
    """A sampled video, what was seen of it, and the seconds it took from caption to pixels."""

    saved: SavedVideo
    seen: Seen
    seconds: float


def jobs(config: Config) -> list[Job]:
    """The videos that the keys of task=sample ask for."""
    wanted = config.sample
    assert wanted is not None
    if wanted.script is not None:
        prompts: list[str | Script] = [Script(wanted.script, wanted.crossfade)]
    elif isinstance(wanted.prompt, str):
        prompts = [wanted.prompt]
    else:
        prompts = [*(wanted.prompt or toy_captions(_origin(config).config, wanted.count))]
    return [Job(number, prompt, wanted.sections, file_name(number, prompt)) for number, prompt in enumerate(prompts)]


def sampled(config: Config, jobs: Sequence[Job], folder: Path) -> Iterator[Made]:
    """Samples one video after the other into `folder`, from the weights `init`, as the keys of task=sample say."""
    wanted = config.sample
    assert wanted is not None
    origin = _origin(config)
    now = build.encoders(origin.config)
    _same_encoders(config, origin.encoders, now)
    size = wanted.size or origin.size
    start = _start(wanted, size)
    codec, text = build.codec(origin.config), build.text(origin.config)
    began = time.perf_counter()
    encoded = Encoded(text, [job.prompt for job in jobs])
    encoding = (time.perf_counter() - began) / max(1, len(jobs))
    text.unload()
    begun = weights.start(config, wanted.weights)
    _same_encoders(config, begun.encoders, now)
    device = build.device(config)
    build.computes(config, begun.transformer, trains=False)
    transformer = begun.transformer.to(device)
    settings = replace(begun.sampler or recipes.sampler(config), solver=wanted.solver)
    speed = toy_speed(origin.config)
    sampler = VideoSampler(
        codec,
        encoded,
        settings,
        size,
        wanted.fps,
        config.seed,
        start=start,
        told=_progress,
        toy_speed=speed,
        drift=wanted.drift,
    )
    print(f"{config.init}: {size[0]}x{size[1]} pixels, codec {codec.name}, text {text.name}, on {device}", flush=True)
    if start:
        print("\n".join([f"from {start.path}", *(f"  {note}" for note in start.notes)]), flush=True)
    for done, job in enumerate(jobs, start=1):
        print(f"sampling {done} of {len(jobs)}: {job.caption}", flush=True)
        plan = job.sections, wanted.steps, wanted.guidance
        saved, seen = sampler.sample(transformer, job.prompt, job.number, *plan, folder, job.name)
        yield Made(saved, seen, seen.seconds + encoding)


@dataclass(frozen=True)
class Origin:
    """How the weights `init` were trained: (H, W) of their videos in pixels, the config whose codec, text and toy videos go with
    them, and what a manifest says of the encoders."""

    size: tuple[int, int]
    config: Config
    encoders: build.Encoders | None = None


def _origin(config: Config) -> Origin:
    """A run (or checkpoint) says it by its config, a merged folder by its manifest; anybody else's folder is taken at this
    config's word."""
    if config.init is None:
        raise InputError("task=sample needs init=<merged folder, run folder or checkpoints/<iteration>.ckpt>")
    path = Path(config.init)
    if not path.exists():
        raise InputError(
            f"init={path}: no such folder or checkpoint; give a merged folder, a run folder or checkpoints/<iteration>.ckpt"
        )
    if path.suffix == ".ckpt" or (path / "config.yaml").is_file():
        run = compose.typed(compose.saved(RunFolder.open(path.parent.parent if path.suffix == ".ckpt" else path).load_config()))
        # The run knows its encoders, and where their weights lay; weights of the same kind named now may have moved.
        codec = config.codec if config.codec.name == run.codec.name and getattr(config.codec, "weights", None) else run.codec
        text = config.text if config.text.name == run.text.name and getattr(config.text, "weights", None) else run.text
        return Origin(run.data.size, replace(config, codec=codec, text=text, data=run.data))
    known = manifest.read_manifest(path)
    return Origin(known.size, config, {"codec": known.codec, "text": known.text}) if known else Origin(config.data.size, config)


def _same_encoders(config: Config, learned: build.Encoders | None, now: build.Encoders) -> None:
    if learned:
        remedy = f"choose codec={learned['codec']['name']} text={learned['text']['name']}, with the weights of the training"
        build.same_encoders(learned, f"init={config.init}", now, "this config", remedy)


def _start(wanted: Sample, size: tuple[int, int]) -> ImageStart | VideoStart | None:
    if wanted.image is not None:
        return load_image(Path(wanted.image), size)
    return load_video(Path(wanted.video), size) if wanted.video is not None else None


def _progress(done: int, count: int) -> None:
    if sys.stdout.isatty():
        print(f"\rsection {done} of {count}", end="\n" if done == count else "", flush=True)


class Captions(Protocol):
    """What a sampler asks of a text encoder: captions to [L, dim] each, L at most `rows`."""

    rows: int

    def encode(self, captions: list[str]) -> list[Tensor]: ...


class Encoded:
    """Captions encoded beforehand: a large text encoder can go before a large transformer comes."""

    def __init__(self, text: Captions, prompts: Iterable[str | Script]):
        captions = [caption for prompt in prompts for _, caption in _as_script(prompt).captions]
        self.rows = text.rows
        self._known = dict(zip(captions, text.encode(captions), strict=True))

    def encode(self, captions: list[str]) -> list[Tensor]:
        """What the encoder gave; KeyError for a caption it was not shown."""
        return [self._known[caption] for caption in captions]


@dataclass(frozen=True)
class Seen:
    """What was measured of a sampled video: how it drifts, the verdict on a toy caption ({} for others), and the seconds it took,
    from an encoded caption to pixels: neither what is measured nor the file are in them."""

    drift: Drift
    toy: dict[str, Any]
    seconds: float


class VideoSampler:
    """Samples prompts with one codec, text encoder and sampler, `size` = (H, W) in pixels.

    A video's noise is a function of (seed, number). `start`: what every video begins from, nothing by default. `told` hears
    after each section how many of how many are done. `toy_speed`: the range that parts slow from quick in captions of toy videos,
    pixels a frame for a shorter side of 64. `drift`: history is noised where a video's latents drift, see DriftGuard.
    """

    def __init__(
        self,
        codec: Codec,
        text: Captions,
        settings: SamplerSettings,
        size: tuple[int, int],
        fps: float,
        seed: int,
        *,
        start: ImageStart | VideoStart | None = None,
        told: Callable[[int, int], None] | None = None,
        toy_speed: tuple[float, float] = ToySpec.speed,
        drift: bool = False,
    ):
        self.codec, self.text, self.settings = codec, text, settings
        self.size, self.fps, self.seed = size, fps, seed
        self.start, self.told, self.toy_speed, self.drift = start, told, toy_speed, drift

    def sample(
        self,
        transformer: HeliosTransformer,
        prompt: str | Script,
        number: int,
        sections: int,
        steps: int | tuple[int, ...] | None,
        guidance: float,
        folder: Path,
        name: str | None = None,
    ) -> tuple[SavedVideo, Seen]:
        """One video into `folder`, written and measured as its sections come; toy captions are judged. Its files are called
        `name`, by default after number and caption."""
        script = _as_script(prompt)
        caption = script.captions[0][1]
        each, guidance = self.settings.steps(steps), 1.0 if self.settings.distilled else guidance
        judging = len(script.captions) == 1 and parse_caption(caption) is not None
        tracks: list[ToyTrack] = []
        meter = DriftMeter()
        guard = DriftGuard(self.seed) if self.drift else None
        with VideoFiles(folder, name or file_name(number, script), self.fps, sections) as files:
            made = self._sections(transformer, script, number, (sections, each, guidance), guard)
            seconds, began = 0.0, time.perf_counter()
            for done, latents in enumerate(made, start=1):
                frames = pixels(self.codec, latents)[0]  # on the host: the device has done all of it
                seconds += time.perf_counter() - began
                files.add(frames)
                meter.add(frames)
                meter.add_latents(latents[0])
                if judging:
                    tracks.append(track(frames))
                if self.told:
                    self.told(done, sections)
                began = time.perf_counter()
            verdict = dict(judge(join_tracks(tracks), caption, self.toy_speed)) if judging else {}
            seen = Seen(meter.result(), verdict, seconds)
            facts: dict[str, Any] = {"seed": self.seed, "number": number, "steps": each, "guidance": guidance, "toy": seen.toy}
            facts["drift"] = seen.drift.facts()
            if len(script.captions) > 1:
                facts |= {"script": script.captions, "crossfade": script.crossfade}
            if guard:
                facts["drifted"] = [section for section, off in enumerate(guard.drifted) if any(off)]
            if self.start:
                facts |= {"start": str(self.start.path), "start_notes": self.start.notes}
            return files.finish(_caption(prompt), facts), seen

    def _sections(
        self,
        transformer: HeliosTransformer,
        script: Script,
        number: int,
        plan: tuple[int, tuple[int, ...], float],
        guard: DriftGuard | None = None,
    ) -> Iterator[Tensor]:
        """Latents of one section after the other; `plan` is (sections, steps, guidance)."""
        count, steps, guidance = plan
        embeddings = pad(self.text.encode([caption for _, caption in script.captions]), self.text.rows)
        generator = rng.torch_generator(self.seed, "sample", number)
        nothing = from_nothing(1, self.codec.channels, self.size)
        history = self.start.history(self.codec, generator) if self.start else nothing
        pipeline = build_pipeline(transformer, self.codec, self.settings)
        denoise = Sections(pipeline, steps, guidance, generator, self.settings.amplify, self.settings.anchor)
        return grown(denoise, script.texts(embeddings, count), history, guard)


def file_name(number: int, prompt: str | Script) -> str:
    """What the files of a video are called: its number and the letters of its (first) caption."""
    caption = _as_script(prompt).captions[0][1]
    return f"{number:03d}_{re.sub(r'[^a-z0-9]+', '_', caption.lower()).strip('_')[:SHOWN] or 'no_prompt'}"


def _as_script(prompt: str | Script) -> Script:
    return prompt if isinstance(prompt, Script) else Script(((0, prompt),))


def _caption(prompt: str | Script) -> str:
    """What people read: the caption, or every caption with the section it begins at."""
    return prompt if isinstance(prompt, str) else "\n".join(f"from section {start}: {text}" for start, text in prompt.captions)


def toy_captions(config: Config, count: int) -> list[str]:
    """Captions as toy videos have them, drawn by seed."""
    spec = build.toy_spec(config) or ToySpec()
    truths = [render(config.seed + 1, number, spec)[1] for number in range(count)]
    return [caption_of(truth, spec.motion_in_caption) for truth in truths]


def toy_speed(config: Config) -> tuple[float, float]:
    """The range of speeds in the toy videos of a config, or of the toy world's own."""
    return (build.toy_spec(config) or ToySpec()).speed


def summary(figures: list[dict[str, Any]]) -> str:
    """The tracker's figures over all videos, a line: names right, directions and paces where captions say them, and the mean step
    across section borders beside the mean step inside sections (pixels a frame)."""
    right = sum(bool(f["colour_right"] and f["background_right"]) for f in figures)
    shapes = sum(bool(f["shape_right"]) for f in figures)
    line = f"toy tracker: colour and background right in {right} of {len(figures)}, shape in {shapes}"
    said = [f for f in figures if f["direction_right"] is not None]
    if said:
        counts = (sum(bool(f[name]) for f in said) for name in ("direction_right", "pace_right"))
        line += ", direction in {} and pace in {} of {}".format(*counts, len(said))
    moving = [f for f in figures if math.isfinite(f["ratio"]) and math.isfinite(f["motion"])]
    if not moving:
        return line
    jump, motion = (sum(f[name] for f in moving) / len(moving) for name in ("border_jump", "motion"))
    ratios = f"ratio {jump / motion:.2f} (worst video {max(f['ratio'] for f in moving):.2f})"
    return f"{line}; border jump {jump:.2f} px, motion {motion:.2f} px a frame, {ratios}"


def drift_summary(drifts: Sequence[Drift]) -> str:
    """Drift over all videos, a line: of each figure the one that is farthest from what is well, in shares of the full range."""

    def _there(*names: str) -> list[float]:
        found = [drift.figures[f"drift/{name}"] for drift in drifts for name in names]
        return [value for value in found if math.isfinite(value)]

    def _most(*names: str) -> str:
        return f"{max(_there(*names), key=abs):+.4f}" if _there(*names) else "-"

    def _least(name: str) -> str:
        return f"{min(_there(name)):.4f}" if _there(name) else "-"

    slopes = f"saturation {_most('saturation_slope')}, luma {_most('luma_slope')}"
    colour = _most("red_green_slope", "yellow_blue_slope")
    ratio = f"{max(_there('border_ratio')):.2f}" if _there("border_ratio") else "-"
    least = f"least motion {_least('motion_least')}, least spread {_least('spread_least')}"
    return f"drift a section, worst video: {slopes}, colour {colour}; frames across borders to inside {ratio}; {least}"
