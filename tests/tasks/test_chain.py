"""task=chain: links hand over, what is finished is not done again, what is foreign is refused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helios_train.conf import compose
from helios_train.errors import ConfigError, InputError
from helios_train.models.manifest import read_manifest
from helios_train.run import RunFolder
from helios_train.tasks import chain

TINY = (
    "model.head_dim=16",
    "model.rope_dim=[8,4,4]",
    "model.layers=1",
    "data.size=[64,64]",
    "data.toy.clips=8",
    "data.held_out=2",
    "data.global_batch=2",
    "data.micro_batch=2",
    "trainer.accelerator=cpu",
    "trainer.progress=false",
    "watch.every=0",
    "watch.sample=false",
    "checkpoint.every=2",
    "chain.sample='sample.count=1 sample.sections=1 sample.steps=1 sample.guidance=1'",
)
LINKS = 'chain.links=["stage=base trainer.max_steps=3","stage=mid trainer.max_steps=4"]'

BAD = {  # what is said of it before anything trains
    'chain.links=["stage=base init=x"]': "chain.links: 'stage=base init=x .* sets init; take that out",
    'chain.links=["stage=base run_dir=x resume=auto"]': "sets run_dir, resume; take that out",
    'chain.links=["task=merge"]': "sets task; take that out",
    'chain.links=["experiment=toy_chain"]': "sets task; take that out",
    'chain.links=["trainer.devices=2 data.micro_batch=1"]': "sets trainer.devices; take that out",
    'chain.links=["stage=mid"]': "stage=mid cannot come first; put stage=base before it",
    "chain.links=['experiment.about=\\'a']": r"chain.links: .* cannot be read \(No closing quotation\)",
    "chain.sample='sample.prompt=\\'a'": r"chain.sample: .* cannot be read \(No closing quotation\)",
    "chain.sample='sample.cout=1'": "sample.cout: no such key; nearest: sample.count",
    "chain.sample='sample.output=x'": "chain.sample: .* sets sample.output; take that out",
    "chain.sample='sample.steps=[1,1]'": r"chain.sample: sample.steps=\[1, 1\]: the model has 3 levels",
}


def words(folder: Path, shards: Path, *more: str) -> list[str]:
    return ["task=chain", LINKS, *TINY, f"data.root={shards}", f"run_dir={folder}", *more]


def run(given: list[str]) -> None:
    raw = compose.plain(compose.compose_plain(given))
    chain.run(compose.typed(raw), raw, given)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chain") / "shards"


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chain that nobody disturbed."""
    folder = tmp_path_factory.mktemp("chains") / "whole"
    run(words(folder, shards))
    return folder


def made(folder: Path) -> dict[str, str]:
    """What a chain is for: its weights and its videos, by sha256."""
    kinds = "*_merged/**/*.safetensors", "*_merged/helios_train.json", "samples/*.mp4"
    files = [path for kind in kinds for path in folder.rglob(kind)]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_links_hand_over(whole: Path) -> None:
    base, mid = (read_manifest(whole / name) for name in ("1_base_merged", "2_mid_merged"))
    assert base is not None and mid is not None
    assert [(link.stage, link.iterations) for link in mid.lineage] == [("base", 3), ("mid", 4)]
    assert mid.lineage[:1] == base.lineage and mid.sampler["levels"] == 3 and base.sampler["levels"] == 1
    saved = compose.typed(RunFolder.open(whole / "2_mid").load_config())
    assert saved.init == str(whole / "1_base_merged") and saved.model.layers == 1
    assert len(list((whole / "samples").glob("*.mp4"))) == 1
    parts = {"1_base", "1_base_merged", "2_mid", "2_mid_merged", "samples"}
    assert {path.name for path in whole.iterdir()} == parts | {"chain.json", "lock"}


@pytest.mark.parametrize("lost", ["samples", "2_mid_merged", "2_mid", "1_base_merged"])
def test_only_what_is_missing_is_done_again(whole: Path, shards: Path, tmp_path: Path, lost: str) -> None:
    """From any link on, with the same weights and the same video at the end."""
    folder = tmp_path / "whole"
    shutil.copytree(whole, folder)
    order = ["1_base", "1_base_merged", "2_mid", "2_mid_merged", "samples"]
    kept = order[: order.index(lost)]
    for name in order[order.index(lost) :]:
        shutil.rmtree(folder / name)
    before = {path: path.stat().st_mtime_ns for name in kept for path in (folder / name).rglob("*.safetensors")}
    run(words(folder, shards, "resume=auto"))
    ours, theirs = made(folder), made(whole)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert ours == theirs and len(ours) >= 5


