"""Two ranks with an uneven last batch, one of which repeats a video, compute what one process does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import helios_train

from .ranks import SCORES, Given, score

RANK = Path(__file__).parent / "ranks.py"


def test_two_ranks_compute_what_one_does(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(helios_train.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    ranks = [subprocess.Popen([sys.executable, str(RANK), str(rank), str(tmp_path)], env=environment) for rank in (0, 1)]
    assert [rank.wait(300) for rank in ranks] == [0, 0]
    one = Given()
    one.add([(number, score(number)) for number in SCORES])
    for rank in (0, 1):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["shared"] == found["alone"] == [float(one.compute()), float(one.signed())]
        assert found["shared"][0] == pytest.approx(sum(SCORES.values()) / len(SCORES), abs=1e-15)
        assert found["throughput"] == pytest.approx([20 / 3, 10 / 2])
        assert found["local_after"] == [3]
