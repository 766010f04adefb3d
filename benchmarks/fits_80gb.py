"""Does one iteration of distilling 14 B, with adversary, run in 80 GB of a GPU, and does it take what was planned?

One command on a machine with a GPU of 80 GB or more and about 100 GB of memory; nothing is downloaded: the networks are built on
meta and get random weights in bf16 on the device. The process may take 79.2 GiB of it. Runs iterations of the worst case that is
planned: the student's turn and the critic's, after the adversary's start, with the rollout that keeps most graphs. The first
fills caches; of the others the peak is compared with the plan, which must agree within 5 %.

Writes results/fits_80gb.json and exits with 1 where they do not. On a CPU (--model tiny, for a test) storages are counted.

Usage: python benchmarks/fits_80gb.py [--memory h100_80gb] [--model 14b] [--iterations 2] [--capacity 79.2]
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from timing import machine

from helios_train.conf.compose import compose
from helios_train.conf.schema import Config
from helios_train.memory.live import LiveCounter
from helios_train.memory.places import DEVICE
from helios_train.memory.plan import CARDS, GIB
from helios_train.stages.distill import DistillStage
from helios_train.tasks import build, plan

RESULT = Path(__file__).parent / "results" / "fits_80gb.json"
COMMON = ["task=plan", "stage=distill", "stage.every=1", "data.global_batch=1", "data.micro_batch=1", "init=somewhere"]
MODELS = {
    "14b": ["model=14b", "codec=wan", "text=umt5", "data=folder", "data.root=/nowhere", "data.size=[384,640]"],
    "small": ["model=small", "model.dtype=bf16", "data.size=[128,256]", "stage.lora.rank=32"],
    "tiny": ["model=tiny", "model.dtype=bf16", "data.size=[64,64]", "stage.lora.rank=4", "stage.student.steps=[2,2]"],
}
NEAR = 0.05  # share by which the measured peak may differ from the plan


def config_of(model: str, memory: str) -> Config:
    """The config that is planned and run."""
    return compose([*COMMON, *MODELS[model], f"memory={memory}"])


def measured(config: Config, iterations: int, where: torch.device) -> dict[str, Any]:
    """GiB of the device at the peak of the iterations after the first, and seconds of the turns of the last."""
    stage = plan.stage_with_weights(config, where).alone()
    assert isinstance(stage, DistillStage)
    ema = build.ema(config, stage)
    batch = [pair.to(where) for pair in plan.part(config)]
    seconds: dict[str, float] = {}
    stage.train_student = _timed("student", stage.train_student, seconds, where)  # type: ignore[method-assign]
    stage.train_critic = _timed("critic", stage.train_critic, seconds, where)  # type: ignore[method-assign]

    def _iteration(number: int) -> None:
        begun = _now(where)
        stage.training_step(batch, number)
        if ema is not None:
            ema.update(stage.masters.state_dict())
        seconds["iteration"] = _now(where) - begun

    _iteration(0)
    with _peak(where, stage) as peak:
        for number in range(1, iterations):
            _iteration(number)
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
    finite = all(torch.isfinite(master).all() for trainee in stage.trainees for master in trainee.masters)
    return {"peak_gib": peak[0], "host_gib": host, "seconds": seconds, "finite": bool(finite), "skipped": stage.skipped}


def _timed(name: str, work: Callable[..., Any], seconds: dict[str, float], where: torch.device) -> Callable[..., Any]:
    def _call(*given: Any) -> Any:
        begun = _now(where)
        result = work(*given)
        seconds[name] = _now(where) - begun
        return result

    return _call


def _now(where: torch.device) -> float:
    if where.type == "cuda":
        torch.cuda.synchronize(where)
    return time.perf_counter()


@contextmanager
def _peak(where: torch.device, stage: DistillStage) -> Iterator[list[float]]:
    """GiB that were allocated at once inside: by the GPU's allocator, or counted in storages."""
    found: list[float] = []
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats(where)
        yield found
        found.append(torch.cuda.max_memory_allocated(where) / GIB)
        return
    with LiveCounter() as counter:
        counter.claim(stage, "stage")
        yield found
        found.append(counter.report().peak[DEVICE] / GIB)


def run(model: str, memory: str, iterations: int, capacity: float) -> dict[str, Any]:
    """The record of one run: plan, measured, and whether they agree."""
    config = config_of(model, memory)
    where = build.device(config)
    if where.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(
            min(1.0, capacity * GIB / torch.cuda.get_device_properties(where).total_memory)
        )
    planned = plan.plan_of(config)
    print(planned.summary(), flush=True)
    found = measured(config, iterations, where)
    off = found["peak_gib"] / planned.peak - 1
    return {
        "machine": machine(where),
        "torch": torch.__version__,
        "model": model,
        "memory": memory,
        "capacity_gib": capacity,
        "planned": planned.record(),
        "measured": found,
        "off": off,
        "agrees": abs(off) <= NEAR,
    }


def main() -> None:
    """One run, as asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", default="h100_80gb")
    parser.add_argument("--model", default="14b", choices=list(MODELS))
    parser.add_argument("--iterations", type=int, default=2)
    parser.add_argument("--capacity", type=float, default=CARDS["80 GB"])
    parser.add_argument("--output", type=Path, default=RESULT)
    given = parser.parse_args()
    if given.iterations < 2:
        parser.error("--iterations: the first fills caches; 2 or more")
    record = run(given.model, given.memory, given.iterations, given.capacity)
    given.output.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({name: record[name] for name in ("measured", "off", "agrees")}, indent=1))
    sys.exit(0 if record["agrees"] else 1)


if __name__ == "__main__":
    main()
