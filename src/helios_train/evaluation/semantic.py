"""Semantic consistency: the cosine between a video's embedding and its caption's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from helios_train.errors import InputError
from helios_train.evaluation.frames import Block, Clip, clip_input
from helios_train.evaluation.metric import Score, Scorer, VideoMetric
from helios_train.evaluation.windows import middles


class SemanticConsistency(VideoMetric):
    """cos(video embedding, text embedding), of 8 frames of a video: those that `places` (T -> 8 indices, ascending) names.

    `video_encoder`: fp32 [B, 8, 3, 224, 224], normalised as for CLIP, -> [B, D]; `text_encoder`: captions -> [B, D]. Source:
    HeliosBench, where both are ViCLIP-L/14's, whose text is cut off after 32 tokens.
    """

    def __init__(
        self,
        video_encoder: Callable[[Tensor], Tensor],
        text_encoder: Callable[[list[str]], Tensor],
        places: Callable[[int], Sequence[int]] = middles,
        **options: Any,
    ):
        super().__init__((video_encoder, text_encoder), **options)
        self.places = places

    def begin(self, clip: Clip) -> Scorer:
        """Keeps the 8 frames of one video. InputError where it has no caption."""
        if not clip.text:
            raise InputError("has no caption to compare it with")
        return _Few(self, clip)

    def cosine(self, frames_8: Tensor, text: str) -> float:
        """Of frames fp32 [8, 3, 224, 224] with a caption."""
        video_encoder, text_encoder = self._nets
        video, caption = video_encoder(frames_8[None].to(self.device)), text_encoder([text])
        return float(F.cosine_similarity(video.float(), caption.to(video.device).float()).double())


class _Few:
    def __init__(self, metric: SemanticConsistency, clip: Clip):
        self.metric, self.text, self.wanted = metric, clip.text, list(metric.places(clip.frames))
        self.frames: list[Tensor] = []

    def feed(self, block: Block) -> None:
        if places := block.places(self.wanted):
            self.frames.append(clip_input(block.boxed[places]))

    def end(self) -> Score:
        return Score(self.metric.cosine(torch.cat(self.frames), self.text), {})
