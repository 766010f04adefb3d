"""README's table of what fits which GPU is what the planner found; one row is planned again."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "what_fits.json"


@pytest.fixture
def what_fits(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("what_fits")


def test_the_readme_has_the_table(what_fits: ModuleType) -> None:
    known = json.loads(RESULT.read_text())
    assert list(known) == list(what_fits.ROWS)
    written = (ROOT / "README.md").read_text().partition("<!-- what fits -->\n")[2].partition("<!-- end -->")[0]
    assert written.strip() == what_fits.table(known).strip()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["single, base x 2", "nf4_16gb"])
def test_the_table_is_what_the_planner_finds(what_fits: ModuleType, name: str) -> None:
    known, found = json.loads(RESULT.read_text())[name], what_fits.planned(what_fits.ROWS[name][2])
    assert found["peak_gib"] == pytest.approx(known["peak_gib"], rel=0.005) and found["moment"] == known["moment"]
    assert found["fits"] == known["fits"] and found["host_gib"] == pytest.approx(known["host_gib"], rel=0.005)
