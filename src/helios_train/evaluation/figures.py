"""The figures and tables of a page: tiles, alarms by name, differences of configs, videos' facts, what a plan is made of."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from helios_train.evaluation.charts import Chart, Line, short
from helios_train.evaluation.curves import Name, unit_of
from helios_train.evaluation.recorded import Alarm, Record, Video, number
from helios_train.run import fixed_leaves

SHOWN_ALARMS = 40  # names of alarms in the table
LATE = "mean of last tenth"
MESSAGE = 400  # characters of one
FACTS = 60  # rows of one video's table
SETTINGS = ("caption", "frames", "height", "width", "fps", "steps", "guidance", "seed", "number", "drift", "script")


@dataclass(frozen=True)
class Tile:
    """One figure at the top of a page, and what it is to be seen against."""

    label: str
    value: str
    note: str = ""
    unit: str = ""
    bad: bool = False


@dataclass(frozen=True)
class Raised:
    """The alarms of one name: how often, since when, and the newest."""

    name: str
    times: int
    first: int
    newest: Alarm

    @property
    def message(self) -> str:
        """The newest one's."""
        return self.newest.message[:MESSAGE]


def tiles(run: Record) -> list[Tile]:
    """What tells most of a run in few figures."""
    steps = number(run.key("trainer.max_steps"))
    of = f"of {steps:,.0f}" if math.isfinite(steps) else ""
    found = [Tile("iterations", f"{run.reached:,}", of), *_health(run)]
    columns = {name.column: name for name in map(Name.of, run.columns)}
    for column, name in columns.items():
        series = run.columns[column]
        if name.section == "held_out" and not name.parent and name.leaf == "full":
            found.append(Tile("held-out loss", short(series.last), f"from {short(series.first)}"))
        elif name.leaf == "loss" and not name.parent and name.section == "loss":
            found.append(Tile(f"{name.role} loss".strip(), short(series.tail), LATE))
    for column in ("time/step_seconds", "time/samples_per_second"):
        if column in run.columns:
            name = Name.of(column)
            found.append(Tile(name.words(), short(run.columns[column].tail), LATE, unit_of(name.leaf)))
    peak, place = number(run.plan.get("peak_gib")), str(run.plan.get("moment") or "")
    if math.isfinite(peak):
        found.append(Tile("planned peak", short(peak), f"in {place}" if place else "", "GiB"))
    return found


def _health(run: Record) -> Iterator[Tile]:
    if run.watched:
        on = sum(raised.newest.over is None for raised in _raised(run))
        note = (
            f"newest at {run.alarms[-1].iteration:,}, {f'{on} still on' if on else 'all over'}"
            if run.alarms
            else "none was raised"
        )
        yield Tile("alarms", f"{len(run.alarms):,}", note, bad=on > 0)
    skipped = [series for column, series in run.columns.items() if Name.of(column).leaf == "skipped"]
    if skipped:
        total = sum(series.last for series in skipped)
        yield Tile("skipped updates", short(total), "not finite" if total else "", bad=total > 0)


def alarms(run: Record) -> tuple[list[Raised], int]:
    """Alarms by name, those that are on before those that are over, the newest first; and how many names are left out."""
    found = sorted(_raised(run), key=lambda raised: (raised.newest.over is not None, -raised.newest.iteration))
    return found[:SHOWN_ALARMS], max(0, len(found) - SHOWN_ALARMS)


def _raised(run: Record) -> list[Raised]:
    groups: dict[str, list[Alarm]] = {}
    for alarm in run.alarms:
        groups.setdefault(alarm.name, []).append(alarm)
    return [Raised(name[:200], len(group), group[0].iteration, group[-1]) for name, group in groups.items()]


def settings(video: Video) -> str:
    """How a video was sampled, on one line."""
    facts = video.facts
    size = f"{facts['width']} × {facts['height']}" if {"width", "height"} <= facts.keys() else ""
    steps = facts.get("steps")
    said = [
        size,
        f"{facts['frames']} frames" if "frames" in facts else "",
        f"{facts['fps']:g}/s" if isinstance(facts.get("fps"), int | float) else "",
        f"{'+'.join(map(str, steps)) if isinstance(steps, list) else steps} steps" if steps is not None else "",
        f"guidance {facts['guidance']}" if facts.get("guidance") is not None else "",
    ]
    return ", ".join(filter(None, said))[:300]


def facts(video: Video) -> list[tuple[str, str]]:
    """The other figures of a video, by dotted name."""
    rows = fixed_leaves(video.facts, SETTINGS)
    drift = video.facts.get("drift")
    if isinstance(drift, dict):
        rows |= fixed_leaves({"drift": {key: value for key, value in drift.items() if key != "sections"}}, ())
    return [(name[:200], _value(value)) for name, value in list(rows.items())[:FACTS] if value is not None]


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return short(value) if isinstance(value, int | float) else str(value)[:300]


