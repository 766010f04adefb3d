"""The one command that measures 14 B on a GPU, at a size that takes seconds of a CPU: it runs what is planned."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from helios_train.memory.plan import Plan


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    return importlib.import_module("fits_80gb")


def test_it_runs_what_is_planned(fits: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both turns, weights finite; storages that are counted while real ones are made are those of the plan."""
    output = tmp_path / "found.json"
    monkeypatch.setattr(sys, "argv", ["fits_80gb.py", "--model", "tiny", f"--output={output}"])
    with pytest.raises(SystemExit) as left:
        fits.main()
    record = json.loads(output.read_text())
    found = record["measured"]
    assert left.value.code == 0 and record["agrees"] and abs(record["off"]) < 0.05, record["off"]
    assert found["finite"] and found["skipped"] == 0
    assert 0 < found["seconds"]["student"] + found["seconds"]["critic"] <= found["seconds"]["iteration"]
    assert found["peak_gib"] == pytest.approx(record["planned"]["peak_gib"], rel=0.05)
    with pytest.raises(SystemExit):
        monkeypatch.setattr(sys, "argv", ["fits_80gb.py", "--iterations=1"])
        fits.main()


def test_another_peak_is_no_agreement(fits: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"peak_gib": 99.0, "host_gib": 1.0, "seconds": {}, "finite": True, "skipped": 0}
    monkeypatch.setattr(fits, "measured", lambda *_: given)
    monkeypatch.setattr(fits.plan, "plan_of", lambda _: Plan(90.0, "teacher", {}, 54.0, {}, [], {}, 1.0))
    monkeypatch.setattr(sys, "argv", ["fits_80gb.py", "--model", "tiny", f"--output={tmp_path}/found.json"])
    with pytest.raises(SystemExit) as left:
        fits.main()
    assert left.value.code == 1 and not json.loads((tmp_path / "found.json").read_text())["agrees"]
