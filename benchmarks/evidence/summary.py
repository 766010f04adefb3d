"""The tables of docs/evidence.md, and a plot of each with the intervals: from the figures in results/evidence.

Of each question results/evidence/QUESTION_SEED.json, seed by seed, arm by arm; puts the table into the page and writes
results/evidence/QUESTION.svg: a row an arm, a panel a figure, a dot a seed, a line its 95 % interval over the videos where the
experiment has one. An arm that a seed does not have yet is left out of its row.

Usage: python benchmarks/evidence/summary.py [QUESTION ...]
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent.parent / "results" / "evidence"
PAGE, END = Path(__file__).parents[2] / "docs" / "evidence.md", "<!-- end -->"
SEEDS = (0, 1, 2)
COLOURS = ("#2a78d6", "#eb6834", "#1baf7a")  # of the seeds
INK, FAINT, PAPER = "#22231f", "#d8d7d0", "#fcfcfb"
LABELS, PANEL, GAP, ROW, TOP, BOTTOM = 230, 176, 44, 24, 58, 30  # pixels


@dataclass(frozen=True)
class Value:
    """One arm's figure of one seed; `low` and `high` where it has an interval."""

    mean: float
    low: float = math.nan
    high: float = math.nan


Getter = Callable[[dict[str, Any]], Value | None]


@dataclass(frozen=True)
class Figure:
    """A column of the table and a panel of the plot."""

    title: str
    digits: int
    of: Getter


@dataclass(frozen=True)
class Question:
    """Arms by their names in the files, with what people call them; figures."""

    arms: dict[str, str]
    figures: Sequence[Figure]


def _plain(name: str, interval: str = "") -> Getter:
    def of(arm: dict[str, Any]) -> Value | None:
        value = arm.get(name)
        return Value(value, *(arm.get(interval) or ())) if value is not None and math.isfinite(value) else None

    return of


def _by_video(name: str) -> Getter:
    def of(arm: dict[str, Any]) -> Value | None:
        found = arm[name]
        return Value(found["mean"], *found["interval"]) if found["videos"] else None

    return of


def _less_the_second(arm: dict[str, Any]) -> Value | None:
    way = arm["background_by_section"]
    return Value(way[-1] - way[1])


RIGHT = Figure("names right", 2, _plain("right"))
FOUND = Figure("object found", 2, _plain("found"))
JUMP = Figure("jump at borders, median, px", 1, _plain("border_jump_median"))
ENERGY = Figure("energy distance", 2, _plain("energy", "energy_interval"))
CURES = {"both": "both", "no_anchor": "no anchor", "no_corrupt": "no corruption", "neither": "neither"}
STEPS = {3: "1+1+1", 4: "1+1+2", 6: "2+2+2", 12: "4+4+4"}
QUESTIONS = {
    "drift_with_and_without": Question(
        CURES | {f"{arm}_untold": f"{said}, untold" for arm, said in CURES.items()},
        (
            Figure("background's colour", 3, _by_video("background")),
            Figure("last less second", 3, _less_the_second),
            Figure("object's colour", 3, _by_video("object")),
            Figure("its name lost", 2, _by_video("lost")),
            Figure("radius", 2, _by_video("radius")),
            Figure("jump at borders, px", 1, _by_video("jump")),
            Figure("last four less first four", 1, _by_video("jump_more")),
        ),
    ),
    "tint_inherited": Question(
        CURES,
        (Figure("told", 3, _by_video("told")), Figure("untold", 3, _by_video("untold"))),
    ),
    "mid_against_base": Question(
        {
            "base": "Base, 60 steps, guidance 3",
            "mid": "Mid, 20+20+20, guidance 3",
            "base_guidance_2": "Base, 60 steps, guidance 2",
            "base_33_guidance_2": "Base, 33 steps, guidance 2",
            "mid_guidance_2": "Mid, 20+20+20, guidance 2",
            "base_10_guidance_2": "Base, 10 steps, guidance 2",
            "mid_18_guidance_2": "Mid, 6+6+6, guidance 2",
        },
        (RIGHT, FOUND, JUMP, ENERGY, Figure("GFLOP a section", 0, _plain("gflop_a_section"))),
    ),
    "distilled_against_teacher": Question(
        {
            "teacher": "teacher: Base, 60 steps, guidance 3",
            "teacher_guidance_2": "teacher: Base, 60 steps, guidance 2",
            "mid_6": "Mid, 2+2+2, guidance 2",
            "regression_6": "after `ode`, 2+2+2",
            **{f"alone_{count}": f"matching alone, {steps}" for count, steps in STEPS.items()},
            **{f"student_{count}": f"with the adversary, {steps}" for count, steps in STEPS.items()},
        },
        (RIGHT, FOUND, Figure("radius, px", 1, _plain("radius")), JUMP, ENERGY),
    ),
    "released_against_corrected": Question(
        {"released": "released", "corrected": "corrected"},
        (
            Figure("early, px a frame", 2, _by_video("early")),
            Figure("later, px a frame", 2, _by_video("later")),
            Figure("early / later", 2, _by_video("ratio")),
        ),
    ),
}


