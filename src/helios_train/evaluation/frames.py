"""What metrics are shown of a video: blocks of frames in order, and the ways in which they are made smaller.

Axes: T frames of a video, N frames of a block, H W pixel rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BOX = (384, 640)  # rows and columns that a landscape video is brought into, its shape preserved; a portrait one into 640 x 384
BLOCK = 16  # frames a block; at 384 x 640 it is 12 MB
CROP = 224  # side of what CLIP and ViCLIP look at
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's training images, RGB


@dataclass(frozen=True)
class Clip:
    """What is known of a video before its first frame: their number, its caption, and a digest of its content."""

    frames: int
    text: str = ""
    digest: str = ""


class Block:
    """Frames `start` to `start + N` of a video, `pixels` uint8 [N, H, W, 3] RGB as stored."""

    def __init__(self, start: int, pixels: Tensor, boxed: Tensor | None = None):
        self.start, self.pixels, self._boxed = start, pixels, boxed

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def boxed(self) -> Tensor:
        """uint8 [N, 3, h, w] inside the box, for all metrics but naturalness; made once."""
        if self._boxed is None:
            frames = self.pixels.permute(0, 3, 1, 2)
            size = box_size(frames.shape[2], frames.shape[3])
            self._boxed = frames.contiguous() if size == frames.shape[2:] else resized(frames, size, "bilinear")
        return self._boxed

    def part(self, window: range) -> Block | None:
        """What of it lies in a window, counted from the window's start; None where nothing does."""
        first, last = max(self.start, window.start), min(self.start + len(self), window.stop)
        if first >= last:
            return None
        cut = slice(first - self.start, last - self.start)
        return Block(first - window.start, self.pixels[cut], self.boxed[cut])

    def places(self, wanted: Sequence[int]) -> list[int]:
        """Which of its frames are wanted, by their places in it; ascending, the same one as often as it is wanted."""
        return [index - self.start for index in wanted if self.start <= index < self.start + len(self)]


def box_size(height: int, width: int) -> tuple[int, int]:
    """Rows and columns in the box: the width is the box's, the height follows the video's shape, rounded down to a multiple of 2;
    of a portrait video the other way round. 480 x 832 becomes 368 x 640, as published."""
    if height > width:
        return box_size(width, height)[::-1]
    return max(2, int(BOX[1] * height / width) // 2 * 2), BOX[1]


def resized(frames_N3HW: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """Frames resized without antialiasing, as OpenCV and torchvision do; uint8 is rounded and kept within 0 to 255."""
    out = F.interpolate(frames_N3HW.float(), size=size, mode=mode, antialias=False, align_corners=False)
    return out if frames_N3HW.is_floating_point() else out.round().clamp(0, 255).to(torch.uint8)


def clip_input(frames_N3HW: Tensor) -> Tensor:
    """fp32 [N, 3, 224, 224] as CLIP takes them: the shorter side brought to 224 (bicubic), the middle cut out, normalised.

    uint8 frames stay within 0 to 255 on the way; what bicubic resizing makes of floats (0 to 255) goes past that, as published
    for the aesthetic score.
    """
    height, width = frames_N3HW.shape[2:]
    short = min(height, width)
    size = (CROP * height // short, CROP * width // short)
    frames = resized(frames_N3HW, size, "bicubic").float()
    top, left = round((size[0] - CROP) / 2), round((size[1] - CROP) / 2)
    frames = frames[:, :, top : top + CROP, left : left + CROP] / 255
    mean, std = (torch.tensor(values, device=frames.device).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (frames - mean) / std
