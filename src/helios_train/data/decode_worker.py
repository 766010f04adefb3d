"""The process that decodes videos for `decode.Decoder`: `python -m helios_train.data.decode_worker PARENT_PID`.

Requests come on stdin, answers go to stdout: a length of four bytes (big-endian), so many bytes of JSON, and where frames were
asked for these as plain bytes. It ends when stdin does, and on Linux with its parent, even stuck in a decoder. No torch.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import struct
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from helios_train.data.contents import Contents, survey
from helios_train.data.reader import read, stream
from helios_train.errors import InputError

LENGTH = struct.Struct(">I")
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    """Answer requests until there are no more."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(sys.argv[1]):  # it died before it could be watched
            return
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not come between the answers
    requests, streams = sys.stdin.buffer, Streams()
    _send(answers, {"ready": True})
    while head := requests.read(LENGTH.size):
        request = json.loads(requests.read(LENGTH.unpack(head)[0]))
        try:
            answer, frames = _do(request, streams)
        except InputError as error:
            answer, frames = {"error": str(error)}, None
        except Exception as error:  # a library's own exception: this video is the reason, the next may be well
            answer, frames = {"error": f"{request['path']}: not readable ({type(error).__name__}: {error}); remove it"}, None
        _send(answers, answer, frames)


class Streams:
    """The one video that is being read from its first frame to its last, a request a block."""

    def __init__(self) -> None:
        self._path, self._next = Path(), 0
        self._blocks: Iterator[np.ndarray] = iter(())

    def block(self, path: Path, start: int, count: int) -> np.ndarray | None:
        """The next frames, from `start` on; at 0 a video is begun, past its end there are none. InputError for other places."""
        if not start:
            self._path, self._next, self._blocks = path, 0, stream(path, _contents(path, *_state(path)), count)
        if (path, start) != (self._path, self._next):
            raise InputError(f"{path}: frames from {start} on do not follow those read before; read it from its first frame")
        frames = next(self._blocks, None)
        if frames is None:
            return None
        self._next += len(frames)
        return np.ascontiguousarray(frames)


def _do(request: dict[str, Any], streams: Streams) -> tuple[dict[str, Any], np.ndarray | None]:
    path = Path(request["path"])
    if "from" in request:
        block = streams.block(path, request["from"], request["count"])
        return ({"end": True}, None) if block is None else ({"shape": block.shape}, block)
    contents = _contents(path, *_state(path))
    if "indices" not in request:
        return {"info": contents.info}, None
    frames = np.ascontiguousarray(read(path, request["indices"], contents))
    return {"shape": frames.shape}, frames


@lru_cache(maxsize=8)
def _contents(path: Path, size: int, changed: int) -> Contents:
    """The survey of a file, made once for all its reads; again where it was changed in between."""
    return survey(path)


def _state(path: Path) -> tuple[int, int]:
    try:
        state = path.stat()
        return state.st_size, state.st_mtime_ns
    except OSError:
        return 0, 0  # `survey` says what is wrong


def _send(answers: BinaryIO, answer: dict[str, Any], frames: np.ndarray | None = None) -> None:
    head = json.dumps(answer).encode()
    answers.write(LENGTH.pack(len(head)) + head)
    if frames is not None:
        answers.write(frames.data)
    answers.flush()


if __name__ == "__main__":
    main()
