"""Is the training healthy? The drift of the videos that are sampled anyway, as metrics; alarms for what is wrong with them.

`drift/<figure>` (`drift/<name>/<figure>` where several videos are sampled) and `health/alarm/<alarm>`, 1 or 0, go to every
logger and to `monitor=`. An alarm is printed, and noted in alarms.jsonl, where it begins, and noted where it is over.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch

from helios_train.callbacks.videos import NAME, Videos
from helios_train.data.batch import Window, WindowPair
from helios_train.evaluation.alarms import LOOK_AT_NAN, NAN, Finding, judge
from helios_train.run import append, write
from helios_train.stages.stage import Stage

SHOWN = 16  # samples of an iteration that a message names


class AlarmLog:
    """alarms.jsonl, a row where an alarm begins or is over; which are on is what it says.

    What a killed run noted after the iteration it goes on from will come again, and is cut. `main`: whether this process is
    the one that writes and prints; the others only remember.
    """

    def __init__(self, path: Path, resumed_at: int | None, main: bool = True):
        """`resumed_at`: the iteration gone on from; None: a run from 0, whose file begins anew."""
        self.path, self.main = path, main
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        rows = list(_whole(lines))
        kept = [row for row in rows if resumed_at is not None and row["iteration"] <= resumed_at]
        if main and len(kept) < len(lines):
            write(path, "".join(f"{json.dumps(row)}\n" for row in kept))
        self.on = {(row["alarm"], row["video"]): row["state"] == "on" for row in kept}

    def turn(self, iteration: int, alarm: str, video: str, finding: Finding | None) -> None:
        """Notes the alarm about `video` ("": about the training) as found, or as over; says it once."""
        was = self.on.get((alarm, video), False)
        if was == (finding is not None):
            return
        self.on[alarm, video] = not was
        if not self.main:
            return
        row = {"iteration": iteration, "alarm": alarm, "video": video, "state": "on" if finding else "off"}
        about = f"{alarm}, iteration {iteration}{f', {video}' if video else ''}"
        if finding:
            figures = {"figure": finding.figure, "value": finding.value, "limit": finding.limit}
            row |= figures | {"seen": finding.seen, "look_at": finding.look_at}
            print(f"ALARM {about}: {finding.seen}\n  look at: {finding.look_at}", flush=True)
        else:
            print(f"alarm over: {about}", flush=True)
        append(self.path, json.dumps(row))


class Health(L.Callback):
    """Stands after `videos`. Looks where one of them is due, and at the weights also every `every` iterations; a loss or gradient
    that is not finite is told at once.

    limits: by alarm, None for none, see `evaluation.alarms`; before iteration `start` a video is measured and not judged: what
    has learned nothing yet drifts. What is measured on the first device is known to all.
    """

    def __init__(self, videos: Sequence[Videos], limits: Mapping[str, float | None], start: int, every: int, log: AlarmLog):
        self.videos, self.limits, self.start, self.every, self.log_file = tuple(videos), dict(limits), start, every, log

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After every iteration: nearly always a comparison of two numbers."""
        assert isinstance(pl_module, Stage)
        iteration = trainer.global_step
        due = [video for video in self.videos if video.due(trainer)]
        looks = bool(due) or iteration % self.every == 0
        skipped = _skipped(pl_module, batch)
        if skipped and not looks and not self.log_file.on.get((NAN, "")):
            self.log_file.turn(iteration, NAN, "", skipped)
            pl_module.report({f"health/alarm/{NAN}": 1.0})
        if looks:
            measured: dict[str, dict[str, float]] = trainer.strategy.broadcast({video.name: video.figures for video in due})
            self._look(pl_module, iteration, skipped or _broken_weights(pl_module), measured)

    def _look(self, stage: Stage, iteration: int, nan: Finding | None, measured: Mapping[str, Mapping[str, float]]) -> None:
        before = any(self.log_file.on.values())
        findings: list[tuple[str, str, Finding | None]] = [(NAN, "", nan)]
        metrics: dict[str, float] = {}
        for video, figures in measured.items():
            metrics |= {_place(name, video): value for name, value in figures.items()}
            findings.append((NAN, video, _broken_video(figures)))
            judged = judge(figures, self.limits) if iteration >= self.start else {}
            findings += [(alarm, video, finding) for alarm, finding in judged.items()]
        for alarm, video, finding in findings:
            self.log_file.turn(iteration, alarm, video, finding)
            name = f"health/alarm/{alarm}"
            metrics[name] = max(metrics.get(name, 0.0), float(finding is not None))
        if measured or before or any(metrics.values()):
            stage.report(metrics)
        else:  # all is well: nothing that a row of its own would tell
            stage.log_dict(metrics, logger=False)


def _whole(lines: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows, but for one that a kill cut."""
    for line in lines:
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def _place(name: str, video: str) -> str:
    """A figure's name among the metrics: with several videos, theirs after the first part."""
    group, _, figure = name.partition("/")
    return "/".join(filter(None, (group, video.removeprefix(NAME).strip("/"), figure)))


def _skipped(stage: Stage, batch: Any) -> Finding | None:
    """What is known of an update that was just left out."""
    off = [trainee for trainee in stage.trainees if trainee.skipped_in_a_row]
    if not off:
        return None
    names = [f"{one.name}/{key}" if one.name else key for one in off for key in (one.names[-1], "gradient_norm")]
    seen = ", ".join(f"{name} {float(stage.last[name]):g}" for name in names if name in stage.last)
    samples = sorted(set(_samples(batch)))
    of = f"; samples {', '.join(map(str, samples[:SHOWN]))}{' ...' if len(samples) > SHOWN else ''}" if samples else ""
    in_a_row = stage.skipped_in_a_row
    times = f"{in_a_row} in a row, {stage.skipped} in the whole run"
    return Finding("skipped_in_a_row", in_a_row, 0, f"an update was left out ({times}): {seen} must be finite{of}", LOOK_AT_NAN)


def _samples(batch: Any) -> Iterator[int]:
    """The samples (ordinals over the shards) of this device's share of the iteration."""
    for part in batch or ():
        window = part.first if isinstance(part, WindowPair) else part
        refs = window.refs if isinstance(window, Window) else (part.ref,) if hasattr(part, "ref") else ()
        yield from (ref.sample for ref in refs)


def _broken_weights(stage: Stage) -> Finding | None:
    weights = {name: weight for trainee in stage.trainees for name, weight in trainee.masters.state_dict().items()}
    broken = [name for name, weight in weights.items() if not bool(torch.isfinite(weight).all())]
    if not broken:
        return None
    seen = f"{len(broken)} of {len(weights)} trained weights hold numbers that are not finite, {broken[0]} first"
    return Finding("broken_weights", len(broken), 0, seen, LOOK_AT_NAN)


def _broken_video(figures: Mapping[str, float]) -> Finding | None:
    share = figures.get("drift/latent_nonfinite", math.nan)
    if not share > 0:
        return None
    seen = f"{share:.1%} of the sampled latents are not finite; none may be"
    return Finding("drift/latent_nonfinite", share, 0, seen, LOOK_AT_NAN)
