"""Video files: written with PyAV, read by `reader`, cropped and resized to what a codec takes.

Frames are uint8 [F, H, W, 3] in RGB until `centre_crop_resize` makes them floats. F frames, H W pixel rows and columns.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import av
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from helios_train.data.contents import VideoInfo, survey
from helios_train.data.reader import read
from helios_train.errors import InputError

BT601 = 6  # the matrix readers assume for small untagged video; written down so that players assume it too
LIMITED_RANGE = 1
RESIZE_BLOCK = 8  # frames resized at a time: a float copy of a whole 720p clip would be gigabytes
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Mp4Writer:
    """Writes uint8 [F, H, W, 3] RGB frames as H.264, close to lossless, 4:2:0 so that every player takes it; as many as come.

    A context manager. The same frames give the same bytes under the same libraries, however they are cut into calls of `add`:
    one thread, no time stamp. The file appears under its name only when it is whole, and leaves nothing where an error ends it.
    """

    def __init__(self, path: Path, fps: float):
        self.path, self.rate = path, Fraction(fps).limit_denominator(1001)
        self.part = path.with_name(path.name + ".tmp")
        self._container: Any = None
        self._stream: Any = None
        self._size = (0, 0)
        self._count = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._discard()

    def add(self, frames: torch.Tensor | NDArray[np.uint8]) -> None:
        """Append frames, all calls of one size.

        InputError when they have another shape or type, or odd sides (4:2:0 halves both), and when the file cannot be written.
        """
        array = np.asarray(frames)
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3:
            raise InputError(f"{self.path}: frames must be uint8 [F, H, W, 3], got {array.dtype} {list(array.shape)}")
        height, width = array.shape[1:3]
        if height % 2 or width % 2 or not height or not width:
            raise InputError(f"{self.path}: {height}x{width} has an odd side, which 4:2:0 video cannot hold; crop to even sides")
        if self._container is not None and self._size != (height, width):
            before = "{}x{}".format(*self._size)
            raise InputError(f"{self.path}: frames of {height}x{width} after frames of {before}; give all one size")
        try:
            if self._container is None:
                self._open(height, width)
            for pixels in array:
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
                frame.pts, frame.time_base = self._count, 1 / self.rate
                self._container.mux(self._stream.encode(frame))
                self._count += 1
        except (av.FFmpegError, OSError) as error:
            raise self._unwritten(error) from error

    def _open(self, height: int, width: int) -> None:
        self._container = av.open(str(self.part), "w", format="mp4")
        # Kernels wider than SSE2 read past rows whose width they do not divide: one file in fifty came out different.
        options = {"crf": "10", "preset": "veryfast", "threads": "1", "x264-params": "asm=SSE2"}
        stream = self._container.add_stream("libx264", rate=self.rate, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1
        stream.codec_context.colorspace, stream.codec_context.color_range = BT601, LIMITED_RANGE
        self._stream, self._size = stream, (height, width)

    def _finish(self) -> None:
        if not self._count:
            raise InputError(f"{self.path}: no frame was given, and a video has one at least")
        try:
            self._container.mux(self._stream.encode(None))
            self._container.close()
            os.replace(self.part, self.path)
        except (av.FFmpegError, OSError) as error:
            raise self._unwritten(error) from error

    def _discard(self) -> None:
        """Close what is open and remove what is not whole."""
        if self._container is None:
            return
        with suppress(av.FFmpegError, OSError):  # the reason is on its way up already
            self._container.close()
        with suppress(OSError):
            self.part.unlink()

    def _unwritten(self, error: Exception) -> InputError:
        reason = getattr(error, "strerror", None) or error
        remedy = "free some space" if getattr(error, "errno", None) in FULL else "make its folder writable"
        return InputError(f"{self.path}: cannot be written ({reason}); {remedy} or choose another folder")


def write_mp4(path: Path, frames: torch.Tensor | NDArray[np.uint8], fps: float) -> None:
    """Write uint8 [F, H, W, 3] RGB frames at once; as `Mp4Writer` does."""
    with Mp4Writer(path, fps) as writer:
        writer.add(frames)


def probe(path: Path) -> VideoInfo:
    """What the file holds, read in this process: for files of our own. InputError naming the file and what is wrong with it.

    Files of others go through `decode.Decoder`, which survives what they may do to a decoder.
    """
    return survey(path).info


def read_frames(path: Path, indices: Sequence[int]) -> torch.Tensor:
    """The frames at `indices` (ascending, from 0) as uint8 [F, H, W, 3], upright, read in this process: as `probe`."""
    return torch.from_numpy(np.ascontiguousarray(read(path, indices, survey(path))))


def centre_crop_resize(
    frames: torch.Tensor, size: tuple[int, int], crop: tuple[int, int, int, int] | None = None
) -> torch.Tensor:
    """uint8 [F, h, w, 3] to fp32 [3, F, H, W] in [-1, 1]: the largest centred crop of the target's shape, antialiased bilinear.

    `size` is (H, W) in pixels; `crop` (x0, x1, y0, y1) is taken first: columns x0 to x1, rows y0 to y1, ends not included. The
    centred crop's free side is rounded down, as the published pixel pipeline does. InputError when `crop` is empty or outside.
    """
    if crop is not None:
        x0, x1, y0, y1 = crop
        if not (0 <= x0 < x1 <= frames.shape[2] and 0 <= y0 < y1 <= frames.shape[1]):
            shape = f"{frames.shape[1]}x{frames.shape[2]}"
            raise InputError(f"crop {list(crop)} (x0, x1, y0, y1) is empty or not inside frames of {shape}; correct it")
        frames = frames[:, y0:y1, x0:x1]
    count, rows, columns, _ = frames.shape
    height, width = size
    if rows * width >= columns * height:
        crop_rows, crop_columns = max(1, columns * height // width), columns
    else:
        crop_rows, crop_columns = rows, max(1, rows * width // height)
    top, left = (rows - crop_rows) // 2, (columns - crop_columns) // 2
    cropped = frames[:, top : top + crop_rows, left : left + crop_columns]
    # Said aloud: while transformers loads a text encoder in one thread, the whole process's default is bf16.
    out = torch.empty(3, count, height, width, dtype=torch.float32)
    for start in range(0, count, RESIZE_BLOCK):
        block = cropped[start : start + RESIZE_BLOCK].permute(0, 3, 1, 2).float() / 127.5 - 1
        if (crop_rows, crop_columns) != (height, width):
            block = F.interpolate(block, size=(height, width), mode="bilinear", antialias=True, align_corners=False)
        out[:, start : start + RESIZE_BLOCK] = block.transpose(0, 1)
    return out
