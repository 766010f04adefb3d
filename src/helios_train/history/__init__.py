"""What precedes a section: the type every network call takes.

Axis letters: B batch, C latent channels, T latent frames, H W latent rows and columns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

LONG, MID, SHORT = 16, 2, 1
FRAMES = LONG + MID + SHORT
SECTION = 9

# Frame indices of rotary embedding, the same for every section: position cannot drift with the length of the video.
ANCHOR_INDEX = 0
LONG_INDICES = tuple(range(1, 1 + LONG))
MID_INDICES = tuple(range(17, 17 + MID))
SHORT_INDICES = (19,)
TARGET_INDICES = tuple(range(20, 20 + SECTION))


@dataclass(frozen=True)
class History:
    """The 19 latent frames before a section (oldest first: 16 long, 2 mid, 1 short) and the clip's first latent frame.

    `counts` and `anchored` say on the host what the tensors hold, so that no step has to look at a tensor's value: sample b
    has its newest `counts[b]` frames, the older ones are exactly zero; its anchor is zero unless `anchored[b]`.
    """

    frames: Tensor  # [B, C, 19, H, W]
    anchor: Tensor  # [B, C, 1, H, W]
    counts: tuple[int, ...]
    anchored: tuple[bool, ...]

    def __post_init__(self) -> None:
        batch = self.frames.shape[0]
        if self.frames.ndim != 5 or self.frames.shape[2] != FRAMES:
            raise ValueError(f"history frames must be [B, C, {FRAMES}, H, W], got {tuple(self.frames.shape)}")
        if self.anchor.shape != (batch, self.frames.shape[1], 1, *self.frames.shape[3:]):
            raise ValueError(f"anchor {tuple(self.anchor.shape)} does not go with frames {tuple(self.frames.shape)}")
        if len(self.counts) != batch or len(self.anchored) != batch:
            raise ValueError(f"{batch} samples, but {len(self.counts)} counts and {len(self.anchored)} anchors")

    @classmethod
    def none(cls, batch: int, channels: int, rows: int, columns: int) -> History:
        """What precedes the first section of a text to video: fp32 zeros, on the host."""
        frames = torch.zeros(batch, channels, FRAMES, rows, columns)
        return cls(frames, frames[:, :, :1].clone(), (0,) * batch, (False,) * batch)

    @property
    def long(self) -> Tensor:
        """[B, C, 16, H, W]"""
        return self.frames[:, :, :LONG]

    @property
    def mid(self) -> Tensor:
        """[B, C, 2, H, W]"""
        return self.frames[:, :, LONG : LONG + MID]

    @property
    def short(self) -> Tensor:
        """[B, C, 1, H, W]"""
        return self.frames[:, :, LONG + MID :]

    @property
    def empty(self) -> tuple[bool, ...]:
        """Which samples have neither a frame nor an anchor: text to video."""
        return tuple(count == 0 and not anchored for count, anchored in zip(self.counts, self.anchored, strict=True))

    def present(self) -> Tensor:
        """1 where a frame exists, 0 where it is absent. [B, 1, 19, 1, 1], on the frames' device."""
        first = torch.tensor([FRAMES - count for count in self.counts])
        mask = (torch.arange(FRAMES)[None] >= first[:, None]).to(self.frames.dtype)
        return mask.to(self.frames.device)[:, None, :, None, None]

    def keep(self, counts: tuple[int, ...], anchored: tuple[bool, ...]) -> History:
        """The same history with at most `counts[b]` newest frames, and without the anchor where not `anchored[b]`."""
        fewer = tuple(min(have, want) for have, want in zip(self.counts, counts, strict=True))
        still = tuple(have and want for have, want in zip(self.anchored, anchored, strict=True))
        kept = replace(self, counts=fewer, anchored=still)
        return replace(kept, frames=self.frames * kept.present(), anchor=self.anchor * _column(still, self.anchor))

    def sample(self, number: int) -> History:
        """The history of one sample alone."""
        own = slice(number, number + 1)
        return History(self.frames[own], self.anchor[own], self.counts[own], self.anchored[own])

    def dropped(self) -> History:
        """No history at all: what text to video starts from."""
        return self.keep((0,) * len(self.counts), (False,) * len(self.counts))

    def followed_by(self, latents_BCTHW: Tensor) -> History:
        """What precedes the section after `latents` [B, C, 9, H, W]: the newest 19 frames, on their device and in their dtype.

        An anchor stays; where there is none, the first latent frame becomes it.
        """
        frames = torch.cat([self.frames.to(latents_BCTHW), latents_BCTHW], dim=2)[:, :, -FRAMES:]
        anchor = self.anchor.to(latents_BCTHW)
        if not all(self.anchored):  # else no gradient of the latents is to pass here
            anchor = torch.where(_column(self.anchored, anchor).bool(), anchor, latents_BCTHW[:, :, :1])
        counts = tuple(min(FRAMES, count + latents_BCTHW.shape[2]) for count in self.counts)
        return History(frames, anchor, counts, (True,) * len(counts))

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> History:
        """The same history elsewhere."""
        return replace(self, frames=self.frames.to(device, dtype), anchor=self.anchor.to(device, dtype))


def _column(flags: tuple[bool, ...], like: Tensor) -> Tensor:
    return torch.tensor(flags, dtype=like.dtype).to(like.device)[:, None, None, None, None]
