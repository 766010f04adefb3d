"""What one of two ranks does, `python ranks.py RANK FOLDER`: it counts its share of videos, and writes what all computed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from helios_train.evaluation.metric import Score, VideoMetric
from helios_train.evaluation.throughput import Throughput

SCORES = {0: 0.1, 1: 0.7, 2: 0.4, 3: 0.9, 4: 0.25}  # five videos in batches of two: the last batch is uneven
SHARES = {0: [0, 2, 4], 1: [1, 3, 0]}  # as DistributedSampler gives them: the first again, so that ranks are even


class Given(VideoMetric):
    """Scores that are known."""

    def begin(self, clip: object) -> object:  # type: ignore[override]
        raise NotImplementedError


def score(number: int) -> Score:
    return Score(SCORES[number], {}, -SCORES[number])


def main() -> None:
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    shared, alone, fast, slow = Given(), Given(), Throughput(), Throughput(model_parallel=True)
    shared.add([(number, score(number)) for number in SHARES[rank]])
    if rank == 0:  # the other rank saw nothing
        alone.add([(number, score(number)) for number in SCORES])
    for metric in (fast, slow):
        metric.update(10, 1.0 + rank)
    found = {
        "shared": [float(shared.compute()), float(shared.signed())],
        "alone": [float(alone.compute()), float(alone.signed())],
        "throughput": [float(fast.compute()), float(slow.compute())],
        "local_after": [len(torch.cat(shared.ids))],
    }
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
