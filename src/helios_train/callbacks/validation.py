"""Held-out loss by sigma, and by level where there are several: with the full history, with it dropped, and with a wrong
caption; and by quantile of what is trained.

The mean hides whether history is used: at middle levels the noisy section itself says enough. At high sigma it does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor

from helios_train import rng
from helios_train.data.batch import Window
from helios_train.history import History
from helios_train.models.ema import Ema
from helios_train.objectives.flow import Objective
from helios_train.stages.stage import Stage

CASES = ("full", "dropped", "wrong_caption")
FULL_HISTORY = 3  # the first section that has all 19 frames


class HeldOut(L.Callback):
    """Validates before the first iteration and every `every` after it, on the average of the weights where there is one.

    Noise depends on (seed, clip, sigma) alone: every validation of a run, and of its resumed self, sees the same.
    """

    def __init__(
        self,
        objective: Objective,
        sigmas: Sequence[float],
        quantiles: int,
        clips: int,
        every: int,
        seed: int,
        ema: Ema | None,
    ):
        self.objective, self.sigmas, self.quantiles, self.clips = objective, tuple(sigmas), quantiles, clips
        self.every, self.seed, self.ema = every, seed, ema

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The value before training; a resumed run has it already."""
        if trainer.global_step == 0:
            self._run(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Where it is due."""
        if trainer.global_step % self.every == 0:
            self._run(trainer, pl_module)

    def _run(self, trainer: L.Trainer, stage: L.LightningModule) -> None:
        assert isinstance(stage, Stage)
        windows = trainer.datamodule.held_out_windows(self.clips, FULL_HISTORY)  # type: ignore[attr-defined]
        if self.ema is None:
            metrics = self.measure(stage, windows)
        else:
            with self.ema.swapped_in(stage.masters.weights):
                metrics = self.measure(stage, windows)
        stage.report(metrics)

    @torch.no_grad()
    def measure(self, stage: Stage, windows: list[Window]) -> dict[str, float]:
        """`held_out/<case>/sigma_<s>` and `held_out/<case>`, the mean over the sigmas, for full, dropped and wrong_caption.

        And `held_out/full/quantile_<i>`, i from 1 (little noise) to Q: at the (i - 1/2) / Q quantile of the sigmas the run
        trains on, after the shift for the clip's tokens. Their mean estimates the unweighted training loss. Where the objective
        has several parts, `held_out/<case>/level_<k>` stands in the place of `held_out/<case>`, which is their mean.
        """
        sums: dict[str, list[float]] = {}

        def add(window: Window, draw: Any, case: str, what: str, text: Tensor, history: History) -> None:
            rows = self.objective.errors(stage.transformer.velocity, window.target, text, history, draw)
            for part, errors in zip(self.objective.parts, rows.tolist(), strict=True):
                sums.setdefault(_name(case, part, what), []).extend(errors)

        for window in (window.to(stage.device) for window in windows):
            given = (
                (window.text, window.history),
                (window.text, window.history.dropped()),
                (other_captions(window.text), window.history),
            )
            for sigma in self.sigmas:
                draw = self.objective.at_sigma(sigma, self._noise(window, round(sigma * 1e6)))
                for case, conditions in zip(CASES, given, strict=True):
                    add(window, draw, case, f"sigma_{sigma:g}", *conditions)
            for number, draw in enumerate(self.objective.at_quantiles(self.quantiles, self._noise(window, 0)), start=1):
                add(window, draw, "full", f"quantile_{number}", *given[0])
        metrics = {name: float(np.mean(values)) for name, values in sums.items()}
        for case in CASES:
            for part in self.objective.parts:
                metrics[_name(case, part)] = float(np.mean([metrics[_name(case, part, f"sigma_{s:g}")] for s in self.sigmas]))
            metrics[_name(case)] = float(np.mean([metrics[_name(case, part)] for part in self.objective.parts]))
        return metrics

    def _noise(self, window: Window, place: int) -> Tensor:
        shape = tuple(window.target.shape[1:])
        return torch.stack([rng.normal(rng.generator(self.seed, "held out", ref.sample, place), shape) for ref in window.refs])


def _name(case: str, part: str = "", what: str = "") -> str:
    return "/".join(filter(None, ("held_out", case, part, what)))


def other_captions(text: torch.Tensor) -> torch.Tensor:
    """Text [B, rows, dim] in which each sample has the next sample's that differs from its own, if there is one."""
    batch = len(text)
    chosen = []
    for sample in range(batch):
        others = [(sample + step) % batch for step in range(1, batch)]
        chosen.append(next((other for other in others if not torch.equal(text[other], text[sample])), sample))
    return text[chosen]
