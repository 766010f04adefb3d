"""Videos inside a page: as they are while they fit, smaller or as contact sheets where they do not; the newest come first."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
from PIL import Image

from helios_train.evaluation.recorded import Video

MOST = 24  # videos on a page
NEWEST = 3  # shares of the room that a video of the newest iteration may take to be shown as it is
SMALLER = 8  # videos that are encoded again for one page: each takes a second or more
SIDES = 416, 208  # pixels, the longest side of those: the second where the first takes too much
FRAMES = 3000  # of a video that is encoded again, at most
SLOWEST = 40_000  # bits a second, below which nothing can be seen
SHEET = 1200, 3000  # pixels, largest width and height of a contact sheet
QUALITY = 75  # of its WebP


@dataclass
class Shown:
    """One video on a page: data URIs of what is shown of it. `how`: whole, smaller, sheet or none."""

    video: Video
    mp4: str = ""
    sheet: str = ""
    how: str = "none"

    @property
    def size(self) -> int:
        """Characters it takes."""
        return len(self.mp4) + len(self.sheet)


@dataclass
class Album:
    """Videos that share a page. `notes`: what is not shown as it is, a sentence each."""

    shown: list[Shown] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def album(videos: Sequence[Video], room: int) -> Album:
    """As many of the videos as fit into `room` characters, by iteration; what cannot be read is noted."""
    made = Album()
    if not videos:
        return made
    ordered = by_importance(videos)
    newest = max(video.iteration for video in videos)
    share, left, again = room // min(len(ordered), MOST), room, SMALLER
    for video in ordered[:MOST]:
        shown = Shown(video, sheet=_sheet(video, made))
        whole = _uri_size(video.mp4)
        roomy = (NEWEST if video.iteration == newest else 1) * share >= whole + len(shown.sheet)
        if whole and whole + len(shown.sheet) <= left and (roomy or _all_fit(ordered, room)):
            shown.mp4 = _mp4(video, made)
        elif whole and again and (most := min(share, left) - len(shown.sheet)) > 0:
            again -= 1
            shown.mp4, shown.how = _smaller(video, most, made), "smaller"
        if len(shown.sheet) > left:
            shown.sheet = ""
        shown.how = (shown.how if shown.how == "smaller" else "whole") if shown.mp4 else "sheet" if shown.sheet else "none"
        left -= shown.size
        made.shown.append(shown)
    made.shown.sort(key=lambda one: videos.index(one.video))
    _say(made, len(ordered))
    return made


def by_importance(videos: Iterable[Video]) -> list[Video]:
    """The newest iteration's videos, the first's, those half-way between, and so on."""
    videos = list(videos)
    moments = sorted({video.iteration for video in videos})
    order = dict.fromkeys([moments[-1], moments[0]])
    parts = 2
    while len(order) < len(moments):
        order |= dict.fromkeys(moments[round(place * (len(moments) - 1) / parts)] for place in range(1, parts))
        parts *= 2
    rank = {moment: number for number, moment in enumerate(order)}
    return sorted(videos, key=lambda video: rank[video.iteration])


def _all_fit(videos: Sequence[Video], room: int) -> bool:
    """Whether nothing has to give way: a PNG is larger than the sheet made of it."""
    return len(videos) <= MOST and sum(_uri_size(video.mp4) + _uri_size(video.sheet) for video in videos) <= room


def _uri_size(path: Path | None) -> int:
    """Characters of a file as a data URI; 0 where there is none."""
    try:
        return 4 * math.ceil(path.stat().st_size / 3) + 30 if path else 0
    except OSError:
        return 0


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _mp4(video: Video, made: Album) -> str:
    assert video.mp4 is not None
    try:
        with av.open(str(video.mp4)) as opened:  # a page should not hold what no browser plays
            next(opened.decode(video=0))
        return _uri("video/mp4", video.mp4.read_bytes())
    except (av.FFmpegError, OSError, StopIteration, ValueError, IndexError) as error:
        made.notes.append(f"videos/{video.mp4.name} cannot be played ({_reason(error)})")
        return ""


def _sheet(video: Video, made: Album) -> str:
    """The contact sheet as WebP; "" where there is none."""
    if video.sheet is None:
        return ""
    try:
        with Image.open(video.sheet) as opened:
            page = opened.convert("RGB")
        page.thumbnail(SHEET)
        packed = io.BytesIO()
        page.save(packed, "WEBP", quality=QUALITY, method=1)  # the quickest that is smaller than JPEG
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        made.notes.append(f"videos/{video.sheet.name} cannot be read ({_reason(error)})")
        return ""
    return _uri("image/webp", packed.getvalue())


def _smaller(video: Video, room: int, made: Album) -> str:
    """The video with fewer pixels and bits, within `room` characters; "" where that cannot be."""
    assert video.mp4 is not None
    try:
        tries = (_encoded_again(video.mp4, room * 3 // 4 - 60, side) for side in SIDES)
        packed = next(filter(None, tries), b"")
    except (av.FFmpegError, OSError, StopIteration, ValueError, IndexError, ZeroDivisionError) as error:
        made.notes.append(f"videos/{video.mp4.name} cannot be played ({_reason(error)})")
        return ""
    return _uri("video/mp4", packed) if packed else ""


def _encoded_again(path: Path, size: int, side: int) -> bytes:
    """At most `size` bytes of mp4 with no side above `side`; none where it would take more."""
    packed = io.BytesIO()
    with av.open(str(path)) as source, av.open(packed, "w", format="mp4") as target:
        stream = source.streams.video[0]
        rate = stream.average_rate or Fraction(25)
        if not 0 < stream.frames <= FRAMES or (bits := int(size * 8 * 0.8 * rate / stream.frames)) < SLOWEST:
            return b""
        shrink = min(1.0, side / max(stream.width, stream.height))
        width, height = (max(2, round(length * shrink / 2) * 2) for length in (stream.width, stream.height))
        limits = {"maxrate": str(bits), "bufsize": str(bits), "threads": "1", "preset": "veryfast", "crf": "23"}
        out = target.add_stream("libx264", rate=rate, options=limits)
        out.width, out.height, out.pix_fmt = width, height, "yuv420p"
        for number, frame in enumerate(source.decode(stream)):
            small = frame.reformat(width, height, "yuv420p")
            small.pts, small.time_base = number, 1 / rate
            target.mux(out.encode(small))
        target.mux(out.encode(None))
    return packed.getvalue() if len(packed.getbuffer()) <= size else b""


def _say(made: Album, count: int) -> None:
    """Notes on what the bound on a page's size did to the videos."""
    hows = [one.how for one in made.shown]
    for how, what in (
        ("smaller", "shown with fewer pixels"),
        ("sheet", "shown as contact sheets only"),
        ("none", "not shown"),
    ):
        if number := hows.count(how):
            made.notes.append(f"{number} of {count} videos {'is' if number == 1 else 'are'} {what}; the files are in videos/")
    if count > len(hows):
        made.notes.append(
            f"{len(hows)} of {count} videos are shown, the newest, the first and some between; the others are in videos/"
        )


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
