"""report.html: a run on one page, and several runs or evaluations on one; made of the files of their folders alone, needs nothing
but a browser.

A page holds everything it shows, stays under 15 MB, and says what was missing, damaged or left out.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from helios_train import run as run_folders
from helios_train.errors import InputError
from helios_train.evaluation import curves, figures, scores
from helios_train.evaluation.charts import CATEGORIES, Chart, Drawn, draw
from helios_train.evaluation.page_videos import Album, Shown, album
from helios_train.evaluation.recorded import Record, Video, record
from helios_train.evaluation.results import labels as labels_of

LIMIT = 15_000_000  # bytes of a page
MARGIN = 50_000  # of them kept free: a page with videos has a few more words than the one measured without
LINES = 260  # of all charts on a page: each takes up to 20 kB
NOTES = 40  # sentences on what is missing
MOMENTS = 6  # videos of one name whose drift is drawn
LEFT_OUT = "{} charts are left out: more lines than a page can hold; metrics.csv has them all"


@dataclass
class Section:
    """A headline, its charts, and those that are folded."""

    title: str
    charts: list[Drawn] = field(default_factory=list)
    details: list[Drawn] = field(default_factory=list)

    @property
    def anchor(self) -> str:
        """Its place on the page."""
        return self.title.lower().replace(" ", "-")


def write(run_folder: Path) -> Path:
    """Makes report.html in a run folder, whole or not at all, and returns its path.

    What is missing or damaged is said on the page. InputError where there is no such folder or nothing can be written there.
    """
    run = record(run_folder)
    sections, notes = _sections(curves.charts(run))
    drift = figures.drift_charts(_aged(run.videos))
    if drift:
        _place(sections, "Drift").charts += _drawn(drift)
    _place_memory(sections, run)
    raised, more = figures.alarms(run)

    def _page(found: Album) -> str:
        return _render(
            "run.html.j2",
            title=f"{run.name} · run report",
            run=run,
            sections=sections,
            tiles=figures.tiles(run),
            alarms=raised,
            more_alarms=more,
            moments=_moments(found.shown),
            notes=[*run.notes, *notes, *found.notes][:NOTES],
            fits=run.plan.get("fits") if isinstance(run.plan.get("fits"), dict) else {},
            parts_of_plan=[
                (title, made)
                for title, made in (
                    ("device, at the peak", figures.bars(run.plan.get("by_group"))),
                    ("host, at its peak", figures.bars(run.plan.get("host_by_group"))),
                    ("highest of each moment", figures.highest(run.plan)),
                )
                if made
            ],
            has_plan=bool(run.plan),
        )

    path = run_folders.RunFolder(run.path).report
    run_folders.write(path, _with_videos(_page, run.videos))
    return path


def compare(folders: Sequence[Path], output: Path) -> Path:
    """Makes one page at `output` with 2 to 7 runs or evaluations side by side, whole or not at all, and returns its path.

    InputError for another number of folders, where one is no folder, or nothing can be written.
    """
    if not 2 <= len(folders) <= CATEGORIES:
        raise InputError(f"a page compares 2 to {CATEGORIES} runs or evaluations, not {len(folders)}; name as many folders")
    runs = [record(Path(folder)) for folder in folders]
    labels = labels_of([run.path for run in runs])
    trained = [place for place, run in enumerate(runs) if run.is_run]
    evaluated = {place: found for place, run in enumerate(runs) if (found := scores.scores(run)) is not None}
    sections, notes = _sections(curves.compared(runs, labels))
    newest = [{video.name: video for video in run.videos} for run in runs]  # by iteration: the last of a name stays
    names = list(dict.fromkeys(name for found in newest for name in found))
    coloured = [(label, f"c{place}", found) for place, (label, found) in enumerate(zip(labels, newest, strict=True))]
    drift = figures.drift_charts([(label, colour, own[name]) for name in names for label, colour, own in coloured if name in own])
    if drift:
        _place(sections, "Drift").charts += _drawn(drift)
    videos = [video for found in newest for video in found.values()]

    def _page(found: Album) -> str:
        shown = {id(one.video): one for one in found.shown}
        return _render(
            "compare.html.j2",
            title=f"{' · '.join(labels)} · compared",
            runs=list(zip(runs, labels, [_tiles(run, evaluated.get(place)) for place, run in enumerate(runs)], strict=True)),
            labels=labels,
            trained=trained,
            evaluated=list(evaluated),
            scores=scores.table(list(evaluated.values())) if evaluated else [],
            apart=scores.differing(list(evaluated.values())),
            differences=figures.differences([runs[place] for place in trained]),
            finals=figures.finals([runs[place] for place in trained]),
            sections=sections,
            rows=[(name, [shown.get(id(one[name])) if name in one else None for one in newest]) for name in names],
            notes=[
                *(f"{label}: {note}" for run, label in zip(runs, labels, strict=True) for note in run.notes),
                *notes,
                *found.notes,
            ][:NOTES],
        )

    output = Path(output)
    with run_folders.writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
    run_folders.write(output, _with_videos(_page, videos))
    return output


def _with_videos(page: Callable[[Album], str], videos: Sequence[Video]) -> str:
    """The page with as many videos as the bound leaves room for."""
    room = LIMIT - MARGIN - len(page(Album()).encode()) - 4000 * len(videos[:100])
    return page(album(videos, max(0, room)))


def _sections(charts: dict[str, list[tuple[Chart, bool]]]) -> tuple[list[Section], list[str]]:
    """Charts with their places, the main ones first in line for the room; and what was left out."""
    left, dropped, sections = LINES, 0, [Section(title) for title in charts]
    for folded in (False, True):
        for section, made in zip(sections, charts.values(), strict=True):
            for chart, detail in made:
                if detail is not folded:
                    continue
                left -= len(chart.lines)
                if left < 0:
                    dropped += 1
                else:
                    (section.details if detail else section.charts).append(draw(chart))
    return sections, [LEFT_OUT.format(dropped)] if dropped else []


def _drawn(charts: Sequence[Chart]) -> list[Drawn]:
    return [draw(chart) for chart in charts[:24]]


def _place(sections: list[Section], title: str) -> Section:
    """The section of that title, in its place among the others."""
    for section in sections:
        if section.title == title:
            return section
    order = list(curves.SECTIONS.values())
    new = Section(title)
    sections.append(new)
    sections.sort(key=lambda section: order.index(section.title))
    return new


def _place_memory(sections: list[Section], run: Record) -> None:
    """The section on memory is always there: it says how to get a plan."""
    section = _place(sections, "Memory")
    planned = figures.timeline(run.plan)
    if planned:
        section.charts.insert(0, draw(planned))


def _aged(videos: Sequence[Video]) -> list[tuple[str, str, Video]]:
    """A few videos of each name, evenly spaced, the first and the newest among them, labelled by iteration."""
    found = []
    for name in dict.fromkeys(video.name for video in videos):
        own = [video for video in videos if video.name == name and video.drift]
        places = {round(place * (len(own) - 1) / max(1, MOMENTS - 1)) for place in range(MOMENTS)} if own else set()
        found += [(f"iteration {own[place].iteration:,}", "", own[place]) for place in sorted(places)]
    return found


def _moments(shown: Sequence[Shown]) -> list[tuple[int, list[Shown]]]:
    """Videos by iteration, the newest first."""
    moments: dict[int, list[Shown]] = {}
    for one in shown:
        moments.setdefault(one.video.iteration, []).append(one)
    return sorted(moments.items(), reverse=True)


def _tiles(run: Record, evaluation: scores.Scores | None) -> list[figures.Tile]:
    """Of a run, an evaluation, or a folder that holds both."""
    return [*(figures.tiles(run) if run.is_run else ()), *(scores.tiles(evaluation) if evaluation else ())]


def _render(template: str, **what: Any) -> str:
    """A page; every text in it is escaped."""
    environment = _environment()
    script = _asset("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(template).render(
        style=Markup(_asset("page.css")),
        script=Markup(script),
        digest=digest,
        written=datetime.now().strftime("%Y-%m-%d %H:%M"),
        settings=figures.settings,
        facts=figures.facts,
        **what,
    )


@cache
def _environment() -> Environment:
    loader = PackageLoader("helios_train.evaluation", "templates")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


@cache
def _asset(name: str) -> str:
    return (Path(__file__).parent / "templates" / name).read_text(encoding="utf-8")
