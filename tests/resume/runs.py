"""Runs in processes of their own that a test starts, stops and compares."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helios_train.memory.places import tensors_of
from helios_train.models.checkpoint import read

DRIVER = Path(__file__).with_name("driver.py")
STEPS, EVERY = 14, 2
TINY = [
    "experiment=debug",
    "model.heads=1",
    "model.head_dim=32",
    "model.rope_dim=[12,10,10]",
    "model.layers=1",
    "model.ffn_dim=32",
    "model.freq_dim=32",
    "data.size=[64,64]",
    "data.toy.clips=9",
    "data.toy.sections=2",
    "data.held_out=2",
    "data.global_batch=6",
    "stage.ema.decay=0.9",
    "watch.every=4",
    "watch.clips=2",
    "watch.sample=false",
    f"checkpoint.every={EVERY}",
    "checkpoint.keep=20",
    "trainer.log_every=1",
    "trainer.progress=false",
    "trainer.accelerator=cpu",
]
WITHOUT_TIME = "time/"


class Runs:
    """Starts runs over one shared set of shards."""

    def __init__(self, folder: Path):
        self.folder = folder

    def command(self, name: str, ranks: int, workers: int, *extra: str) -> tuple[list[str], dict[str, str]]:
        """Command line and environment of a run; two ranks take one sample at a time, one rank two: accumulation 3."""
        steps = [] if any(argument.startswith("trainer.max_steps") for argument in extra) else [f"trainer.max_steps={STEPS}"]
        arguments = [*TINY, *steps, f"run_dir={self.folder / name}", f"data.root={self.folder / 'shards'}"]
        arguments += [f"trainer.devices={ranks}", f"data.workers={workers}", *extra]
        if not any(argument.startswith("data.micro_batch") for argument in extra):
            arguments.append(f"data.micro_batch={2 // ranks}")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HELIOS_TRAIN_TEST_RECORD": str(self.folder / f"{name}.draws")}
        return [sys.executable, str(DRIVER), *arguments], environment

    def run(self, name: str, ranks: int, workers: int, *extra: str, code: int = 0) -> Path:
        """Runs to the end; the run folder."""
        command, environment = self.command(name, ranks, workers, *extra)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == code, done.stdout[-2000:] + done.stderr[-2000:]
        return self.folder / name

    def stop(self, name: str, ranks: int, workers: int, number: int, after: int, *extra: str) -> int:
        """Starts a run, sends it a signal once it has logged `after` iterations; its exit code."""
        command, environment = self.command(name, ranks, workers, *extra)
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline and iterations_of(self.folder / name) < after:
            time.sleep(0.005)
        assert process.poll() is None, f"the run ended before iteration {after}"
        if number == signal.SIGKILL:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        return process.wait(timeout=120)


def iterations_of(run: Path) -> int:
    metrics = run / "metrics.csv"
    if not metrics.is_file():
        return -1
    return max((int(row["iteration"]) for row in _rows(metrics) if (row["iteration"] or "").isdigit()), default=-1)


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def metrics(run: Path) -> list[dict[str, str]]:
    """Rows of the log without what no two runs agree on."""
    return [
        {name: value for name, value in row.items() if value and not name.startswith(WITHOUT_TIME)}
        for row in _rows(run / "metrics.csv")
    ]


def draws(run: Path) -> dict[tuple[int, int], list[Any]]:
    """What each (iteration, position) saw last, over all ranks."""
    seen = {}
    for path in sorted(run.parent.glob(f"{run.name}.draws.*")):
        for line in path.read_text().splitlines():
            iteration, position, *rest = json.loads(line)
            seen[iteration, position] = rest
    return seen


def assert_same_state(one: Any, other: Any, where: str = "checkpoint") -> None:
    """Bit equality of two nests of tensors and plain Python."""
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same_state(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for index, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_same_state(left, right, f"{where}[{index}]")
    else:
        assert one == other, where


def assert_same_run(one: Path, other: Path) -> None:
    """The two runs' last checkpoints, samples, draws and logs are equal."""
    first, second = (read(run / "checkpoints" / f"{STEPS:08d}.ckpt") for run in (one, other))
    for key in ("state_dict", "optimizer_states", "callbacks", "counters", "WindowModule", "global_step"):
        assert_same_state(first[key], second[key], key)
    assert first["global_step"] == STEPS
    assert draws(one) == draws(other)
    assert len(draws(one)) == 6 * STEPS
    assert metrics(one) == metrics(other)
    logged = [int(row["iteration"]) for row in metrics(one) if "loss" in row or "critic/loss/critic" in row]
    assert logged == list(range(1, STEPS + 1))


def of(stage: str, runs: Runs) -> list[str]:
    """The words of a stage; mid trains every weight of the base run, so that as much can go wrong as in base; in distill the base
    run is teacher and student alike, and the adversary starts on the way."""
    base = f"{runs.folder}/whole_base1"
    few = ["stage.student.steps=[2]", "stage.lora.rank=2", "stage.every=3", "stage.ema.start=0", "stage.critic.lr=1e-3"]
    few += ["stage.gan.start=6", "stage.gan.head_width=32"]  # a start that some are killed before and some after
    words = {
        "base": [],
        "mid": [f"init={base}", "stage.trainable=full"],
        "distill": [f"init={base}", f"stage.teacher={base}", *few],
    }
    return [f"stage={stage}", *words[stage]]


def killed_and_resumed(runs: Runs, whole: Path, stage: str, ranks: int, workers: int) -> None:
    """A run killed somewhere and resumed is the whole one."""
    after = random.SystemRandom().randint(EVERY + 1, STEPS - 7)  # early enough not to finish meanwhile
    name = f"killed_{stage}{ranks}{workers}"
    assert runs.stop(name, ranks, workers, signal.SIGKILL, after, *of(stage, runs)) == -signal.SIGKILL
    newest = max(int(path.stem) for path in (runs.folder / name / "checkpoints").glob("*.ckpt"))
    assert newest < STEPS, f"killed after iteration {after}, yet it finished"
    assert_same_run(whole, runs.run(name, ranks, workers, *of(stage, runs), "resume=auto"))


def last_tensors(folder: Path) -> list[Tensor]:
    """All of the last checkpoint, in its order."""
    return list(tensors_of(read(max((folder / "checkpoints").glob("*.ckpt")))))