def found(name: str) -> dict[str, list[list[Value | None]]]:
    """Of each arm that a seed has, by figure, by seed."""
    question, known = QUESTIONS[name], []
    for seed in SEEDS:
        path = RESULTS / f"{name}_{seed}.json"
        known.append(json.loads(path.read_text()) if path.is_file() else {})
    return {
        arm: [[figure.of(seed[arm]) if arm in seed else None for seed in known] for figure in question.figures]
        for arm in question.arms
        if any(arm in seed for seed in known)
    }


def table(name: str) -> str:
    """As the page has it: a cell has the seeds' figures one after another."""
    question = QUESTIONS[name]
    lines = ["| arm | " + " | ".join(figure.title for figure in question.figures) + " |"]
    lines.append("|" + "---|" * (len(question.figures) + 1))
    for arm, columns in found(name).items():
        cells = [
            " / ".join("–" if value is None else f"{value.mean:.{figure.digits}f}" for value in column)
            for figure, column in zip(question.figures, columns, strict=True)
        ]
        lines.append(f"| {question.arms[arm]} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _text(x: float, y: float, said: str, anchor: str = "start", size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(said)}</text>'


def _dot(x: float, y: float, seed: int) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2" fill="{COLOURS[seed]}"/>'


def _line(x: tuple[float, float], y: tuple[float, float], colour: str) -> str:
    return f'<line x1="{x[0]:.1f}" x2="{x[1]:.1f}" y1="{y[0]:.1f}" y2="{y[1]:.1f}" stroke="{colour}" stroke-width="1.5"/>'


def _panel(figure: Figure, rows: list[list[Value | None]], left: float) -> list[str]:
    """Dots and intervals between the smallest and the largest; 0 is among them."""
    ends = [end for row in rows for value in row if value for end in (value.mean, value.low, value.high) if math.isfinite(end)]
    low, high = min([0.0, *ends]), max([0.0, *ends])

    def place(value: float) -> float:
        return left + (value - low) * PANEL / ((high - low) or 1.0)

    bottom = TOP + ROW * len(rows)
    drawn = [_text(left, TOP - 12, figure.title)]
    for tick in sorted({low, 0.0, high}):
        drawn.append(_line((place(tick), place(tick)), (TOP, bottom), FAINT))
        if tick in (low, high) or min(-low, high) > 0.2 * (high - low):  # 0 has room
            drawn.append(_text(place(tick), bottom + 16, f"{tick:.{figure.digits}f}", "middle", 11))
    for number, row in enumerate(rows):
        for seed, value in enumerate(row):
            if value is None:
                continue
            y = TOP + ROW * number + ROW / 2 + 6 * (seed - 1)
            if math.isfinite(value.low):
                drawn.append(_line((place(value.low), place(value.high)), (y, y), COLOURS[seed]))
            drawn.append(_dot(place(value.mean), y, seed))
    return drawn


def plot(name: str) -> str:
    """An SVG."""
    question, rows = QUESTIONS[name], found(name)
    width, height = LABELS + len(question.figures) * (PANEL + GAP) + GAP, TOP + ROW * len(rows) + BOTTOM
    drawn = [f'<rect width="{width}" height="{height}" fill="{PAPER}"/>']
    for seed in SEEDS:
        drawn += [_dot(14 + 70 * seed, 18, seed), _text(22 + 70 * seed, 22, f"seed {seed}")]
    for number, arm in enumerate(rows):
        drawn.append(_text(10, TOP + ROW * number + ROW / 2 + 4, question.arms[arm].replace("`", "")))
    for number, figure in enumerate(question.figures):
        drawn += _panel(figure, [columns[number] for columns in rows.values()], LABELS + number * (PANEL + GAP))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    return "\n".join([f'{head} font-family="sans-serif" fill="{INK}">', *drawn, "</svg>\n"])


def main() -> None:
    """The questions named, or all."""
    for name in sys.argv[1:] or QUESTIONS:
        (RESULTS / f"{name}.svg").write_text(plot(name))
        before, mark, rest = PAGE.read_text().partition(f"<!-- {name} -->\n")
        if not mark or END not in rest:
            raise SystemExit(f"{PAGE}: no lines <!-- {name} --> and {END} to put the table between")
        PAGE.write_text(before + mark + table(name) + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
