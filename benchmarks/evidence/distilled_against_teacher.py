"""Is a student of 2+2+2 steps without guidance as good as its guided Base teacher in 60, and better than Mid in as few?

Reads the chain folder of one seed, made by
    python -m helios_train experiment=toy_student seed=SEED run_dir=runs/evidence/student_SEED resume=auto
or one that has the student alone (init= a merged Mid model, two links), with the teacher's folder named; samples the captions of
held-out clips with every arm from the same noise, and writes results/evidence/distilled_against_teacher_SEED.json, arm by arm; an
arm that is there is not sampled again. The teacher's figures are those of mid_against_base_SEED.json where that is there: the
same folder, captions and noise.

A further merged student (`toy_distill` with other words) is an arm under a name of its own: NAME=FOLDER.

Usage: python benchmarks/evidence/distilled_against_teacher.py SEED [FOLDER [TEACHER MID [NAME=FOLDER ...]]]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from mid_against_base import CLIPS, RESULTS
from quality import Plan, Real, figures, sample

from helios_train.conf.compose import compose
from helios_train.tasks import build

FEW = (2, 2, 2)


def arms(folder: Path, teacher: Path | None, mid: Path | None) -> dict[str, tuple[Path, str, Plan]]:
    """Of each arm the merged folder, an experiment of the same data and model, and how it is sampled."""
    merged = sorted(folder.glob("*_merged"))
    of = {path.name.split("_")[1]: path for path in merged}
    return {
        "teacher": (teacher or of["base"], "toy_base", Plan(60)),
        "mid_6": (mid or of["mid"], "toy_mid", Plan(FEW, 2.0)),
        "regression_6": (of["ode"], "toy_mid", Plan(FEW, 1.0)),
        "student_6": (of["distill"], "toy_mid", Plan(FEW, 1.0)),
    }


def main() -> None:
    """One seed."""
    seed, given = int(sys.argv[1]), [Path(path) for path in sys.argv[2:] if "=" not in path]
    further = dict(word.split("=", 1) for word in sys.argv[2:] if "=" in word)
    folder = given[0] if given else Path(f"runs/evidence/student_{seed}")
    teacher, mid = given[1:] if len(given) > 1 else (None, None)
    path, before = RESULTS / f"distilled_against_teacher_{seed}.json", RESULTS / f"mid_against_base_{seed}.json"
    known: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"seed": seed, "clips": CLIPS}
    if "teacher" not in known and before.is_file():
        known["teacher"] = json.loads(before.read_text())["base"] | {"from": before.name}
    every = arms(folder, teacher, mid) | {name: (Path(path), "toy_mid", Plan(FEW, 1.0)) for name, path in further.items()}
    for name, (merged, experiment, plan) in every.items():
        if name in known:
            continue
        config = compose([f"experiment={experiment}", "data.size=[64,128]", f"init={merged}", f"seed={seed}"])
        real = Real.of(config, CLIPS)
        made = sample(config, merged, real.captions, plan)
        spec = build.toy_spec(config)
        assert spec is not None
        known[name] = figures(real, made["latents"], made["tracks"], spec.speed) | {"seconds_a_section": made["seconds"]}
        print(name, json.dumps(known[name]), flush=True)
        path.write_text(json.dumps(known, indent=1) + "\n")
    energy = {name: known[name]["energy"] for name in ("teacher", "mid_6", "regression_6", "student_6")}
    known["student_over_teacher"] = energy["student_6"] / energy["teacher"]
    known["mid_over_student"] = energy["mid_6"] / energy["student_6"]
    path.write_text(json.dumps(known, indent=1) + "\n")
    print(energy, {name: round(known[name], 2) for name in ("student_over_teacher", "mid_over_student")})


if __name__ == "__main__":
    main()
