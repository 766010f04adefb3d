"""What the folder of a run or an evaluation holds, read for a page about it: whatever is missing or damaged is noted."""

from __future__ import annotations

import csv
import json
import math
import re
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from helios_train.errors import InputError
from helios_train.evaluation.ratings import RULES
from helios_train.evaluation.results import MERGED, RECORDS, THROUGHPUT
from helios_train.evaluation.thinning import Series, Thinned
from helios_train.run import RunFolder

BLOCK = 4096  # rows of metrics.csv read at a time
ALARMS = 10_000  # alarms a page is made of
LARGEST = 1e30  # size from which a value counts as infinite
TEXT = 200_000  # characters of a text file that a page shows
STEM = re.compile(r"(\d{1,12})_(.*)")  # of a sampled video: iteration, what it shows
ROLES = ("student", "ema", "teacher", "critic")


@dataclass
class Alarm:
    """An alarm of alarms.jsonl, by its begin; what that does not say is None. `column`: of metrics.csv, that it is about; `over`:
    the iteration at which it was over, None for one that still is on."""

    iteration: int
    name: str
    value: float | None
    limit: float | None
    message: str
    column: str = ""
    over: int | None = None


@dataclass(frozen=True)
class Video:
    """A sampled video: the files that are there, and the facts beside them. `name`: whose video it is, "" where a run has one."""

    stem: str
    iteration: int
    name: str
    mp4: Path | None
    sheet: Path | None
    facts: Mapping[str, Any]

    @property
    def caption(self) -> str:
        """What was asked for."""
        return str(self.facts.get("caption") or STEM.sub(r"\2", self.stem).replace("_", " "))

    @property
    def drift(self) -> dict[str, list[float]]:
        """Values a section by measure; NaN for what is no number."""
        drift = self.facts.get("drift")
        sections = drift.get("sections") if isinstance(drift, dict) else None
        found = sections.items() if isinstance(sections, dict) else ()
        return {str(name): [number(value) for value in values] for name, values in found if isinstance(values, list) and values}


@dataclass
class Record:
    """One folder. `notes`: what is missing or damaged, a sentence each. `infinite`: values of a column that are infinite.

    `is_run`: whether it holds a run; `merged`, `measured` (by metric) and `throughput`: what files of an evaluation hold.
    """

    path: Path
    card: str = ""
    config_text: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    columns: dict[str, Series] = field(default_factory=dict)
    infinite: dict[str, int] = field(default_factory=dict)
    reached: int = 0
    alarms: list[Alarm] = field(default_factory=list)
    watched: bool = False
    videos: list[Video] = field(default_factory=list)
    plan: dict[str, Any] = field(default_factory=dict)
    environments: list[dict[str, Any]] = field(default_factory=list)
    is_run: bool = True
    merged: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, dict[str, Any]] = field(default_factory=dict)
    throughput: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The folder's."""
        return self.path.resolve().name

    def key(self, dotted: str, default: Any = None) -> Any:
        """A value of the config by its dotted name."""
        node: Any = self.config
        for part in dotted.split("."):
            node = node.get(part) if isinstance(node, Mapping) else None
        return default if node is None else node

    @property
    def warnings(self) -> list[str]:
        """The run card's."""
        return [
            line.strip()[1:].strip() for line in self.card.partition("\nWARNINGS:")[2].splitlines() if line.startswith("  ! ")
        ]


def record(path: Path) -> Record:
    """Reads the folder of a run, an evaluation or both; InputError where there is no such folder."""
    folder = RunFolder(path)
    if not folder.path.is_dir():
        raise InputError(f"{path}: no such run folder")
    run = Record(folder.path)
    evaluated = _evaluation(run)
    run.is_run = not evaluated or any(file.exists() for file in (folder.config, folder.card, folder.metrics, folder.checkpoints))
    if not run.is_run:
        return run
    run.card = _text(run, folder.card) or ""
    run.config_text = _text(run, folder.config) or ""
    run.config = _config(run, folder.config.name)
    _metrics(run, folder.metrics)
    _alarms(run, folder.alarms)
    run.videos = _videos(run, folder.videos)
    plan = next((file for file in (folder.plan, folder.path / "memory.json") if file.is_file()), None)
    run.plan = _json(run, plan, dict) or {} if plan else {}
    starts = _json(run, folder.environment, list) if folder.environment.is_file() else None
    run.environments = [start for start in starts or [] if isinstance(start, dict)]
    if not folder.environment.is_file():
        run.notes.append(f"{folder.environment.name} is not there: the run was made before it was written")
    run.reached = int(max([run.reached, *(series.x[-1] for series in run.columns.values())]))
    return run


