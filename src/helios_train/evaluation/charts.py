"""Line charts as numbers a template draws: places in a box of 560 x 280, ticks, paths, and the points a pointer finds.

P points of a line.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from helios_train.evaluation.thinning import Series

WIDTH, HEIGHT = 560.0, 280.0
LEFT, RIGHT, TOP, BOTTOM = 62.0, 546.0, 12.0, 234.0  # of the box that lines are in
LOG_FROM = 5.0  # largest by smallest value from which a scale is logarithmic
NOISY = 40  # points from which a noisy line is drawn smoothed, over itself
WINDOW = 20  # share of the points, inverted, a smoothed one is a mean of
MARKED = 30  # points up to which each has a dot
LINES = 12  # of a chart
DIGITS = 4  # significant ones of what a pointer shows
CATEGORIES, STEPS = 7, 7  # colours of a kind

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Line:
    """Points [P] of one line, by ascending x. `low` and `high`: what the points are means between; in a chart of steps, what is
    filled. `noisy`: may be smoothed."""

    label: str
    x: Numbers
    y: Numbers
    low: Numbers | None = None
    high: Numbers | None = None
    noisy: bool = False
    colour: str = ""  # c0 .. c6, one of a kind, or q0 .. q6, one of an order; "": by its place in the chart

    @classmethod
    def of(cls, label: str, series: Series, noisy: bool = False, colour: str = "") -> Line:
        """A column of metrics."""
        spread = series.count.max() > 1
        low, high = (series.low, series.high) if spread else (None, None)
        return cls(label, series.x, series.y, low, high, noisy, colour)


@dataclass(frozen=True)
class Chart:
    """What is shown: lines over iterations (or `along`), in a unit. `ordered`: the lines are steps of one thing.

    `steps`: every point holds until the next. `names`: of the points, where x says too little. `marks`: iterations of alarms.
    """

    title: str
    lines: Sequence[Line]
    unit: str = ""
    along: str = "iteration"
    ordered: bool = False
    log: bool | None = None  # None: where the values are positive and far apart
    steps: bool = False
    names: Sequence[str] = ()
    marks: Sequence[int] = ()
    limit: float | None = None


@dataclass(frozen=True)
class Axis:
    """Values from `low` to `high`, at places from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    whole: bool = False  # counts things: ticks only at whole numbers

    def place(self, values: Any) -> Numbers:
        """Where values are, up to a box's width outside of it."""
        low, high, found = (np.asarray(one, np.float64) for one in (self.low, self.high, values))
        if self.log:
            low, high, found = np.log10(low), np.log10(high), np.log10(np.maximum(found, self.low * 1e-3))
        share = np.clip((found - low) / (high - low), -1.0, 2.0)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[tuple[float, str]]:
        """Places and labels of round values."""
        values = _log_ticks(self.low, self.high) if self.log else _ticks(self.low, self.high, self.whole)
        step = min(np.diff(values), default=0.0) if not self.log else 0.0
        return [(round(float(self.place(value)), 1), short(value, float(step))) for value in values]


@dataclass
class Drawn:
    """A chart with its places worked out; what a template needs."""

    title: str
    unit: str
    along: str
    log: bool
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[dict[str, Any]]
    marks: list[tuple[float, int]]
    limit: tuple[float, str] | None
    data: dict[str, Any]
    box: dict[str, float] = field(
        default_factory=lambda: {"left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM, "width": WIDTH, "height": HEIGHT}
    )
    left_out: int = 0


def draw(chart: Chart) -> Drawn:
    """Works out the places. ValueError where there is no point at all."""
    lines = [line for line in chart.lines if len(line.y)]
    if not lines:
        raise ValueError(f"{chart.title}: a chart without a point")
    shown = lines if len(lines) <= LINES else [lines[i] for i in np.linspace(0, len(lines) - 1, LINES).round().astype(int)]
    x_axis = _x_axis(shown, chart.steps)
    y_axis = _y_axis(shown, chart)
    drawn = [
        _line(line, line.colour or _colour(number, len(shown), chart.ordered), x_axis, y_axis, chart.steps)
        for number, line in enumerate(shown)
    ]
    limit = None
    if chart.limit is not None and (not y_axis.log or chart.limit > 0):
        limit = round(float(y_axis.place(chart.limit)), 1), short(chart.limit)
    inside = [mark for mark in dict.fromkeys(chart.marks) if x_axis.low <= mark <= x_axis.high]
    return Drawn(
        chart.title,
        chart.unit,
        chart.along,
        y_axis.log,
        x_axis.ticks() if not chart.names else [],
        y_axis.ticks(),
        drawn,
        [(round(float(x_axis.place(mark)), 1), mark) for mark in inside[-50:]],
        limit,
        {
            "box": [LEFT, RIGHT, WIDTH],
            "from": x_axis.low,
            "to": x_axis.high,
            "along": chart.along,
            "unit": chart.unit,
            "names": list(chart.names),
            "lines": [
                {"label": line.label, "colour": made["colour"], "x": _rounded(line.x, 9), "y": _rounded(line.y, DIGITS)}
                for line, made in zip(shown, drawn, strict=True)
            ],
        },
        left_out=len(lines) - len(shown),
    )


def short(value: float, step: float = 0.0) -> str:
    """A number in few characters; `step`: the distance it must be told apart at, 0 for four digits."""
    if not math.isfinite(value):
        return "not finite"
    size = abs(value)
    if size and not (1e-3 <= size < 1e5 or (step >= 1e-3 and size < 1e5)):
        for factor, name in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
            if factor <= size < 1e15:
                return f"{value / factor:.4g}{name}"
        mantissa, _, exponent = f"{value:.3g}".partition("e")
        return f"{mantissa}e{int(exponent)}" if exponent else mantissa
    if step and step < 1e-3:
        return f"{value:.3g}" if size < 1 else f"{value:.7g}"
    if step:
        return f"{value:,.{max(0, min(6, -math.floor(math.log10(step) + 1e-9)))}f}"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.4g}"


