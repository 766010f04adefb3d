"""Which columns of metrics.csv belong on one chart, in which section of a page, and what people call them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from helios_train.evaluation.charts import Chart, Line
from helios_train.evaluation.recorded import ROLES, Alarm, Record
from helios_train.evaluation.thinning import Series

ORDERED = re.compile(r"(sigma|level|quantile|section|frame|block|step)_(-?\d.*)")
CASES = {"full": "full history", "dropped": "history dropped", "wrong_caption": "wrong caption"}
LEVELS = ("level 0, quarter", "level 1, half", "level 2, full")
WORDS = {
    "lr": "learning rate",
    "dmd": "distribution matching",
    "gan": "adversary",
    "saturation_real": "saturation of the data",
    "gradient_norm": "gradient norm",
    "skipped": "skipped updates",
    "step_seconds": "time of an iteration",
    "samples_per_second": "throughput",
    "data_wait_share": "share of the time spent waiting for data",
    "sigma": "noise level",
}
UNITS = {
    "step_seconds": "s",
    "samples_per_second": "samples/s",
    "data_wait_share": "1 = all of it",
    "gradient_norm": "before clipping",
    "skipped": "in the whole run",
}
SUFFIXES = {"gib": "GiB", "gb": "GB", "bytes": "bytes", "seconds": "s", "ms": "ms", "db": "dB"}
SECTIONS = {
    "loss": "Training loss",
    "held_out": "Held-out loss",
    "optimizer": "Optimizer",
    "drift": "Drift",
    "health": "Health",
    "time": "Throughput",
    "memory": "Memory",
    "other": "Other figures",
}
APART = ("drift", "health", "time", "memory")  # sections whose columns share no unit


@dataclass(frozen=True)
class Name:
    """A column's name in its parts: `section`, the `role` it is about ("" where a run has one), `parent` and `leaf`."""

    column: str
    section: str
    role: str
    parent: str
    leaf: str

    @classmethod
    def of(cls, column: str) -> Name:
        """Any column."""
        parts = [part for part in column.split("/") if part] or [column]
        section = parts[0] if parts[0] in ("held_out", *APART) else ""
        rest = parts[1:] if section and len(parts) > 1 else parts
        role = next((part for part in rest if part in ROLES), "") if section != "held_out" else ""
        rest = [part for number, part in enumerate(rest) if not (part == role and number == rest.index(role))] or rest
        if not section:
            if rest[0] in ("lr", "gradient_norm", "skipped"):
                section = "optimizer"
            else:
                section = "loss" if rest[0] == "loss" or role else "other"
        return cls(column, section, role, "/".join(rest[:-1]), rest[-1])

    @property
    def ordered(self) -> re.Match[str] | None:
        """A leaf that is a step of something."""
        return ORDERED.fullmatch(self.leaf)

    @property
    def main(self) -> bool:
        """Whether the column is among the few that tell most of a run."""
        held_out = self.section == "held_out" and not self.parent and self.leaf in CASES
        return held_out or self.section == "optimizer" or (self.section == "loss" and not self.parent) or self.section == "time"

    def words(self, apart: bool = False) -> str:
        """The whole name for people; `apart` from its section."""
        before = self.section.replace("_", "-") if apart and self.section in ("held_out", "drift", "health", "memory") else ""
        said = " · ".join(filter(None, (before, *(spoken(part) for part in (*self.parent.split("/"), self.leaf) if part))))
        return f"{self.role}: {said}" if self.role else said


def spoken(part: str) -> str:
    """One part of a name for people."""
    if match := ORDERED.fullmatch(part):
        if match[1] == "level" and match[2].isdecimal() and int(match[2]) < len(LEVELS):
            return LEVELS[int(match[2])]
        return f"{'noise' if match[1] == 'sigma' else match[1]} {match[2]}"
    if part in CASES or part in WORDS:
        return CASES.get(part) or WORDS[part]
    before, _, unit = part.rpartition("_")
    return (before if before and unit.lower() in SUFFIXES else part).replace("_", " ")


def unit_of(leaf: str) -> str:
    """The unit a name says."""
    return UNITS.get(leaf) or SUFFIXES.get(leaf.rpartition("_")[2].lower(), "")


