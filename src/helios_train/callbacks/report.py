"""report.html of a run is written whenever a video was sampled; a page that cannot be written is a warning and ends no run."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning as L

from helios_train.evaluation import report


class RunReport(L.Callback):
    """Writes the page every `every` iterations (0: never), on the first device. Stands after what writes figures and videos."""

    def __init__(self, folder: Path, every: int):
        self.folder, self.every = folder, every

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Where it is due; the last iteration's page is the task's, which writes one however the run ends."""
        due = self.every and trainer.global_step % self.every == 0 and trainer.global_step != trainer.max_steps
        if due and trainer.is_global_zero:
            write(self.folder)


def write(folder: Path) -> None:
    """Writes the page of a run folder, or warns."""
    try:
        report.write(folder)
    except Exception as error:  # whatever it is, the run is worth more
        reason = " ".join(str(error).split()) or type(error).__name__
        warnings.warn(f"the run report was not written ({reason}); the run itself is unharmed", stacklevel=2)
