"""Windows cut out of the shards, reading only the byte ranges a window needs."""

from __future__ import annotations

import torch
from torch.utils.data import Dataset

from helios_train import rng
from helios_train.data.batch import Piece
from helios_train.data.index import ClipStore
from helios_train.data.order import Ref
from helios_train.errors import InputError
from helios_train.history import windows


class WindowDataset(Dataset[Piece]):
    """Sample -> one window of it. Map-style: everything random is drawn from (seed, purpose, epoch, sample id)."""

    def __init__(self, store: ClipStore, rows: int, seed: int, caption_drop: float = 0.0, anchors: bool = True):
        """`rows`: text rows a sample may have; `caption_drop`: share of samples that train with the null text.

        `anchors`: whether the windows have their clip's anchor; else it is zero.
        """
        self.store, self.rows, self.seed, self.caption_drop, self.anchors = store, rows, seed, caption_drop, anchors

    def __getitem__(self, ref: Ref) -> Piece:
        return self._drawn(ref, "section")

    def _drawn(self, ref: Ref, purpose: str) -> Piece:
        sections = self.store.section_count(ref.sample)
        section = int(rng.generator(self.seed, purpose, ref.epoch, ref.sample).integers(sections))
        dropped = rng.generator(self.seed, "caption drop", ref.epoch, ref.sample).random() < self.caption_drop
        return self.piece(ref, section, dropped)

    def piece(self, ref: Ref, section: int, dropped: bool = False) -> Piece:
        """The window of a chosen section; `dropped` gives it the null text. bf16, as stored."""
        where = windows.span(section, self.store.section_count(ref.sample))
        latents = self.store.view(ref.sample, where.first, section + 1)
        first = latents if where.first == 0 else self.store.view(ref.sample, 0, 1)
        target, frames, anchor = windows.cut(latents, first[0, :, 0], where)
        anchored = where.anchored and self.anchors
        anchor = anchor if anchored else torch.zeros_like(anchor)
        return Piece(target, frames, anchor, self.text(ref.sample, dropped), ref, section, where.count, anchored)

    def text(self, sample: int, dropped: bool = False) -> torch.Tensor:
        """The text rows `[L, dim]` bf16 of a clip, L at most `rows`; none if `dropped`."""
        text = self.store.text(sample)
        if text.shape[0] > self.rows:
            raise InputError(
                f"{self.store.key(sample)} has {text.shape[0]} text rows, the model takes {self.rows}: "
                f"prepare it again with text.rows={self.rows}"
            )
        return text[:0] if dropped else text


class PairDataset(WindowDataset):
    """Sample -> two windows of it, the second drawn for itself."""

    def __getitem__(self, ref: Ref) -> tuple[Piece, Piece]:  # type: ignore[override]
        return self._drawn(ref, "section"), self._drawn(ref, "second section")
