"""The README: what is not run there (it takes weights and GPUs) is composed, so that no command names a key that is not there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from helios_train.conf.compose import check_arguments, compose

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def shown_commands() -> list[str]:
    """The helios_train commands of all console blocks, continued lines joined."""
    blocks = [block for page in PAGES for block in re.findall(r"```console\n(.*?)```", page.read_text(), flags=re.DOTALL)]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.removeprefix("$ ") for line in lines if line.startswith("$ python -m helios_train")]


@pytest.mark.parametrize("command", shown_commands())
def test_shown_commands_compose(command: str) -> None:
    arguments = shlex.split(command)[3:]
    check_arguments(arguments)
    assert compose(arguments).task.name in ("train", "prepare", "merge", "sample", "evaluate")


def test_there_are_such_commands_and_links_lead_somewhere() -> None:
    assert len(shown_commands()) >= 5
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
