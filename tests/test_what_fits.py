"""README's tables of memory are what the benchmarks found; a row of what fits which GPU is planned again."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "what_fits.json"


def written(table: str) -> str:
    return (ROOT / "README.md").read_text().partition(f"<!-- {table} -->\n")[2].partition("<!-- end -->")[0].strip()


@pytest.fixture
def what_fits(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("what_fits")


def test_the_readme_has_the_table(what_fits: ModuleType) -> None:
    known = json.loads(RESULT.read_text())
    assert list(known) == list(what_fits.ROWS)
    assert written("what fits") == what_fits.table(known).strip()


def test_the_readme_has_the_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("memory_distance")
    known = json.loads(module.RESULT.read_text())
    rows = [f"{stage}, {name}" for stage, (_, choices) in module.STAGES.items() for name in choices]
    assert known["iterations"] == 50 and [name for name in known if name != "iterations"] == rows
    assert written("memory distance") == module.table(known).strip()
    assert all(known[name]["bit for bit"] for name in rows if name.endswith(("h100_80gb", "stream", "graphs kept")))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["single, base x 2", "nf4_16gb"])
def test_the_table_is_what_the_planner_finds(what_fits: ModuleType, name: str) -> None:
    known, found = json.loads(RESULT.read_text())[name], what_fits.planned(what_fits.ROWS[name][2])
    assert found["peak_gib"] == pytest.approx(known["peak_gib"], rel=0.005) and found["moment"] == known["moment"]
    assert found["fits"] == known["fits"] and found["host_gib"] == pytest.approx(known["host_gib"], rel=0.005)
