"""What does each link of `experiment=toy_student` give, and what does it cost? README's stage table.

Takes the folder of a finished chain. Of each link: its iterations and their minutes, by the step time that its run recorded, and
of its merged model 32 held-out captions, every link from the same noise: names right, jumps at borders beside the motion inside
sections, energy distance to the held-out clips. Base is sampled in 25 steps with guidance, Mid in 2+2+2 with guidance, the two
student links in 2+2+2 without. Writes results/evidence/stages_SEED.json and prints the table. What is there of the same run, by
its iterations and minutes, is not measured again.

Usage: python benchmarks/evidence/stages.py RUN
"""

from __future__ import annotations

import csv
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from quality import Plan, Results

LINKS = {  # folder, how it is sampled
    "base": ("1_base", "toy_base", Plan(25)),
    "mid": ("2_mid", "toy_mid", Plan((2, 2, 2), 2.0)),
    "ode": ("3_ode", "toy_mid", Plan((2, 2, 2), 1.0)),
    "distill": ("4_distill", "toy_mid", Plan((2, 2, 2), 1.0)),
}


def cost(run: Path) -> dict[str, float]:
    """Iterations of a run, and their minutes."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    seconds = [float(row["time/step_seconds"]) for row in rows if row.get("time/step_seconds")]
    iterations = max(int(row["iteration"]) for row in rows)
    return {"iterations": iterations, "minutes": iterations * statistics.median(seconds) / 60}


def table(known: dict[str, Any]) -> str:
    """As README has it."""
    columns = ("stage", "iterations", "minutes", "sampled in", "names right", "jump at borders, px", "motion, px a frame")
    lines = ["| " + " | ".join([*columns, "energy distance"]) + " |", "|" + "---|" * (len(columns) + 1)]
    for name, (_, _, plan) in LINKS.items():
        found = known[name]
        steps = "+".join(map(str, plan.steps)) if isinstance(plan.steps, tuple) else plan.steps
        guided = f", guidance {plan.guidance:g}" if plan.guidance > 1 else ""
        figures = f"{found['right']:.2f} | {found['border_jump_median']:.1f} | {found['motion']:.1f} | {found['energy']:.2f}"
        lines.append(f"| `{name}` | {found['iterations']} | {found['minutes']:.0f} | {steps}{guided} | {figures} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """One chain."""
    chain = Path(sys.argv[1])
    first = json.loads((chain / f"{LINKS['base'][0]}_merged" / "helios_train.json").read_text())["lineage"][0]
    results = Results("stages", first["seed"])
    for name, (folder, experiment, plan) in LINKS.items():
        took = cost(chain / folder)
        if not took.items() <= results.known.get(name, {}).items():
            results.measure(name, chain / f"{folder}_merged", experiment, plan, took)
    print(table(results.known))


if __name__ == "__main__":
    main()
