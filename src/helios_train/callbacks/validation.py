"""Held-out loss by sigma: with the full history, with it dropped, and with a wrong caption; and by quantile of what is trained.

The mean hides whether history is used: at middle levels the noisy section itself says enough. At high sigma it does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import numpy as np
import torch

from helios_train import rng
from helios_train.data.batch import Window
from helios_train.diffusion.schedule import token_count
from helios_train.models.ema import Ema
from helios_train.objectives.flow import FlowDraw, FlowObjective
from helios_train.stages.stage import Stage

FULL_HISTORY = 3  # the first section that has all 19 frames


class HeldOut(L.Callback):
    """Validates before the first iteration and every `every` after it, on the average of the weights where there is one.

    Noise depends on (seed, clip, sigma) alone: every validation of a run, and of its resumed self, sees the same.
    """

    def __init__(
        self,
        objective: FlowObjective,
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
        """`held_out/<case>/sigma_<s>` and `held_out/<case>`, the mean over the levels, for full, dropped and wrong_caption.

        And `held_out/full/quantile_<i>`, i from 1 (little noise) to Q: at the (i - 1/2) / Q quantile of the levels the run
        trains on, after the shift for the clip's tokens. Their mean estimates the unweighted training loss.
        """
        sums: dict[str, list[float]] = {}
        for window in (window.to(stage.device) for window in windows):
            cases = {
                "full": (window.text, window.history),
                "dropped": (window.text, window.history.dropped()),
                "wrong_caption": (other_captions(window.text), window.history),
            }
            for sigma in self.sigmas:
                draw = self._draw(window, sigma)
                for case, (text, history) in cases.items():
                    errors = self.objective.errors(stage.transformer.velocity, window.target, text, history, draw)
                    sums.setdefault(f"held_out/{case}/sigma_{sigma:g}", []).extend(errors.tolist())
            levels = self.objective.levels.quantiles(self.quantiles, token_count(*window.target.shape[2:]))
            for number, sigma in enumerate(levels.tolist(), start=1):
                draw = self._draw(window, sigma)
                errors = self.objective.errors(stage.transformer.velocity, window.target, *cases["full"], draw)
                sums.setdefault(f"held_out/full/quantile_{number}", []).extend(errors.tolist())
        metrics = {name: float(np.mean(values)) for name, values in sums.items()}
        for case in ("full", "dropped", "wrong_caption"):
            metrics[f"held_out/{case}"] = float(np.mean([metrics[f"held_out/{case}/sigma_{sigma:g}"] for sigma in self.sigmas]))
        return metrics

    def _draw(self, window: Window, sigma: float) -> FlowDraw:
        shape = tuple(window.target.shape[1:])
        place = round(sigma * 1e6)
        noise = [rng.normal(rng.generator(self.seed, "held out", ref.sample, place), shape) for ref in window.refs]
        return FlowDraw(np.full(len(noise), sigma, dtype=np.float32), torch.stack(noise))


def other_captions(text: torch.Tensor) -> torch.Tensor:
    """Text [B, rows, dim] in which each sample has the next sample's that differs from its own, if there is one."""
    batch = len(text)
    chosen = []
    for sample in range(batch):
        others = [(sample + step) % batch for step in range(1, batch)]
        chosen.append(next((other for other in others if not torch.equal(text[other], text[sample])), sample))
    return text[chosen]
