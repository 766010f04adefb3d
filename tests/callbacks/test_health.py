"""Alarms begin and end once, say what was seen, survive a resume; a skipped update is told at once."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from helios_train.callbacks.health import AlarmLog, Health
from helios_train.callbacks.videos import Videos
from helios_train.data.batch import Window, WindowPair
from helios_train.data.order import Ref
from helios_train.history import History
from helios_train.stages.stage import Stage

WELL = {
    "drift/saturation_slope": 0.0,
    "drift/luma_slope": 0.0,
    "drift/red_green_slope": 0.0,
    "drift/yellow_blue_slope": 0.0,
    "drift/border_ratio": 1.0,
    "drift/spread_least": 0.2,
    "drift/motion_least": 0.01,
    "drift/latent_nonfinite": 0.0,
}
LIMITS = {"saturation": 0.05, "luma": 0.05, "colour": 0.1, "border": 10.0, "solid": 0.01, "frozen": 0.001}


class Watched(Stage):
    """A stage of one weight that keeps what it reports."""

    def __init__(self) -> None:
        L.LightningModule.__init__(self)
        self.weight = torch.zeros(2)
        masters = SimpleNamespace(state_dict=lambda: {"w": self.weight})
        self.trainee = SimpleNamespace(skipped=0, skipped_in_a_row=0, name="", names=["level_0", "loss"], masters=masters)
        self.trainees = (self.trainee,)  # type: ignore[assignment]
        self.last = {"loss": 0.5, "gradient_norm": 1.0}
        self.reported: list[dict[str, Any]] = []

    def report(self, metrics: Any) -> None:
        self.reported.append(dict(metrics))


class Run:
    """Iterations, one after the other, with a video every 10 whose figures a test sets."""

    def __init__(self, folder: Path, resumed_at: int | None = None, names: tuple[str, ...] = ("video",), **more: Any):
        self.stage, self.file = Watched(), folder / "alarms.jsonl"
        self.videos = [Videos(None, 10, None, name) for name in names]
        self.log = AlarmLog(self.file, resumed_at, more.pop("main", True))
        self.health = Health(self.videos, LIMITS, more.pop("start", 0), more.pop("every", 7), self.log)

    def iteration(self, number: int, figures: dict[str, float] | None = None, batch: Any = None) -> dict[str, float]:
        """What it reports."""
        self.stage.reported.clear()
        for video in self.videos:
            video.figures = WELL | (figures or {})
        trainer: Any = SimpleNamespace(
            global_step=number, max_steps=1000, strategy=SimpleNamespace(broadcast=lambda figures: figures)
        )
        self.health.on_train_batch_end(trainer, self.stage, None, batch, 0)
        assert len(self.stage.reported) <= 1
        return self.stage.reported[0] if self.stage.reported else {}

    def rows(self) -> list[tuple[int, str, str, str]]:
        lines = self.file.read_text().splitlines() if self.file.is_file() else []
        return [(row["iteration"], row["alarm"], row["video"], row["state"]) for row in map(json.loads, lines)]


CASES = [
    ("saturation", "drift/saturation_slope", 0.051, 0.049),
    ("saturation", "drift/saturation_slope", -0.051, -0.049),
    ("luma", "drift/luma_slope", -0.051, -0.049),
    ("colour", "drift/red_green_slope", 0.101, 0.099),
    ("colour", "drift/yellow_blue_slope", -0.101, -0.099),
    ("border", "drift/border_ratio", 10.1, 9.9),
    ("solid", "drift/spread_least", 0.0099, 0.0101),
    ("frozen", "drift/motion_least", 0.00099, 0.00101),
    ("nan", "drift/latent_nonfinite", 1e-6, 0.0),
]


@pytest.mark.parametrize(("alarm", "figure", "past", "below"), CASES)
def test_an_alarm_begins_is_said_once_and_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], alarm: str, figure: str, past: float, below: float
) -> None:
    run = Run(tmp_path)
    assert run.iteration(10, {figure: below})[f"health/alarm/{alarm}"] == 0 and not run.file.exists()
    reported = run.iteration(20, {figure: past})
    flags = {name: value for name, value in reported.items() if name.startswith("health/")}
    others = set() if alarm == "nan" else {name for name in (*LIMITS, "nan") if (alarm, name) != ("solid", "frozen")}
    assert {name.removeprefix("health/alarm/") for name in flags} == others | {alarm}
    assert {name for name, value in flags.items() if value} == {f"health/alarm/{alarm}"}
    assert reported[figure] == past
    said = capsys.readouterr().out
    assert said.count("ALARM") == 1 and f"ALARM {alarm}, iteration 20, video: " in said and "look at: " in said
    (row,) = map(json.loads, run.file.read_text().splitlines())
    assert (row["figure"], row["value"], row["limit"]) == (figure, past, LIMITS.get(alarm, 0))
    assert row["seen"] in said and row["look_at"] in said
    run.iteration(30, {figure: past})
    run.iteration(40, {figure: below})
    run.iteration(50, {figure: past})
    states = [(20, "on"), (40, "off"), (50, "on")]
    assert run.rows() == [(iteration, alarm, "video", state) for iteration, state in states]
    said = capsys.readouterr().out
    assert said.count("ALARM") == 1 and said.count(f"alarm over: {alarm}, iteration 40") == 1


def test_before_the_start_videos_are_measured_and_not_judged(tmp_path: Path) -> None:
    run, bad = Run(tmp_path, start=20), {"drift/saturation_slope": 1.0}
    reported = run.iteration(10, bad)
    assert reported["drift/saturation_slope"] == 1 and {name for name in reported if "health" in name} == {"health/alarm/nan"}
    assert run.iteration(20, bad)["health/alarm/saturation"] == 1


def windows(*samples: int) -> list[Window]:
    nothing = History.none(len(samples), 2, 2, 2)
    refs = tuple(Ref(4, position, 0, sample) for position, sample in enumerate(samples))
    return [Window(torch.zeros(len(samples), 2, 9, 2, 2), nothing, torch.zeros(len(samples), 1, 1), refs, (0,) * len(samples))]


@pytest.mark.parametrize("kind", ["windows", "pairs of windows", "trajectories"])
def test_a_skipped_update_is_told_at_once_and_over_at_the_next_look(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    one = windows(12, 3)[0]
    batch = {
        "windows": [one],
        "pairs of windows": [WindowPair(one, one)],
        "trajectories": [SimpleNamespace(ref=ref) for ref in one.refs],
    }[kind]
    run = Run(tmp_path)
    trainee = run.stage.trainee
    assert run.iteration(1) == {}
    trainee.skipped_in_a_row = trainee.skipped = 1
    run.stage.last = {"loss": math.nan, "gradient_norm": math.inf, "lr": 1.0}
    assert run.iteration(2, batch=batch) == {"health/alarm/nan": 1.0}
    said = capsys.readouterr().out
    for part in ("ALARM nan, iteration 2: ", "loss nan", "gradient_norm inf", "samples 3, 12", "optimizer.lr", "1 in a row"):
        assert part in said, part
    trainee.skipped_in_a_row = trainee.skipped = 2
    assert run.iteration(3, batch=batch) == {}  # said once
    assert run.iteration(7, batch=batch) == {"health/alarm/nan": 1.0}  # a look: still on
    trainee.skipped_in_a_row = 0
    assert run.iteration(8) == {}
    assert run.iteration(14) == {"health/alarm/nan": 0.0}
    assert run.rows() == [(2, "nan", "", "on"), (14, "nan", "", "off")]


def test_a_look_at_a_skipped_update_says_it_too(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.stage.trainee.skipped_in_a_row = 1
    reported = run.iteration(10)
    assert reported["health/alarm/nan"] == 1 and reported["health/alarm/saturation"] == 0
    assert run.rows() == [(10, "nan", "", "on")]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_seen_where_it_looks(tmp_path: Path, value: float) -> None:
    run = Run(tmp_path)
    run.stage.weight = Tensor([0.0, value])
    assert run.iteration(6) == {}
    assert run.iteration(7) == {"health/alarm/nan": 1.0}
    (row,) = map(json.loads, run.file.read_text().splitlines())
    assert row["figure"] == "broken_weights" and "1 of 1 trained weights" in row["seen"] and "w first" in row["seen"]


def test_several_videos_have_names_of_their_own_and_one_alarm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path, names=("video/student", "video/teacher"))
    student, teacher = run.videos
    student.figures, teacher.figures = WELL | {"drift/border_ratio": 99.0, "toy/found": 1.0}, dict(WELL)
    trainer: Any = SimpleNamespace(global_step=10, max_steps=10, strategy=SimpleNamespace(broadcast=lambda figures: figures))
    run.health.on_train_batch_end(trainer, run.stage, None, None, 0)
    (reported,) = run.stage.reported
    assert reported["drift/student/border_ratio"] == 99 and reported["drift/teacher/border_ratio"] == 1
    assert reported["toy/student/found"] == 1 and "drift/border_ratio" not in reported
    assert reported["health/alarm/border"] == 1  # of either
    assert run.rows() == [(10, "border", "video/student", "on")]
    assert "ALARM border, iteration 10, video/student: " in capsys.readouterr().out


def test_a_resumed_run_repeats_no_row_and_knows_what_is_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path)
    run.iteration(10, {"drift/luma_slope": 1.0, "drift/border_ratio": 99.0})
    run.iteration(20, {"drift/luma_slope": 1.0})
    run.iteration(30, {"drift/saturation_slope": 1.0})
    with run.file.open("a") as file:
        file.write('{"iteration": 40, "al')  # killed while it wrote
    whole = [(10, "luma"), (10, "border"), (20, "border"), (30, "saturation"), (30, "luma")]
    assert len(run.file.read_text().splitlines()) == len(whole) + 1
    again = Run(tmp_path, resumed_at=20)
    assert [row[:2] for row in again.rows()] == whole[:3]
    capsys.readouterr()
    again.iteration(30, {"drift/saturation_slope": 1.0})
    assert sorted(row[:2] for row in again.rows()) == sorted(whole)
    said = capsys.readouterr().out
    assert said.count("ALARM saturation") == 1 and said.count("alarm over: luma") == 1 and "border" not in said
    assert Run(tmp_path).rows() == []  # from 0 the file begins anew


def test_a_further_device_knows_and_says_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path, main=False)
    assert run.iteration(10, {"drift/luma_slope": 1.0})["health/alarm/luma"] == 1
    assert run.log.on == {("luma", "video"): True}
    assert not run.file.exists() and capsys.readouterr().out == ""
