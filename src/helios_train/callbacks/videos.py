"""Sampled videos while a run trains: into its folder, and to the loggers that show pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import lightning as L
import numpy as np
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from PIL import Image

from helios_train.models.ema import Ema
from helios_train.stages.stage import Stage

NAME = "video"  # of the videos in W&B and TensorBoard


class Clip(NamedTuple):
    """A sampled video: the mp4, its contact sheet (PNG), what it was asked to show, and what was measured of it, by name."""

    mp4: Path
    sheet: Path
    caption: str
    figures: Mapping[str, float] = MappingProxyType({})


class Videos(L.Callback):
    """Samples every `every` iterations (0: never) and after the last, on the average of the weights where there is one.

    `sample(iteration)` brings its own randomness and leaves the network's mode as it was: the run goes on as if it had not
    been called. With several devices the first samples and the others, which have no `sample`, wait for it.
    """

    def __init__(self, sample: Callable[[int], Clip] | None, every: int, ema: Ema | None, name: str = NAME):
        """`name`: of the videos in W&B and TensorBoard."""
        self.sample, self.every, self.ema, self.name = sample, every, ema, name
        self.figures: dict[str, float] = {}  # of the newest video

    def due(self, trainer: L.Trainer) -> bool:
        """Whether the iteration just done is one to sample after."""
        iteration = trainer.global_step
        return iteration == trainer.max_steps or bool(self.every and iteration % self.every == 0)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Where it is due."""
        assert isinstance(pl_module, Stage)
        if not self.due(trainer):
            return
        iteration = trainer.global_step
        if self.sample:
            with self.ema.swapped_in(pl_module.masters.weights) if self.ema else nullcontext():
                clip = self.sample(iteration)
            self.figures = dict(clip.figures)
            for logger in trainer.loggers:
                show(logger, clip, iteration, self.name)
        trainer.strategy.barrier(self.name)


def show(logger: Logger, clip: Clip, iteration: int, name: str = NAME) -> None:
    """The video to W&B; its contact sheet to TensorBoard, which would need another package to encode a video."""
    if isinstance(logger, WandbLogger):
        logger.log_video(name, [str(clip.mp4)], iteration, caption=[clip.caption])
    elif isinstance(logger, TensorBoardLogger):
        with Image.open(clip.sheet) as sheet:
            logger.experiment.add_image(name, np.asarray(sheet), iteration, dataformats="HWC")
