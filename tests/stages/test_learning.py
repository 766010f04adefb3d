"""That the whole step learns: minutes of training, so these run by hand (`pytest -m slow`)."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from helios_train.conf import compose
from helios_train.tasks import run_task

CLEAN = ["stage.corrupt.noise=0", "stage.corrupt.blur=0", "stage.corrupt.clean=1", "stage.corrupt.saturation_on_top=0"]


@pytest.mark.slow
def test_one_clip_is_overfitted(tmp_path: Path) -> None:
    overrides = [
        f"run_dir={tmp_path}/run",
        f"data.root={tmp_path}/shards",
        "data.size=[64,64]",
        "data.toy.clips=1",
        "data.toy.sections=2",
        "data.held_out=0",
        "data.global_batch=4",
        "data.micro_batch=4",
        "stage.caption_drop=0",
        "stage.flow.stratified=true",
        *CLEAN,
        "trainer.max_steps=1200",
        "trainer.log_every=1",
        "trainer.progress=false",
        "watch.sample=false",
        "optimizer.schedule=linear",
        "optimizer.decay=0.5",
    ]
    config = compose.compose_plain(overrides)
    run_task(compose.typed(config), compose.plain(config))
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    last = sum(losses[-50:]) / 50
    print(f"first loss {losses[0]:.4f}, mean of the last 50 {last:.4f}, ratio {last / losses[0]:.4f}")
    assert last < 0.02 * losses[0]
