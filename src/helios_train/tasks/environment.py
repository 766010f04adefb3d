"""environment.json: the machine and the versions a run is started and gone on with; no paths, no names of machines, no keys."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from helios_train.run import RunFolder, write

PACKAGES = (
    *("helios-train", "torch", "lightning", "torchmetrics", "diffusers", "transformers", "peft", "safetensors"),
    *("bitsandbytes", "triton", "hydra-core", "webdataset", "av", "decord", "numpy", "wandb"),
)
SECONDS = 5  # a question to git may take


def note(folder: RunFolder, done: int) -> None:
    """Adds what a run begins with, or goes on with after `done` iterations, unless it is what it had before."""
    starts = _known(folder.environment)
    now = collect()
    before = {name: value for name, value in starts[-1].items() if name not in ("iteration", "started")} if starts else None
    if now != before:
        starts.append({"iteration": done, "started": datetime.now(UTC).isoformat(timespec="seconds"), **now})
        write(folder.environment, json.dumps(starts, indent=1) + "\n")


def collect() -> dict[str, Any]:
    """Versions, processor, memory and accelerators of this process; the commit where the code lies in a git checkout of it."""
    found: dict[str, Any] = {
        "commit": commit(Path(__file__).parent),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": _memory(),
        "devices": [_device(number) for number in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
    }
    return {name: value for name, value in found.items() if value not in (None, [])}


def commit(folder: Path) -> str | None:
    """The commit of the checkout that tracks a folder of code, "+" after it where the code was changed; None without one."""
    found = _git(folder, "rev-parse", "--short=12", "HEAD")
    if not found or not _git(folder, "ls-files", "--", "."):  # a package installed inside of someone's own repository
        return None
    return found + ("+" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")


def _git(folder: Path, *words: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _known(path: Path) -> list[dict[str, Any]]:
    """The starts noted before; none where the file is missing or damaged."""
    try:
        starts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [start for start in starts if isinstance(start, dict)] if isinstance(starts, list) else []


def _device(number: int) -> str:
    facts = torch.cuda.get_device_properties(number)
    return f"{facts.name}, {facts.total_memory / 2**30:.1f} GiB"


def _memory() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
