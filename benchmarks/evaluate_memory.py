"""How much memory does task=evaluate take on 240 videos of 81 to 1440 frames, and does length matter?

Most videos are strips of 16 x 640 pixels, which fill the width that metrics look at and are quick; some are 384 x 640. The
interpolator is a stand-in. Peaks are VmHWM: of the process that scores, and of the largest of its decoding processes;
they are added as if they coincided.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from timing import machine

import helios_train
from helios_train.data.video import Mp4Writer

MIX = {(16, 640): {81: 226, 240: 6, 720: 4, 1440: 1}, (384, 640): {81: 2, 1440: 1}}  # size: frames: videos; 240 in all
SMALL = {(16, 640): {81: 3}, (384, 640): {33: 1}}
BLOCK = 33
POLL = 0.1  # seconds
NETS = """
def between(before, after):
    return (before + after) / 2
"""


def frames(size: tuple[int, int], count: int, number: int) -> Iterator[np.ndarray]:
    """A texture that moves a pixel a frame, uint8 [N, H, W, 3] at a time."""
    texture = np.random.default_rng(number).integers(0, 256, (size[0], size[1] // 16), dtype=np.uint8).repeat(16, 1)
    for start in range(0, count, BLOCK):
        moved = [np.roll(texture, t, axis=1) for t in range(start, min(count, start + BLOCK))]
        yield np.stack(moved)[..., None].repeat(3, -1)


def make(folder: Path, mix: dict[tuple[int, int], dict[int, int]]) -> int:
    """Writes the videos with captions; returns their number."""
    made = 0
    for size, lengths in mix.items():
        for count, videos in lengths.items():
            for _ in range(videos):
                path = folder / f"{made:03d}_{size[0]}x{size[1]}_{count}.mp4"
                with Mp4Writer(path, 24) as writer:
                    for block in frames(size, count, made):
                        writer.add(block)
                made += 1
    return made


def high_water(pid: int) -> int:
    """Peak resident bytes of a process; 0 where it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def children(pid: int) -> list[int]:
    """Processes that a process started."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def evaluate(folder: Path) -> dict[str, float]:
    """Runs the task as a user would, on what lies in `folder`; peaks in bytes and seconds."""
    (folder / "toy_nets.py").write_text(NETS)
    source = str(Path(helios_train.__file__).parents[1])
    words = [
        "task=evaluate",
        f"evaluate.videos={folder}/videos",
        f"evaluate.output={folder}/out",
        "evaluate.interpolator=toy_nets:between",
        "trainer.accelerator=cpu",
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([source, str(folder)]), "OMP_NUM_THREADS": "1"}
    start, scorer, decoder = time.perf_counter(), 0, 0
    task = subprocess.Popen([sys.executable, "-m", "helios_train", *words], env=environment, cwd=folder)
    while task.poll() is None:
        scorer = max(scorer, high_water(task.pid))
        decoder = max([decoder, *map(high_water, children(task.pid))])
        time.sleep(POLL)
    if task.returncode:
        raise SystemExit(f"task=evaluate ended with {task.returncode}")
    return {"scorer": scorer, "decoder": decoder, "seconds": time.perf_counter() - start}


def main() -> None:
    """Makes the videos, evaluates them, writes the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "evaluate_memory.json")
    parser.add_argument("--small", action="store_true", help="a few videos, to try the script")
    options = parser.parse_args()
    mix = SMALL if options.small else MIX
    with tempfile.TemporaryDirectory() as scratch:
        videos = Path(scratch) / "videos"
        videos.mkdir()
        count = make(videos, mix)
        peak = evaluate(Path(scratch))
        merged = json.loads((Path(scratch) / "out/merged_results.json").read_text())["summary"]
    measured = {**merged["non_drifting"], **merged["drifting"]}
    result = {
        "machine": machine(torch.device("cpu")),
        "videos": count,
        "mix": [{"size": size, "frames": frames, "videos": n} for size, lengths in mix.items() for frames, n in lengths.items()],
        "metrics": {name: {"videos": entry["num_videos"], "mean": entry["raw_score"]} for name, entry in measured.items()},
        "peak_GiB": {
            "scorer": peak["scorer"] / 2**30,
            "decoder": peak["decoder"] / 2**30,
            "sum": (peak["scorer"] + peak["decoder"]) / 2**30,
        },
        "seconds": peak["seconds"],
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["peak_GiB"]), f"{count} videos, {peak['seconds']:.0f} s")


if __name__ == "__main__":
    main()
