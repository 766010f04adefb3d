"""Text encoders: captions to rows of numbers. Rows past a caption are exactly zero, and no text is all rows zero."""

from __future__ import annotations

import hashlib
import re
from functools import lru_cache

import numpy as np
import torch

from helios_train.errors import InputError

_WORD = re.compile(r"\w+")


class HashText:
    """Word embeddings without weights: a row is hash(word) + hash(previous word, word), unit variance an element.

    The pair term binds neighbours: with words alone "red circle, blue square" and "blue circle, red square" hold the same rows.
    """

    name = "hash"

    def __init__(self, rows: int = 16, dim: int = 64):
        self.rows, self.dim = rows, dim

    def encode(self, captions: list[str]) -> list[torch.Tensor]:
        """One fp32 [L, dim] tensor a caption, L words and at most `rows`: the rest of a longer caption is left out.

        Lower case, punctuation dropped; a caption without a word gives [0, dim].
        """
        return [self._encode(caption) for caption in captions]

    def _encode(self, caption: str) -> torch.Tensor:
        words = _WORD.findall(caption.lower())[: self.rows]
        pairs = zip(["", *words], words, strict=False)
        rows = [_gauss(word, self.dim) + _gauss(f"{before} {word}", self.dim) for before, word in pairs]
        if not rows:
            return torch.zeros(0, self.dim)
        return torch.from_numpy(np.stack(rows) * np.float32(0.5**0.5))

    def fingerprint(self) -> str:
        """Changes with anything that changes an embedding, a numpy whose Gaussians differ among it (sha256, hex)."""
        probe = self._encode("two words").numpy().tobytes()
        return hashlib.sha256(f"{self.name}:{self.rows}:{self.dim}:".encode() + probe).hexdigest()


@lru_cache(maxsize=65536)
def _gauss(text: str, dim: int) -> np.ndarray:
    """A standard normal fp32 vector that is a function of the text."""
    key = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")
    vector = np.random.Generator(np.random.Philox(key=key)).standard_normal(dim, dtype=np.float32)
    vector.flags.writeable = False
    return vector


def pad(rows: list[torch.Tensor], length: int) -> torch.Tensor:
    """Prompts [L, dim] of any lengths as one [B, length, dim] batch, zeros past each prompt.

    The rows keep their type. InputError when a prompt is longer than `length`, or the widths differ.
    """
    if not rows:
        raise InputError("no prompts to pad: a batch needs at least one")
    dim = rows[0].shape[-1]
    out = rows[0].new_zeros(len(rows), length, dim)
    for number, prompt in enumerate(rows):
        if prompt.shape[0] > length or prompt.shape[-1] != dim:
            raise InputError(
                f"prompt {number} of the batch is {list(prompt.shape)}, but the model takes {length} rows of {dim}; "
                "prepare the data with the text encoder the model was built for"
            )
        out[number, : prompt.shape[0]] = prompt
    return out
