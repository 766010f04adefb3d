"""Video files: written with PyAV, read back with decord, cropped and resized to what a codec takes.

Frames are uint8 [F, H, W, 3] in RGB until `centre_crop_resize` makes them floats. F frames, H W pixel rows and columns.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from helios_train.errors import InputError

try:
    import decord
except ImportError:  # no wheel for this platform: PyAV reads instead
    decord = None

BT601 = 6  # the matrix both readers assume for small untagged video; written down so that players assume it too
LIMITED_RANGE = 1
RESIZE_BLOCK = 8  # frames resized at a time: a float copy of a whole 720p clip would be gigabytes


class VideoInfo(NamedTuple):
    """What a file holds: frame count, rows, columns, frames a second."""

    frames: int
    height: int
    width: int
    fps: float


def write_mp4(path: Path, frames: torch.Tensor | NDArray[np.uint8], fps: float) -> None:
    """Write uint8 [F, H, W, 3] RGB frames as H.264, close to lossless, 4:2:0 so that every player takes it.

    The same frames give the same bytes under the same libraries: one thread, no time stamp. The file appears under its name
    only when it is whole. InputError when the frames have another shape or type, or odd sides (4:2:0 halves both).
    """
    array = np.asarray(frames)
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3 or not len(array):
        raise InputError(f"{path}: frames must be uint8 [F, H, W, 3], got {array.dtype} {list(array.shape)}")
    height, width = array.shape[1:3]
    if height % 2 or width % 2:
        raise InputError(f"{path}: {height}x{width} has an odd side, which 4:2:0 video cannot hold; crop to even sides")
    part = path.with_name(path.name + ".tmp")
    rate = Fraction(fps).limit_denominator(1001)
    with av.open(str(part), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "10", "preset": "veryfast", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1
        stream.codec_context.colorspace, stream.codec_context.color_range = BT601, LIMITED_RANGE
        for number, pixels in enumerate(array):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts, frame.time_base = number, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    os.replace(part, path)


def probe(path: Path) -> VideoInfo:
    """Frame count, size and rate from the file's header (packets are counted where it does not say); nothing is decoded.

    InputError when the file cannot be opened or has no video stream.
    """
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            rate = stream.average_rate or stream.guessed_rate
            height, width = stream.height, stream.width
            frames = stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
    except (av.FFmpegError, IndexError, OSError) as error:
        raise InputError(f"{path}: not a readable video ({error}); repair or remove it") from error
    if not rate or not height or not width:
        raise InputError(f"{path}: the header gives no frame rate or size; encode it again as H.264 mp4")
    return VideoInfo(frames, height, width, float(rate))


def read_frames(path: Path, indices: Sequence[int]) -> torch.Tensor:
    """The frames at `indices` (ascending, from 0) as uint8 [F, H, W, 3], by decord, or by PyAV where decord cannot.

    One reader, one thread, one request: decord reads ahead without bound while a reader is kept. InputError when the file
    cannot be read or an index is past its end.
    """
    wanted = [int(i) for i in indices]
    if not wanted or wanted[0] < 0 or any(a > b for a, b in zip(wanted, wanted[1:], strict=False)):
        raise InputError(f"{path}: frame indices must be ascending and not negative, got {wanted[:4]}...")
    if not path.is_file():
        raise InputError(f"{path}: no such video file")
    if decord is not None:
        try:
            return _read_decord(path, wanted)
        except (decord.DECORDError, RuntimeError):
            pass  # decord knows no AV1, and fails on widths whose rows its decoder pads (48, 72); PyAV reads them or says why not
    return _read_av(path, wanted)


def _read_decord(path: Path, wanted: list[int]) -> torch.Tensor:
    reader = decord.VideoReader(str(path), num_threads=1)
    if wanted[-1] >= len(reader):
        raise InputError(_too_short(path, wanted[-1], len(reader)))
    return torch.from_numpy(reader.get_batch(wanted).asnumpy())


def _read_av(path: Path, wanted: list[int]) -> torch.Tensor:
    count, kept, needed = 0, {}, set(wanted)
    try:
        with av.open(str(path)) as container:
            for count, frame in enumerate(container.decode(video=0), start=1):
                if count - 1 in needed:
                    kept[count - 1] = frame.to_ndarray(format="rgb24")
                if count > wanted[-1]:
                    break
    except (av.FFmpegError, IndexError, OSError) as error:
        raise InputError(f"{path}: not a readable video ({error}); repair or remove it") from error
    if count <= wanted[-1]:
        raise InputError(_too_short(path, wanted[-1], count))
    return torch.from_numpy(np.stack([kept[i] for i in wanted]))


def _too_short(path: Path, index: int, count: int) -> str:
    return f"{path}: frame {index} was asked for, but only {count} can be read; the file is cut short or its header is wrong"


def centre_crop_resize(frames: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """uint8 [F, h, w, 3] to fp32 [3, F, H, W] in [-1, 1]: the largest centred crop of the target's shape, antialiased bilinear.

    `size` is (H, W) in pixels. The crop's free side is rounded down, as the published pixel pipeline does.
    """
    count, rows, columns, _ = frames.shape
    height, width = size
    if rows * width >= columns * height:
        crop_rows, crop_columns = max(1, columns * height // width), columns
    else:
        crop_rows, crop_columns = rows, max(1, rows * width // height)
    top, left = (rows - crop_rows) // 2, (columns - crop_columns) // 2
    cropped = frames[:, top : top + crop_rows, left : left + crop_columns]
    out = torch.empty(3, count, height, width)
    for start in range(0, count, RESIZE_BLOCK):
        block = cropped[start : start + RESIZE_BLOCK].permute(0, 3, 1, 2).float() / 127.5 - 1
        if (crop_rows, crop_columns) != (height, width):
            block = F.interpolate(block, size=(height, width), mode="bilinear", antialias=True, align_corners=False)
        out[:, start : start + RESIZE_BLOCK] = block.transpose(0, 1)
    return out
