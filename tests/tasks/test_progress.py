"""How far a task is, where nobody sees a bar: a line now and then."""

from __future__ import annotations

import re

import pytest

from helios_train.tasks import progress


def test_a_line_now_and_then(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with progress.Progress("encoding", 10, "sections") as bar:
        bar.advance(3)
        assert capsys.readouterr().out == ""  # the first seconds say nothing
        monkeypatch.setattr(progress, "EVERY", 0.0)
        bar.advance()
    assert re.fullmatch(r"encoding: 4 of 10 sections, [\d.]+/s, \d+ min left\n", capsys.readouterr().out)


def test_a_bar_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress.Progress("encoding", 2, "sections") as bar:
        bar.advance(2)
    said = capsys.readouterr().out
    assert "2/2" in said and "sections/s" in said
