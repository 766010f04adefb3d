"""Drift: how far a metric of a video's start lies from the same metric of its end."""

from __future__ import annotations

from typing import Any

from helios_train.evaluation.frames import Block, Clip
from helios_train.evaluation.metric import Score, Scorer, VideoMetric
from helios_train.evaluation.windows import WindowRule


class Drift(VideoMetric):
    """|M(start) - M(end)| of each video, then the mean; M = `base`, on the two windows that `window_fn` names.

    A video whose windows are None drifts by 0, as published. `signed()` is the mean of M(start) - M(end): above 0 for what gets
    worse on the way.
    """

    higher_is_better = False

    def __init__(self, base: VideoMetric, window_fn: WindowRule, **options: Any):
        super().__init__(**options)
        self.base, self.window_fn = base, window_fn

    def begin(self, clip: Clip) -> Scorer:
        """Two scorers of the base metric, on the windows of one video."""
        windows = self.window_fn(clip.frames)
        if windows is None:
            return _Still()
        own = [Clip(len(window), clip.text, f"{clip.digest}:{window.start}-{window.stop}") for window in windows]
        return _Ends([(window, self.base.begin(part)) for window, part in zip(windows, own, strict=True)])


class _Ends:
    def __init__(self, ends: list[tuple[range, Scorer]]):
        self.ends = ends

    def feed(self, block: Block) -> None:
        for window, scorer in self.ends:
            part = block.part(window)
            if part is not None:
                scorer.feed(part)

    def end(self) -> Score:
        start, end = (scorer.end().value for _, scorer in self.ends)
        return Score(abs(start - end), {"start": start, "end": end}, start - end)


class _Still:
    def feed(self, block: Block) -> None:
        pass

    def end(self) -> Score:
        return Score(0.0, {"start": 0.0, "end": 0.0})
