"""The table of what fits which GPU: what it plans trains at tiny size, and its rows are planned again."""

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


@pytest.fixture
def what_fits(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("what_fits")


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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["single, base x 2", "nf4_16gb"])
def test_the_table_is_what_the_planner_finds(what_fits: ModuleType, name: str) -> None:
    known, found = json.loads(RESULT.read_text())[name], what_fits.planned(what_fits.ROWS[name][2])
    assert found["peak_gib"] == pytest.approx(known["peak_gib"], rel=0.005) and found["moment"] == known["moment"]
    assert found["fits"] == known["fits"] and found["host_gib"] == pytest.approx(known["host_gib"], rel=0.005)
