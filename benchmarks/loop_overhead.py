"""What our loop costs: iterations under Lightning with every callback, against a bare PyTorch loop over the same step.

The two take turns in one process, block by block, so that the machine's mood falls on both; medians of single iterations are
compared. Waiting for data is the run's own column `time/data_wait_share`.

Usage: python benchmarks/loop_overhead.py [model] [blocks]
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn

from helios_train.callbacks.metrics_csv import MetricsCsv
from helios_train.conf.compose import compose
from helios_train.run import RunFolder
from helios_train.tasks import build, prepare, recipes, train

BLOCK = 6  # iterations a turn; the first of each is not counted
RESULT = Path(__file__).parent / "results" / "loop_overhead.json"


class Clock(L.Callback):
    """Seconds from one iteration's end to the next one's."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.ends.append(time.perf_counter())


def seconds(ends: list[float]) -> list[float]:
    """Durations of all iterations but the first."""
    return [after - before for before, after in zip(ends, ends[1:], strict=False)]


def ours(overrides: list[str], folder: Path) -> tuple[list[float], list[float]]:
    """One turn of the real run: seconds of its iterations, and the data wait shares it logged."""
    config = compose([*overrides, f"run_dir={folder}"])
    run = RunFolder.create(folder, folder)
    data, stage = build.data(config), build.stage(config)
    clock = Clock()
    callbacks = [*train.watchers(config, run, stage, data, build.ema(config, stage), 0), clock]
    trainer = train.trainer(config, run, callbacks, [MetricsCsv(run.metrics, None)])
    trainer.fit(stage, datamodule=data)
    rows = [line.split(",") for line in run.metrics.read_text().splitlines()]
    column = rows[0].index("time/data_wait_share")
    return seconds(clock.ends), [float(row[column]) for row in rows[2:] if row[column]]


def bare(overrides: list[str]) -> list[float]:
    """One turn of the bare loop over the same data, draws, network, objective, optimizer and moving average."""
    config = compose(overrides)
    data, stage = build.data(config), build.stage(config)
    optimizer, ema = recipes.optimizer(config, stage.masters), build.ema(config, stage)
    assert ema is not None
    ends = []
    for _, windows in zip(range(BLOCK), data.train_dataloader(), strict=False):
        for window in (window.to("cpu") for window in windows):
            draws = stage.draws(window)
            history = stage.history(window, draws)
            loss = stage.recipe.objective(stage.transformer.velocity, window.target, window.text, history, draws.flow)
            (loss.total / len(windows)).backward()
        nn.utils.clip_grad_norm_(list(stage.masters), config.optimizer.clip)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(stage.masters.masters)
        ends.append(time.perf_counter())
    return seconds(ends)


def main(model: str = "small", blocks: int = 4) -> None:
    """Prints the ratio and writes it with the machine's name."""
    with tempfile.TemporaryDirectory() as scratch:
        overrides = [
            f"model={model}",
            "data.size=[64,64]",
            "data.toy.clips=8",
            "data.held_out=2",
            "data.global_batch=4",
            "data.micro_batch=2",
            f"data.root={scratch}/shards",
            f"trainer.max_steps={BLOCK}",
            "trainer.log_every=1",
            "trainer.progress=false",
            "trainer.accelerator=cpu",
            "stage.ema.decay=0.99",
            "watch.every=0",
            "watch.sample=false",
        ]
        prepare.toy_shards(compose(overrides))
        loop: list[float] = []
        plain: list[float] = []
        waits: list[float] = []
        for block in range(blocks):
            plain += bare(overrides)
            took, waited = ours(overrides, Path(scratch) / f"run{block}")
            loop += took
            waits += waited
    result = {
        "model": model,
        "iterations": len(loop),
        "ours_s": statistics.median(loop),
        "bare_s": statistics.median(plain),
        "ratio": statistics.median(loop) / statistics.median(plain),
        "data_wait_share": statistics.median(waits),
        "machine": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:2], *(int(argument) for argument in sys.argv[2:3]))