@pytest.mark.slow
def test_killed_and_started_again_is_the_same(whole: Path, shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    command = [sys.executable, "-m", "helios_train", *words(folder, shards)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, env=environment, start_new_session=True, **silent)  # type: ignore[call-overload]
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline and not (folder / "2_mid/checkpoints/00000002.ckpt").exists():
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert (folder / "2_mid").is_dir() and not (folder / "samples").exists()
    done = subprocess.run([*command, "resume=auto"], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert made(folder) == made(whole)


def test_another_chain_is_refused(whole: Path, shards: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="already holds a chain: go on with resume=auto"):
        run(words(whole, shards))
    with pytest.raises(InputError, match=r"whole: cannot resume with another seed in link 1, seed in link 2; .*in chain.json"):
        run(words(whole, shards, "resume=auto", "seed=1"))
    with pytest.raises(InputError, match="holds no chain"):
        run([*words(tmp_path, shards), f"resume={tmp_path}"])


@pytest.fixture
def only_planned(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Chains are read, compared and locked, and do nothing; the folders they chose."""
    folders: list[Path] = []
    monkeypatch.setattr(chain, "_run", lambda plan, folder, record: folders.append(folder))
    return folders


def test_what_may_change_may_change_in_a_chain(whole: Path, shards: Path, only_planned: list[Path]) -> None:
    """As in a run; iterations may not, nor the number of links. The order of the words says nothing."""
    given = words(whole, shards, "resume=auto")
    run([*reversed(given), "data.workers=1", "trainer.progress=true"])
    assert only_planned == [whole]
    for links, said in (
        (LINKS.replace("max_steps=3", "max_steps=5"), r"another trainer\.max_steps in link 1;"),
        ('chain.links=["stage=base trainer.max_steps=3"]', r"another number of links \(2\)"),
    ):
        with pytest.raises(InputError, match=said):
            run([*given, links])
    with pytest.raises(InputError, match="another init;"):
        run([*given, f"init={whole}"])
    assert len(only_planned) == 1


def test_a_chain_has_one_process(whole: Path, shards: Path, only_planned: list[Path]) -> None:
    other = RunFolder(whole)
    other.lock()
    try:
        with pytest.raises(InputError, match=f"process {os.getpid()} is writing"):
            run(words(whole, shards, "resume=auto"))
    finally:
        other.unlock()
    assert not only_planned


def test_auto_takes_the_newest_unfinished(
    whole: Path,
    shards: Path,
    only_planned: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [word for word in words(whole, shards, "resume=auto") if not word.startswith("run_dir=")]
    parent = tmp_path / "runs/chain/default"
    for number in range(1, 6):
        shutil.copytree(whole, parent / f"2026-01-01_00-00-0{number}")
    unfinished, lost, locked, damaged, finished = sorted(parent.iterdir())
    shutil.rmtree(unfinished / "samples")
    shutil.rmtree(lost / "2_mid_merged")
    shutil.rmtree(locked / "samples")
    (damaged / "chain.json").write_text('{"init": null')
    other = RunFolder(locked)
    other.lock()
    run(given)
    shutil.rmtree(lost)
    run(given)
    shutil.rmtree(unfinished)
    assert only_planned == [lost, unfinished] and "starting a new one" not in capsys.readouterr().out
    run(given)
    other.unlock()
    assert only_planned[-1] not in (locked, damaged, finished) and only_planned[-1].parent == parent
    assert "resume=auto: no unfinished chain like this one in runs/chain/default; starting a new one" in capsys.readouterr().out


def test_a_chain_folder_is_the_same_by_any_path(
    whole: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Begun by an absolute path; gone on with by a link and a relative one, while a link is trained."""
    folder = tmp_path / "whole"
    given = words(folder, shards)
    run(given)
    shutil.rmtree(folder / "2_mid_merged")
    (folder / "2_mid/checkpoints/00000004.ckpt").unlink()
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    run([*given, "run_dir=link", "resume=auto"])
    assert made(folder) == made(whole)


def test_other_samples_are_made_beside_the_first(
    whole: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "whole"
    shutil.copytree(whole, folder)
    (folder / "samples_2").mkdir()
    (folder / "samples_2/999_unfinished.mp4").write_text("")
    more = "chain.sample='sample.count=2 sample.sections=1 sample.steps=[1,2,1] sample.guidance=1'"
    run(words(folder, shards, "resume=auto", more))
    counts = {name: len(list((folder / name).glob("*.mp4"))) for name in ("samples", "samples_2")}
    assert counts == {"samples": 1, "samples_2": 2}
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.mp4")}
    for wanted in ([more], []):
        capsys.readouterr()
        run(words(folder, shards, "resume=auto", *wanted))
        assert "nothing is left to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.mp4")} == before


@pytest.mark.parametrize("kind", ["run", "checkpoint"])
def test_a_chain_begins_with_a_run_or_a_checkpoint(whole: Path, shards: Path, tmp_path: Path, kind: str) -> None:
    init = {"run": whole / "1_base", "checkpoint": whole / "1_base/checkpoints/00000003.ckpt"}[kind]
    given = words(tmp_path / "chain", shards, f"init={init}")
    given[1] = 'chain.links=["stage=mid trainer.max_steps=4"]'
    run(given)
    known, same = (read_manifest(place) for place in (tmp_path / "chain/1_mid_merged", whole / "2_mid_merged"))
    assert known == same
    run([*given, "resume=auto"])


def test_a_foreign_link_is_refused(whole: Path, shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "whole"
    shutil.copytree(whole, folder)
    path = folder / "1_base_merged/helios_train.json"
    content = json.loads(path.read_text())
    content["lineage"][0]["iterations"] = 7
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"1_base_merged: its manifest says .*7, 0.*this chain made .*3, 0"):
        run(words(folder, shards, "resume=auto"))


def test_a_word_that_no_link_takes_stops_before_anything_trains(shards: Path, tmp_path: Path) -> None:
    given = words(tmp_path / "chain", shards)
    given[1] = 'chain.links=["stage=base","stage=mid stage.flow.shift=2"]'
    with pytest.raises(ConfigError, match="stage.flow"):
        run(given)
    assert not list(tmp_path.rglob("*.ckpt"))
    for bad, said in BAD.items():
        with pytest.raises(ConfigError, match=said):
            run([*words(tmp_path / "chain", shards), bad])
    assert not (tmp_path / "chain").exists()
    with pytest.raises(ConfigError, match="name at least one link"):
        run(["task=chain", "chain.links=[]"])
    with pytest.raises(ConfigError, match="a chain takes one device"):
        run(["task=chain", "trainer.devices=2", "data.micro_batch=4"])


def test_a_chain_to_a_few_step_student(tmp_path: Path, shards: Path) -> None:
    """Pairs are made where an ode link needs them, the newest base link is the teacher; going on does nothing again."""
    few = "stage.student.steps=[2,2] stage.lora.rank=2 trainer.max_steps=2 stage.every=2"
    links = [
        "stage=base trainer.max_steps=1",
        "stage=mid stage.pyramid.ratios=[1,1] trainer.max_steps=1",
        few.replace(" stage.every=2", " stage=ode stage.sections=1"),
        f"stage=distill {few}",
    ]
    given = [
        "task=chain",
        f"chain.links={json.dumps(links)}",
        *TINY[:-1],
        "chain.pairs='pairs.count=2 pairs.sections=1 pairs.steps=2 pairs.batch=2'",
        "chain.sample='sample.count=1 sample.sections=1'",
        f"data.root={shards}",
        f"run_dir={tmp_path / 'chain'}",
    ]
    run(given)
    folder = tmp_path / "chain"
    known = read_manifest(folder / "4_distill_merged")
    assert known is not None and [link.stage for link in known.lineage] == ["base", "mid", "ode", "distill"]
    assert known.sampler["few_steps"] == [2, 2]
    taught = RunFolder(folder / "4_distill").load_config()["stage"]["teacher"]
    assert taught == str(folder / "1_base_merged") and (folder / "3_ode_pairs" / "pairs.json").is_file()
    facts = json.loads(next((folder / "samples").glob("*.json")).read_text())
    assert facts["steps"] == [2, 2] and facts["guidance"] == 1.0
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != "lock"}
    run([*given, "resume=auto"])
    assert {path: path.stat().st_mtime_ns for path in before} == before
