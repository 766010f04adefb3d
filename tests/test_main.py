"""The command line as a process: exit codes, one-line errors, what it imports and what it leaves behind."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import helios_train
from helios_train.__main__ import main
from helios_train.conf.schema import Config
from helios_train.errors import HeliosError, InputError, Preempted

CHILD = ['hydra.run.dir="."', "hydra.job.name=train_ddp_process_1", "hydra.output_subdir=null"]  # Lightning's, for further ranks


def shell(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(helios_train.__file__).parents[1])}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """Run main() in an empty folder with `task` in place of every task; gives the exit code."""
    monkeypatch.chdir(tmp_path)

    def run(task: Callable[[Config, dict[str, Any]], None], *arguments: str) -> int:
        tasks = types.ModuleType("helios_train.tasks")
        tasks.run_task = task  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "helios_train.tasks", tasks)
        monkeypatch.setattr(sys, "argv", ["helios_train", *arguments])
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    return run


def test_help_is_quick_and_imports_no_torch(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = shell("-m", "helios_train", "--help", cwd=tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and "experiment=" in done.stdout and done.stderr == ""
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3  # seconds of CPU: other load does not count
    code = "import sys; sys.argv = ['x', '--help']; from helios_train.__main__ import main; main(); print('torch' in sys.modules)"
    assert shell("-c", code, cwd=tmp_path).stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize("argument", ["optimizer.lrr=1", "+a=1", "~stage", "optimizer.lr=x", "seed=-1", "stage=x", "=", "--x"])
def test_what_is_refused_takes_one_line_and_ends_with_2(argument: str, tmp_path: Path) -> None:
    done = shell("-m", "helios_train", argument, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("helios_train: ") and done.stderr.count("\n") == 1


def test_the_working_directory_hides_no_package(tmp_path: Path) -> None:
    (tmp_path / "omegaconf.py").write_text("raise SystemExit('imported from the working directory')")
    assert shell("-m", "helios_train", "--help", cwd=tmp_path).returncode == 0


@pytest.mark.parametrize("arguments", [[], CHILD], ids=["first rank", "further rank"])
@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (InputError("no such\nfolder"), 2, "helios_train: no such folder\n"),
        (HeliosError("lost"), 1, "helios_train: lost\n"),
        (Preempted(signal.SIGTERM, "x.ckpt"), 143, "helios_train: stopped by signal 15 after saving x.ckpt"),
        (Preempted(signal.SIGINT, "x.ckpt"), 130, "helios_train: stopped by signal 2"),
        (KeyboardInterrupt(), 130, "helios_train: interrupted\n"),
        (SystemExit(7), 7, ""),
        (ValueError("a defect"), 1, "ValueError: a defect"),
    ],
    ids=repr,
)
def test_exit_codes(
    run: Callable[..., int], arguments: list[str], error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def task(config: Config, raw: dict[str, Any]) -> None:
        raise error

    assert run(task, *arguments) == code
    heard = capsys.readouterr().err
    assert said in heard
    assert ("Traceback" in heard) == isinstance(error, ValueError)


def test_the_task_gets_the_config_and_nothing_else_is_written(run: Callable[..., int], tmp_path: Path) -> None:
    got = []
    assert run(lambda config, raw: got.append((config, raw)), "experiment=debug", "seed=3") == 0
    config, raw = got[0]
    assert (config.seed, config.experiment.name, raw["seed"], raw["trainer"]["max_steps"]) == (3, "debug", 3, 2)
    assert "hydra" not in raw
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_runs_every_combination_and_writes_nothing(run: Callable[..., int], tmp_path: Path) -> None:
    seen = []
    assert (
        run(lambda config, raw: seen.append((config.seed, config.optimizer.lr)), "-m", "seed=1,2", "optimizer.lr=1e-3,2e-3") == 0
    )
    assert seen == [(1, 1e-3), (1, 2e-3), (2, 1e-3), (2, 2e-3)]
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_is_checked_before_its_first_run(run: Callable[..., int]) -> None:
    seen = []
    assert run(lambda config, raw: seen.append(1), "-m", "seed=1,-2") == 2
    assert seen == []


def test_cfg_shows_and_runs_nothing(run: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    seen = []
    assert run(lambda config, raw: seen.append(1), "--cfg", "job", "--resolve") == 0
    assert "max_steps: 1700" in capsys.readouterr().out
    assert seen == [] and list(tmp_path.iterdir()) == []
