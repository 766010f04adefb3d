"""How far does a memory choice lead from the plain run? The same 50 iterations on the toy, choice by choice.

Every choice trains the same model from the same seed on the same windows: base and distill with adversary, tiny, in bf16 as 14 B
is. What only moves bytes must end with the plain run's weights bit for bit; what rounds is measured: the distance of the trained
weights' change from the plain run's, as a share of it (of all weights, and the median over the tensors), and of the last ten
losses.

Writes results/memory_distance.json, choice by choice, and prints README's table.
Usage: python benchmarks/memory_distance.py [--iterations 50]
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helios_train.conf.compose import compose
from helios_train.tasks import plan

RESULT = Path(__file__).parent / "results" / "memory_distance.json"
SIZE = ["model=tiny", "data.size=[64,64]", "data.global_batch=2", "data.micro_batch=1", "model.dtype=bf16", "init=somewhere"]
SIZE += ["stage.lora.rank=8", "optimizer.lr=1e-3", "optimizer.warmup=0", "optimizer.schedule=constant", "stage.ema.decay=0"]
CAST = ["stage=distill", "stage.student.steps=[2,2]", "stage.gan.head_width=32", "stage.gan.start=20", "stage.every=2"]
PLAIN = ["memory.checkpointing=true"]
STAGES = {
    "base": (
        ["stage=base"],
        {
            "h100_80gb": ["memory=h100_80gb"],
            "single, 8-bit AdamW": ["memory=single", "optimizer=adamw8bit"],
            "int8": ["memory=h100_80gb", "memory.bases=int8"],
            "nf4": ["memory=h100_80gb", "memory.bases=nf4"],
        },
    ),
    "distill": (
        [*CAST, "stage.bases=distinct"],
        {
            "h100_80gb": ["memory=h100_80gb"],
            "stream": ["memory=stream"],
            "graphs kept": ["memory=h100_80gb", "memory.gan_replay=false"],
            "int8": ["memory=h100_80gb", "memory.bases=int8"],
            "nf4": ["memory=h100_80gb", "memory.bases=nf4"],
        },
    ),
}


def trained(words: list[str], iterations: int) -> tuple[dict[str, Tensor], dict[str, Tensor], list[float]]:
    """What trains, before and after, in fp32, and the losses."""
    stage = plan.bare_stage(compose(["task=plan", *SIZE, *words]), fake=False).alone()
    batch = plan.part(compose(["task=plan", *SIZE, *words]))
    masters = {f"{t.name} {name}": one for t in stage.trainees for name, one in t.masters.state_dict().items()}
    before, losses = {name: one.float().clone() for name, one in masters.items()}, []
    for iteration in range(iterations):
        stage.training_step(batch, iteration)
        losses.append(next(float(value) for name, value in reversed(stage.last.items()) if name.endswith("loss")))
    return before, {name: one.float() for name, one in masters.items()}, losses


def distance(plain: Any, other: Any) -> dict[str, Any]:
    """Of a run from the plain one."""
    (before, one, losses), (_, two, others) = plain, other
    moved = sum(float((after - before[name]).square().sum()) for name, after in one.items())
    apart = sum(float((two[name] - after).square().sum()) for name, after in one.items())
    shares = [
        float((two[name] - after).norm() / (after - before[name]).norm())
        for name, after in one.items()
        if (after - before[name]).norm() > 0
    ]
    near = [abs(a - b) / abs(b) for a, b in zip(others[-10:], losses[-10:], strict=True)]
    return {
        "bit for bit": all(torch.equal(two[name], after) for name, after in one.items()),
        "weights, all": (apart / moved) ** 0.5,
        "weights, median": statistics.median(shares),
        "losses": statistics.mean(near),
    }


def table(result: dict[str, Any]) -> str:
    """As README has it."""
    lines = ["| stage | choice | weights | median over tensors | losses |", "|---|---|---|---|---|"]
    for name, found in result.items():
        if isinstance(found, dict):
            far = ["bit for bit", "", ""]
            if not found["bit for bit"]:
                far = [f"{found[key]:.1%}" for key in ("weights, all", "weights, median", "losses")]
            lines.append("| " + " | ".join([*name.split(", ", 1), *far]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """All choices."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=50)
    given = parser.parse_args()
    result: dict[str, Any] = {"iterations": given.iterations}
    for stage, (words, choices) in STAGES.items():
        plain = trained([*words, *PLAIN], given.iterations)
        for name, choice in choices.items():
            result[f"{stage}, {name}"] = distance(plain, trained([*words, *choice], given.iterations))
            print(stage, name, json.dumps(result[f"{stage}, {name}"]), flush=True)
            RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
