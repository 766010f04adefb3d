"""What a video file holds, from its header: frames, size, rate, turn, and how frame numbers and time stamps hang together.

PyAV and numpy alone: this is imported by the decoding process, which has to start fast.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from numpy.typing import NDArray

from helios_train.errors import InputError

STEADY = 0.25  # a rate is constant where no frame lies further than this part of a frame from its place
PLAIN_FRAMES = 300  # decord reads ahead as fast as it can: a long video would fill the memory
PLAIN_FORMATS = ("yuv420p", "yuvj420p")
HDR_CURVES = {16: "PQ", 18: "HLG"}  # transfer characteristics of H.273


class VideoInfo(NamedTuple):
    """What a file shows: frame count, rows and columns (upright), frames a second, and what is out of the ordinary about it."""

    frames: int
    height: int
    width: int
    fps: float
    notes: tuple[str, ...] = ()


class Turn(NamedTuple):
    """How stored frames become upright ones: rows and columns swapped, then rows, then columns reversed."""

    swap: bool = False
    flip_rows: bool = False
    flip_columns: bool = False

    def __call__(self, frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """uint8 [F, h, w, 3] turned; a view."""
        frames = frames.swapaxes(1, 2) if self.swap else frames
        return frames[:, :: -1 if self.flip_rows else 1, :: -1 if self.flip_columns else 1]


UPRIGHT = Turn()
TURN_NOTES = {  # degrees clockwise
    Turn(True, False, True): "rotated 90",
    Turn(False, True, True): "rotated 180",
    Turn(True, True, False): "rotated 270",
}


@dataclass(frozen=True)
class Contents:
    """A file's header, digested. `first` None: its time stamps tell nothing (AVI), frames are counted from the start."""

    info: VideoInfo
    size: tuple[int, int]  # rows, columns as stored
    stored: int  # frames in the file
    turn: Turn
    first: int | None  # time stamp of frame 0, in the stream's ticks
    step: float  # ticks a frame, where the rate is constant
    stamps: NDArray[np.float64] | None  # time stamp of every stored frame, where it is not
    grid: NDArray[np.int64] | None  # the stored frame nearest to each frame of a constant rate, where that is not its namesake
    plain: bool  # decord reads it right

    def number(self, stamp: int) -> int:
        """The stored frame that has a time stamp."""
        if self.stamps is not None:
            return int(np.searchsorted(self.stamps, stamp))
        assert self.first is not None
        return round((stamp - self.first) / self.step)

    def stamp(self, number: int) -> int:
        """The time stamp of a stored frame."""
        if self.stamps is not None:
            return int(self.stamps[number])
        assert self.first is not None
        return round(self.first + number * self.step)


class _Table(NamedTuple):
    """Times of all frames in ticks, ascending, and how long the last one lasts (0: unknown)."""

    times: NDArray[np.float64]
    last: float

    @property
    def step(self) -> float:
        """Ticks a frame between the first and the last; 1 where there is but one."""
        span = float(self.times[-1] - self.times[0])
        return span / (len(self.times) - 1) if span else 1.0

    @property
    def steady(self) -> bool:
        """Whether all frames lie where a constant rate puts them."""
        places = self.times[0] + np.arange(len(self.times)) * self.step
        return bool(np.abs(self.times - places).max() <= STEADY * self.step)

    def ends_at(self, span: int) -> bool:
        """Whether the last frame comes so many ticks after the first."""
        return bool(abs(self.times[-1] - self.times[0] - span) <= STEADY * self.step)


