"""Is a Mid model, coarse to fine, as good as its Base model at equal cost, and at lower?

Samples the captions of held-out clips from both, made first where they are missing (arms.py): in as many steps, in as many as
cost the same (nine of Mid's, three a level, cost what five of Base's do), and in few. Counts what a section costs, and adds what
the mid run measured on held-out clips: losses by level at its begin and end, and what dropping the history costs each. Writes
results/evidence/mid_against_base_SEED.json, arm by arm; an arm that is there is not sampled again.

Usage: python benchmarks/evidence/mid_against_base.py SEED [ARM ...]
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

from arms import FOLDER, merged
from quality import Plan, Results, cost

ARMS = {
    "base": ("base", "toy_base", Plan(60)),
    "mid": ("mid", "toy_mid", Plan((20, 20, 20))),
    "base_guidance_2": ("base", "toy_base", Plan(60, 2.0)),
    "base_33_guidance_2": ("base", "toy_base", Plan(33, 2.0)),
    "mid_guidance_2": ("mid", "toy_mid", Plan((20, 20, 20), 2.0)),
    "base_10_guidance_2": ("base", "toy_base", Plan(10, 2.0)),
    "mid_18_guidance_2": ("mid", "toy_mid", Plan((6, 6, 6), 2.0)),
}
LEVELS = 3


def held_out(metrics: Path) -> dict[str, Any]:
    """By level: the loss before and after training, and by how much it is higher without history."""
    with metrics.open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("held_out/full")]
    first, last = rows[0], rows[-1]
    found: dict[str, Any] = {}
    for level in range(LEVELS):
        names = {case: f"held_out/{case}/level_{level}" for case in ("full", "dropped", "wrong_caption")}
        after = {case: float(last[name]) for case, name in names.items()}
        noisy = {case: float(last[f"{name}/sigma_0.9"]) for case, name in names.items()}
        found[f"level_{level}"] = {
            "before": float(first[names["full"]]),
            "after": after["full"],
            "dropped_costs": after["dropped"] / after["full"] - 1,
            "dropped_costs_at_sigma_0.9": noisy["dropped"] / noisy["full"] - 1,
            "wrong_caption_costs": after["wrong_caption"] / after["full"] - 1,
        }
    return found


def main() -> None:
    """One seed."""
    seed, *asked = sys.argv[1:]
    results = Results("mid_against_base", int(seed))
    for name in asked or ARMS:
        arm, experiment, plan = ARMS[name]
        if name not in results.known:
            results.measure(name, merged(results.seed, arm), experiment, plan)
        if "gflop_a_section" not in results.known[name]:
            counted = cost(experiment, merged(results.seed, arm), plan)
            results.add(name, results.known[name] | {"gflop_a_section": counted})
    mid = FOLDER / seed / "mid" / "metrics.csv"
    if mid.is_file() and "held_out" not in results.known:
        results.add("held_out", held_out(mid))


if __name__ == "__main__":
    main()
