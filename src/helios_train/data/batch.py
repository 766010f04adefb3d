"""What the loader yields: windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from helios_train.data.order import Ref
from helios_train.history import History


@dataclass(frozen=True)
class Window:
    """Target and history of one section of each of B clips, with their text and their places in the run.

    bf16 as it leaves the loader, fp32 (exactly the same numbers) from `to` on.
    """

    target: Tensor  # [B, C, 9, H, W]
    history: History
    text: Tensor  # [B, rows, dim], rows past the prompt zero
    refs: tuple[Ref, ...]
    sections: tuple[int, ...]

    @property
    def positions(self) -> list[int]:
        """Places in the global batch."""
        return [ref.position for ref in self.refs]

    @property
    def iteration(self) -> int:
        """The iteration this window belongs to, counted from 0."""
        return self.refs[0].iteration

    def to(self, device: torch.device | str) -> Window:
        """The window on the device that works on it, in fp32; widened there, so that half the bytes travel."""
        tensors = {name: getattr(self, name).to(device).float() for name in ("target", "text")}
        return replace(self, history=self.history.to(device).to(device, torch.float32), **tensors)

    def samples(self) -> list[Window]:
        """Its samples, a window each."""
        return [
            Window(
                self.target[own],
                self.history.sample(number),
                self.text[own],
                self.refs[own],
                self.sections[own],
            )
            for number, own in enumerate(slice(number, number + 1) for number in range(len(self.refs)))
        ]


@dataclass(frozen=True)
class WindowPair:
    """Two windows of the same clips, their sections drawn independently: one for the student, one for the critic."""

    first: Window
    second: Window

    def to(self, device: torch.device | str) -> WindowPair:
        """As Window.to."""
        return WindowPair(self.first.to(device), self.second.to(device))


@dataclass(frozen=True)
class Piece:
    """One sample of a window, as a worker cuts it."""

    target: Tensor  # [C, 9, H, W]
    frames: Tensor  # [C, 19, H, W]
    anchor: Tensor  # [C, 1, H, W]
    text: Tensor  # [L, dim], the prompt's rows alone
    ref: Ref
    section: int
    count: int
    anchored: bool


def stack(pieces: Sequence[Piece], rows: int) -> Window:
    """One window out of samples of one shape, their texts padded with zeros to `rows`."""
    text = pieces[0].text.new_zeros(len(pieces), rows, pieces[0].text.shape[1])
    for sample, piece in enumerate(pieces):
        text[sample, : len(piece.text)] = piece.text
    return Window(
        target=torch.stack([piece.target for piece in pieces]),
        history=History(
            frames=torch.stack([piece.frames for piece in pieces]),
            anchor=torch.stack([piece.anchor for piece in pieces]),
            counts=tuple(piece.count for piece in pieces),
            anchored=tuple(piece.anchored for piece in pieces),
        ),
        text=text,
        refs=tuple(piece.ref for piece in pieces),
        sections=tuple(piece.section for piece in pieces),
    )


@dataclass(frozen=True)
class MicroBatches:
    """Collate function: a rank's share of a global batch as a list of micro-batches of `size`, texts padded to `rows`."""

    size: int
    rows: int

    def __call__(self, pieces: list[Piece]) -> list[Window]:
        return [stack(pieces[at : at + self.size], self.rows) for at in range(0, len(pieces), self.size)]


@dataclass(frozen=True)
class MicroBatchesOfPairs(MicroBatches):
    """The same for samples that are two pieces each."""

    def __call__(self, pieces: list[tuple[Piece, Piece]]) -> list[WindowPair]:  # type: ignore[override]
        halves = (super(MicroBatchesOfPairs, self).__call__([pair[half] for pair in pieces]) for half in (0, 1))
        return [WindowPair(*windows) for windows in zip(*halves, strict=True)]
