"""Is a few-step student without guidance as good as its guided Base teacher in 60 steps, and better than Mid in as few?

By number of steps, for Mid, the student after regression, after distribution matching alone, and with the adversary besides; all
made first where they are missing (arms.py). Three levels take three steps at least. A student takes twice as many where nothing
precedes a section, as it is trained to. Samples the captions of held-out clips, every arm from the same noise, and
writes results/evidence/distilled_against_teacher_SEED.json, arm by arm; an arm that is there is not sampled again. The teacher's
figures are those of mid_against_base_SEED.json where that has them: the same model, captions and noise.

Usage: python benchmarks/evidence/distilled_against_teacher.py SEED [ARM ...]
"""

from __future__ import annotations

import json
import sys

from arms import merged
from quality import RESULTS, Plan, Results

STEPS = {3: (1, 1, 1), 4: (1, 1, 2), 6: (2, 2, 2), 12: (4, 4, 4)}
TEACHER = {"teacher": "base", "teacher_guidance_2": "base_guidance_2"}  # named so in mid_against_base.py
FEW = {"mid": ("mid", 2.0), "regression": ("ode", 1.0), "alone": ("alone", 1.0), "student": ("student", 1.0)}
ARMS = {
    "teacher": ("base", "toy_base", Plan(60)),
    "teacher_guidance_2": ("base", "toy_base", Plan(60, 2.0)),  # as strong as in matching
    **{
        f"{name}_{count}": (arm, "toy_mid", Plan(steps, guidance))
        for count, steps in STEPS.items()
        for name, (arm, guidance) in FEW.items()
    },
}


def main() -> None:
    """One seed."""
    results = Results("distilled_against_teacher", int(sys.argv[1]))
    path = RESULTS / f"mid_against_base_{results.seed}.json"
    before = json.loads(path.read_text()) if path.is_file() else {}
    for name, there in TEACHER.items():
        if name not in results.known and there in before:
            results.add(name, before[there] | {"from": path.name})
    for name in sys.argv[2:] or ARMS:
        arm, experiment, plan = ARMS[name]
        if name not in results.known:
            results.measure(name, merged(results.seed, arm), experiment, plan)
    energy = {name: results.known[name]["energy"] for name in ARMS if name in results.known}
    print("energy distance, times the teacher's:", {name: round(value / energy["teacher"], 2) for name, value in energy.items()})


if __name__ == "__main__":
    main()
