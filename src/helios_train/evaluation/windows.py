"""Which frames the published metrics look at. They are not alike: every rule here is that of one script of HeliosBench.

T is the number of frames of a video, or of a window of one.
"""

from __future__ import annotations

from collections.abc import Callable

SHARE = 0.15  # of a video, at its start and at its end, between which it may drift
SEEN = 8  # frames that ViCLIP takes
JUDGED = 16  # frames that a judge of naturalness is shown, at most

Windows = tuple[range, range]
WindowRule = Callable[[int], Windows | None]


def middles(frames: int) -> list[int]:
    """The middle of each of 8 equal intervals, for the semantic score of a whole video."""
    edges = [frames * part // SEEN for part in range(SEEN + 1)]
    return [max(first, (first + last - 1) // 2) for first, last in zip(edges, edges[1:], strict=False)]


def beginnings(frames: int) -> list[int]:
    """The beginning of each of 8 equal intervals, for the semantic score of a window."""
    return [part * frames // SEEN for part in range(SEEN)]


def strided(frames: int) -> list[int]:
    """At most 16 frames from the first on, at a stride of T // 16: the tail of a video is not among them."""
    return list(range(0, frames, max(frames // JUDGED, 1)))[:JUDGED]


def ends(frames: int) -> Windows:
    """The first and the last 15 %, at least a frame: drift of the aesthetic score and of naturalness."""
    return _outer(frames, max(1, int(SHARE * frames)))


def smoothness_ends(frames: int) -> Windows | None:
    """The first and the last 15 %, at least four frames; None for a video of fewer, whose drift counts as 0."""
    return _outer(frames, max(4, int(SHARE * frames))) if frames >= 4 else None


def semantic_ends(frames: int) -> Windows:
    """Frames from 0 to 15 % and from 85 to 100 %, each at least 8 where there are so many."""
    start, end = int(SHARE * frames), int((1 - SHARE) * frames)
    return range(min(frames, max(SEEN, start))), range(max(0, min(end, frames - SEEN)), frames)


def _outer(frames: int, length: int) -> Windows:
    return range(length), range(frames - length, frames)
