"""Which shape and length a video is stored in: the published choices."""

from __future__ import annotations

from collections.abc import Sequence

from helios_train.data.format import SECTION_FRAMES

# The published shapes around 640 pixels, (height, width), in the order that decides ties.
RESOLUTIONS = (
    (768, 320),
    (768, 384),
    (640, 384),
    (768, 512),
    (576, 448),
    (512, 512),
    (448, 576),
    (512, 768),
    (384, 640),
    (384, 768),
    (320, 768),
)

# The published lengths in frames that are worth a clip: the list goes on down to 21, but clips under 121 are dropped.
LENGTHS = (*range(501, 220, -20), 193, 181, 161, 141, 121)


def nearest(height: int, width: int, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The (height, width) of `sizes` for a video of that many pixels: the smallest |h * bw - w * bh|, the last of equals."""
    return min(reversed(sizes), key=lambda size: abs(height * size[1] - width * size[0]))


def whole_sections(frames: int, lengths: Sequence[int] | None = None) -> int:
    """The frames kept of a clip of `frames`: the whole sections of the longest of `lengths` it fills; 0 where it fills none.

    Without `lengths` every multiple of a section is one. A published clip of 121 frames keeps 99: what does not fill a
    section is thrown away.
    """
    if lengths is not None:
        frames = max((length for length in lengths if length <= frames), default=0)
    return frames // SECTION_FRAMES * SECTION_FRAMES
