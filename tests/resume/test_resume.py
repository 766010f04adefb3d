"""Killed and resumed equals never killed: weights, moments, EMA, samples, draws and metrics, bit for bit."""

from __future__ import annotations

import csv
import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

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
        while process.poll() is None and time.monotonic() < deadline and _iterations(self.folder / name) < after:
            time.sleep(0.005)
        assert process.poll() is None, f"the run ended before iteration {after}"
        if number == signal.SIGKILL:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        return process.wait(timeout=120)


def _iterations(run: Path) -> int:
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


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("resume"))


@pytest.fixture(scope="module")
def unkilled(runs: Runs) -> Callable[[str, int], Path]:
    """Runs that nobody disturbed, each made once."""

    @functools.cache
    def made(stage: str, ranks: int) -> Path:
        if stage != "base":
            made("base", 1)
        return runs.run(f"whole_{stage}{ranks}", ranks, 0, *of(stage, runs))

    return made


def of(stage: str, runs: Runs) -> list[str]:
    """The words of a stage; mid trains every weight of the base run, so that as much can go wrong as in base; in distill the base
    run is teacher and student alike."""
    base = f"{runs.folder}/whole_base1"
    few = ["stage.student.steps=[2]", "stage.lora.rank=2", "stage.every=3", "stage.ema.start=0", "stage.critic.lr=1e-3"]
    words = {
        "base": [],
        "mid": [f"init={base}", "stage.trainable=full"],
        "distill": [f"init={base}", f"stage.teacher={base}", *few],
    }
    return [f"stage={stage}", *words[stage]]


@pytest.mark.parametrize(
    ("stage", "ranks", "workers"),
    [("base", 1, 2), ("base", 2, 0), ("mid", 1, 0), ("mid", 2, 2), ("distill", 1, 2), ("distill", 2, 0)],
)
def test_killed_and_resumed_is_bit_equal(
    runs: Runs, unkilled: Callable[[str, int], Path], stage: str, ranks: int, workers: int
) -> None:
    whole = unkilled(stage, ranks)
    after = random.SystemRandom().randint(EVERY + 1, STEPS - 7)  # early enough not to finish meanwhile
    name = f"killed_{stage}{ranks}{workers}"
    assert runs.stop(name, ranks, workers, signal.SIGKILL, after, *of(stage, runs)) == -signal.SIGKILL
    newest = max(int(path.stem) for path in (runs.folder / name / "checkpoints").glob("*.ckpt"))
    assert newest < STEPS, f"killed after iteration {after}, yet it finished"
    assert_same_run(whole, runs.run(name, ranks, workers, *of(stage, runs), "resume=auto"))


def test_two_ranks_go_on_as_one(runs: Runs) -> None:
    micro = "data.micro_batch=1"
    whole = runs.run("elastic_whole", 2, 0, micro, "trainer.max_steps=15", "optimizer.total=15")
    runs.run("elastic", 2, 0, micro, "trainer.max_steps=4", "optimizer.total=15")
    other = runs.run("elastic", 1, 0, micro, "trainer.max_steps=15", "optimizer.total=15", "resume=auto")
    assert draws(whole) == draws(other)
    losses = [{int(row["iteration"]): float(row["loss"]) for row in metrics(run) if "loss" in row} for run in (whole, other)]
    assert losses[0].keys() == losses[1].keys() == set(range(1, 16))
    assert losses[1][5] == pytest.approx(losses[0][5], rel=1e-6)
    for iteration in range(5, 16):
        assert losses[1][iteration] == pytest.approx(losses[0][iteration], rel=1e-4)


@pytest.mark.parametrize(("number", "ranks"), [(signal.SIGTERM, 1), (signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_signals_save_and_leave(runs: Runs, number: signal.Signals, ranks: int) -> None:
    name = f"signal{int(number)}{ranks}"
    extra = ("trainer.max_steps=100000", "checkpoint.every=100000", "watch.every=0")
    assert runs.stop(name, ranks, 0, number, 3, *extra) == 128 + number
    saved = list((runs.folder / name / "checkpoints").glob("*.ckpt"))
    assert len(saved) == 1
    content = read(saved[0])
    assert content["global_step"] == int(saved[0].stem) == _iterations(runs.folder / name)
    assert content["WindowModule"]["iteration"] == content["global_step"]
    assert not list((runs.folder / name / "checkpoints").glob("*.tmp"))


def test_resume_refuses_what_may_not_change(runs: Runs, unkilled: Callable[[str, int], Path]) -> None:
    whole = unkilled("base", 1)
    command, environment = runs.command(whole.name, 1, 0, "resume=auto", "optimizer.lr=0.5", "trainer.max_steps=20")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "optimizer.lr" in done.stderr and done.stderr.count("\n") == 1


def test_resume_auto_finds_the_newest_unfinished_run(runs: Runs, tmp_path: Path) -> None:
    command, environment = runs.command("unused", 1, 0, "trainer.max_steps=2")
    command = [argument for argument in command if not argument.startswith("run_dir=")]
    first = subprocess.run([*command, "resume=auto"], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert first.returncode == 0 and "starting a new one" in first.stdout, first.stderr
    longer = [argument for argument in command if "max_steps" not in argument] + ["trainer.max_steps=4", "resume=auto"]
    second = subprocess.run(longer, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert second.returncode == 0, second.stderr
    assert "resuming" in second.stdout and "at iteration 2" in second.stdout
    assert len(list(tmp_path.glob("runs/base/debug/*"))) == 1
