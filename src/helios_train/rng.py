"""Randomness is a function, not a state: every draw names its purpose and its place.

A generator is made from (run seed, purpose, where), used for one purpose, and dropped. `where` is (iteration, position in the
global batch) for what belongs to a step, (epoch, sample id) for what belongs to a clip: never a rank, a worker or a
micro-batch, so another number of ranks or workers draws the same numbers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch


def generator(seed: int, purpose: str, *where: int) -> np.random.Generator:
    """The CPU generator of one purpose at one place.

    Philox with a 128-bit key: torch's CPU generator keeps 32 bits of its seed, few enough for two of the millions of places of
    a run to share their noise.
    """
    place = ":".join([str(int(seed)), purpose, *(str(int(i)) for i in where)])
    key = hashlib.blake2b(place.encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))


def normal(draw: np.random.Generator, shape: Sequence[int]) -> torch.Tensor:
    """Standard normal fp32 tensor of `shape` on the CPU."""
    return torch.from_numpy(draw.standard_normal(tuple(shape), dtype=np.float32))


def torch_generator(seed: int, purpose: str, *where: int) -> torch.Generator:
    """A torch CPU generator of one purpose at one place, for libraries that ask for one (diffusers' pipelines)."""
    return torch.Generator().manual_seed(int(generator(seed, purpose, *where).integers(2**63)))


@contextmanager
def forked(seed: int, purpose: str) -> Iterator[None]:
    """Context in which torch's global CPU generator is seeded by purpose: for module initialisers, which use nothing else."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(generator(seed, purpose).integers(2**63)))
        yield


def half_cosine(done: int, length: int) -> float:
    """How far a schedule of `length` iterations is after `done`: from 0 to 1 along half a cosine; 1 without a length."""
    share = min(max(done / length, 0.0), 1.0) if length else 1.0
    return (1 - math.cos(math.pi * share)) / 2
