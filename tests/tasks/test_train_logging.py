"""A run at W&B and TensorBoard as the command line leaves it: one row an iteration, over sweeps, kills and signals."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from helios_train.callbacks.metrics_csv import read_rows
from helios_train.callbacks.wandb_run import last_step, records
from helios_train.errors import InputError, Preempted

RUN = (
    "experiment=debug",
    "model.head_dim=16",
    "model.rope_dim=[8,4,4]",
    "data.toy.clips=8",
    "trainer.accelerator=cpu",
    "watch.every=4",
)
WANDB = ("logger=wandb", "logger.tags=[a,b]")
EVERY = 8  # iterations from one checkpoint, and one video, to the next
LONG = (
    f"checkpoint.every={EVERY}",
    f"watch.sample_every={EVERY}",
    "trainer.max_steps=20000",
    "optimizer.total=20000",
    "checkpoint.keep=2",
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logging") / "shards"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Without a key, and with W&B writing its file at once."""
    home = tmp_path_factory.mktemp("home")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "HELIOS_TRAIN"))}
    return kept | {"HOME": str(home), "WANDB__TRANSACTION_LOG_FLUSH_INTERVAL": "0.1", "OMP_NUM_THREADS": "1"}


def command(shards: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "helios_train", *overrides[:1], *RUN, *WANDB, f"data.root={shards}", *overrides[1:]]


def files(run: Path) -> list[Path]:
    """W&B's files of a run, oldest first."""
    return sorted(run.glob("wandb/*run-*/run-*.wandb"))


