"""Training through our forward and through diffusers' own: the same losses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import HeliosTransformer3DModel
from torch import Tensor

from helios_train.callbacks.metrics_csv import read_rows
from helios_train.history import History
from helios_train.models import loading

STEPS = 20


class Diffusers(HeliosTransformer3DModel):
    """diffusers' module with the calls a stage makes."""

    def velocity(self, x_t: Tensor, t: Tensor, text: Tensor, history: History) -> Tensor:
        first, long, mid, short, target = torch.arange(29)[None].split([1, 16, 2, 1, 9], dim=1)
        output = self(
            x_t,
            t,
            text,
            indices_hidden_states=target,
            indices_latents_history_short=torch.cat([first, short], dim=1),
            indices_latents_history_mid=mid,
            indices_latents_history_long=long,
            latents_history_short=torch.cat([history.anchor, history.short], dim=2),
            latents_history_mid=history.mid,
            latents_history_long=history.long,
            return_dict=False,
        )
        return output[0]  # type: ignore[no-any-return]

    def compute_with(self, *_: Any, **__: Any) -> None:
        """It computes as it does."""

    def checkpoint_blocks(self, *_: Any, **__: Any) -> None:
        self.enable_gradient_checkpointing()


@pytest.mark.parametrize("checkpointing", ["true", "false"])
def test_twenty_iterations(
    tiny_run: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpointing: str
) -> None:
    found = []
    for name, kind in (("ours", None), ("theirs", Diffusers)):
        if kind:
            monkeypatch.setattr(loading, "HeliosTransformer", kind)
        run = tmp_path / name
        tiny_run(f"run_dir={run}", f"trainer.max_steps={STEPS}", f"memory.checkpointing={checkpointing}", "optimizer.lr=0.01")
        found.append(
            [(values["loss"], values["gradient_norm"]) for _, values in read_rows(run / "metrics.csv") if "loss" in values]
        )
    ours, theirs = (torch.tensor(values, dtype=torch.float64) for values in found)
    assert len(ours) == STEPS and ours[:, 0].std() > 0.01 and not torch.equal(ours, theirs)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