def _x_axis(lines: Sequence[Line], steps: bool) -> Axis:
    low, high = min(float(line.x[0]) for line in lines), max(float(line.x[-1]) for line in lines)
    high += steps  # the last point holds for one more
    return Axis(low, high, LEFT, RIGHT, whole=True) if high > low else Axis(low - 1, high + 1, LEFT, RIGHT, whole=True)


def _y_axis(lines: Sequence[Line], chart: Chart) -> Axis:
    """The values with some air."""
    spans = [_span(line.y) if line.noisy and len(line.y) >= NOISY else line.y for line in lines]
    values = np.concatenate([*spans, *([np.array([chart.limit])] if chart.limit is not None else [])])
    low, high = float(values.min()), float(values.max())
    if high - low < 1e-9 * abs(high):  # what is left is rounding
        high = low
    log = low > 0 and high / low >= LOG_FROM if chart.log is None else chart.log and low > 0
    if log:
        air = (high / low) ** 0.05 if high > low else 2.0
        return Axis(low / air, high * air, BOTTOM, TOP, log=True)
    if chart.steps or (low >= 0 and low < 0.4 * high):
        low = min(0.0, low)
    air = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return Axis(low if low == 0 else low - air, high + air, BOTTOM, TOP)


def _span(y: Numbers) -> Numbers:
    """Smallest and largest value of noise, but for a few spikes far outside, which would flatten all the rest."""
    low, high = np.quantile(y, [0.01, 0.99])
    reach = 3 * (high - low)
    return np.array([low if y.min() < low - reach else y.min(), high if y.max() > high + reach else y.max()])


def _line(line: Line, colour: str, x_axis: Axis, y_axis: Axis, steps: bool) -> dict[str, Any]:
    x, y = x_axis.place(line.x), y_axis.place(line.y)
    smooth = line.noisy and len(y) >= NOISY
    made: dict[str, Any] = {
        "label": line.label,
        "colour": colour,
        "last": short(float(line.y[-1])),
        "title": f"{line.label}: {short(float(line.y[0]))} to {short(float(line.y[-1]))}, "
        f"between {short(float(line.y.min()))} and {short(float(line.y.max()))}",
        "dots": [(round(float(a), 1), round(float(b), 1)) for a, b in zip(x, y, strict=True)] if len(y) <= MARKED else [],
        "raw": _path(x, y) if smooth else "",
        "band": "",
    }
    if steps:
        ends = np.append(x[1:], x_axis.place(line.x[-1] + 1))
        x, y = np.stack([x, ends], axis=1).ravel(), np.repeat(y, 2)
        filled = _path(np.array([x[0], *x, x[-1]]), np.array([BOTTOM, *y, BOTTOM])) + "Z"
        made["band"], made["dots"] = filled if line.low is not None else "", []
    elif line.low is not None and line.high is not None:
        low, high = y_axis.place(line.low), y_axis.place(line.high)
        made["band"] = _path(np.append(x, x[::-1]), np.append(high, low[::-1])) + "Z"
    made["path"] = _path(x, y_axis.place(_smoothed(line.y)) if smooth else y)
    return made


def _path(x: Numbers, y: Numbers) -> str:
    return "M" + "L".join(f"{a:.1f},{b:.1f}" for a, b in zip(x.tolist(), y.tolist(), strict=True))


def _smoothed(y: Numbers) -> Numbers:
    """Means over a window around each point, that is cut at the ends."""
    half = max(1, len(y) // (2 * WINDOW))
    sums = np.concatenate([[0.0], np.cumsum(y)])
    at = np.arange(len(y))
    start, end = np.maximum(at - half, 0), np.minimum(at + half + 1, len(y))
    return (sums[end] - sums[start]) / (end - start)


def _colour(number: int, count: int, ordered: bool) -> str:
    if ordered:
        return f"q{round(number * (STEPS - 1) / max(1, count - 1))}"
    return f"c{number % CATEGORIES}"


def _ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """About five multiples of 1, 2 or 5 times a power of ten."""
    raw = max((high - low) / 5, 1.0 if whole else 0.0)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    return [step * i for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten; between them 2 and 5 where few, and multiples of anything where there would be fewer than two."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = max(1, math.ceil(len(decades) / 7))
    for factors in ((1,), (1, 2, 5)):
        values = [factor * 10.0**power for power in decades[::every] for factor in factors]
        inside = [value for value in values if low <= value <= high]
        if len(inside) >= 3:
            return inside
    return _ticks(low, high) if len(inside) < 2 else inside


def _rounded(values: Numbers, digits: int) -> list[float]:
    return [float(f"{value:.{digits}g}") for value in values.tolist()]
