"""The books of a memory count: bytes at each place by owner and by the moment they were made in, now and at every peak."""

from __future__ import annotations

from dataclasses import dataclass, field

from helios_train.memory.places import DEVICE, PLACES, Place

Cell = tuple[str, str]  # (owner, moment it was made in)
NOBODY, BEFORE, OUTSIDE = "nobody", "before", "outside"  # labels of what no one named


@dataclass
class Stretch:
    """One moment, from entering to leaving: its peak at each place, moments inside it included, and what the peak was made of."""

    moment: str
    peak: dict[Place, int] = field(default_factory=lambda: dict.fromkeys(PLACES, 0))
    cells: dict[Place, dict[Cell, int]] = field(default_factory=lambda: {place: {} for place in PLACES})

    def owners(self, place: Place = DEVICE) -> dict[str, int]:
        """Bytes at this moment's peak by owner, largest first."""
        return _summed(self.cells[place], 0)

    def include(self, inner: Stretch) -> None:
        """Takes the peaks of a stretch inside this one where they are higher."""
        for place in PLACES:
            if inner.peak[place] > self.peak[place]:
                self.peak[place], self.cells[place] = inner.peak[place], inner.cells[place]

    def copy(self) -> Stretch:
        """The stretch as it stands."""
        return Stretch(self.moment, dict(self.peak), {place: dict(cells) for place, cells in self.cells.items()})


@dataclass(frozen=True)
class Report:
    """What a counter has seen: `whole` is the run as one stretch, `timeline` each moment in the order of entering."""

    whole: Stretch
    timeline: tuple[Stretch, ...]
    live: dict[Place, int]

    @property
    def peak(self) -> dict[Place, int]:
        """The highest sum of live storages at each place, bytes."""
        return self.whole.peak

    def cells(self, place: Place = DEVICE) -> dict[Cell, int]:
        """Bytes at the peak by (owner, moment they were made in); they add up to the peak."""
        return self.whole.cells[place]

    def owners(self, place: Place = DEVICE) -> dict[str, int]:
        """Bytes at the peak by owner, largest first."""
        return self.whole.owners(place)

    def made_in(self, place: Place = DEVICE) -> dict[str, int]:
        """Bytes at the peak by the moment they were made in, largest first."""
        return _summed(self.cells(place), 1)

    def moments(self, place: Place = DEVICE) -> dict[str, int]:
        """The highest peak of each moment, in the order of first entering."""
        peaks: dict[str, int] = {}
        for stretch in self.timeline:
            peaks[stretch.moment] = max(peaks.get(stretch.moment, 0), stretch.peak[place])
        return peaks

    def summit(self, place: Place = DEVICE) -> str:
        """The innermost moment in which the peak stood; OUTSIDE if in none."""
        return next((s.moment for s in reversed(self.timeline) if s.peak[place] == self.peak[place]), OUTSIDE)

    def table(self, place: Place = DEVICE) -> str:
        """The peak as text, GiB: a row an owner, a column a moment, sums at the edges."""
        owners, moments, cells = self.owners(place), self.made_in(place), self.cells(place)
        rows = [["GiB", *moments, "sum"]]
        rows += [[owner, *(_gib(cells.get((owner, moment), 0)) for moment in moments), _gib(owners[owner])] for owner in owners]
        rows.append(["sum", *(_gib(size) for size in moments.values()), _gib(self.peak[place])])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
            for row in rows
        ]
        return "\n".join("  ".join(line) for line in lines)


class Ledger:
    """The bytes at one place: now, and at the peak of the stretch that is open."""

    def __init__(self, place: Place):
        self.place, self.live, self.peak = place, 0, 0
        self.cells: dict[Cell, int] = {}
        self._at_peak: dict[Cell, int] = {}
        self._rising = False  # the peak is now: its composition is copied before the first byte goes, once a summit

    def add(self, cell: Cell, size: int) -> None:
        """`size` bytes more (fewer if negative) of this cell."""
        if size < 0 and self._rising:
            self._at_peak, self._rising = dict(self.cells), False
        self.live += size
        self._shift(cell, size)
        if self.live > self.peak:
            self.peak, self._rising = self.live, True

    def rename(self, old: Cell, new: Cell, size: int) -> None:
        """Bytes that belong to another cell than was written; there are no more and no fewer."""
        self._shift(old, -size)
        self._shift(new, size)

    def open(self, stretch: Stretch) -> None:
        """From now on peaks are this stretch's, which goes on from those it has."""
        self.peak, self._at_peak = stretch.peak[self.place], stretch.cells[self.place]
        self._rising = self.live > self.peak
        self.peak = max(self.peak, self.live)

    def close(self, stretch: Stretch) -> None:
        """Writes the peak and its composition to the open stretch."""
        stretch.peak[self.place] = self.peak
        stretch.cells[self.place] = dict(self.cells) if self._rising else self._at_peak

    def _shift(self, cell: Cell, size: int) -> None:
        size += self.cells.get(cell, 0)
        if size:
            self.cells[cell] = size
        else:
            self.cells.pop(cell, None)


def _summed(cells: dict[Cell, int], part: int) -> dict[str, int]:
    sums: dict[str, int] = {}
    for cell, size in cells.items():
        sums[cell[part]] = sums.get(cell[part], 0) + size
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"
