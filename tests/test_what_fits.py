"""README's generated tables are what the benchmarks found; a row of what fits which GPU is planned again."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch

from helios_train.conf.compose import compose
from helios_train.tasks import plan

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


TINY = ["model=tiny", "data=toy", "codec=dct", "text=hash", "data.root=nowhere", "data.size=[64,64]", "init=somewhere"]
TINY += ["data.global_batch=2", "stage.lora.rank=4", "model.dtype=bf16"]
FEW = ["stage.student.steps=[2,2]", "stage.gan.head_width=32", "stage.gan.start=0", "stage.every=2", "data.micro_batch=1"]
TRAINED = ("h100_80gb", "shared_48gb", "nf4_24gb", "nf4_16gb", "stream", "single, base x 2", "single, mid x 2")


@pytest.mark.parametrize("name", TRAINED)
def test_what_the_table_plans_trains(what_fits: ModuleType, name: str) -> None:
    """The same stage and memory at tiny size, on this machine: three iterations, the student's turn among them."""
    stage, batch, words = what_fits.ROWS[name]
    words = [word for word in words if not word.startswith("codec.weights=")]
    words = [*words, *TINY, *(FEW if stage == "distill" else [f"data.micro_batch={batch}"])]
    config = compose(["task=plan", *words])
    made, given = plan.stage_with_weights(config).alone(), plan.part(config)
    begun = [{key: master.clone() for key, master in one.masters.state_dict().items()} for one in made.trainees]
    for iteration in range(3):
        made.training_step(given, iteration)
        assert all(math.isfinite(value) for key, value in made.last.items() if key.endswith("loss")), name
    assert config.memory.name == name.partition(",")[0]
    for one, before in zip(made.trainees, begun, strict=True):
        assert any(not torch.equal(master, before[key]) for key, master in one.masters.state_dict().items()), one.name


def test_the_readme_has_the_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("benchmarks/evidence", "benchmarks"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    known = json.loads((ROOT / "benchmarks/results/evidence/stages_0.json").read_text())
    assert written("stages") == importlib.import_module("stages").table(known).strip()


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
