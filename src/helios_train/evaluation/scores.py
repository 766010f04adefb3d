"""Evaluations side by side, as a page shows them: a row a metric, a column an evaluation; what was read may be damaged."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from helios_train.evaluation.figures import Tile
from helios_train.evaluation.ratings import RULES
from helios_train.evaluation.recorded import Record, number

NAMED = 5  # bad videos that a cell names before it counts the others


@dataclass(frozen=True)
class Measured:
    """One metric: raw mean, rating (NaN for none), videos in the mean, names of bad ones; `reason` why it has no rating."""

    score: float
    rating: float = math.nan
    videos: float = math.nan
    bad: Sequence[str] = ()
    counted: float = math.nan  # what a bad one counts as; NaN: it is left out
    reason: str = ""


@dataclass(frozen=True)
class Scores:
    """One evaluation. `total`: weighted rating, NaN for none; `length`, `thresholds`: what it was rated by; frames a second."""

    metrics: Mapping[str, Measured]
    total: float
    length: str
    thresholds: str
    speed: float
    speed_rating: float

    @property
    def bad(self) -> list[str]:
        """Names of videos that lack the score of a metric, each once."""
        return list(dict.fromkeys(name for measured in self.metrics.values() for name in measured.bad))

    @property
    def weighed(self) -> list[str]:
        """Metrics that have a weight for videos of this length."""
        return [name for name, rule in RULES.items() if self.length in rule.weights or self.length not in ("long", "short")]

    @property
    def missing(self) -> list[str]:
        """Those of them that have no rating here."""
        return [name for name in self.weighed if name not in self.metrics or math.isnan(self.metrics[name].rating)]

    @property
    def videos(self) -> str:
        """How many videos are in the means: from the fewest to the most of a metric."""
        counts = {measured.videos for measured in self.metrics.values() if math.isfinite(measured.videos)}
        return "—" if not counts else " to ".join(f"{count:.0f}" for count in sorted({min(counts), max(counts)}))


@dataclass(frozen=True)
class Cell:
    """What one evaluation has in one row, and a remark on it."""

    value: str
    rating: str = ""
    note: str = ""
    best: bool = False


@dataclass(frozen=True)
class Group:
    """Rows under one headline, each with its name and a cell an evaluation."""

    title: str
    rows: list[tuple[str, list[Cell]]] = field(default_factory=list)


def scores(read: Record) -> Scores | None:
    """What the files of an evaluation say; None where it has no results."""
    summary = _dict(read.merged.get("summary"))
    if not summary:
        return None
    rated = {str(name): _dict(entry) for kind in ("non_drifting", "drifting") for name, entry in _dict(summary.get(kind)).items()}
    bare = {str(name): _dict(entry) for name, entry in _dict(read.merged.get("not_rated")).items()}
    return Scores(
        {name: _measured(entry, read.measured.get(name, {})) for name, entry in {**bare, **rated}.items() if name in RULES},
        number(summary.get("total_weighted_rating")),
        str(read.merged.get("length") or "not said"),
        str(read.merged.get("thresholds") or "not said"),
        number(read.throughput.get("frames_per_second")),
        number(read.throughput.get("rating")),
    )


def _measured(entry: Mapping[str, Any], file: Mapping[str, Any]) -> Measured:
    failed = file.get("failed")
    bad = [str(_dict(row).get("video_name") or "?") for row in failed] if isinstance(failed, list) else []
    score, rating, videos = (number(entry.get(key)) for key in ("raw_score", "rating", "num_videos"))
    return Measured(score, rating, videos, bad, number(file.get("failed_count_as")), str(entry.get("reason") or ""))


def _dict(found: Any) -> dict[Any, Any]:
    return found if isinstance(found, dict) else {}


def tiles(found: Scores) -> list[Tile]:
    """What tells most of an evaluation in few figures."""
    of = f"of {len(found.weighed) - len(found.missing)} of {len(found.weighed)} metrics"
    bad = len(found.bad)
    made = [
        Tile("total rating", _figure(found.total), of),
        Tile("videos", found.videos, f"{bad} bad" if bad else "", bad=bad > 0),
    ]
    if math.isfinite(found.speed):
        made.append(Tile("throughput", f"{found.speed:.4g}", f"rating {_figure(found.speed_rating)}", "frames/s"))
    return made


def table(evaluations: Sequence[Scores]) -> list[Group]:
    """All metrics, measured or not, the totals below them, and what the totals are of."""
    alike = len({found.length for found in evaluations}) == 1
    groups = [Group("not drifting: more is better"), Group("drifting: less is better"), Group("in all")]
    for name, rule in RULES.items():
        measured = [found.metrics.get(name) for found in evaluations]
        best = _best(measured, rule.drift) if alike else math.nan
        groups[rule.drift].rows.append((name.replace("_", " "), [_cell(one, best) for one in measured]))

    def _row(name: str, cell: Callable[[Scores], Cell]) -> None:
        groups[-1].rows.append((name, [cell(found) for found in evaluations]))

    totals = {found.total for found in evaluations if math.isfinite(found.total)}
    most = max(totals) if len(totals) > 1 and not differing(evaluations) else math.nan
    _row("total rating", lambda found: Cell(_figure(found.total), best=found.total == most))
    if any(math.isfinite(found.speed) for found in evaluations):
        _row("throughput, frames/s, not in the total", lambda found: Cell(_figure(found.speed), _figure(found.speed_rating, "")))
    _row("videos counted", lambda found: Cell(found.videos))
    _row("bad videos", lambda found: Cell(str(len(found.bad)), note=_listed(found.bad)))
    _row("not in the total", lambda found: Cell(str(len(found.missing)), note=", ".join(found.missing).replace("_", " ")))
    _row("videos rated as", lambda found: Cell(found.length))
    _row("thresholds", lambda found: Cell(found.thresholds))
    return groups


def differing(evaluations: Sequence[Scores]) -> list[str]:
    """What the evaluations differ in, so that their totals do not compare."""
    return [
        name
        for name, values in (
            ("the length of videos", {found.length for found in evaluations}),
            ("thresholds", {found.thresholds for found in evaluations}),
            ("the metrics in them", {" ".join(found.missing) for found in evaluations}),
        )
        if len(values) > 1
    ]


def _best(measured: Sequence[Measured | None], drift: bool) -> float:
    """The best raw score, NaN where there is none to tell: a figure of one form is no better than one of another."""
    known = [one for one in measured if one is not None and math.isfinite(one.score)]
    values = {one.score for one in known}
    if len(values) < 2 or len({one.reason for one in known}) > 1:
        return math.nan
    return min(values) if drift else max(values)


def _cell(measured: Measured | None, best: float) -> Cell:
    if measured is None:
        return Cell("—", note="not measured")
    bad = len(measured.bad)
    counts = f"count as {measured.counted:g}" if math.isfinite(measured.counted) else "are left out"
    said = [f"not rated: {measured.reason}" if measured.reason else "", f"{bad} bad {counts}" if bad else ""]
    value = f"{measured.score:.5f}" if math.isfinite(measured.score) else "—"
    return Cell(value, _figure(measured.rating, ""), "; ".join(filter(None, said))[:300], measured.score == best)


def _figure(value: float, none: str = "—") -> str:
    return f"{value:.6g}" if math.isfinite(value) else none


def _listed(names: Sequence[str]) -> str:
    return ", ".join(name[:80] for name in names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
