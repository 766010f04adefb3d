"""A run goes on under another memory choice: the same to the bit where bytes move, to rounding where blocks compute again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helios_train.conf import compose
from helios_train.errors import InputError
from helios_train.models.checkpoint import read
from helios_train.tasks import sameness

Run = Callable[..., None]
WORDS = ("stage=base", "trainer.max_steps=4", "checkpoint.every=2", "checkpoint.keep=9", "watch.every=0", "watch.sample=false")


def tensors(folder: Path) -> dict[str, Tensor]:
    """All of the last checkpoint, by where they are."""
    found: dict[str, Tensor] = {}

    def collect(what: Any, name: str) -> None:
        if isinstance(what, Tensor):
            found[name] = what
        elif isinstance(what, dict):
            for key, value in what.items():
                collect(value, f"{name}.{key}")
        elif isinstance(what, list | tuple):
            for number, value in enumerate(what):
                collect(value, f"{name}.{number}")

    collect(read(max((folder / "checkpoints").glob("*.ckpt"))), "")
    return found


@pytest.mark.parametrize(("first", "then", "exact"), [("h100_80gb", "single", True), ("plain", "h100_80gb", False)])
def test_it_ends_where_it_would_have_ended(tiny_run: Run, tmp_path: Path, first: str, then: str, exact: bool) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    tiny_run(*WORDS, f"memory={first}", f"run_dir={whole}")
    tiny_run(*WORDS, f"memory={first}", f"run_dir={cut}", "trainer.max_steps=2", "optimizer.total=4")
    tiny_run(*WORDS, f"memory={then}", f"run_dir={cut}", "resume=auto")
    expected, found = tensors(whole), tensors(cut)
    assert expected.keys() == found.keys() and len(found) > 20
    for name, tensor in expected.items():
        if exact:
            assert torch.equal(found[name], tensor), name
        else:
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_what_rounds_may_not_change(tiny_run: Run, tmp_path: Path) -> None:
    run = tmp_path / "run"
    tiny_run(*WORDS, f"run_dir={run}", "trainer.max_steps=2", "optimizer.total=4")
    with pytest.raises(InputError, match="cannot resume with another memory.bases;"):
        tiny_run(*WORDS, "memory=h100_80gb", "memory.bases=int8", f"run_dir={run}", "resume=auto")


def test_nor_may_the_number_of_bases() -> None:
    """`stage.bases=auto` is one under shared_48gb, two under h100_80gb; said aloud it is what is said."""
    for words, refused in (["stage=distill"], True), (["stage=distill", "stage.bases=shared"], False):
        began, now = (compose.plain(compose.compose_plain([*words, f"memory={name}"])) for name in ("h100_80gb", "shared_48gb"))
        assert bool(sameness.changed(began, now)) == refused
    assert sameness.changed(began, compose.plain(compose.compose_plain([*words, "memory=stream"]))) == []
