"""prepare stopped at any moment, in parts, by several processes, on a disk that fills up: the same bytes or a clear no."""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from helios_train.data.decode import Decoder
from helios_train.data.format import MANIFEST
from helios_train.data.plan import PLAN_PLACE, Locks, PrepareSettings
from helios_train.data.toy import ToySpec, render_folder
from helios_train.errors import HeliosError, InputError
from helios_train.models.codecs import Codec, dct_codec
from helios_train.models.text import HashText
from helios_train.tasks.prepare import Stopped, prepare_folder

CODEC, TEXT, SIZE = dct_codec(), HashText(), (32, 48)
CONTEXT = multiprocessing.get_context("fork")


def settings(part: int = 1, parts: int = 1, **more: Any) -> PrepareSettings:
    return PrepareSettings(shard_samples=3, part=(part, parts), **more)


def prepare(source: Path, root: Path, *part: int) -> object:
    return prepare_folder(source, root, CODEC, TEXT, SIZE, settings=settings(*part))


def _in_child(source: Path, root: Path, part: tuple[int, ...]) -> None:
    torch.set_num_threads(1)  # a forked process has none of its parent's threads
    try:
        prepare(source, root, *part)
    except HeliosError as error:
        os._exit(error.exit_code)


def started(source: Path, root: Path, *part: int) -> BaseProcess:
    """The same in a process of its own."""
    process = CONTEXT.Process(target=_in_child, args=(source, root, part))
    process.start()
    return process


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve short videos, and three longer ones."""
    folder = tmp_path_factory.mktemp("data") / "videos"
    render_folder(folder, ToySpec(size=SIZE, sections=2, clips=12))
    render_folder(folder / "long", ToySpec(size=SIZE, sections=5, clips=3))
    return folder


@pytest.fixture(scope="module")
def wanted(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What one undisturbed run writes."""
    root = tmp_path_factory.mktemp("wanted") / "set"
    prepare(videos, root)
    found = digest(root)
    assert len(found) == 3 * 5 + 1  # raw, lat and index of five shards, and dataset.json
    return found


def digest(root: Path) -> dict[str, str]:
    files = [path for path in root.rglob("*") if path.is_file() and path.parent.name != "prepare"]
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def receipts(root: Path) -> set[str]:
    return {path.name for path in (root / "prepare").glob("b*.json")}


