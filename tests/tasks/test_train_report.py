"""report.html and environment.json of a run, however it ends; a page that fails ends no run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from helios_train.callbacks import report as callback
from helios_train.callbacks.preempt import Preempt
from helios_train.errors import Preempted
from helios_train.evaluation import report
from helios_train.run import RunFolder
from helios_train.stages.stage import Stage
from helios_train.tasks import environment

RUN = ("trainer.max_steps=3", "checkpoint.every=1")


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows metrics.csv had whenever a page was written; none is written twice for nothing."""
    rows: list[int] = []
    write = report.write

    def noted(folder: Path) -> Path:
        rows.append(len((folder / "metrics.csv").read_text().splitlines()) - 1)
        return write(folder)

    monkeypatch.setattr(report, "write", noted)
    return rows


def test_a_run_has_its_page_with_every_video(tiny_run: Callable[..., None], tmp_path: Path, written: list[int]) -> None:
    tiny_run(*RUN, "watch.sample=true", "watch.sample_every=2", "watch.every=2", f"run_dir={tmp_path / 'run'}")
    page = (tmp_path / "run/report.html").read_text()
    assert len(written) == 2 and written[0] < written[1]
    assert page.count('src="data:video/mp4;base64,') == 2 and "iteration 3<" in page and "iteration 2<" in page
    assert page.count('<figure class="chart"') >= 6 and "held-out loss" in page and "missing, damaged" not in page
    assert "helios_train: stage base, recipe corrected" in page and "experiment" in page and len(page) < 2_000_000
    (start,) = json.loads((tmp_path / "run/environment.json").read_text())
    assert start["iteration"] == 0 and start["python"] in page and start["packages"]["torch"] in page


@pytest.mark.parametrize("how", ["signal", "error"])
def test_a_run_that_is_stopped_has_its_page_too(
    tiny_run: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: list[int], how: str
) -> None:
    step = Preempt.on_train_batch_end

    def stopped(self: Preempt, trainer: Any, *rest: Any) -> None:
        if trainer.global_step == 2 and how == "error":
            raise ZeroDivisionError("as if")
        if trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        step(self, trainer, *rest)

    monkeypatch.setattr(Preempt, "on_train_batch_end", stopped)
    with pytest.raises(Preempted if how == "signal" else ZeroDivisionError):
        tiny_run(*RUN, f"run_dir={tmp_path / 'run'}")
    assert written == [2] and "of 3<" in (tmp_path / "run/report.html").read_text()


def test_a_page_that_fails_is_a_warning(tiny_run: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(folder: Path) -> Path:
        raise RuntimeError("no\nroom")

    monkeypatch.setattr(report, "write", failing)
    with pytest.warns(UserWarning, match=r"report was not written \(no room\)") as warned:
        tiny_run(*RUN, "watch.sample=true", "watch.sample_every=1", "watch.sample_steps=1", f"run_dir={tmp_path / 'run'}")
    assert sum("report was not written" in str(one.message) for one in warned) == 3
    assert RunFolder(tmp_path / "run").newest_checkpoint() == tmp_path / "run/checkpoints/00000003.ckpt"
    assert not (tmp_path / "run/report.html").exists()


def test_the_environment_is_noted_once_for_each_that_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path)
    environment.note(folder, 0)
    environment.note(folder, 10)
    (first,) = json.loads(folder.environment.read_text())
    assert first["iteration"] == 0 and {"python", "system", "cores", "packages", "started"} <= first.keys()
    monkeypatch.setattr(environment, "collect", lambda: {"python": "4.0"})
    environment.note(folder, 20)
    assert [start["iteration"] for start in json.loads(folder.environment.read_text())] == [0, 20]
    folder.environment.write_text("{damaged")
    environment.note(folder, 30)
    assert [start["iteration"] for start in json.loads(folder.environment.read_text())] == [30]


def test_the_environment_names_no_place_and_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "secret-key")
    said = json.dumps(environment.collect())
    assert "secret-key" not in said and os.uname().nodename not in said
    assert str(Path.home()) not in said and str(Path.cwd()) not in said and str(Path(environment.__file__).parents[3]) not in said


@pytest.mark.skipif(shutil.which("git") is None, reason="there is no git here")
def test_the_commit_is_that_of_tracked_code(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        who = ("-c", "user.name=x", "-c", "user.email=x@y")
        return subprocess.run(
            ["git", "-C", str(tmp_path), *who, *words], check=True, capture_output=True, text=True
        ).stdout.strip()

    assert environment.commit(tmp_path) is None
    git("init", "-q")
    code = tmp_path / "code"
    code.mkdir()
    (code / "a.py").write_text("1\n")
    assert environment.commit(code) is None
    git("add", ".")
    git("commit", "-qm", "first")
    head = git("rev-parse", "--short=12", "HEAD")
    assert environment.commit(code) == head
    (code / "a.py").write_text("2\n")
    assert environment.commit(code) == head + "+"
    (tmp_path / "untracked").mkdir()
    (tmp_path / "untracked/b.py").write_text("1\n")
    assert environment.commit(tmp_path / "untracked") is None


def test_only_the_first_device_writes_and_only_where_a_video_came(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    monkeypatch.setattr(callback, "write", lambda folder: written.append(step))
    for first in (True, False):
        for step in range(1, 9):
            trainer: Any = SimpleNamespace(global_step=step, max_steps=8, is_global_zero=first)
            for every in (0, 3, 4):
                callback.RunReport(Path(), every).on_train_batch_end(trainer, Stage.__new__(Stage), None, None, 0)
    assert written == [3, 4, 6]
