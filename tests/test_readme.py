"""The README: its tables and figures are what the benchmarks found, and what is not run there (it takes weights and GPUs) is
composed, so that no command names a key that is not there."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from pathlib import Path
from types import ModuleType

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


def benchmark(monkeypatch: pytest.MonkeyPatch, name: str) -> ModuleType:
    for folder in ("benchmarks/evidence", "benchmarks"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    return importlib.import_module(name)


def written(table: str, page: str = "README.md") -> str:
    return (ROOT / page).read_text().partition(f"<!-- {table} -->\n")[2].partition("<!-- end -->")[0].strip()


def test_the_table_of_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    module = benchmark(monkeypatch, "what_fits")
    known = json.loads(module.RESULT.read_text())
    assert list(known) == list(module.ROWS)
    assert written("what fits") == module.table(known).strip()


def test_the_table_of_the_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    known = json.loads((ROOT / "benchmarks/results/evidence/stages_0.json").read_text())
    assert written("stages") == benchmark(monkeypatch, "stages").table(known).strip()


def test_the_table_of_memory_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    module = benchmark(monkeypatch, "memory_distance")
    known = json.loads(module.RESULT.read_text())
    rows = [f"{stage}, {name}" for stage, (_, choices) in module.STAGES.items() for name in choices]
    assert known["iterations"] == 50 and [name for name in known if name != "iterations"] == rows
    assert written("memory distance") == module.table(known).strip()
    assert all(known[name]["bit for bit"] for name in rows if name.endswith(("h100_80gb", "stream", "graphs kept")))


def test_the_tables_and_plots_of_the_evidence(monkeypatch: pytest.MonkeyPatch) -> None:
    summary = benchmark(monkeypatch, "summary")
    for name in summary.QUESTIONS:
        assert written(name, "docs/evidence.md") == summary.table(name).strip(), name
        assert (summary.RESULTS / f"{name}.svg").read_text() == summary.plot(name), name


def test_what_is_said_of_the_adversary_on_the_plane(monkeypatch: pytest.MonkeyPatch) -> None:
    module = benchmark(monkeypatch, "gan_2d")
    seeds = [json.loads(module.RESULT.read_text())["seeds"][str(seed)] for seed in range(3)]
    falls = [[f"{100 * seed[f'random exits, {what}']['falls_by']:.1f}" for seed in seeds] for what in list(module.WEIGHTS)[1:]]
    large = [f"{seed[module.BEGUN]['as large as matching'][1][1]:.2f}" for seed in seeds]
    assert all(seed[module.BEGUN]["published"][1][:1] == [20] for seed in seeds)
    assert all(abs(seed[module.BEGUN]["published"][1][1]) < 0.001 for seed in seeds)
    text = " ".join((ROOT / "docs/evidence.md").read_text().split())
    for one, two, three in (*falls, large):
        assert f"{one}, {two} and {three}" in text
