"""Throughput: frames a second from caption to pixels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class Throughput(Metric):
    """Frames a second of one model, as the ratio of sums. `model_parallel`: ranks make one video together, so that frames count
    once and the slowest rank's seconds count; else each rank is a model of its own."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    frames: Tensor
    seconds: Tensor

    def __init__(self, model_parallel: bool = False, **options: Any):
        super().__init__(**options)
        reduced = "max" if model_parallel else "sum"
        self.add_state("frames", torch.zeros((), dtype=torch.int64), dist_reduce_fx=reduced)
        self.add_state("seconds", torch.zeros((), dtype=torch.float64), dist_reduce_fx=reduced)

    def update(self, n_frames: int, seconds: float) -> None:
        """So many frames took so long, text encoder and VAE included, after warm-up."""
        self.frames += n_frames
        self.seconds += seconds

    def compute(self) -> Tensor:
        """Frames a second, float64; NaN before the first update."""
        return self.frames / self.seconds
