"""Runs that the tests of a file share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from .runs import Runs, of


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("resume"))


@pytest.fixture(scope="module")
def unkilled(runs: Runs) -> Callable[[str, int], Path]:
    """Runs that nobody disturbed, each made once."""

    @functools.cache
    def made(stage: str, ranks: int) -> Path:
        if stage != "base":
            made("base", 1)
        return runs.run(f"whole_{stage}{ranks}", ranks, 0, *of(stage, runs))

    return made
