"""A run goes on under another memory choice: the same to the bit where bytes move, to rounding where blocks compute again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helios_train.conf import compose
from helios_train.errors import InputError
from helios_train.run import RunFolder
from helios_train.tasks import sameness, train

from .runs import last_tensors

Run = Callable[..., None]
WORDS = ("stage=base", "trainer.max_steps=4", "checkpoint.every=2", "checkpoint.keep=9", "watch.every=0", "watch.sample=false")


@pytest.mark.parametrize(("first", "then", "exact"), [("h100_80gb", "single", True), ("plain", "h100_80gb", False)])
def test_it_ends_where_it_would_have_ended(tiny_run: Run, tmp_path: Path, first: str, then: str, exact: bool) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    tiny_run(*WORDS, f"memory={first}", f"run_dir={whole}")
    tiny_run(*WORDS, f"memory={first}", f"run_dir={cut}", "trainer.max_steps=2", "optimizer.total=4")
    tiny_run(*WORDS, f"memory={then}", f"run_dir={cut}", "resume=auto")
    expected, found = last_tensors(whole), last_tensors(cut)
    assert len(found) > 20
    near = {"rtol": 0.0, "atol": 0.0} if exact else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(found, expected, **near)


def test_what_rounds_may_not_change(tiny_run: Run, tmp_path: Path) -> None:
    run = tmp_path / "run"
    tiny_run(*WORDS, f"run_dir={run}", "trainer.max_steps=2", "optimizer.total=4")
    with pytest.raises(InputError, match="cannot resume with another memory.bases;"):
        tiny_run(*WORDS, "memory=h100_80gb", "memory.bases=int8", f"run_dir={run}", "resume=auto")


def composed(*words: str) -> dict[str, Any]:
    return compose.plain(compose.compose_plain(list(words)))


def test_nor_may_the_number_of_bases() -> None:
    """`stage.bases=auto` is one under shared_48gb, two under h100_80gb; said aloud it is what is said."""
    for bases, now, refused in (("auto", "shared_48gb", True), ("shared", "shared_48gb", False), ("distinct", "stream", False)):
        words = "stage=distill", f"stage.bases={bases}"
        assert bool(sameness.changed(composed(*words, "memory=h100_80gb"), composed(*words, f"memory={now}"))) == refused


@pytest.mark.parametrize(
    "words", [["stage=base", "memory=single"], ["stage=distill", "memory=h100_80gb"], ["stage=mid", "memory=plain"]]
)
def test_what_running_out_of_memory_names_is_taken(words: list[str]) -> None:
    raw = composed(*words)
    named = train._may_take(compose.typed(raw), raw)
    assert named and all(not sameness.changed(raw, composed(*words, f"memory={name}")) for name in named)


def test_the_choice_is_kept_for_the_next_time(tiny_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    tiny_run(*WORDS, "memory=plain", f"run_dir={run}", "trainer.max_steps=1", "optimizer.total=4")
    tiny_run(*WORDS, "memory=single", f"run_dir={run}", "trainer.max_steps=2", "resume=auto")
    assert "from here on memory has name single (was plain), checkpointing True (was False), block_" in capsys.readouterr().out
    tiny_run(*WORDS, "memory=auto", f"run_dir={run}", "trainer.max_steps=3", "resume=auto")
    assert "from here on" not in capsys.readouterr().out
    assert RunFolder.open(run).load_config()["memory"]["name"] == "single"
