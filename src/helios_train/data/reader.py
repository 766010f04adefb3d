"""The frames of a video file, by PyAV, or by decord where that is sure to be right; no torch, as in `contents`.

PyAV finds frames by their time stamps and starts at the key frame before the first one wanted. decord seeks to wrong frames,
without a word, in open groups of pictures, in MPEG-4 with B-frames and in fragmented files, and does not know turned, 10-bit and
AV1 video: it reads what `Contents.plain` says. Frames are uint8 [F, H, W, 3] in RGB. F frames, H W pixel rows and columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from helios_train.data.contents import Contents, opened
from helios_train.errors import InputError

try:
    import decord
except ImportError:  # no wheel for this platform: PyAV reads everything
    decord = None

UNDECODED = "cannot be decoded; repair or remove it"


def read(path: Path, indices: Sequence[int], contents: Contents) -> NDArray[np.uint8]:
    """The frames at `indices` (ascending, from 0), upright, at a constant rate; no more than these are held in memory.

    InputError naming the file when it is damaged or an index is past its end.
    """
    wanted = np.asarray(indices, dtype=np.int64)
    if not len(wanted) or wanted[0] < 0 or (np.diff(wanted) < 0).any():
        raise InputError(f"{path}: frame indices must be ascending and not negative, got {wanted[:4].tolist()}...")
    if wanted[-1] >= contents.info.frames:
        raise InputError(f"{path}: frame {wanted[-1]} was asked for, but it has only {contents.info.frames}; ask for fewer")
    if contents.grid is not None:
        wanted = contents.grid[wanted]
    frames = read_decord(path, wanted, contents) if contents.plain else None
    return contents.turn(read_av(path, wanted, contents) if frames is None else frames)


def read_decord(path: Path, wanted: NDArray[np.int64], contents: Contents) -> NDArray[np.uint8] | None:
    """Stored frames by decord; None where it is missing or fails, as on widths whose rows its decoder pads (48, 72).

    One reader, one thread, one request: it reads ahead without bound while a reader is kept.
    """
    if decord is None:
        return None
    try:
        reader = decord.VideoReader(str(path), num_threads=1)
        return reader.get_batch(wanted.tolist()).asnumpy() if len(reader) == contents.stored else None
    except (decord.DECORDError, RuntimeError, UnicodeError):
        return None


def read_av(path: Path, wanted: NDArray[np.int64], contents: Contents) -> NDArray[np.uint8]:
    """Stored frames by PyAV, ascending, the same one possibly several times. InputError when one cannot be decoded."""
    out = np.empty((len(wanted), *contents.size, 3), np.uint8)
    if wanted[0] > 0 and contents.first is not None:
        try:
            if _fill(out, path, wanted, contents, seek=True) == len(wanted):
                return out
        except InputError:
            pass  # what follows a key frame may need what is before it (open groups, gradual refresh): from the start, then
    done = _fill(out, path, wanted, contents, seek=False)
    if done < len(wanted):
        raise InputError(f"{path}: frame {wanted[done]} of {contents.stored} {UNDECODED}")
    return out


def stream(path: Path, contents: Contents, count: int) -> Iterator[NDArray[np.uint8]]:
    """All frames from the first to the last, upright, at a constant rate: `count` at a time, at the end fewer. Each is decoded
    once, and no more than `count` are held in memory.

    InputError naming the file when one is damaged or missing.
    """
    wanted = np.arange(contents.info.frames) if contents.grid is None else contents.grid
    frames = _decoded(path, wanted, contents, seek=False)
    for start in range(0, len(wanted), count):
        block = list(islice(frames, min(count, len(wanted) - start)))
        if len(block) < min(count, len(wanted) - start):
            raise InputError(f"{path}: frame {wanted[start + len(block)]} of {contents.stored} {UNDECODED}")
        yield contents.turn(np.stack(block))


def _fill(out: NDArray[np.uint8], path: Path, wanted: NDArray[np.int64], contents: Contents, *, seek: bool) -> int:
    """Decode into `out` from the start or the key frame before; how many places were filled before a frame was missing."""
    done = 0
    for pixels in _decoded(path, wanted, contents, seek=seek):
        out[done] = pixels
        done += 1
    return done


def _decoded(path: Path, wanted: NDArray[np.int64], contents: Contents, *, seek: bool) -> Iterator[NDArray[np.uint8]]:
    """Stored frames, ascending, the same one possibly several times, decoded from the start or the key frame before the first;
    it ends where a frame is missing."""
    done = 0
    with opened(path) as (container, stream):
        if seek:
            container.seek(contents.stamp(int(wanted[0])), stream=stream)
        for count, frame in enumerate(container.decode(stream)):
            number = count if contents.first is None else contents.number(frame.pts)
            if number > wanted[done]:
                break
            if number < wanted[done]:
                continue
            if frame.is_corrupt or (frame.height, frame.width) != contents.size:
                raise InputError(f"{path}: frame {number} is damaged or of another size; encode the video again or remove it")
            pixels = frame.to_ndarray(format="rgb24")
            while done < len(wanted) and wanted[done] == number:
                yield pixels
                done += 1
            if done == len(wanted):
                break