def test_in_two_parts(videos: Path, wanted: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare(videos, tmp_path, 2, 2) is None
    said = capsys.readouterr().out
    assert "this part is done; 3 of 5 shards are still open (b00066x32x48_000000, " in said and MANIFEST in said
    assert len(receipts(tmp_path)) == 2 and not (tmp_path / MANIFEST).exists()
    plan = (tmp_path / "prepare" / "plan.json").stat()
    assert prepare(videos, tmp_path, 1, 2) is not None and digest(tmp_path) == wanted
    assert (tmp_path / "prepare" / "plan.json").stat().st_mtime_ns == plan.st_mtime_ns  # shared, not made again


def test_several_processes_at_once(videos: Path, wanted: dict[str, str], tmp_path: Path) -> None:
    shares = [(1, 3), (2, 3), (3, 3), (3, 3), (1, 1)]  # one share twice, and all of them once more
    processes = [started(videos, tmp_path, *share) for share in shares]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 5 and digest(tmp_path) == wanted


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_stopped_at_any_moment(number: int, videos: Path, wanted: dict[str, str], tmp_path: Path) -> None:
    draw, finished = random.Random(int(number)), [set[str]()]
    while not (tmp_path / MANIFEST).exists() and len(finished) < 12:
        process = started(videos, tmp_path)
        before, more = len(list(tmp_path.rglob("*"))), draw.randrange(1, 12)
        while process.is_alive() and len(list(tmp_path.rglob("*"))) < before + more:
            time.sleep(0.002)
        time.sleep(0.03 * draw.random())
        (process.kill if number == signal.SIGKILL else process.terminate)()
        process.join()
        assert process.exitcode in (0, -number, 143 if number == signal.SIGTERM else 0)
        finished.append(receipts(tmp_path))
        assert finished[-2] <= finished[-1]  # nothing finished is lost
        if process.exitcode == 143:
            assert not list(tmp_path.rglob("*.tmp"))
    assert len({len(names) for names in finished}) > 2, finished
    prepare(videos, tmp_path)
    assert digest(tmp_path) == wanted and not list(tmp_path.rglob("*.tmp"))


class Interrupting(Codec):
    """Sends this process a signal while it encodes the fifth block."""

    count, number = 0, signal.SIGTERM

    def encode(self, video: torch.Tensor, generator: Any = None) -> torch.Tensor:
        self.count += 1
        if self.count == 5:
            os.kill(os.getpid(), self.number)
        return super().encode(video, generator)


def test_a_signal_leaves_nothing_half_done(videos: Path, wanted: dict[str, str], tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    for number, error in ((signal.SIGTERM, Stopped), (signal.SIGINT, KeyboardInterrupt)):
        codec = Interrupting("dct", CODEC.vae)
        codec.number = number
        with pytest.raises(error) as caught:
            prepare_folder(videos, tmp_path, codec, TEXT, SIZE, settings=settings())
        if number == signal.SIGTERM:
            assert caught.value.exit_code == 143 and "the same command goes on" in str(caught.value)
        assert not list(tmp_path.rglob("*.tmp")) and receipts(tmp_path)
    assert signal.getsignal(signal.SIGTERM) is before
    prepare(videos, tmp_path)
    assert digest(tmp_path) == wanted


@pytest.fixture
def frozen(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """The worker that decodes stops dead in its seventh request, once; set when it does."""
    read, count, event = Decoder.read, itertools.count(1), threading.Event()

    def freezing(decoder: Decoder, path: Path, indices: range) -> torch.Tensor:
        if next(count) == 7:
            os.kill(decoder.pid or 0, signal.SIGSTOP)
            event.set()
        return read(decoder, path, indices)

    monkeypatch.setattr(Decoder, "read", freezing)
    return event


def test_a_decoder_that_hangs_is_one_video_s_fault(videos: Path, tmp_path: Path, frozen: threading.Event) -> None:
    manifest = prepare_folder(videos, tmp_path, CODEC, TEXT, SIZE, settings=settings(bad="skip", timeout=3.0))
    assert manifest is not None and manifest.total == 14 and manifest.health["skipped"] == {"undecodable": 1}
    (one,) = json.loads((tmp_path / "skipped.json").read_text())
    assert one["reason"].startswith("did not finish in 3 s; ") and frozen.is_set()


def test_ctrl_c_does_not_wait_for_a_video_that_hangs(
    videos: Path, wanted: dict[str, str], tmp_path: Path, frozen: threading.Event
) -> None:
    def interrupt() -> None:
        frozen.wait()
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)

    thread, start = threading.Thread(target=interrupt), time.monotonic()
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        prepare(videos, tmp_path)
    assert time.monotonic() - start < 60 and not list(tmp_path.rglob("*.tmp"))  # and not the 120 s it may take
    thread.join()
    prepare(videos, tmp_path)
    assert digest(tmp_path) == wanted


def test_what_is_missing_or_cut_short_is_made_again(videos: Path, wanted: dict[str, str], tmp_path: Path) -> None:
    prepare(videos, tmp_path)
    for column in ("raw", "lat", "index"):
        first, second, *_, last = sorted(path for path in (tmp_path / column).rglob("*") if path.is_file())
        first.unlink()
        os.truncate(second, second.stat().st_size // 2)
        os.utime(last, ns=(1, 1))
        if column == "index":  # a dataset.json beside whole tars says that all is well; the receipts know better
            (tmp_path / MANIFEST).unlink()
        prepare(videos, tmp_path)
        assert digest(tmp_path) == wanted and last.stat().st_mtime_ns == 1
    receipt = next((tmp_path / "prepare").glob("b*.json"))
    receipt.write_text("{")
    (tmp_path / MANIFEST).unlink()
    prepare(videos, tmp_path)
    assert digest(tmp_path) == wanted


def test_a_damaged_plan_is_named(videos: Path, tmp_path: Path) -> None:
    prepare(videos, tmp_path, 1, 2)
    (tmp_path / "prepare" / "plan.json").write_text("{}")
    with pytest.raises(InputError, match="plan.json: not a readable plan .* remove it"):
        prepare(videos, tmp_path, 2, 2)


def _hold(root: Path, place: int, held: Any) -> None:
    with Locks(root).hold(place):
        held.put(True)
        time.sleep(600)


def test_a_shard_another_process_is_at_is_left_to_it(
    videos: Path, wanted: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = CONTEXT.Queue()
    process = CONTEXT.Process(target=_hold, args=(tmp_path, PLAN_PLACE + 1 + 3, held))
    process.start()
    assert held.get(timeout=60) and prepare(videos, tmp_path) is None
    assert "1 of 5 shards are still open (b00066x32x48_000003)" in capsys.readouterr().out
    process.kill()
    process.join()
    assert prepare(videos, tmp_path) is not None and digest(tmp_path) == wanted


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 KiB, of which the first shards fill most."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"no right to mount: {done.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk(videos: Path, wanted: dict[str, str], small_disk: Path) -> None:
    root = small_disk / "set"
    with pytest.raises(InputError, match=r"disk/set/.*: cannot be written \(No space left on device\); free or choose another"):
        prepare(videos, root)
    kept = digest(root)
    assert receipts(root) and kept.items() < wanted.items() and not list(root.rglob("*.tmp"))
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    prepare(videos, root)
    assert digest(root) == wanted


def test_a_read_only_disk(videos: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(InputError, match=r"disk/set/prepare/lock: cannot be written \(Read-only file system\)"):
        prepare(videos, small_disk / "set")


def test_a_root_that_cannot_be(videos: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file/set/prepare/lock: cannot be written \(Not a directory\)"):
        prepare(videos, tmp_path / "file" / "set")