def drift_charts(videos: Sequence[tuple[str, str, Video]]) -> list[Chart]:
    """A chart a measure and name, over the sections of videos, each with its label and colour ("": they are ordered by age)."""
    groups: dict[tuple[str, str], list[Line]] = {}
    ordered = not any(colour for _, colour, _ in videos)
    for label, colour, video in videos:
        for measure, values in video.drift.items():
            y = np.array(values)
            x = np.flatnonzero(np.isfinite(y)).astype(float)
            line = Line(label, x, y[np.isfinite(y)], colour=colour)
            if len(x):
                groups.setdefault((video.name, measure[:200]), []).append(line)
    return [
        Chart(": ".join(filter(None, (name, measure.replace("_", " ")))), lines, unit_of(measure), "section", ordered)
        for (name, measure), lines in groups.items()
    ]


@dataclass(frozen=True)
class Bar:
    """A part of a whole; `share` is 0 to 1 of the largest."""

    label: str
    value: str
    share: float


def timeline(plan: Mapping[str, Any]) -> Chart | None:
    """Live storages moment by moment, of a plan's JSON; None where it holds no moments."""
    moments = _moments(plan)
    if not moments:
        return None
    x = np.arange(len(moments), dtype=float)
    device, host = (np.array([moment[place] for moment in moments]) for place in (1, 2))
    lines = [Line("device", x, device, low=np.zeros_like(x)), *([Line("host", x, host, colour="c6")] if host.any() else [])]
    return Chart("live storages, moment by moment", lines, "GiB", "moment", log=False, steps=True, names=[m[0] for m in moments])


def _moments(plan: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    rows = plan.get("timeline")
    found = (
        [(str(row[0])[:80], number(row[1]), number(row[2])) for row in rows if isinstance(row, list) and len(row) == 3]
        if (isinstance(rows, list))
        else []
    )
    return [row for row in found if math.isfinite(row[1] + row[2])][:2000]


def bars(parts: Any, unit: str = "GiB") -> list[Bar]:
    """The numbers of a mapping as bars, largest first, without what is too small to see."""
    sizes = {str(name)[:80]: number(size) for name, size in parts.items()} if isinstance(parts, dict) else {}
    sizes = {name: size for name, size in sizes.items() if size > 0}
    most = max(sizes.values(), default=1.0)
    ranked = sorted(sizes.items(), key=lambda item: -item[1])
    return [Bar(name, f"{short(size)} {unit}", size / most) for name, size in ranked if size >= most / 1000][:20]


def highest(plan: Mapping[str, Any]) -> list[Bar]:
    """The peak of each kind of moment on the device."""
    found: dict[str, float] = {}
    for name, device, _ in _moments(plan):
        found[name] = max(found.get(name, 0.0), device)
    return bars(found)


def differences(runs: Sequence[Record]) -> list[tuple[str, list[str]]]:
    """Config keys whose values are not the same in all runs, with the values; "—" where a run lacks the key."""
    leaves = [fixed_leaves(run.config, ()) for run in runs]
    keys = sorted({str(key) for found in leaves for key in found})
    rows = [(key, [_setting(found[key]) if key in found else "—" for found in leaves]) for key in keys]
    return [(key[:200], values) for key, values in rows if len(set(values)) > 1]


def _setting(value: Any) -> str:
    return ("null" if value is None else str(value).lower() if isinstance(value, bool) else str(value))[:300]


@dataclass(frozen=True)
class Row:
    """The final value of one column in each run, "—" where a run lacks it. `best`: the runs with the least loss."""

    name: str
    values: list[str]
    best: frozenset[int]
    change: str
    main: bool


def finals(runs: Sequence[Record]) -> list[Row]:
    """Final figures: of held-out, drift and health the last value, of others the mean of the last tenth of the iterations."""
    return sorted(_finals(runs), key=lambda row: not row.main)


def _finals(runs: Sequence[Record]) -> Iterator[Row]:
    for column in dict.fromkeys(column for run in runs for column in run.columns):
        name = Name.of(column)
        alone = name.section in ("held_out", "drift", "health") or name.leaf in ("skipped", "lr")
        values = [(series.last if alone else series.tail) if (series := run.columns.get(column)) else None for run in runs]
        known = [value for value in values if value is not None]
        judged = name.section == "held_out" or (name.section == "loss" and "loss" in column)
        least = min(known) if judged and len(known) > 1 and max(known) > min(known) else None
        change = ""
        if len(values) == 2 and values[0] and values[1] is not None:
            change = f"{(values[1] / values[0] - 1) * 100:+.1f} %" if abs(values[1] / values[0]) < 1000 else ""
        yield Row(
            name.words(apart=True),
            ["—" if value is None else short(value) for value in values],
            frozenset(place for place, value in enumerate(values) if least is not None and value == least),
            change,
            name.main or name.section in ("drift", "health", "memory"),
        )
