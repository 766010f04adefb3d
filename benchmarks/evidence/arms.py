"""The models that the toy experiments compare: each is trained and merged by the commands that a user would type.

An arm of a seed stands in runs/evidence/SEED/ARM_merged. What is missing of it is made, and what was begun is gone on with: the
arm it starts from, its teacher, a teacher's trajectories.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path("runs/evidence")


@dataclass(frozen=True)
class Arm:
    """Words of a training run; the arms it starts from and learns from; words for the trajectories it regresses on."""

    words: str
    init: str | None = None
    teacher: str | None = None
    pairs: str | None = None


BASE = "experiment=toy_base data.size=[64,128] trainer.max_steps=1200"
PAIRS = "pairs.count=96 pairs.sections=4 pairs.steps=10 pairs.guidance=2 pairs.batch=8"


def _given(t2v: float, i2v: float, v2v: float, full: float) -> str:
    return f"stage.mix={{t2v:{t2v},i2v:{i2v},v2v:{v2v},full:{full}}}"


def _corrupt(noise: float, blur: float, clean: float, on_top: float) -> str:
    return f"stage.corrupt={{noise:{noise},blur:{blur},clean:{clean},saturation_on_top:{on_top}}}"


CLEAN = _corrupt(0.0, 0.0, 1.0, 0.0)  # Frame-Aware Corrupt off
ARMS = {
    "base": Arm(BASE),
    "mid": Arm("experiment=toy_mid trainer.max_steps=600", "base"),
    "ode": Arm(
        "experiment=toy_ode", "mid", pairs="pairs.count=96 pairs.sections=4 pairs.steps=10 pairs.guidance=2 pairs.batch=8"
    ),
    "alone": Arm("experiment=toy_distill stage.gan.enabled=false", "ode", "base"),
    "no_anchor": Arm(f"{BASE} stage.anchor=false"),
    "no_corrupt": Arm(f"{BASE} {CLEAN}"),
    "neither": Arm(f"{BASE} stage.anchor=false {CLEAN}"),
    "released": Arm(f"{BASE} recipe=released {_given(0.4, 0.0, 0.24, 0.36)} {_corrupt(0.9, 0.0, 0.1, 0.0)}"),
    "corrected": Arm(f"{BASE} recipe=corrected {_given(0.4, 0.1, 0.2, 0.3)} {_corrupt(0.8, 0.1, 0.1, 0.9)}"),
    "student": Arm("experiment=toy_distill", "ode", "base"),
}


def merged(seed: int, name: str) -> Path:
    """The merged folder of an arm, which is made first where it is not there."""
    arm, run = ARMS[name], FOLDER / str(seed) / name
    folder = run.with_name(f"{name}_merged")
    if folder.is_dir():
        return folder
    words = [*arm.words.split(), f"seed={seed}"]
    if arm.init:
        words.append(f"init={merged(seed, arm.init)}")
    if arm.teacher:
        words.append(f"stage.teacher={merged(seed, arm.teacher)}")
    if arm.pairs:
        pairs = run.with_name(f"{name}_pairs")
        _helios("task=pairs", *words, f"pairs.output={pairs}", *arm.pairs.split())
        words.append(f"stage.pairs={pairs}")
    _helios(*words, f"run_dir={run}", "resume=auto", "watch.sample=false")
    _helios("task=merge", words[0], f"init={run}", f"merge.output={folder}")
    return folder


def _helios(*words: str) -> None:
    print("python -m helios_train", *words, flush=True)
    subprocess.run([sys.executable, "-m", "helios_train", *words], check=True)