def charts(run: Record) -> dict[str, list[tuple[Chart, bool]]]:
    """The charts of a run by section, each with whether it is a detail."""
    found: dict[str, list[tuple[Chart, bool]]] = {section: [] for section in SECTIONS}
    for names in _grouped(column for column, series in run.columns.items() if not _idle(column, series)):
        chart = _chart(names, run.columns, run.alarms)
        found[names[0].section].append((chart, _is_detail(names[0])))
    return {SECTIONS[section]: made for section, made in found.items() if made}


def compared(runs: Sequence[Record], labels: Sequence[str]) -> dict[str, list[tuple[Chart, bool]]]:
    """A chart a column, of every run that has it, by section; each with whether it is a detail."""
    found: dict[str, list[tuple[Chart, bool]]] = {section: [] for section in SECTIONS}
    for column in dict.fromkeys(column for run in runs for column in run.columns):
        name = Name.of(column)
        noisy = name.section == "loss"
        lines = [
            Line.of(label, run.columns[column], noisy, f"c{number}")
            for number, (run, label) in enumerate(zip(runs, labels, strict=True))
            if column in run.columns
        ]
        drifts = name.section in ("drift", "health", "memory") and not name.ordered
        found[name.section].append((Chart(name.words(), lines, unit_of(name.leaf)), not (name.main or drifts)))
    return {SECTIONS[section]: made for section, made in found.items() if made}


def _grouped(columns: Iterable[str]) -> list[list[Name]]:
    """Columns that are shown together, in the order of the first of each."""
    groups: dict[tuple[str, ...], list[Name]] = {}
    for name in map(Name.of, columns):
        groups.setdefault(_key(name), []).append(name)
    for names in groups.values():
        names.sort(key=_order)
    return sorted(groups.values(), key=lambda names: _rank(names[0]))


def _idle(column: str, series: Series) -> bool:
    """A counter that never moved: its tile says so."""
    return Name.of(column).leaf == "skipped" and not series.high.any()


def _key(name: Name) -> tuple[str, ...]:
    """What columns on one chart have in common."""
    if name.ordered:
        return name.section, name.role, name.parent, name.ordered[1]
    if name.section in APART or name.section == "optimizer":
        return name.section, "", name.parent, name.leaf  # the roles are the lines
    if name.leaf == "loss":
        return name.section, name.role, name.parent, "total"
    return name.section, name.role, name.parent, ""


def _order(name: Name) -> tuple[float, str]:
    match = name.ordered
    first = re.match(r"-?[\d.]*\d", match[2]) if match else None
    try:
        return (float(first[0]) if first else 0.0, "")
    except ValueError:
        return (0.0, name.leaf)


def _rank(name: Name) -> tuple[bool, int, int]:
    """Wholes before their parts, the student before who follows it."""
    role = ROLES.index(name.role) if name.role in ROLES else -1
    depth = name.parent.count("/") + bool(name.parent) + bool(name.ordered)
    return _is_detail(name), role, 2 * depth + (name.leaf != "loss")


def _is_detail(name: Name) -> bool:
    if name.section == "held_out":
        return not name.parent.startswith("full") and bool(name.parent)
    return name.section == "loss" and name.parent.count("/") >= 1


def _chart(names: Sequence[Name], columns: Mapping[str, Series], alarms: Sequence[Alarm]) -> Chart:
    one = names[0]
    by_role = len({name.role for name in names}) > 1
    lines = [
        Line.of(name.role or "run" if by_role else spoken(name.leaf), columns[name.column], noisy=one.section == "loss")
        for name in names
    ]
    about = {name.column for name in names}
    raised = [alarm for alarm in alarms if alarm.column in about]
    limits = {alarm.limit for alarm in raised if alarm.limit is not None}
    return Chart(
        _title(one, len(names), by_role),
        lines,
        unit_of(one.leaf),
        ordered=one.ordered is not None,
        marks=[alarm.iteration for alarm in raised],
        limit=limits.pop() if len(limits) == 1 else None,
    )


def _title(name: Name, count: int, by_role: bool) -> str:
    """What the lines have in common."""
    if name.section == "held_out" and not name.parent and not name.ordered:
        return "held-out loss"
    said = " · ".join(spoken(part) for part in name.parent.split("/") if part)
    if name.ordered:
        kind = WORDS.get(name.ordered[1], name.ordered[1])
        said = f"{said or name.section.replace('_', '-')}, by {kind}"
    elif name.parent == "loss":
        said = "parts of the loss"
    elif count == 1 or by_role or not said:
        said = " · ".join(filter(None, (said, spoken(name.leaf))))
    return f"{name.role}: {said}" if name.role and not by_role else said
