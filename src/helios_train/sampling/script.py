"""Captions that change within a video: which text each section gets.

From the section where a caption begins, its share is 1/(N+1), 2/(N+1), ... N/(N+1), then 1: a crossfade over N sections. The rest
goes to the text of the section before it, a mixture too where one change follows another. N = 0 changes at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from helios_train.errors import InputError


@dataclass(frozen=True)
class Script:
    """Captions as (section they begin at, caption), from section 0 on, and the sections over which a new one takes over.

    InputError unless the sections rise from 0.
    """

    captions: tuple[tuple[int, str], ...]
    crossfade: int = 0

    def __post_init__(self) -> None:
        starts = [start for start, _ in self.captions]
        if not starts or starts[0] != 0 or any(a >= b for a, b in zip(starts, starts[1:], strict=False)) or self.crossfade < 0:
            raise InputError(f"a script whose captions begin at sections {starts}: they must rise from 0")

    def shares(self, sections: int) -> NDArray[np.float64]:
        """The share of each caption in the text of each section, fp64 [sections, captions]; rows sum to 1."""
        shares = np.zeros((sections, len(self.captions)))
        shares[:, 0] = 1
        for number, (start, _) in enumerate(self.captions[1:], start=1):
            for section in range(start, sections):
                new = min(1.0, (section - start + 1) / (self.crossfade + 1))
                shares[section] = (1 - new) * shares[start - 1]
                shares[section, number] += new
        return shares

    def texts(self, embeddings: Tensor, sections: int) -> Iterator[Tensor]:
        """The text [1, rows, dim] of each section, out of padded `embeddings` [captions, rows, dim], in their type.

        A section with one caption gets exactly that caption's.
        """
        for row in self.shares(sections):
            yield _mixed(embeddings, row)[None]


def _mixed(embeddings: Tensor, shares: NDArray[np.float64]) -> Tensor:
    present: Sequence[int] = np.flatnonzero(shares).tolist()
    if len(present) == 1:
        return embeddings[present[0]]
    weights = torch.from_numpy(shares[present]).to(embeddings.device, torch.float32)
    return torch.einsum("n,nrd->rd", weights, embeddings[present].float()).to(embeddings.dtype)
