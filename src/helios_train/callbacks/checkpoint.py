"""When checkpoints are written: every so many iterations, at the end, before a stop; the newest few are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from helios_train.errors import HeliosError
from helios_train.stages.stage import Stage


class RunCheckpoint(Checkpoint):
    """Writes `<folder>/<iteration>.ckpt`, and ends a run that computes nothing finite any more."""

    def __init__(self, folder: Path, every: int, keep: int, nonfinite_limit: int):
        self.folder, self.every, self.keep, self.nonfinite_limit = folder, every, keep, nonfinite_limit

    def save(self, trainer: L.Trainer) -> Path:
        """Writes the checkpoint of the current iteration (collective: every device calls it), unless it is there."""
        path = self.folder / f"{trainer.global_step:08d}.ckpt"
        if not trainer.strategy.broadcast(path.exists()):  # the first device's answer: it may write before another looks
            trainer.save_checkpoint(path)
        if trainer.is_global_zero:
            for old in sorted(self.folder.glob("*.ckpt"))[: -self.keep]:
                old.unlink()
        return path

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves where it is due."""
        assert isinstance(pl_module, Stage)
        if pl_module.skipped_in_a_row >= self.nonfinite_limit:
            path = self.save(trainer)
            raise HeliosError(
                f"the loss or its gradient was not finite in {self.nonfinite_limit} iterations in a row; stopped after saving "
                f"{path}: lower optimizer.lr, or go back to an earlier checkpoint and look at the data"
            )
        if trainer.global_step % self.every == 0:
            self.save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves the last iteration."""
        self.save(trainer)
