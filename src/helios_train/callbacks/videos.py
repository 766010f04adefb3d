"""Sampled videos while a run trains: into its folder, and to the loggers that show pictures."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from PIL import Image

from helios_train.models.ema import Ema
from helios_train.stages.stage import Stage

NAME = "video"  # of the videos in W&B and TensorBoard


class Clip(NamedTuple):
    """A sampled video: the mp4, its contact sheet (PNG), and what it was asked to show."""

    mp4: Path
    sheet: Path
    caption: str


class Videos(L.Callback):
    """Samples every `every` iterations (0: never) and after the last, on the average of the weights where there is one.

    `sample(iteration)` brings its own randomness and leaves the network's mode as it was: the run goes on as if it had not
    been called. With several devices the first samples and the others, which have no `sample`, wait for it.
    """

    def __init__(self, sample: Callable[[int], Clip] | None, every: int, ema: Ema | None, name: str = NAME):
        """`name`: of the videos in W&B and TensorBoard."""
        self.sample, self.every, self.ema, self.name = sample, every, ema, name

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Where it is due."""
        assert isinstance(pl_module, Stage)
        iteration = trainer.global_step
        if iteration != trainer.max_steps and not (self.every and iteration % self.every == 0):
            return
        if self.sample:
            with self.ema.swapped_in(pl_module.masters.weights) if self.ema else nullcontext():
                clip = self.sample(iteration)
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
