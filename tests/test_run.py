"""Run folders: unique names, a lock that dies with its process, which run is gone on with."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

import helios_train
from helios_train.errors import InputError
from helios_train.run import RunFolder, compare_configs, default_folder, find_resumable, iteration_of

HOLD = """
import sys, time
from pathlib import Path
from helios_train.run import RunFolder
RunFolder(Path(sys.argv[1])).lock()
{then}
print("locked", flush=True)
time.sleep(60)
"""

WRITE = """
import os
import sys
from pathlib import Path
from helios_train.errors import InputError
from helios_train.run import RunFolder, write
run = RunFolder(Path(sys.argv[1]))
if os.geteuid() == 0:  # who may write anywhere
    os.setgid(65534)
    os.setuid(65534)
acts = [run.lock, lambda: run.save_config({}), lambda: write(run.card, "")]
for act in [*acts, lambda: RunFolder.create(run.path / "b", run.path)]:
    try:
        act()
    except InputError as error:
        print(error)
"""
SOURCE = str(Path(helios_train.__file__).parents[1])


def make(folder: Path, iterations: list[int], config: dict[str, Any] | None = None) -> RunFolder:
    run = RunFolder.create(folder, folder)
    run.save_config({"seed": 0} if config is None else config)
    for iteration in iterations:
        (run.checkpoints / f"{iteration:08d}.ckpt").touch()
    return run


def holder(folder: Path, then: str = "") -> subprocess.Popen[str]:
    """A process that holds the lock of `folder`."""
    environment = os.environ | {"PYTHONPATH": SOURCE}
    command = [sys.executable, "-c", HOLD.format(then=then), str(folder)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "locked\n"
    return process


def stop(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


class TestCreate:
    def test_layout(self, tmp_path: Path) -> None:
        run = RunFolder.create(None, tmp_path / "runs/base/x/2026-01-02_03-04-05")
        names = [
            path.relative_to(run.path).as_posix() for path in (run.checkpoints, run.videos, run.metrics, run.card, run.config)
        ]
        assert names == ["checkpoints", "videos", "metrics.csv", "run_card.txt", "config.yaml"]
        assert sorted(path.name for path in run.path.iterdir()) == ["checkpoints", "videos"]

    def test_default_is_made_unique(self, tmp_path: Path) -> None:
        made = [RunFolder.create(None, tmp_path / "a").path.name for _ in range(3)]
        assert made == ["a", "a_2", "a_3"]

    def test_a_given_folder_may_exist_but_holds_no_run(self, tmp_path: Path) -> None:
        (tmp_path / "a").mkdir()
        make(tmp_path / "a", [])
        with pytest.raises(InputError, match="already holds a run: go on with resume="):
            RunFolder.create(tmp_path / "a", tmp_path / "b")

    def test_a_folder_that_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(InputError, match="cannot create the run folder"):
            RunFolder.create(tmp_path / "file/run", tmp_path)

    def test_a_folder_without_the_right_to_write(self) -> None:
        with tempfile.TemporaryDirectory(prefix="helios_train_test_") as parent:
            os.chmod(parent, 0o755)  # another user may look in
            run = make(Path(parent) / "a", [])
            run.path.chmod(0o555)
            command, environment = [sys.executable, "-c", WRITE, str(run.path)], os.environ | {"PYTHONPATH": SOURCE}
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            run.path.chmod(0o755)
        said = done.stdout.splitlines()
        assert len(said) == 4, done.stderr
        for line, what in zip(said, ("lock the run folder", "write", "write", "create the run folder"), strict=True):
            assert f"cannot {what}: Permission denied; give yourself the right to write there" in line
        assert "config.yaml" in said[1] and "run_card.txt" in said[2]

    def test_default_name(self) -> None:
        assert default_folder("base", "toy_base", datetime(2026, 1, 2, 3, 4, 5)) == Path("runs/base/toy_base/2026-01-02_03-04-05")

    def test_open_wants_a_run(self, tmp_path: Path) -> None:
        assert RunFolder.open(make(tmp_path / "a", []).path).path == tmp_path / "a"
        for folder in (tmp_path / "none", tmp_path):
            with pytest.raises(InputError, match=r"no such run folder|holds no config\.yaml"):
                RunFolder.open(folder)


class TestLock:
    def test_another_process_is_named(self, tmp_path: Path) -> None:
        process = holder(tmp_path)
        try:
            run = RunFolder(tmp_path)
            assert run.locked()
            with pytest.raises(InputError, match=f"process {process.pid} is writing to this run"):
                run.lock()
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert not run.locked()
            run.lock()
            assert run.lock_file.read_text() == f"{os.getpid()}\n"
            run.unlock()
        finally:
            stop(process)

    def test_a_forked_child_does_not_keep_it(self, tmp_path: Path) -> None:
        fork = (
            "import os\nready, done = os.pipe()\nif os.fork() == 0:\n"
            "    os.write(done, b'.')\n    time.sleep(10)\n    os._exit(0)\nos.read(ready, 1)"
        )
        process = holder(tmp_path, fork)
        stop(process)
        RunFolder(tmp_path).lock()

    def test_lock_and_unlock_in_one_process(self, tmp_path: Path) -> None:
        first, second = RunFolder(tmp_path), RunFolder(tmp_path)
        assert not first.locked()
        first.lock()
        first.lock()
        assert second.locked()
        with pytest.raises(InputError, match=f"process {os.getpid()} "):
            second.lock()
        first.unlock()
        first.unlock()
        second.lock()
        second.unlock()

    def test_a_forked_worker_leaves_the_parents_lock(self, tmp_path: Path) -> None:
        run = RunFolder(tmp_path)
        run.lock()
        worker = multiprocessing.get_context("fork").Process(target=run.unlock)
        worker.start()
        worker.join()
        assert run.locked()
        run.unlock()


class TestCheckpoints:
    def test_newest_by_number(self, tmp_path: Path) -> None:
        run = make(tmp_path / "a", [500, 100000000, 99999999])
        (run.checkpoints / "999999999.ckpt.tmp").touch()
        (run.checkpoints / "last.ckpt").touch()
        newest = run.newest_checkpoint()
        assert newest is not None and iteration_of(newest) == 100000000

    def test_none(self, tmp_path: Path) -> None:
        assert RunFolder(tmp_path).newest_checkpoint() is None
        with pytest.raises(InputError, match="not named like a checkpoint"):
            iteration_of(tmp_path / "last.ckpt")


class TestConfig:
    def test_round_trip(self, tmp_path: Path) -> None:
        config = {"seed": 0, "optimizer": {"lr": 1e-5, "eps": 1e-8, "betas": [0.9, 0.99]}, "init": None, "note": "a: ü #"}
        run = make(tmp_path / "a", [], config)
        assert run.load_config() == config
        assert list(run.load_config()) == list(config)
        assert not list(run.path.glob("*.tmp"))

    @pytest.mark.parametrize("text", ["a: [", "- 1", ""])
    def test_damaged(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(InputError, match=r"config\.yaml: (is damaged|holds no config)"):
            RunFolder(tmp_path).load_config()

    def test_compare(self) -> None:
        saved = {"seed": 0, "trainer": {"devices": 1, "max_steps": 5}, "optimizer": {"betas": [0.9, 0.99]}, "old": None}
        now = {"seed": 1, "trainer": {"devices": 2, "max_steps": 9}, "optimizer": {"betas": (0.9, 0.99)}, "trainers": 1}
        assert compare_configs(saved, saved, ()) == []
        everything = ["old", "seed", "trainer.devices", "trainer.max_steps", "trainers"]
        assert compare_configs(saved, now, ()) == everything
        assert compare_configs(saved, now, ("trainer.devices",)) == ["old", "seed", "trainer.max_steps", "trainers"]
        assert compare_configs(saved, now, ("trainer", "old")) == ["seed", "trainers"]


class TestResumable:
    def test_the_newest_unfinished_same_and_unlocked(self, tmp_path: Path) -> None:
        for name, iterations, seed in [
            ("2026-01-01_00-00-00", [10], 0),
            ("2026-01-02_00-00-00_2", [20], 0),
            ("2026-01-02_00-00-00_10", [20], 0),
            ("2026-01-03_00-00-00", [100], 0),  # finished
            ("2026-01-04_00-00-00", [], 0),  # nothing saved
            ("2026-01-05_00-00-00", [20], 1),  # another config
        ]:
            make(tmp_path / name, iterations, {"seed": seed})
        make(tmp_path / "2026-01-06_00-00-00", [20]).config.write_text("a: [")  # damaged

        def find() -> str | None:
            found = find_resumable(tmp_path, lambda config: config["seed"] == 0, max_steps=100)
            return found and found.name

        assert find() == "2026-01-02_00-00-00_10"
        writer = RunFolder(tmp_path / "2026-01-02_00-00-00_10")
        writer.lock()
        assert find() == "2026-01-02_00-00-00_2"
        writer.unlock()
        assert find_resumable(tmp_path, lambda config: False, 100) is None
        assert find_resumable(tmp_path / "none", lambda config: True, 100) is None


def test_disk_is_checked(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.check_free(1)
    with pytest.raises(InputError, match="GB of disk"):
        run.check_free(10**18)
