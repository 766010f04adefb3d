"""Aesthetic score: CLIP's image embedding and LAION's linear head, over all frames."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from helios_train.evaluation.frames import Block, Clip, clip_input
from helios_train.evaluation.metric import Score, Scorer, VideoMetric


class AestheticScore(VideoMetric):
    """mean over frames of (head(f / |f|)) / 10, with f = `image_encoder` [N, 3, 224, 224] -> [N, D] and `head` [N, D] -> [N, 1].

    Frames go to the encoder `frame_batch` at a time, on the metric's device. Source: HeliosBench (CLIP ViT-L/14, LAION's first
    linear head).
    """

    def __init__(
        self,
        image_encoder: Callable[[Tensor], Tensor],
        head: Callable[[Tensor], Tensor],
        frame_batch: int = 32,
        **options: Any,
    ):
        super().__init__((image_encoder, head), **options)
        self.frame_batch = frame_batch

    def begin(self, clip: Clip) -> Scorer:
        """Sums over the frames of one video."""
        return _Sum(self)

    def frame_scores(self, frames_N3HW: Tensor) -> Tensor:
        """fp32 [N], 0 to 10 or so, of uint8 frames."""
        encoder, head = self._nets
        features = encoder(clip_input(frames_N3HW.to(self.device).float())).float()
        return head(F.normalize(features, dim=-1)).float().flatten()


class _Sum:
    def __init__(self, metric: AestheticScore):
        self.metric, self.total, self.count = metric, 0.0, 0

    def feed(self, block: Block) -> None:
        for frames in block.boxed.split(self.metric.frame_batch):
            self.total += float(self.metric.frame_scores(frames).double().sum())
            self.count += len(frames)

    def end(self) -> Score:
        return Score(self.total / self.count / 10, {})
