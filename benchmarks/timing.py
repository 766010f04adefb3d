"""What the benchmarks of models and kernels share: times by turns on the device's own clock, and the machine's name."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def machine(device: torch.device) -> str:
    """The device's name, or of a CPU what is known of it."""
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return torch.cuda.get_device_name() if device.type == "cuda" else cpu


def milliseconds(work: Callable[[], Any], device: torch.device) -> float:
    """One run of `work`, on the device's own clock where it has one."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    begin = time.perf_counter()
    work()
    return (time.perf_counter() - begin) * 1e3


def by_turns(works: dict[str, Callable[[], Any]], turns: int, device: torch.device) -> dict[str, float]:
    """Medians in ms of each, one run of every one a turn; the first turn does not count."""
    return {name: statistics.median(took) for name, took in all_turns(works, turns, device).items()}


def all_turns(works: dict[str, Callable[[], Any]], turns: int, device: torch.device) -> dict[str, list[float]]:
    """Times in ms of each in every turn but the first."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(turns + 1):
        for name, work in works.items():
            took = milliseconds(work, device)
            if turn:
                times[name].append(took)
    return times
