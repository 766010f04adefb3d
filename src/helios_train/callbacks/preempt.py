"""SIGTERM and SIGINT: finish the iteration, save, and leave with 128 + the signal's number."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

import lightning as L

from helios_train.callbacks.checkpoint import RunCheckpoint
from helios_train.errors import Preempted

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Preempt(L.Callback):
    """Listens from the first iteration to the last; what listened before gets its place back."""

    def __init__(self, checkpoint: RunCheckpoint):
        self.checkpoint = checkpoint
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes the signals over, from Lightning too, which would end the process at once."""
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stops every device at the same iteration if any of them was asked to.

        The first device raises Preempted; the others end quietly, or their parent would take them for crashed.
        """
        stop = self.received is not None
        if trainer.world_size > 1:
            stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
        if not stop:
            return
        path = self.checkpoint.save(trainer)
        trainer.strategy.barrier()
        trainer.should_stop = True
        if trainer.is_global_zero:
            raise Preempted(self.received or signal.SIGTERM, str(path))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Gives the signals back."""
        self._release()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Gives the signals back."""
        self._release()

    def _release(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
