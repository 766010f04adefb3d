"""How far a long task is: a bar with rate and time left, or now and then a line where nobody sees a bar."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text

EVERY = 30.0  # seconds between lines


class _Rate(ProgressColumn):
    """Pieces a second."""

    def __init__(self, unit: str):
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        """Of the last seconds, where there were any."""
        return Text(f"{task.speed or 0:.1f} {self.unit}/s")


class Progress:
    """`total` pieces of work called `unit`, counted by `advance` within the context."""

    def __init__(self, what: str, total: int, unit: str):
        self.what, self.total, self.unit = what, total, unit
        self.done, self.start = 0, time.monotonic()
        self._said = self.start
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(unit), TimeRemainingColumn())
        self._bar = Bar(*columns) if Console().is_terminal and total else None

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
            self._task = self._bar.add_task(self.what, total=self.total)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, pieces: int = 1) -> None:
        """So many more are done."""
        self.done += pieces
        if self._bar:
            self._bar.advance(self._task, pieces)
        elif time.monotonic() - self._said >= EVERY:
            self._said = time.monotonic()
            rate = self.done / (self._said - self.start)
            left = (self.total - self.done) / rate
            print(f"{self.what}: {self.done} of {self.total} {self.unit}, {rate:.1f}/s, {left / 60:.0f} min left", flush=True)
