"""What a run takes of its GPU beside what was planned, and what to say where that was too much."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch

from helios_train.errors import HeliosError
from helios_train.memory.plan import GIB, Plan
from helios_train.models import roles, transformer
from helios_train.stages import trainee
from helios_train.stages.stage import Stage

BETWEEN = "between"  # no moment that a plan knows


@dataclass(frozen=True)
class Device:
    """What a device tells of its memory: the most bytes that were allocated at once, and a picture of its allocator."""

    peak: Callable[[], int]
    snapshot: Callable[[], Any]


def device_of(where: torch.device) -> Device | None:
    """A GPU's; None of a CPU, which does not count."""
    if where.type != "cuda":
        return None
    return Device(lambda: torch.cuda.max_memory_allocated(where), torch.cuda.memory._snapshot)


class MemoryWatch(L.Callback):
    """Logs `memory/peak_gib`, measured so far, beside `memory/planned_gib` every `every` iterations, and explains running out.

    Without a device it logs nothing; without a plan the measured peak alone. `others` gives the `memory=` choices that
    take less, when they are asked for.
    """

    def __init__(self, every: int, device: Device | None, plan: Plan | None, others: Callable[[], Sequence[str]], folder: Path):
        self.every, self.device, self.plan, self.others, self.folder = every, device, plan, others, folder
        self.iteration = 0
        self._snapshot: Path | None = None

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        """Notes the iteration."""
        self.iteration = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs where it is due."""
        assert isinstance(pl_module, Stage)
        if self.device is None or trainer.global_step % self.every:
            return
        planned = {"memory/planned_gib": self.plan.peak} if self.plan else {}
        pl_module.report({"memory/peak_gib": self.device.peak() / GIB, **planned})

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Keeps the allocator's picture while what filled it is still there."""
        if self.device is None or not isinstance(exception, torch.OutOfMemoryError):
            return
        path = self.folder / "memory_snapshot.pickle"
        try:
            path.write_bytes(pickle.dumps(self.device.snapshot()))
            self._snapshot = path
        except (OSError, RuntimeError):  # the first error says more
            return

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Inside, running out of memory is a HeliosError with the plan, the moment and what to do."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise HeliosError(self._said(error)) from error

    def _said(self, error: torch.OutOfMemoryError) -> str:
        peak = f"measured peak {self.device.peak() / GIB:.1f} GiB" if self.device else ""
        plan = f"planned {self.plan.peak:.1f} GiB, in {self.plan.moment}" if self.plan else "there was no plan"
        known = "; ".join(part for part in (peak, plan) if part)
        others = list(self.others())
        less = f", or with memory={' or '.join(others)}, which take less" if others else ""
        seen = f"; {self._snapshot} shows what was allocated (pytorch.org/memory_viz)" if self._snapshot else ""
        reason = str(error).partition("\n")[0]
        return (
            f"out of memory in iteration {self.iteration}, in {moment_of(error)} ({reason}); {known}. Checkpoints are whole: "
            f"resume={self.folder} where more is free{less}; or start again with smaller data.micro_batch or data.size "
            f"(task=plan plan.all=true puts choices side by side){seen}"
        )


def moment_of(error: BaseException) -> str:
    """The moment of a step, as plans name them, that an error comes from: read off the functions it came through."""
    found = BETWEEN
    for frame, _ in traceback.walk_tb(error.__traceback__):
        function, own = (frame.f_globals.get("__name__"), frame.f_code.co_name), frame.f_locals
        if function in ((trainee.__name__, "add"), (trainee.__name__, "step")):
            found = f"{'backward' if function[1] == 'add' else 'step'} {own['self'].name}".strip()
        elif function == (roles.__name__, "_velocity"):
            found = own["role"]
        elif function == (roles.__name__, "_logits"):
            found = "adversary"
        elif function == (transformer.__name__, "velocity") and found == BETWEEN:
            found = "network"
    return found
