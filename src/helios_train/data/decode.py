"""Frames of videos, decoded in a process of their own that is watched, replaced often, and never outlives its owner.

Decoders leak, crash and hang on some files; in the process that encodes or trains, each of these would end the work of hours.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from helios_train.data.contents import VideoInfo
from helios_train.data.decode_worker import LENGTH
from helios_train.errors import HeliosError, InputError

START_SECONDS = 60.0  # for a busy machine; 0.3 are usual
PIPE_BYTES = 1 << 20  # frames are megabytes, a pipe's default is 64 KiB
F_SETPIPE_SZ = getattr(fcntl, "F_SETPIPE_SZ", None)  # Linux alone


class _DiedError(Exception):
    """The process ended in the middle of a request."""


class _LateError(Exception):
    """The process did not answer in time."""


class Decoder:
    """Reads videos in one worker process at a time, started when it is needed. A context manager; for one thread.

    `timeout`: seconds one request may take before the worker is killed; `clips_a_worker`: reads after which it is replaced.
    """

    def __init__(self, timeout: float = 120.0, clips_a_worker: int = 32):
        self.timeout, self.clips_a_worker = timeout, clips_a_worker
        self._worker: subprocess.Popen[bytes] | None = None
        self._log: Any = None
        self._reads = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """The worker's process, None where none runs."""
        return self._worker.pid if self._worker is not None and self._worker.poll() is None else None

    def probe(self, path: Path) -> VideoInfo:
        """What the file holds, by its header and its first frame. InputError naming the file and what is wrong with it."""
        answer, _ = self._ask(path, {"path": str(path)})
        frames, height, width, fps, notes = answer["info"]
        return VideoInfo(frames, height, width, fps, tuple(notes))

    def read(self, path: Path, indices: Sequence[int]) -> Tensor:
        """The frames at `indices` (ascending, from 0) as uint8 [F, H, W, 3] RGB, upright, at the constant rate of `probe`.

        All of them are in memory twice for a moment: ask for a few sections at a time. InputError naming the file when it is
        damaged, short, brings the worker down, or is not done within `timeout` seconds.
        """
        _, frames = self._ask(path, {"path": str(path), "indices": [int(index) for index in indices]})
        assert frames is not None
        self._count_read()
        return frames

    def stream(self, path: Path, count: int) -> Iterator[Tensor]:
        """All frames from the first to the last, `count` at a time, each decoded once; for the rest as `read`. One video at a
        time: what is asked of this decoder in between may end the worker, and the stream with it. `timeout` is a block's."""
        done = 0
        try:
            while True:
                _, frames = self._ask(path, {"path": str(path), "from": done, "count": count})
                if frames is None:
                    break
                done += len(frames)
                yield frames
        finally:  # whoever has seen enough leaves in the middle
            self._count_read()

    def _count_read(self) -> None:
        """One more; after so many, the worker goes."""
        self._reads += 1
        if self._reads >= self.clips_a_worker:
            self.close()

    def close(self) -> None:
        """End the worker, whatever it does; a later request starts another."""
        worker, self._worker, self._reads = self._worker, None, 0
        if worker is None:
            return
        if worker.poll() is None:
            os.killpg(worker.pid, signal.SIGKILL)  # its own group, whose number nobody else can get before it is waited for
        for pipe in (worker.stdin, worker.stdout):
            assert pipe is not None
            pipe.close()
        try:
            worker.wait(10)
        except subprocess.TimeoutExpired:
            pass  # stuck in the kernel, as on a lost network drive: it dies when that lets go of it
        self._log.close()

    def _ask(self, path: Path, request: dict[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
        """One request and its answer. Whatever goes wrong on the way, the worker does not survive it."""
        try:
            self._start()
            answer, frames = self._exchange(request, time.monotonic() + self.timeout)
        except _LateError:
            self.close()
            raise InputError(f"{path}: did not finish in {self.timeout:g} s; repair or remove it, or allow more time") from None
        except _DiedError:
            reason = self._last_words()
            self.close()
            raise InputError(f"{path}: ended the process that decoded it ({reason}); repair, encode again or remove it") from None
        except BaseException:
            self.close()
            raise
        if "error" in answer:
            raise InputError(answer["error"])
        return answer, frames

    def _exchange(self, request: dict[str, Any], deadline: float) -> tuple[dict[str, Any], Tensor | None]:
        body = json.dumps(request).encode()
        self._write(LENGTH.pack(len(body)) + body, deadline)
        answer = self._answer(deadline)
        if "shape" not in answer:
            return answer, None
        frames = torch.empty(answer["shape"], dtype=torch.uint8)
        self._fill(frames.numpy().data.cast("B"), deadline)
        return answer, frames

    def _start(self) -> None:
        """A worker that answers. HeliosError where it cannot even start: no video is the reason of that."""
        if self.pid is not None:
            return
        self.close()
        self._log = tempfile.TemporaryFile()
        self._worker = subprocess.Popen(
            # -P and the same search path: it finds the modules this process found, and nothing in the working directory.
            [sys.executable, "-P", "-m", "helios_train.data.decode_worker", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,  # a group to kill as one; Ctrl-C is for its owner
        )
        for pipe in (self._worker.stdin, self._worker.stdout):
            assert pipe is not None
            os.set_blocking(pipe.fileno(), False)
            if F_SETPIPE_SZ is not None:
                try:
                    fcntl.fcntl(pipe, F_SETPIPE_SZ, PIPE_BYTES)
                except OSError:
                    pass  # the user's share of pipe memory is used up: slower, no less right
        try:
            self._answer(time.monotonic() + START_SECONDS)
        except (_DiedError, _LateError):
            reason = self._last_words()
            raise HeliosError(f"the process that decodes videos does not start ({reason}); is the installation whole?") from None

    def _answer(self, deadline: float) -> dict[str, Any]:
        size = bytearray(LENGTH.size)
        self._fill(memoryview(size), deadline)
        body = bytearray(LENGTH.unpack(size)[0])
        self._fill(memoryview(body), deadline)
        return json.loads(body)

    def _fill(self, view: memoryview, deadline: float) -> None:
        """Read exactly as many bytes as fit."""
        assert self._worker is not None and self._worker.stdout is not None
        pipe = self._worker.stdout.fileno()
        while view:
            self._wait(pipe, select.POLLIN, deadline)
            count = os.readv(pipe, [view])
            if not count:
                raise _DiedError
            view = view[count:]

    def _write(self, data: bytes, deadline: float) -> None:
        assert self._worker is not None and self._worker.stdin is not None
        pipe, view = self._worker.stdin.fileno(), memoryview(data)
        while view:
            self._wait(pipe, select.POLLOUT, deadline)
            try:
                view = view[os.write(pipe, view) :]
            except BrokenPipeError:
                raise _DiedError from None

    def _wait(self, pipe: int, event: int, deadline: float) -> None:
        """Until something can be read or written."""
        poll = select.poll()
        poll.register(pipe, event)
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            raise _LateError

    def _last_words(self) -> str:
        """How the worker ended: the signal, or the last line it wrote."""
        assert self._worker is not None
        try:
            code = self._worker.wait(1)
        except subprocess.TimeoutExpired:
            return "no answer"
        if code < 0:
            name = signal.Signals(-code).name
            return f"{name}, as when memory runs out" if -code == signal.SIGKILL else name
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), f"exit code {code}")