def number(value: Any) -> float:
    """A float that can be drawn, or NaN: for what people or programs wrote."""
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
    return found if abs(found) <= LARGEST else math.nan


def _text(run: Record, path: Path) -> str | None:
    """The beginning of a file, or None with a note."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            text = file.read(TEXT + 1)
    except FileNotFoundError:
        run.notes.append(f"{path.name} is not there")
        return None
    except OSError as error:
        run.notes.append(f"{path.name} cannot be read ({error.strerror or error})")
        return None
    return text if len(text) <= TEXT else text[:TEXT] + "\n... cut here\n"


def _config(run: Record, name: str) -> dict[str, Any]:
    try:
        config = yaml.safe_load(run.config_text)
    except (yaml.YAMLError, RecursionError):
        config = None
    if isinstance(config, dict):
        return config
    if run.config_text:
        run.notes.append(f"{name} is damaged")
    return {}


def _json(run: Record, path: Path, kind: type) -> Any:
    """What a JSON file of that kind holds, or None with a note."""
    try:
        found = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except OSError as error:
        run.notes.append(f"{path.name} cannot be read ({error.strerror or error})")
        return None
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, kind):
        return found
    run.notes.append(f"{path.name} is damaged")
    return None


def _evaluation(run: Record) -> bool:
    """What task=evaluate left in a folder; whether it was there."""
    merged, speed = run.path / MERGED, run.path / THROUGHPUT
    if not merged.is_file():
        begun = (run.path / RECORDS).is_dir()
        if begun:
            run.notes.append(f"{MERGED} is not there: the evaluation is not finished")
        return begun
    run.merged = _json(run, merged, dict) or {}
    for name in RULES:
        file = run.path / f"{name}_results.json"
        run.measured |= {name: _json(run, file, dict) or {}} if file.is_file() else {}
    run.throughput = _json(run, speed, dict) or {} if speed.is_file() else {}
    return True


def _metrics(run: Record, path: Path) -> None:
    """Columns of metrics.csv, thinned while they are read."""
    try:
        with path.open(encoding="utf-8", errors="replace", newline="") as file:
            cut = _Lines(file)
            rows = csv.reader(cut)
            names = next(rows, [])
            if "iteration" not in names:
                run.notes.append(f"{path.name} has no column of iterations")
                return
            damaged = _columns(run, rows, names)
    except FileNotFoundError:
        run.notes.append(f"{path.name} is not there: no figures yet")
        return
    except (OSError, csv.Error) as error:
        run.notes.append(f"{path.name} cannot be read ({error})")
        return
    if damaged or cut.cut:
        run.notes.append(f"{path.name}: {damaged + cut.cut} damaged or cut rows are left out")
    if not run.columns:
        run.notes.append(f"{path.name} has no figures yet")
    if run.infinite:
        worst = ", ".join(f"{name} {count}" for name, count in run.infinite.items())
        run.notes.append(f"{path.name}: infinite values are left out of the charts: {worst}")


class _Lines:
    """Lines that end: a kill can cut the last."""

    def __init__(self, file: Iterator[str]):
        self.file, self.cut = file, 0

    def __iter__(self) -> Iterator[str]:
        for line in self.file:
            if line.endswith("\n"):
                yield line
            else:
                self.cut = 1


def _columns(run: Record, rows: Iterator[list[str]], names: list[str]) -> int:
    """Fills the columns of a run; how many rows are not whole."""
    at, damaged = names.index("iteration"), 0
    thinned = {name: (column, Thinned()) for column, name in enumerate(names) if column != at and len(name) < 200}
    while block := list(islice(rows, BLOCK)):
        whole = [row for row in block if len(row) == len(names) and row[at].isdecimal() and len(row[at]) <= 12]
        damaged += len(block) - len(whole)
        x = np.array([float(row[at]) for row in whole])
        for name, (column, series) in thinned.items():
            y = np.array([_value(row[column]) for row in whole])
            seen = np.abs(y) <= LARGEST
            series.add(x[seen], np.where(np.abs(y[seen]) < 1 / LARGEST, 0.0, y[seen]))
            if infinite := int((np.abs(y) > LARGEST).sum()):
                run.infinite[name] = run.infinite.get(name, 0) + infinite
        run.reached = max(run.reached, int(x.max(initial=0)))
    run.columns = {name: found for name, (_, series) in thinned.items() if (found := series.series()) is not None}
    return damaged


def _value(text: str) -> float:
    try:
        return float(text) if text else math.nan
    except ValueError:
        return math.nan


def _alarms(run: Record, path: Path) -> None:
    """The newest alarms of alarms.jsonl, if the run's health was watched."""
    run.watched = path.is_file() or any(column.startswith("health/") for column in run.columns)
    if not path.is_file():
        return
    damaged, alarms = 0, deque[Alarm](maxlen=ALARMS)
    on: dict[str, Alarm] = {}  # by name
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in filter(str.strip, file):
                try:
                    row = json.loads(line)
                    alarm = _alarm(row)
                    if row["state"] == "on":
                        alarms.append(alarm)
                        on[alarm.name] = alarm
                    elif row["state"] == "off" and alarm.name in on:
                        on.pop(alarm.name).over = alarm.iteration
                except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
                    damaged += 1
    except OSError as error:
        run.notes.append(f"{path.name} cannot be read ({error.strerror or error})")
    run.alarms = list(alarms)
    if damaged:
        run.notes.append(f"{path.name}: {damaged} damaged or cut lines are left out")


