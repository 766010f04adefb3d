"""A part of a video as a file of its own, without encoding anything anew: the packets are copied."""

from __future__ import annotations

from pathlib import Path

import av

FORMATS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska", ".webm": "webm", ".avi": "avi"}


def copy_range(path: Path, target: Path, start: int, end: int) -> int | None:
    """Write what decoding frames start..end-1 of `path` needs to `target`; returns the number of frame `start` in it.

    The copy begins at a keyframe, so frames before `start` may come along. None, and no file, where that cannot be done or
    saves nothing. Compare the decoded frames before relying on it: headers lie. The same file gives the same bytes.
    """
    container = FORMATS.get(path.suffix.lower())
    if container is None:
        return None
    try:
        found = _range(path, start, end)
        if found is None:
            return None
        _copy(path, target, container, found[0], found[1])
        if target.stat().st_size < path.stat().st_size:
            return found[2]
    except (av.FFmpegError, ValueError, OSError, IndexError):  # a full disk too: the whole file is no better, and says so
        pass
    target.unlink(missing_ok=True)
    return None


def _range(path: Path, start: int, end: int) -> tuple[int, int, int] | None:
    """First and last packet, in their order in the file, and how many frames come before frame `start`."""
    times: list[int] = []
    keys: list[bool] = []
    with av.open(str(path)) as video:
        for packet in video.demux(video.streams.video[0]):
            if packet.size:
                times.append(-1 if packet.pts is None else packet.pts)
                keys.append(packet.is_keyframe)
    shown = sorted(times)
    if len(set(shown)) != len(times) or end > len(shown):
        return None  # without times of their own frames cannot be counted
    first, last = shown[start], shown[end - 1]
    stop = max(i for i, time in enumerate(times) if time <= last)
    # Frames come before those that lean on them: on to where no gap is left, or the rate of the copy would seem to vary.
    while (gap := max(i for i, time in enumerate(times) if time <= max(times[: stop + 1]))) > stop:
        stop = gap
    # A keyframe with everything before it in the file shown before it, everything after it after: nothing reaches across.
    latest: int | None = None
    clean = set()
    for i, time in enumerate(times):
        if keys[i] and (latest is None or latest < time):
            clean.add(i)
        latest = time if latest is None else max(latest, time)
    earliest: int | None = None
    for i in range(len(times) - 1, -1, -1):
        earliest = times[i] if earliest is None else min(earliest, times[i])
        if i in clean and earliest == times[i] and times[i] <= first:
            return i, stop, sum(times[i] <= time < first for time in times)
    return None


def _copy(path: Path, target: Path, container: str, first: int, last: int) -> None:
    """Packets first..last of the video stream into a new file, times counted from its beginning."""
    number = -1
    # bitexact: no library version and, in Matroska, no random names in the file
    with av.open(str(path)) as video, av.open(str(target), "w", format=container, options={"fflags": "+bitexact"}) as copy:
        stream = video.streams.video[0]
        out = copy.add_stream_from_template(stream)
        begin: int | None = None
        for packet in video.demux(stream):
            number += packet.size > 0
            if not packet.size or number < first:
                continue
            if number > last:
                break
            assert packet.pts is not None  # or there would be no range
            begin = packet.pts if begin is None else begin
            packet.pts -= begin
            if packet.dts is not None:
                packet.dts -= begin
            packet.stream = out
            copy.mux(packet)
