"""What can be wrong with a run folder: each fault is one sentence, and what was saved before stays whole."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import helios_train
from helios_train.callbacks.metrics_csv import MetricsCsv, read_rows
from helios_train.errors import InputError
from helios_train.models.checkpoint import read
from helios_train.run import RunFolder

RUN = ("optimizer.total=6", "checkpoint.keep=5")
LOCK = """
import sys
from pathlib import Path
from helios_train.run import RunFolder
RunFolder(Path(sys.argv[1])).lock()
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def two(tiny_run: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two iterations and two checkpoints."""
    run = tmp_path_factory.mktemp("two") / "run"
    tiny_run(*RUN, "trainer.max_steps=2", f"run_dir={run}")
    return run


@pytest.fixture
def run(two: Path, tmp_path: Path) -> Path:
    """A copy of it, to be harmed."""
    return Path(shutil.copytree(two, tmp_path / "run"))


@pytest.fixture
def go_on(tiny_run: Callable[..., None], run: Path) -> Callable[..., None]:
    return lambda *overrides: tiny_run(*RUN, f"run_dir={run}", "resume=auto", *overrides)


def mount(*arguments: str) -> None:
    try:
        done = subprocess.run(["mount", *arguments], capture_output=True)
    except OSError:
        pytest.skip("there is no mount here")
    if done.returncode:
        pytest.skip("may not mount")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount("-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder))
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path, leave: int) -> Path:
    """Uses the disk up, but for `leave` bytes."""
    filler = folder / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(folder).free - leave))
    return filler


def test_a_folder_mounted_read_only(run: Path, go_on: Callable[..., None]) -> None:
    mount("--bind", str(run), str(run))
    try:
        mount("-o", "remount,ro,bind", str(run))
        with pytest.raises(InputError, match="cannot lock the run folder: Read-only file system; .*choose a run folder"):
            go_on()
    finally:
        subprocess.run(["umount", "-l", run], check=True)
    go_on()
    assert (run / "checkpoints/00000003.ckpt").is_file()


def test_a_full_disk_while_a_checkpoint_is_written(
    disk: Path, tiny_run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = disk / "run"
    check, size = RunFolder.check_free, []

    def then_somebody_fills_it(self: RunFolder, needed: int) -> None:
        check(self, needed)
        size.append(needed // 2)  # keep=1: two checkpoints
        fill(disk, int(1.8 * size[0]))

    monkeypatch.setattr(RunFolder, "check_free", then_somebody_fills_it)
    with pytest.raises(InputError, match=r"00000002\.ckpt: .*No space left on device.*earlier ones are kept.*go on with"):
        tiny_run("optimizer.total=6", "checkpoint.keep=1", f"run_dir={run}")
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["00000001.ckpt"]
    assert read(run / "checkpoints/00000001.ckpt")["global_step"] == 1
    monkeypatch.undo()
    with pytest.raises(InputError, match="of disk and .* are free; make room"):
        tiny_run("optimizer.total=6", "checkpoint.keep=1", f"run_dir={run}", "resume=auto")
    (disk / "filler").unlink()
    tiny_run("optimizer.total=6", "checkpoint.keep=1", f"run_dir={run}", "resume=auto")
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["00000003.ckpt"]


def test_a_full_disk_while_metrics_are_written(disk: Path) -> None:
    path = disk / "metrics.csv"
    log = MetricsCsv(path)
    log.log_metrics({"loss": 0.1}, 1)
    fill(disk, 0)
    with pytest.raises(InputError, match=r"metrics\.csv: cannot write: No space left on device; make room, then go on"):
        for step in range(2, 2000):
            log.log_metrics({"loss": 1 / step}, step)
    with pytest.raises(InputError, match=r"metrics\.csv: cannot write: No space left on device"):
        log.log_metrics({"another": 1.0}, step)
    assert step > 2
    rows = list(read_rows(path))
    assert rows[0] == (1, {"loss": 0.1}) and rows[: step - 2] == [
        (1, {"loss": 0.1}),
        *((i, {"loss": 1 / i}) for i in range(2, step - 1)),
    ]
    (disk / "filler").unlink()
    MetricsCsv(path, resumed_at=2).log_metrics({"loss": 3.0}, 3)
    assert list(read_rows(path)) == [(1, {"loss": 0.1}), (2, {"loss": 0.5}), (3, {"loss": 3.0})]


def test_two_runs_in_one_folder(run: Path, go_on: Callable[..., None], tiny_run: Callable[..., None]) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(helios_train.__file__).parents[1])}
    other = subprocess.Popen(
        [sys.executable, "-c", LOCK, str(run)], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with other:
        assert other.stdout is not None and other.stdout.readline() == "locked\n"
        before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
        with pytest.raises(InputError, match=f"process {other.pid} is writing to this run; wait for it or stop it"):
            go_on()
        with pytest.raises(InputError, match="already holds a run: go on with resume="):
            tiny_run(*RUN, f"run_dir={run}")
        assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    go_on()


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda text: text[: text.index("optimizer:")], "cannot resume with another .* more keys; .*damaged"),
        (lambda text: text[: len(text) // 2] + "]: {", r"config\.yaml: is damaged"),
        (lambda text: "", r"config\.yaml: holds no config"),
        (lambda text: text.replace("  total: 6\n", ""), r"config\.yaml of the run folder is damaged"),
        (lambda text: text.replace("seed: 0\n", "seed: 1\n", 1), "cannot resume with another seed;"),
    ],
)
def test_a_damaged_config(run: Path, go_on: Callable[..., None], harm: Callable[[str], str], said: str) -> None:
    config = run / "config.yaml"
    text = config.read_text()
    config.write_text(harm(text))
    with pytest.raises(InputError, match=said) as caught:
        go_on()
    assert len(str(caught.value)) < 400
    config.write_text(text)
    go_on()


@pytest.mark.parametrize("left", [0, 1000, -20])
def test_a_checkpoint_cut_short(run: Path, go_on: Callable[..., None], left: int) -> None:
    newest = run / "checkpoints/00000002.ckpt"
    newest.write_bytes(newest.read_bytes()[:left])
    with pytest.raises(InputError, match=r"00000002\.ckpt: .*damaged.*to resume from the one before, remove this file"):
        go_on()
    newest.unlink()
    go_on()
    assert [step for step, _ in read_rows(run / "metrics.csv")] == [1, 2, 3]
    assert read(run / "checkpoints/00000003.ckpt")["global_step"] == 3
