"""What a run is watched with: its loggers, and the sampler of its videos."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from helios_train.callbacks.health import AlarmLog, Health
from helios_train.callbacks.metrics_csv import MetricsCsv
from helios_train.callbacks.videos import NAME, Clip, Videos
from helios_train.conf.schema import Config, WanCodec
from helios_train.conf.schema import TensorBoardLogger as TensorBoardKeys
from helios_train.conf.schema import WandbLogger as WandbKeys
from helios_train.data.index import ClipStore
from helios_train.data.module import WindowModule
from helios_train.errors import InputError
from helios_train.evaluation.alarms import RULES
from helios_train.models.ema import Ema
from helios_train.models.roles import STUDENT, TEACHER, Roles
from helios_train.models.transformer import HeliosTransformer
from helios_train.run import RunFolder
from helios_train.sampling.pipeline import SamplerSettings
from helios_train.stages.distill import DistillStage
from helios_train.stages.stage import Stage
from helios_train.tasks import build, recipes, sample

FPS = 25  # of sampled videos, where the data do not say
NUMBER = 0  # every video of a run starts from the same noise: what changes between them is the model


def loggers(config: Config, raw: dict[str, Any], folder: RunFolder, done: int) -> list[Logger]:
    """metrics.csv always, first, and what `logger=` adds; `done` iterations are in the checkpoint to go on from.

    InputError where the logger's package or key is missing.
    """
    found: list[Logger] = [MetricsCsv(folder.metrics, done or None)]
    keys = config.logger
    if isinstance(keys, WandbKeys):
        from helios_train.callbacks.wandb_run import WandbRun  # here: importing wandb takes a second

        place = {"project": keys.project, "entity": keys.entity, "tags": list(keys.tags)}
        name, group = f"{config.experiment.name}/{folder.path.resolve().name}", keys.group or config.experiment.name
        found.append(WandbRun(folder, done, keys.mode, raw, name=name, group=group, **place))
    elif isinstance(keys, TensorBoardKeys):
        found.append(tensorboard(folder, done))
    return found


def tensorboard(folder: RunFolder, done: int) -> TensorBoardLogger:
    """TensorBoard's event files; what a killed run logged after iteration `done` is hidden when it comes again."""
    try:
        return TensorBoardLogger(folder.path, name="", version=folder.tensorboard.name, purge_step=done + 1 if done else 0)
    except ModuleNotFoundError:
        raise InputError("logger=tensorboard: the package is missing; pip install tensorboard, or choose logger=csv") from None


class StoredCaption:
    """The caption of one clip, with the rows the dataset stores for it: no text encoder has to be loaded for a run's videos."""

    def __init__(self, store: ClipStore, clip: int, rows: int):
        """`clip` is a sample of `store`; `rows` is what captions are padded to."""
        self.caption = str((store.meta(clip)["caption"] or [""])[0])
        self.rows, self._stored = rows, store.text(clip).float()

    def encode(self, captions: list[str]) -> list[torch.Tensor]:
        """fp32 [L, dim] for each mention of the caption; KeyError for another."""
        return [{self.caption: self._stored}[caption] for caption in captions]


def videos(config: Config, folder: RunFolder, stage: Stage, data: WindowModule, ema: Ema | None, main: bool) -> list[Callback]:
    """The videos of a run: of what it trains; in distill of the student, its average and the teacher, from the same noise.

    Devices other than the `main` one only wait.
    """
    every, own = config.watch.sample_every, recipes.sampler(config)

    def _of(transformer: HeliosTransformer, settings: SamplerSettings, name: str = "") -> Callable[[int], Clip] | None:
        return video_sampler(config, folder, transformer, data, settings, name) if main else None

    if not isinstance(stage, DistillStage):
        return [Videos(_of(stage.transformer, own), every, ema)]
    teacher = _of(stage.roles.scores.transformer, build.teacher_sampler(config), TEACHER)
    samples = [
        (STUDENT, STUDENT, _of(stage.transformer, own, STUDENT), None),
        ("ema", STUDENT, _of(stage.transformer, own, "ema"), ema),
        (TEACHER, TEACHER, teacher, None),
    ]
    return [
        Videos(sampler and _in_role(stage.roles, role, sampler), every, average, f"{NAME}/{name}")
        for name, role, sampler, average in samples
        if name != "ema" or average
    ]


def health(config: Config, folder: RunFolder, callbacks: Sequence[Callback], done: int, main: bool) -> Health:
    """What looks after the videos among `callbacks`; `done` iterations are in the checkpoint to go on from."""
    alarms = config.watch.alarms
    limits = {name: limit for name, limit in asdict(alarms).items() if name in RULES}
    sampled = [callback for callback in callbacks if isinstance(callback, Videos)]
    every = config.watch.every or config.checkpoint.every
    return Health(sampled, limits, alarms.start, every, AlarmLog(folder.alarms, done or None, main))


def _in_role(roles: Roles, role: str, sampler: Callable[[int], Clip]) -> Callable[[int], Clip]:
    def _sample(iteration: int) -> Clip:
        roles.present(role)
        with roles.backbone(role).run(roles.part(role)):
            return sampler(iteration)

    return _sample


def video_sampler(
    config: Config,
    folder: RunFolder,
    transformer: HeliosTransformer,
    data: WindowModule,
    settings: SamplerSettings,
    name: str = "",
) -> Callable[[int], Clip]:
    """Samples into videos/<iteration>_<name>_<caption>: the caption of the first held-out clip (else of the first clip).

    InputError where the codec has no weights to decode with.
    """
    watch = config.watch
    if isinstance(config.codec, WanCodec) and config.codec.weights is None:
        raise InputError(
            "watch.sample=true: sampling a video takes the weights of codec=wan, and codec.weights=null; name their diffusers "
            "folder, or set watch.sample=false"
        )
    clip = data.held_out[0] if data.held_out else 0
    text = StoredCaption(data.store, clip, config.text.rows)
    speed = sample.toy_speed(config)
    sampler = sample.VideoSampler(build.codec(config), text, settings, config.data.size, FPS, config.seed, toy_speed=speed)
    steps = settings.steps(None if settings.distilled else watch.sample_steps)  # refused now, not when the first video is due

    @torch.no_grad()
    def _sample(iteration: int) -> Clip:
        unfinished = folder.videos / "unfinished"
        plan = watch.sample_sections, steps, watch.sample_guidance
        saved, seen = sampler.sample(transformer, text.caption, NUMBER, *plan, unfinished)
        mp4, sheet, _ = (_move(Path(part), folder.videos, iteration, name) for part in saved)
        shutil.rmtree(unfinished)  # with what a killed run may have left in it
        print(f"{mp4}\n{sheet}", flush=True)
        if seen.toy:
            print(sample.summary([seen.toy]), flush=True)
        toy = {f"toy/{name}": float(value) for name, value in seen.toy.items() if value is not None}
        return Clip(mp4, sheet, text.caption, seen.drift.figures | toy)

    return _sample


def _move(part: Path, folder: Path, iteration: int, name: str) -> Path:
    """A finished file under the iteration, and the name of what was sampled, in place of the sampler's number."""
    return part.replace(folder / "_".join(filter(None, (f"{iteration:08d}", name, part.name.partition("_")[2]))))