def survey(path: Path) -> Contents:
    """What is in the file, from its header and its first frame; packets are listed, not decoded, where the header does not do.

    InputError naming the file when it is missing, empty, no video, cut short, or damaged at its start.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such video file")
    nbytes = path.stat().st_size
    if not nbytes:
        raise InputError(f"{path}: is empty (0 bytes); copy it again or remove it")
    with opened(path) as (container, stream):
        table = _from_header(path, container, stream, nbytes)
        keys, start = sum(entry.is_keyframe for entry in stream.index_entries), stream.start_time
        family, codec, tick = container.format.name, stream.codec_context.name, float(stream.time_base)
        average = float(stream.average_rate or stream.guessed_rate or 0) * tick  # frames a tick
        frame = next(iter(container.decode(stream)), None)
        last = 0 if table is None else _last_shown(container, stream, table)
    if frame is None:
        raise InputError(f"{path}: not one frame of it can be decoded; repair or remove it")
    first = None if family == "avi" else frame.pts  # AVI keeps the order in which frames are stored, not when they show
    whole = table is not None and table.steady and first is not None and first == start and table.ends_at(last - first)
    if table is None or not whole:
        table = _from_packets(path, first)
    rate, grid = (average, None) if first is None else _constant_rate(table, average)
    if not rate:
        raise InputError(f"{path}: its header gives no frame rate; encode it again as H.264 mp4")
    fps, turn, notes = round(rate / tick, 6), _turn(path, frame), _notes(frame)
    if grid is not None:
        notes = (f"variable frame rate, brought to {fps:.6g} a second", *notes)
    if turn != UPRIGHT:
        notes = (TURN_NOTES.get(turn, "mirrored"), *notes)
    size = (frame.height, frame.width)
    return Contents(
        info=VideoInfo(len(table.times), *(size[::-1] if turn.swap else size), fps, notes),
        size=size,
        stored=len(table.times),
        turn=turn,
        first=first,
        step=table.step,
        stamps=None if first is None or table.steady else table.times,
        grid=grid,
        plain=whole
        and keys == 1
        and len(table.times) <= PLAIN_FRAMES
        and codec == "h264"
        and frame.format.name in PLAIN_FORMATS
        and turn == UPRIGHT,
    )


@contextmanager
def opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """The container and its video stream, decoded by one thread; what FFmpeg raises inside becomes an InputError."""
    try:
        with av.open(str(path)) as container:
            cover = av.stream.Disposition.attached_pic
            stream = next((stream for stream in container.streams.video if not stream.disposition & cover), None)
            if stream is None:
                kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
                raise InputError(f"{path}: holds no video, only {kinds}; remove it")
            if stream.codec_context is None:
                raise InputError(f"{path}: of a codec that this FFmpeg does not know; encode it again as H.264 mp4")
            stream.codec_context.thread_count = 1
            yield container, stream
    except (av.FFmpegError, OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: not a readable video, or damaged ({reason}); repair or remove it") from error


def _from_header(path: Path, container: Any, stream: Any, nbytes: int) -> _Table | None:
    """Decoding times as an mp4 or mov tabulates them; None where its table is not exactly the frames (fragments, edits)."""
    if not _is_mov(container):
        return None
    entries = list(stream.index_entries)
    missing = sum(entry.pos + entry.size > nbytes for entry in entries)
    if missing:
        raise InputError(_cut_short(path, f"{len(entries)} frames", f"{len(entries) - missing}"))
    if not 0 < stream.frames == len(entries) or any(entry.is_discard for entry in entries):
        return None
    return _Table(np.sort(np.array([entry.timestamp for entry in entries], np.float64)), 0.0)


def _last_shown(container: Any, stream: Any, table: _Table) -> int:
    """When the last frame is shown: where frames are stored in another order, times of decoding do not tell."""
    container.seek(int(table.times[-1]), stream=stream)
    return max((packet.pts for packet in container.demux(stream) if packet.pts is not None), default=-1)


def _is_mov(container: Any) -> bool:
    return "mov" in container.format.name.split(",")


def _from_packets(path: Path, first: int | None) -> _Table:
    """Times of presentation of all packets from the first frame that can be decoded on; counted where `first` is None."""
    shown: list[tuple[int, int]] = []
    with opened(path) as (container, stream):
        promised = 0 if _is_mov(container) else stream.frames  # the table was looked through, and edits leave frames out
        tick, tag = float(stream.time_base), stream.metadata.get("DURATION", "")
        count = 0
        for packet in container.demux(stream):
            if not packet.size or packet.is_corrupt:
                continue
            stamp = count if first is None else packet.pts
            if stamp is not None and (first is None or stamp >= first) and not packet.is_discard:
                shown.append((stamp, packet.duration or 0))
            count += 1
    if count < promised or not shown:
        raise InputError(_cut_short(path, f"{promised} frames", f"{count}"))
    shown.sort()
    table = _Table(np.array([stamp for stamp, _ in shown], np.float64), shown[-1][1])
    if first is not None and tag:
        # Matroska gives no number of frames but, mostly, when the last one ends; its packets may not say how long they last.
        end = (table.times[-1] + 2 * max(table.last, np.diff(table.times).max(initial=0))) * tick
        if end < _seconds(tag):
            raise InputError(_cut_short(path, f"{_seconds(tag):.2f} s", f"{table.times[-1] * tick:.2f} s"))
    return table


def _seconds(tag: str) -> float:
    """Seconds of "hours:minutes:seconds"; 0 where a tag is something else."""
    try:
        hours, minutes, seconds = tag.split(":")
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    except ValueError:
        return 0.0


def _cut_short(path: Path, promised: str, held: str) -> str:
    return f"{path}: is cut short: {promised} by its header, {held} in the file; copy it again or remove it"


def _constant_rate(table: _Table, average: float) -> tuple[float, NDArray[np.int64] | None]:
    """Frames a tick, and the stored frame nearest in time to each frame at that rate where the file's own rate varies."""
    times, count = table.times, len(table.times)
    if count == 1:
        return average, None
    if table.steady:
        near = abs(average * table.step - 1) * count < 0.5  # the header's rate is exact, time stamps are rounded
        return (average if near else 1 / table.step), None
    rate = count / (times[-1] - times[0] + (table.last or table.step))
    places = times[0] + np.arange(count) / rate
    after = np.searchsorted(times, places).clip(1, count - 1)
    nearest = after - (places - times[after - 1] <= times[after] - places)
    return float(rate), None if (nearest == np.arange(count)).all() else nearest


def _turn(path: Path, frame: Any) -> Turn:
    """From the display matrix (ISO/IEC 14496-12): x' = a x + c y, y' = b x + d y. InputError for odd angles."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return UPRIGHT
    a, b, _, c, d = (int(value) for value in np.frombuffer(bytes(data), np.int32)[:5])
    straight, crossed = max(abs(a), abs(d)), max(abs(b), abs(c))
    if min(straight, crossed) > max(straight, crossed) / 100:
        raise InputError(f"{path}: is shown turned by an angle that is no multiple of 90 degrees; encode it again upright")
    return Turn(True, b < 0, c < 0) if crossed > straight else Turn(False, d < 0, a < 0)


def _notes(frame: Any) -> tuple[str, ...]:
    """What else is out of the ordinary about the pixels."""
    notes = []
    bits = max(component.bits for component in frame.format.components)
    if bits > 8:
        notes.append(f"{bits} bit")
    if frame.color_trc in HDR_CURVES:
        notes.append(f"{HDR_CURVES[frame.color_trc]} brightness, kept as it is")
    if frame.interlaced_frame:
        notes.append("interlaced, kept as it is")
    return tuple(notes)