def content(path: Path) -> dict[str, Any]:
    """Run, history {iteration: {name: value}} and exit code of one of W&B's files."""
    found: dict[str, Any] = {"rows": [], "exit": None}
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found["run"] = record.run
            found["config"] = {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "history":
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            found["rows"].append((record.history.step.num, items))
        elif kind == "exit":
            found["exit"] = record.exit.exit_code
    return found


def numbers(rows: list[tuple[int, dict[str, Any]]]) -> dict[int, dict[str, Any]]:
    """Metrics by iteration, as comparable text (NaN equals itself), without times, videos and what W&B adds; an iteration
    that comes twice fails."""
    assert len({step for step, _ in rows}) == len(rows)
    left_out = ("_", "time/", "trainer/", "video")
    return {
        step: {name: repr(float(value)) for name, value in row.items() if not name.startswith(left_out)} for step, row in rows
    }


def logged(run: Path) -> dict[int, dict[str, str]]:
    """The same of metrics.csv."""
    merged: dict[int, dict[str, float]] = {}
    for step, values in read_rows(run / "metrics.csv"):
        merged.setdefault(step, {}).update(values)
    return {
        step: {name: repr(value) for name, value in row.items() if not name.startswith("time/")} for step, row in merged.items()
    }


def test_a_sweep_of_two_is_two_runs(shards: Path, environment: dict[str, str], tmp_path: Path) -> None:
    words = command(shards, "-m", "seed=0,1", "watch.sample_steps=1")
    done = subprocess.run(
        words, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "wandb:" not in done.stdout + done.stderr and "W&B: offline, id " in done.stdout
    runs = sorted((tmp_path / "runs/base/debug").iterdir())
    assert len(runs) == 2 and sorted(path.name for path in tmp_path.iterdir()) == ["runs"]
    assert {path.name for path in Path(environment["HOME"]).iterdir()} <= {".cache"}  # of W&B's own service, shared by all runs
    ids = set()
    for seed, run in enumerate(runs):
        (path,) = files(run)
        found = content(path)
        ids.add(found["run"].run_id)
        assert found["config"]["seed"] == seed and found["config"]["optimizer"]["lr"] == 0.002
        assert found["exit"] == 0  # ended in order, the first before the second began
        assert (found["run"].project, found["run"].run_group) == ("helios_train", "debug")
        assert found["run"].display_name == f"debug/{run.name}" and list(found["run"].tags) == ["a", "b"]
        assert numbers(found["rows"]) == logged(run)
        assert {"loss", "held_out/full/quantile_4"} <= numbers(found["rows"])[0].keys() | numbers(found["rows"])[2].keys()
        videos = [row["video/videos"][0] for _, row in found["rows"] if "video/videos" in row]
        assert len(videos) == 1
        facts = json.loads(next((run / "videos").glob("*.json")).read_text())
        assert videos[0]["caption"] == facts["caption"]
        stored = path.parent / "files" / videos[0]["path"]
        assert stored.read_bytes() == next((run / "videos").glob("00000002_*.mp4")).read_bytes()
        assert "key" not in (run / "config.yaml").read_text().lower()
    assert len(ids) == 2


@pytest.fixture(scope="module")
def killed(shards: Path, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run killed with kill -9 in the middle, after W&B has rows past the newest checkpoint."""
    run = tmp_path_factory.mktemp("killed") / "run"
    words = command(shards, f"run_dir={run}", *LONG)
    silent = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(words, env=environment, start_new_session=True, **silent)  # type: ignore[call-overload]
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if files(run) and last_step(files(run)[0]) > EVERY:
            os.killpg(process.pid, signal.SIGSTOP)  # W&B's writer lags: what is seen must still be so at the kill
            if last_step(files(run)[0]) > newest(run):
                break
            os.killpg(process.pid, signal.SIGCONT)
        time.sleep(0.02)
    assert process.poll() is None, "the run ended on its own"
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    return run


@pytest.fixture
def resume(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, tiny_run: Callable[..., None], shards: Path
) -> Iterator[Callable[..., None]]:
    """Goes on with a run in this process."""
    for name in [name for name in os.environ if name.startswith(("WANDB", "HELIOS_TRAIN"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", environment["HOME"])

    def go_on(run: Path, *overrides: str, logger: Sequence[str] = WANDB) -> None:
        given = {override.partition("=")[0]: override for override in (*RUN, *LONG, "watch.sample=true", *overrides)}
        tiny_run(*given.values(), *logger, f"data.root={shards}", f"run_dir={run}")

    yield go_on
    os.environ.pop("HELIOS_TRAIN_RUN_DIR", None)


def newest(run: Path) -> int:
    return max(int(path.stem) for path in (run / "checkpoints").glob("*.ckpt"))


@pytest.mark.parametrize("kept", ["all", "half", "nothing"])
def test_killed_and_resumed_logs_every_iteration_once(
    killed: Path, tmp_path: Path, resume: Callable[..., None], kept: str
) -> None:
    """`kept`: of W&B's file, which its process had only partly written when it died."""
    run = tmp_path / "run"
    shutil.copytree(killed, run, symlinks=True)
    (first,) = files(run)
    if kept != "all":
        data = first.read_bytes()
        first.write_bytes(data[: len(data) // 2 if kept == "half" else 7])
    had, done = last_step(first), newest(run)
    assert {"all": had > done, "half": -1 < had < last_step(files(killed)[0]), "nothing": had == -1}[kept]
    end = max(had, done) + 3
    resume(run, "resume=auto", f"trainer.max_steps={end}")
    before, after = map(content, files(run))
    assert first.stem == f"run-{after['run'].run_id}" and before["exit"] is None and after["exit"] == 0
    rows = [*before["rows"], *after["rows"]]
    assert [step for step, _ in rows] == list(range(end + 1))
    assert numbers(rows) == logged(run)  # what was done again came out bit-equal: some rows are the first process's
    videos = [step for step, row in rows if "video/videos" in row]
    assert videos == sorted({*range(EVERY, end + 1, EVERY), end})


def test_a_run_that_never_saved_starts_over_under_its_id(
    shards: Path, tmp_path: Path, killed: Path, resume: Callable[..., None]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(killed, run, symlinks=True)
    for path in (run / "checkpoints").iterdir():
        path.unlink()
    end = last_step(files(run)[0]) + 2
    resume(run, "resume=auto", f"trainer.max_steps={end}")
    before, after = map(content, files(run))
    assert before["run"].run_id == after["run"].run_id
    assert [step for step, _ in (*before["rows"], *after["rows"])] == list(range(end + 1))


def test_a_signal_ends_the_wandb_run_too(tmp_path: Path, resume: Callable[..., None]) -> None:
    run = tmp_path / "run"

    def send() -> None:
        while not (run / "metrics.csv").is_file() or (run / "metrics.csv").read_text().count("\n") < 4:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    with pytest.raises(Preempted):
        resume(run, "watch.sample=false")
    (path,) = files(run)
    found = content(path)
    assert found["exit"] == 143
    assert any(record.WhichOneof("record_type") == "preempting" for record in records(path))
    assert numbers(found["rows"]) == logged(run)


def test_wandb_can_be_added_to_a_run(tmp_path: Path, resume: Callable[..., None]) -> None:
    run = tmp_path / "run"
    resume(run, "trainer.max_steps=8", "watch.sample_steps=1", logger=[])
    assert not (run / "wandb").exists()
    resume(run, "resume=auto", "trainer.max_steps=9", "watch.sample_steps=1")
    (path,) = files(run)
    rows = content(path)["rows"]
    assert numbers(rows) == logged(run) and [step for step, row in rows if "video/videos" in row] == [8, 9]


def test_tensorboard_shows_every_iteration_once(tmp_path: Path, resume: Callable[..., None]) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    steps = ("checkpoint.every=4", "watch.sample_steps=1")
    resume(run, *steps, "trainer.max_steps=7", logger=["logger=tensorboard"])
    (run / "checkpoints/00000007.ckpt").unlink()  # as if it had been killed before it was saved
    resume(run, *steps, "trainer.max_steps=9", "resume=auto", logger=["logger=tensorboard"])
    shown = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [event.step for event in shown.Scalars("loss")] == list(range(1, 10))
    assert [event.step for event in shown.Scalars("held_out/full")] == [0, 4, 8]
    assert [event.step for event in shown.Images("video")] == [8, 9]
    assert len(list((run / "tensorboard").glob("events.*"))) == 2
    assert not [path for path in tmp_path.iterdir() if path.name != "run"]


def test_a_missing_tensorboard_is_said_before_anything_trains(
    tmp_path: Path, resume: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning.fabric.loggers import tensorboard

    monkeypatch.setattr(tensorboard, "_TENSORBOARD_AVAILABLE", False)
    monkeypatch.setattr(tensorboard, "_TENSORBOARDX_AVAILABLE", False)
    with pytest.raises(InputError, match="pip install tensorboard"):
        resume(tmp_path / "run", logger=["logger=tensorboard"])
    assert not list(tmp_path.glob("run/checkpoints/*"))
    resume(tmp_path / "run", "trainer.max_steps=1", "watch.sample=false", logger=[])  # the folder is still free
