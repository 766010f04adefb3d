"""When what an iteration logged leaves the process."""

from __future__ import annotations

from typing import Any

import lightning as L


class SaveLoggers(L.Callback):
    """Ends every iteration's row: what it logged is on its way to disk before the next begins. Stands after all that log."""

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Every logger."""
        for logger in trainer.loggers:
            logger.save()
