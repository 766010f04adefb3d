"""Run folders made up for pages about them."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from helios_train.sampling.output import VideoFiles

CONFIG: dict[str, Any] = {
    "run_dir": "runs/first",
    "seed": 1,
    "stage": {"name": "distill", "guidance": 2.0},
    "recipe": {"name": "corrected"},
    "model": {"name": "tiny"},
    "optimizer": {"lr": 1e-4},
    "trainer": {"max_steps": 400},
    "experiment": {"name": "toy_distill", "about": "a tiny student"},
}
PLAN = {
    "peak_gib": 62.6,
    "moment": "backward critic",
    "by_group": {"weights student": 26.7, "weights teacher and critic": 26.7, "activations and temporaries": 9.2},
    "host_gib": 54.0,
    "host_by_group": {"optimizer student": 30.0, "masters student": 24.0},
    "fits": {"48 GB": False, "80 GB": True},
    "timeline": [
        [name, device, 54.0]
        for name, device in (
            ("student", 57.0), ("student", 58.2), ("teacher", 58.0), ("critic", 58.0), ("backward student", 60.1),
            ("step student", 53.9), ("critic", 58.0), ("adversary", 61.0), ("backward critic", 62.6), ("step critic", 53.8),
        )
    ],
}  # fmt: skip
ENVIRONMENT = [
    {
        "iteration": 0,
        "started": "2026-01-05T10:00:00+00:00",
        "python": "3.11.2",
        "devices": ["GPU of 80 GB"],
        "packages": {"torch": "2.13.0"},
    },
    {
        "iteration": 200,
        "started": "2026-01-06T10:00:00+00:00",
        "python": "3.11.2",
        "devices": ["GPU of 80 GB"],
        "packages": {"torch": "2.13.0"},
    },
]


def rows(iterations: int = 400, every: int = 5, worse: float = 0.0) -> list[dict[str, float]]:
    """Rows as a distillation's: two roles, held-out losses now and then, drift, memory, time."""
    draw, found = np.random.default_rng(round(worse * 10)), []
    for i in range(0, iterations + 1, every):
        fall, noise = math.exp(-i / 150) + worse, float(draw.normal())
        row: dict[str, float] = {"iteration": i}
        if i % 50 == 0:
            for case, factor in (("full", 1.0), ("dropped", 1.6), ("wrong_caption", 1.3)):
                row |= {
                    f"held_out/{case}/level_{k}/sigma_{s}": factor * (fall + 0.1) * (1 + 0.3 * k + s)
                    for k in range(3)
                    for s in (0.3, 0.9)
                }
                row |= {f"held_out/{case}/level_{k}": factor * (fall + 0.1) * (1.6 + 0.3 * k) for k in range(3)}
                row[f"held_out/{case}"] = factor * (fall + 0.1) * 1.9
            row |= {f"held_out/full/level_0/quantile_{q}": (fall + 0.1) * q for q in (1, 2, 3, 4)}
            row |= {f"drift/{who}/brightness": 0.05 + 0.1 * (1 - fall) + 0.01 * k for k, who in enumerate(("student", "teacher"))}
            row |= {"health/entropy": 3.0 * fall, "memory/peak_gib": 61.9 + 0.01 * noise}
        if i:
            for role, base in (("student", 1.0), ("critic", 0.7)):
                row |= {
                    f"{role}/lr": 1e-4 * min(1, i / 50),
                    f"{role}/gradient_norm": math.exp(0.5 * noise) * 0.2,
                    f"{role}/skipped": float(i > 300),
                }
                row[f"{role}/loss"] = base * fall + 0.2 + 0.05 * noise
            row |= {
                f"critic/loss/critic/sigma_{k / 5:.1f}-{(k + 1) / 5:.1f}": fall + k / 5 if (i + k) % 3 else math.nan
                for k in range(5)
            }
            row |= {"student/loss/dmd": fall, "student/loss/gan": 0.69 if i >= 100 else math.nan}
            row |= {"time/step_seconds": 6.0 + 0.1 * noise, "time/samples_per_second": 0.66, "time/data_wait_share": 0.004}
        found.append(row)
    return found


def write_rows(path: Path, found: Sequence[Mapping[str, float]]) -> None:
    """metrics.csv as a run writes it."""
    names = list(dict.fromkeys(name for row in found for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(
            {name: int(value) if name == "iteration" else repr(value) for name, value in row.items()} for row in found
        )


def add_video(
    folder: Path, iteration: int, name: str = "", caption: str = "a red circle", side: int = 32, sections: int = 2, noise: int = 0
) -> Path:
    """A video as a run samples it, with its drift; returns the mp4. `noise`: of the pixels, which makes files large."""
    draw = np.random.default_rng(iteration)
    stem = "_".join(filter(None, (f"{iteration:08d}", name, caption.replace(" ", "_").replace("/", "_")[:60])))
    with VideoFiles(folder / "videos", stem, 25, sections) as files:
        for section in range(sections):
            frames = np.full((33, side, 2 * side, 3), 40 + 30 * section, np.uint8)
            for place, frame in enumerate(frames):
                frame[side // 4 : side // 2, (place * side) // 33 : (place * side) // 33 + side // 4] = (200, 40, 40)
            if noise:
                frames = (frames + draw.integers(0, noise, frames.shape)).clip(0, 255).astype(np.uint8)
            files.add(torch.from_numpy(frames))
        drift = {
            "sections": {"brightness": [0.2 + 0.1 * k for k in range(sections)], "saturation": [0.5, None, 0.7][:sections]},
            "figures": {"worst": 0.3},
        }
        files.finish(
            caption,
            {"seed": 1, "steps": [2, 2, 2], "guidance": 1.0, "toy": {"colour_right": True, "border_jump": 5.07}, "drift": drift},
        )
    return folder / "videos" / f"{stem}.mp4"


def make(folder: Path, moments: Sequence[int] = (200, 400), worse: float = 0.0, video: Callable[..., Path] = add_video) -> Path:
    """A whole run folder, with everything a page can show."""
    folder.mkdir(parents=True)
    config = {**CONFIG, "stage": {**CONFIG["stage"], "guidance": 2.0 - worse}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "run_card.txt").write_text("helios_train: stage distill\n\nWARNINGS: 1\n  ! few clips for such a batch\n")
    (folder / "plan.json").write_text(json.dumps(PLAN))
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT))
    alarm = {
        "alarm": "luma",
        "video": "video/student",
        "state": "on",
        "figure": "drift/brightness",
        "value": 0.21,
        "limit": 0.12,
        "seen": "sections grow brighter.",
        "look_at": "the anchor",
    }
    over = {"iteration": 200, "alarm": "luma", "video": "video/student", "state": "off"}
    raised = [{**alarm, "iteration": 150}, over, {**alarm, "iteration": 250}]
    (folder / "alarms.jsonl").write_text("".join(json.dumps(row) + "\n" for row in raised))
    write_rows(folder / "metrics.csv", rows(worse=worse))
    for iteration in moments:
        for name in ("student", "ema", "teacher"):
            video(folder, iteration, name)
    return folder
