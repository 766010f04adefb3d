"""How fast a run is, what it waits for, and its row in the logs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import lightning as L

from helios_train.stages.stage import Stage

WARM = 5  # first iterations of a run that are not timed: allocation, caches


class Throughput(L.Callback):
    """Logs the stage's last step every `every` iterations, with seconds a step, samples a second and the share spent on data.

    Columns of time start with `time/`: no two runs agree on them. `on_measured(seconds)`, if given, is called once, when a
    step's time is known.
    """

    def __init__(self, every: int, global_batch: int, on_measured: Callable[[float], None] | None = None):
        self.every, self.global_batch, self.on_measured = every, global_batch, on_measured
        self._steps = self._done = 0
        self._waited = 0.0
        self._since = self._ended = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the clock."""
        self._since = self._ended = time.perf_counter()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        """The batch is there: what passed since the last step was waiting."""
        self._waited += time.perf_counter() - self._ended

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs where it is due."""
        assert isinstance(pl_module, Stage)
        self._steps += 1
        self._done += 1
        now = time.perf_counter()
        if self._done == WARM:
            self._since, self._waited, self._steps = now, 0.0, 0
        if self._done == 2 * WARM and self.on_measured:
            self.on_measured((now - self._since) / max(1, self._steps))
        if trainer.global_step % self.every == 0:
            pl_module.report({**pl_module.last, **self._times(now)})
            self._since, self._waited, self._steps = time.perf_counter(), 0.0, 0
        self._ended = time.perf_counter()

    def _times(self, now: float) -> dict[str, float]:
        if not self._steps:
            return {}
        seconds = max(1e-9, now - self._since)
        return {
            "time/step_seconds": seconds / self._steps,
            "time/samples_per_second": self.global_batch * self._steps / seconds,
            "time/data_wait_share": self._waited / seconds,
        }
