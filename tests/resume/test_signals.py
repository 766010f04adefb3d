"""Signals save and leave; what may change on going on, and which run that is."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest

from helios_train.models.checkpoint import read

from .runs import Runs, iterations_of

FEWER = [pytest.param(signal.SIGINT, 1, marks=pytest.mark.slow), pytest.param(signal.SIGTERM, 2, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("number", "ranks"), [(signal.SIGTERM, 1), *FEWER])
def test_signals_save_and_leave(runs: Runs, number: signal.Signals, ranks: int) -> None:
    name = f"signal{int(number)}{ranks}"
    extra = ("trainer.max_steps=100000", "checkpoint.every=100000", "watch.every=0")
    assert runs.stop(name, ranks, 0, number, 3, *extra) == 128 + number
    saved = list((runs.folder / name / "checkpoints").glob("*.ckpt"))
    assert len(saved) == 1
    content = read(saved[0])
    assert content["global_step"] == int(saved[0].stem) == iterations_of(runs.folder / name)
    assert content["WindowModule"]["iteration"] == content["global_step"]
    assert not list((runs.folder / name / "checkpoints").glob("*.tmp"))


def test_resume_refuses_what_may_not_change(runs: Runs) -> None:
    whole = runs.run("short", 1, 0, "trainer.max_steps=1")
    command, environment = runs.command(whole.name, 1, 0, "resume=auto", "optimizer.lr=0.5", "trainer.max_steps=20")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "optimizer.lr" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.slow
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
