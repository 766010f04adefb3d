"""What all metrics of HeliosBench have in common: a video is scored as its frames come, and scores are averaged over videos.

A metric takes whole videos too (`update`), as torchmetrics has it; both ways give the same. To add a measure: subclass
`VideoMetric`, write `begin`, and name it in the table of tasks/measures.py. Axes: B videos, T frames, H W pixel rows and columns.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from helios_train.errors import InputError
from helios_train.evaluation.frames import BLOCK, Block, Clip


class Score(NamedTuple):
    """A video's score, what else was found on the way (what JSON can hold), and the score with its sign where it has one."""

    value: float
    details: dict[str, Any]
    signed: float = 0.0


class Scorer(Protocol):
    """Scores one video in bounded memory."""

    def feed(self, block: Block) -> None:
        """The next frames; all of them come, in order."""

    def end(self) -> Score:
        """The score, after the last. InputError where the video cannot have one."""


class VideoMetric(Metric):
    """The mean of a score over videos; a video that several ranks or updates bring under one id counts once.

    States: sum and number of the scores that came without an id; ids (int64 [N]) and rows (float64 [N, 2]: score, signed score)
    of the others. `nets`: what subclasses compute with, moved with the metric, and never part of its `state_dict`.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    variant = ""  # the name of a form of its own, which thresholds of the published form do not rate
    unnumbered: Tensor
    count: Tensor
    ids: Any  # list[Tensor], and a Tensor while ranks are synchronised
    rows: Any

    def __init__(self, nets: Sequence[Callable[..., Any]] = (), **options: Any):
        super().__init__(**options)
        self._nets = tuple(nets)  # a tuple, so that torch does not take them for parts of this module
        self.add_state("unnumbered", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("ids", [], dist_reduce_fx="cat")
        self.add_state("rows", [], dist_reduce_fx="cat")

    @abstractmethod
    def begin(self, clip: Clip) -> Scorer:
        """What scores one video of which `clip` is known. InputError where it is too short."""

    @torch.no_grad()
    def score(self, video: Tensor, text: str = "") -> Score:
        """The score of one video, uint8 [T, 3, H, W]."""
        if video.dtype != torch.uint8 or video.dim() != 4 or video.shape[1] != 3 or not len(video):
            raise InputError(f"a video is uint8 [T, 3, H, W], got {video.dtype} {list(video.shape)}")
        pixels = video.permute(0, 2, 3, 1).cpu()
        scorer = self.begin(Clip(len(video), text, hashlib.sha256(pixels.contiguous().numpy().tobytes()).hexdigest()))
        for start in range(0, len(video), BLOCK):
            scorer.feed(Block(start, pixels[start : start + BLOCK]))
        return scorer.end()

    def update(
        self,
        video: Tensor | Sequence[Tensor],
        lengths: Tensor | Sequence[int] | None = None,
        text: Sequence[str] | None = None,
        ids: Sequence[int] | None = None,
    ) -> None:
        """Scores a batch, uint8 [B, T, 3, H, W] or a list of [T, 3, H, W], of which each video's first `lengths` frames count."""
        for number, frames in enumerate(video):
            length = len(frames) if lengths is None else int(lengths[number])
            score = self.score(frames[:length], text[number] if text is not None else "")
            self._add(score, None if ids is None else ids[number])

    def add(self, scores: Iterable[tuple[int, Score]]) -> None:
        """Counts videos that were scored elsewhere: (id, score)."""
        self._computed = None
        self._update_count += 1
        for number, score in scores:
            self._add(score, number)

    def compute(self) -> Tensor:
        """The mean over videos, float64; NaN of none."""
        return self._means()[0]

    def signed(self) -> Tensor:
        """The mean with signs, over all ranks, float64; 0 of metrics that have none."""
        with self.sync_context():
            return self._means()[1]

    def sync(self, *args: Any, **options: Any) -> None:
        """As torchmetrics', which for a rank that saw no video would gather states of another type and shape."""
        if not self._is_synced and isinstance(self.ids, list) and not self.ids:
            self.ids.append(torch.empty(0, dtype=torch.int64, device=self.device))
            self.rows.append(torch.empty(0, 2, dtype=torch.float64, device=self.device))
        super().sync(*args, **options)

    def _add(self, score: Score, number: int | None) -> None:
        row = torch.tensor([score.value, score.signed], dtype=torch.float64, device=self.device)
        if number is None:
            self.unnumbered += row
            self.count += 1
        else:
            self.ids.append(torch.tensor([number], device=self.device))
            self.rows.append(row[None])

    def _means(self) -> Tensor:
        """float64 [2]: mean score, mean signed score."""
        total, count = self.unnumbered, int(self.count)
        if len(self.ids):
            ids, rows = (state if isinstance(state, Tensor) else torch.cat(state) for state in (self.ids, self.rows))
            # In the order of ids, so that the sum does not depend on who brought what.
            first = {number: place for place, number in reversed(list(enumerate(ids.tolist())))}
            kept = [first[number] for number in sorted(first)]
            total, count = total + rows[kept].sum(0), count + len(kept)
        return total / count if count else torch.full_like(total, torch.nan)

    def _apply(self, fn: Callable[..., Any], exclude_state: Sequence[str] = "") -> nn.Module:
        for net in self._nets:
            if isinstance(net, nn.Module):
                net._apply(fn)
        return super()._apply(fn, exclude_state)
