"""Is a Mid model, coarse to fine in 20+20+20 steps, as good as its Base model in 60, at less cost?

Reads the chain folder of one seed, made by
    python -m helios_train experiment=toy_chain seed=SEED run_dir=runs/evidence/mid_SEED resume=auto \\
        'chain.links=["experiment=toy_base data.size=[64,128] trainer.max_steps=1200", \\
            "experiment=toy_mid trainer.max_steps=600"]'
samples the captions of held-out clips from both merged models, and adds what the mid run measured on held-out clips: losses by
level at its begin and end, and what dropping the history costs each. Writes results/evidence/mid_against_base_SEED.json, arm by
arm; an arm that is there is not sampled again.

Usage: python benchmarks/evidence/mid_against_base.py SEED [FOLDER]
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

from quality import Plan, Real, figures, sample

from helios_train.conf.compose import compose
from helios_train.tasks import build

RESULTS = Path(__file__).parent.parent / "results" / "evidence"
CLIPS = 32
ARMS = {
    "base": ("1_base_merged", "toy_base", Plan(60)),
    "mid": ("2_mid_merged", "toy_mid", Plan((20, 20, 20))),
    "mid_guidance_2": ("2_mid_merged", "toy_mid", Plan((20, 20, 20), 2.0)),  # the other two at 3
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
    seed = int(sys.argv[1])
    folder = Path(sys.argv[2] if len(sys.argv) > 2 else f"runs/evidence/mid_{seed}")
    path = RESULTS / f"mid_against_base_{seed}.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    result: dict[str, Any] = {**known, "seed": seed, "clips": CLIPS, "held_out": held_out(folder / "2_mid" / "metrics.csv")}
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name, (merged, experiment, plan) in ARMS.items():
        if name in known:
            continue
        words = [f"experiment={experiment}", "data.size=[64,128]", f"init={folder / merged}", f"seed={seed}"]
        config = compose(words)
        real = Real.of(config, CLIPS)
        made = sample(config, folder / merged, real.captions, plan)
        spec = build.toy_spec(config)
        assert spec is not None
        result[name] = figures(real, made["latents"], made["tracks"], spec.speed) | {"seconds_a_section": made["seconds"]}
        print(name, json.dumps(result[name]), flush=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["held_out"], indent=1))


if __name__ == "__main__":
    main()
