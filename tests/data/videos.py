"""Videos whose frames carry their numbers, and the ways in which a video file can be wrong or odd: real files, made with PyAV."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

BITS = 8  # of a frame's number, as bright and dark stripes from left to right
SIZE = (64, 96)
MILLISECOND = Fraction(1, 1000)
IPHONE = (0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)  # display matrix of a phone held upright: 90 degrees clockwise


def numbered(number: int, size: tuple[int, int] = SIZE) -> NDArray[np.uint8]:
    """A frame [H, W, 3] that shows a number; its upper quarter is darker, so that it has a top."""
    height, width = size
    stripes = np.arange(width) * BITS // width
    frame = np.where(number >> stripes & 1, 220, 30).astype(np.uint8)[None, :, None].repeat(height, 0).repeat(3, 2)
    frame[: height // 4] //= 2
    return frame


def numbers(frames: NDArray[np.uint8]) -> list[int]:
    """The numbers that frames [F, H, W, 3] show."""
    height, width = frames.shape[1:3]
    middles = (np.arange(BITS) * width + width // 2) // BITS
    lit = frames[:, height // 2 :, middles].mean((1, 3)) > 125
    return (lit << np.arange(BITS)).sum(1).tolist()


def write(
    path: Path,
    count: int = 66,
    *,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    times: Sequence[int] | None = None,
    matrix: Sequence[int] | None = None,
    gop: int = 12,
    options: dict[str, str] | None = None,
) -> Path:
    """Numbered frames, 25 a second or at `times` in milliseconds. Options in capitals are the container's."""
    given = ({"sc_threshold": "0"} if codec == "libx264" else {}) | (options or {})  # key frames at every `gop` alone
    container_options = {key.lower(): value for key, value in given.items() if key.isupper()}
    with av.open(str(path), "w", options=container_options) as container:
        stream = container.add_stream(codec, rate=25, options={k: v for k, v in given.items() if not k.isupper()})
        stream.height, stream.width, stream.pix_fmt = *SIZE, pixels
        stream.codec_context.gop_size = gop
        base = Fraction(1, 25) if times is None else MILLISECOND
        stream.codec_context.time_base = base
        if matrix is not None:
            stream.set_display_matrix(matrix)
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(numbered(number), format="rgb24")
            frame.pts, frame.time_base = number if times is None else times[number], base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def whole(path: Path) -> Path:
    """Nothing wrong: 66 frames, a key frame every 12."""
    return write(path)


def garbage(path: Path) -> Path:
    """No video at all."""
    path.write_bytes(np.random.default_rng(0).bytes(5000))
    return path


def empty(path: Path) -> Path:
    """Zero bytes."""
    path.write_bytes(b"")
    return path


def no_table(path: Path) -> Path:
    """Cut short where the table of frames, at the end, is lost."""
    data = write(path).read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return path


def no_tail(path: Path) -> Path:
    """Cut short with the table of frames at the beginning: it lists frames that are not there."""
    data = write(path, options={"MOVFLAGS": "faststart"}).read_bytes()
    path.write_bytes(data[: len(data) * 3 // 4])
    return path


def no_tail_matroska(path: Path) -> Path:
    """A Matroska file cut short: it lists no frames, but says how long it is."""
    path = path.with_suffix(".mkv")
    data = write(path).read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    return path


def damaged(path: Path) -> Path:
    """Whole by its header, but the bytes of frames in its middle are others."""
    data = bytearray(write(path, options={"MOVFLAGS": "faststart", "crf": "5"}).read_bytes())
    start = data.index(b"mdat")
    middle = start + (len(data) - start) // 2
    data[middle : middle + 600] = bytes(byte ^ 0x5A for byte in data[middle : middle + 600])
    path.write_bytes(data)
    return path


def audio_only(path: Path) -> Path:
    """Sound without pictures."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16000, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def unknown_codec(path: Path) -> Path:
    """A codec that nobody knows."""
    path.write_bytes(write(path).read_bytes().replace(b"avc1", b"zzzz").replace(b"avcC", b"zzzC"))
    return path


def one_frame(path: Path) -> Path:
    """A still picture as a video."""
    return write(path, 1)


VARIABLE_TIMES = [33 * number if number < 33 else 33 * 33 + 100 * (number - 33) for number in range(66)]  # ms


def variable_rate(path: Path) -> Path:
    """66 frames: 33 at 30 a second, then 33 at 10."""
    return write(path, times=VARIABLE_TIMES)


def rotated(path: Path) -> Path:
    """To be shown turned by 90 degrees clockwise, as phones write it."""
    return write(path, matrix=IPHONE)


def ten_bit(path: Path) -> Path:
    """10 bits a channel."""
    return write(path, pixels="yuv420p10le")


def av1(path: Path) -> Path:
    """AV1."""
    return write(path, codec="libsvtav1", options={"preset": "12"})


def edited(path: Path, first: int = 20, end: int = 66) -> Path:
    """An edit list that shows frames `first` to `end` - 1 only, and no key frame first."""
    data = bytearray(write(path).read_bytes())
    at = data.index(b"elst") + 12
    length, start = struct.unpack(">Ii", data[at : at + 8])
    data[at : at + 8] = struct.pack(">Ii", length * (end - first) // 66, start + first * 512)  # 512 ticks a frame
    path.write_bytes(data)
    return path


def headless(path: Path) -> Path:
    """Cut out of a longer video without decoding it: the first frames of its open group need some that were left behind."""
    params = "open-gop=1:bframes=4:b-adapt=0:scenecut=0:min-keyint=1:log-level=none"
    source = write(path.with_name("uncut.mkv"), codec="libx265", gop=15, options={"x265-params": params})
    with av.open(str(source)) as video, av.open(str(path), "w") as container:
        stream = container.add_stream_from_template(video.streams.video[0])
        keys = 0
        for packet in video.demux(video.streams.video[0]):
            keys += packet.is_keyframe
            if keys > 1 and packet.size:
                packet.stream = stream
                container.mux(packet)
    return path


def stretched(path: Path) -> Path:
    """24 seconds long for its 66 frames of 25 a second: the last one stands still."""
    return write(path, times=[*(40 * number for number in range(65)), 24000])


UNUSABLE: dict[Callable[[Path], Path], str] = {  # and what is said of it
    garbage: "not a readable video",
    empty: "is empty",
    no_table: "not a readable video",
    no_tail: r"is cut short: 66 frames by its header, \d\d in the file",
    no_tail_matroska: r"is cut short: 2\.64 s by its header",
    audio_only: "holds no video, only audio",
    unknown_codec: "of a codec that this FFmpeg does not know",
}
