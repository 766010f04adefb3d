"""Motion smoothness: how near every odd frame is to what an interpolator makes of its neighbours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from helios_train.errors import InputError
from helios_train.evaluation.frames import Block, Clip
from helios_train.evaluation.metric import Score, Scorer, VideoMetric

Interpolator = Callable[[Tensor, Tensor], Tensor]
SIDE = 16  # frames are padded to multiples of it for the interpolator
ROUNDING = 1e-3  # of 255: what fp32 loses of a whole number must not cost a grey level when the rest is cut off


class MotionSmoothness(VideoMetric):
    """(255 - mean |odd frame - its interpolation|) / 255, over the odd frames 2k + 1 between the even 2k and 2k + 2.

    `interpolator`: frames twice, fp32 [N, 3, H, W] in [0, 1] with sides that are multiples of 16, to the frame half way between.
    Source: HeliosBench, where it is AMT-S; its output is cut off to whole grey levels, not rounded.
    """

    def __init__(self, interpolator: Interpolator, **options: Any):
        super().__init__((interpolator,), **options)

    def begin(self, clip: Clip) -> Scorer:
        """Keeps two frames of one video. InputError for fewer than three."""
        if clip.frames < 3:
            raise InputError(f"has {clip.frames} frames, and smoothness is seen in three")
        return _Odd(self)

    def between(self, before_N3HW: Tensor, after_N3HW: Tensor) -> Tensor:
        """uint8 frames half way between uint8 frames. InputError where they are no numbers, which would become black."""
        height, width = before_N3HW.shape[2:]
        down, right = -height % SIDE, -width % SIDE
        pad = (right // 2, right - right // 2, down // 2, down - down // 2)
        given = (F.pad(frames.to(self.device).float() / 255, pad, mode="replicate") for frames in (before_N3HW, after_N3HW))
        made = self._nets[0](*given)[:, :, pad[2] : pad[2] + height, pad[0] : pad[0] + width]
        if not bool(made.isfinite().all()):
            raise InputError("the interpolator gives what is no finite number; see to its weights")
        return (made.float() * 255 + ROUNDING).clamp(0, 255).to(torch.uint8).cpu()


class _Odd:
    def __init__(self, metric: MotionSmoothness):
        self.metric, self.total, self.count = metric, 0.0, 0
        self.kept = torch.empty(0)  # from the last even frame on

    def feed(self, block: Block) -> None:
        """The next frames; those from the last even one on are kept."""
        frames = torch.cat([self.kept, block.boxed]) if len(self.kept) else block.boxed
        triples = (len(frames) - 1) // 2
        if triples:
            even, odd = frames[0 : 2 * triples + 1 : 2], frames[1 : 2 * triples : 2]
            off = (odd.short() - self.metric.between(even[:-1], even[1:]).short()).abs()
            self.total += float(off.double().mean((1, 2, 3)).sum())
            self.count += triples
        self.kept = frames[2 * triples :]

    def end(self) -> Score:
        return Score((255 - self.total / self.count) / 255, {})
