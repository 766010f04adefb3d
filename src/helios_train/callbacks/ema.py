"""Keeps the moving average of the weights up to date, and in the checkpoint."""

from __future__ import annotations

from typing import Any

import lightning as L

from helios_train.models.ema import Ema
from helios_train.stages.stage import Stage


class EmaCallback(L.Callback):
    """Updates the average after every iteration that trained what it follows."""

    def __init__(self, ema: Ema):
        self.ema = ema

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After the optimizer step."""
        assert isinstance(pl_module, Stage)
        if pl_module.averages_now:
            self.ema.update(pl_module.masters.masters)

    def state_dict(self) -> dict[str, Any]:
        """Under the callback's name in the checkpoint."""
        return self.ema.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the average back."""
        self.ema.load_state_dict(state_dict)
