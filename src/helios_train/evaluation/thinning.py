"""A column of metrics of any length as a few hundred points that keep its extremes."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

KEPT = 300  # points a column is shown with at most; never fewer than half of that once it has them
TAIL = 0.1  # last share of the iterations that a final figure is a mean over

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Series:
    """Points [P] of one column: `y` means over neighbouring rows, between `low` and `high`; `count` rows are behind each.

    `first` and `last` are the values of single rows.
    """

    x: Numbers
    y: Numbers
    low: Numbers
    high: Numbers
    count: NDArray[np.int64]
    first: float
    last: float

    @property
    def tail(self) -> float:
        """The mean of the rows in the last tenth of the iterations."""
        late = self.x >= self.x[-1] - TAIL * (self.x[-1] - self.x[0])
        return float(np.average(self.y[late], weights=self.count[late]))


@dataclass
class Thinned:
    """Takes finite values in their order and forgets all but `KEPT` cells of equally many; memory does not grow with the rows."""

    width: int = 1  # rows a cell
    cells: list[tuple[float, float, float, float, int]] = field(default_factory=list)  # x, mean, low, high, rows
    waiting: tuple[Numbers, Numbers] = field(default_factory=lambda: (np.empty(0), np.empty(0)))
    ends: tuple[float, float] | None = None

    def add(self, x: Numbers, y: Numbers) -> None:
        """The next values [N]."""
        if not len(y):
            return
        self.ends = (self.ends[0] if self.ends else float(y[0]), float(y[-1]))
        x, y = np.concatenate([self.waiting[0], x]), np.concatenate([self.waiting[1], y])
        whole = len(y) // self.width * self.width
        self.cells += _cells(x[:whole].reshape(-1, self.width), y[:whole].reshape(-1, self.width))
        self.waiting = x[whole:], y[whole:]
        while len(self.cells) > KEPT:
            self._halve()

    def _halve(self) -> None:
        odd = self.cells.pop() if len(self.cells) % 2 else None
        pairs = zip(self.cells[::2], self.cells[1::2], strict=True)
        self.cells = [_joined(one, other) for one, other in pairs]
        self.width *= 2
        if odd:
            self.cells.append(odd)  # half as many rows as the others: its weight says so

    def series(self) -> Series | None:
        """What was added, by iteration; None where nothing was."""
        if self.ends is None:
            return None
        rest = _cells(*(part.reshape(1, -1) for part in self.waiting)) if len(self.waiting[1]) else []
        x, y, low, high, count = (np.array(column) for column in zip(*sorted([*self.cells, *rest]), strict=True))
        return Series(x, y, low, high, count.astype(np.int64), *self.ends)


def _cells(x_CN: Numbers, y_CN: Numbers) -> list[tuple[float, float, float, float, int]]:
    """A cell a row of [C, N]."""
    columns = x_CN.mean(axis=1), y_CN.mean(axis=1), y_CN.min(axis=1), y_CN.max(axis=1)
    return [(*values, x_CN.shape[1]) for values in zip(*(column.tolist() for column in columns), strict=True)]


def _joined(
    one: tuple[float, float, float, float, int], other: tuple[float, float, float, float, int]
) -> tuple[float, float, float, float, int]:
    rows = one[4] + other[4]
    x, mean = ((one[i] * one[4] + other[i] * other[4]) / rows for i in (0, 1))
    return x, mean, min(one[2], other[2]), max(one[3], other[3]), rows
