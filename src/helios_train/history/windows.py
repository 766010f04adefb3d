"""Which latent frames are history, anchor and target of a section of a clip."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from helios_train.history import FRAMES, SECTION


@dataclass(frozen=True)
class Span:
    """What section `section` needs of a clip: sections `first` to `section`, and section 0 for the anchor."""

    section: int
    first: int

    @property
    def count(self) -> int:
        """How many real history frames there are: 0, 9, 18, then 19."""
        return min(FRAMES, SECTION * self.section)

    @property
    def anchored(self) -> bool:
        """Whether there is an anchor: in every section but the first."""
        return self.section > 0


def span(section: int, sections: int) -> Span:
    """The span of one section of a clip of `sections`; ValueError outside it."""
    if not 0 <= section < sections:
        raise ValueError(f"section {section} of a clip of {sections}")
    return Span(section, max(0, section - -(-FRAMES // SECTION)))


def cut(latents_SCTHW: Tensor, anchor_CHW: Tensor, where: Span) -> tuple[Tensor, Tensor, Tensor]:
    """Cuts (target [C, 9, H, W], frames [C, 19, H, W], anchor [C, 1, H, W]) out of sections `where.first` to `where.section`.

    `anchor_CHW` is the clip's first latent frame. Frames before the clip are zero, and so is the anchor of section 0. Target and
    anchor share memory with what they are cut from.
    """
    frames = latents_SCTHW.new_zeros(latents_SCTHW.shape[1], FRAMES, *latents_SCTHW.shape[3:])
    end = FRAMES
    for section in range(len(latents_SCTHW) - 2, -1, -1):  # backwards from the target, as many frames as there is room for
        taken = min(end, SECTION)
        frames[:, end - taken : end] = latents_SCTHW[section, :, SECTION - taken :]
        end -= taken
    anchor = anchor_CHW[:, None] if where.anchored else torch.zeros_like(anchor_CHW)[:, None]
    return latents_SCTHW[-1], frames, anchor