def _alarm(row: Any) -> Alarm:
    value, limit = (None if math.isnan(one := number(row.get(key))) else one for key in ("value", "limit"))
    video, look_at = (str(row.get(key) or "") for key in ("video", "look_at"))
    message = str(row.get("seen") or "") + (f" Look at: {look_at}" if look_at else "")
    group, _, figure = str(row.get("figure") or "").partition("/")
    column = "/".join(filter(None, (group, video.removeprefix("video").strip("/"), figure)))  # as callbacks/health.py has it
    return Alarm(int(row["iteration"]), ", ".join(filter(None, (str(row["alarm"]), video))), value, limit, message, column)


def _videos(run: Record, folder: Path) -> list[Video]:
    """What was sampled, by iteration and name."""
    try:
        files = sorted(path for path in folder.iterdir() if path.suffix in (".mp4", ".png", ".json"))
    except OSError:
        files = []
    found = []
    for stem in sorted({path.stem for path in files}):
        match = STEM.fullmatch(stem)
        if not match:
            continue
        mp4, sheet, facts = (
            path if path in files else None for path in (folder / f"{stem}{kind}" for kind in (".mp4", ".png", ".json"))
        )
        known = _json(run, facts, dict) or {} if facts else {}
        for missing in (kind for kind, path in (("mp4", mp4), ("json", facts)) if path is None):
            run.notes.append(f"videos/{stem}.{missing} is not there")
        found.append(Video(stem, int(match[1]), _whose(match[2], str(known.get("caption") or "")), mp4, sheet, known))
    return sorted(found, key=lambda video: (video.iteration, _role_order(video.name), video.stem))


def _whose(rest: str, caption: str) -> str:
    """The name in `<name>_<caption>`, of which the name may be missing and a caption may begin with any word."""
    name, _, shown = rest.partition("_")
    caption_slug = re.sub(r"[^a-z0-9]+", "_", caption.lower()).strip("_")
    return name if name in ROLES and shown and not caption_slug.startswith(rest) else ""


def _role_order(name: str) -> tuple[int, str]:
    return (ROLES.index(name) if name in ROLES else len(ROLES), name)
