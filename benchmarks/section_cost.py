"""What does a section cost coarse to fine, in 20+20+20 steps, against 60 steps at full resolution?

Both samplers run the same random weights on one section after a full history, by turns. History enters at full resolution at
every level, so time falls by less than noisy tokens do; with one tiny video at a time what a call costs by itself does not fall
at all, so several at once are measured too. `small` takes a quarter of the steps, the same share for both samplers.

Usage: python benchmarks/section_cost.py [turns]
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import all_turns, machine

from helios_train import rng
from helios_train.conf.compose import compose
from helios_train.diffusion.pyramid import Pyramid
from helios_train.history import FRAMES, SECTION, History
from helios_train.models.codecs import SIDE
from helios_train.sampling.pipeline import SamplerSettings, Sections, build_pipeline
from helios_train.tasks import build, weights

RESULT = Path(__file__).parent / "results" / "section_cost.json"
SIZES = (
    ("tiny", (64, 128), 1, 1),
    ("tiny", (64, 128), 8, 1),
    ("small", (128, 256), 1, 4),
)  # model, pixels, videos, share of steps
STEPS = {"base": (60,), "mid": (20, 20, 20)}
GUIDANCE = 3.0
CPU = torch.device("cpu")


def works(model: str, size: tuple[int, int], videos: int, share: int) -> dict[str, Callable[[], Any]]:
    """One section of so many videos by each sampler, in one of `share` of the steps."""
    config = compose([f"model={model}"])
    transformer, codec = weights.start(config).transformer, build.codec(config)
    rows, columns = size[0] // SIDE, size[1] // SIDE
    frames = rng.normal(rng.generator(0, "history"), (videos, 16, FRAMES, rows, columns))
    history = History(frames, frames[:, :, :1], (FRAMES,) * videos, (True,) * videos)
    text = torch.zeros(videos, config.text.rows, config.text.dim)

    def _section(name: str) -> Callable[[], Any]:
        settings = SamplerSettings(levels=len(STEPS[name]), dynamic_shift="linear" if name == "mid" else "exponential")
        pipeline = build_pipeline(transformer, codec, settings)
        steps, generators = (
            tuple(count // share for count in STEPS[name]),
            [rng.torch_generator(0, "noise", n) for n in range(videos)],
        )
        return lambda: Sections(pipeline, steps, GUIDANCE, generators)(0, text, history)

    return {name: _section(name) for name in STEPS}


@torch.no_grad()
def main() -> None:
    """All sizes."""
    turns = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    result: dict[str, Any] = {"machine": machine(CPU), "torch": torch.__version__, "turns": turns, "sizes": {}}
    for model, size, videos, share in SIZES:
        tokens = Pyramid(3).tokens(SECTION, size[0] // SIDE, size[1] // SIDE)
        noisy = {"base": 60 * tokens[-1], "mid": sum(20 * number for number in tokens)}
        times = all_turns(works(model, size, videos, share), turns, CPU)
        found = {
            name: {"seconds": statistics.median(took) * share / videos / 1e3, "noisy_tokens": noisy[name]}
            for name, took in times.items()
        }
        ratios = [mid / base for base, mid in zip(times["base"], times["mid"], strict=True)]
        found["ratio"] = {"seconds": statistics.median(ratios), "noisy_tokens": noisy["mid"] / noisy["base"]}
        name = f"{model} {size[0]}x{size[1]}, {videos} at once"
        result["sizes"][name] = found
        print(name, json.dumps(found), flush=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
