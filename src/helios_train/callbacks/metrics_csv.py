"""metrics.csv: every metric of a run, a row a log; always on."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from helios_train.run import writing


class MetricsCsv(Logger):
    """Appends rows as they come, so that a killed run keeps them; a resumed run cuts what came after its checkpoint.

    Lightning's own CSV logger deletes the file of the run it goes on with.
    """

    def __init__(self, path: Path, resumed_at: int | None = None):
        """`resumed_at`: the iteration a resumed run goes on from; rows after it go. None: run and file start at 0."""
        super().__init__()
        self.path = path
        self.columns: list[str] = []
        rows: list[dict[str, str]] = []
        if path.is_file():
            rows, self.columns = _read(path)
        if self.columns:
            self._rewrite([row for row in rows if resumed_at is not None and int(row["iteration"]) <= resumed_at])

    @property
    def name(self) -> str:
        """Of the logger."""
        return "csv"

    @property
    def version(self) -> str:
        """A run folder has one."""
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Writes one row, flushed; `step` is the iteration."""
        row = {"iteration": str(step), **{name: repr(float(value)) for name, value in metrics.items()}}
        new = [name for name in row if name not in self.columns]
        if new:
            rows: list[dict[str, str]] = _read(self.path)[0] if self.columns else []
            self.columns += new
            self._rewrite(rows)
        with writing(self.path), self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow(row)

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        unfinished = self.path.with_name(self.path.name + ".tmp")
        with writing(self.path):
            with unfinished.open("w", newline="") as file:
                writer = csv.DictWriter(file, self.columns)
                writer.writeheader()
                writer.writerows(rows)
            unfinished.replace(self.path)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The run folder's config.yaml has them."""


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """Iteration and values of every row of the file, if there is one; an iteration may have several rows."""
    for row in _read(path)[0] if path.is_file() else []:
        yield int(row["iteration"]), {name: float(value) for name, value in row.items() if value and name != "iteration"}


def _read(path: Path) -> tuple[list[dict[str, str]], list[str]]:
    """Whole rows, and the names of the columns."""
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        return [row for row in reader if _whole(row)], list(reader.fieldnames or [])


def _whole(row: dict[str, str]) -> bool:
    """Whether the row was written to its end; a kill can cut the last one."""
    return None not in row.values() and (row.get("iteration") or "").isdigit()
