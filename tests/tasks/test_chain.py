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
    assert {path.name for path in whole.iterdir()} == parts | {"chain.json"}


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
    with pytest.raises(InputError, match=r"holds another chain, its words are in chain.json"):
        run(words(whole, shards, "resume=auto", "seed=1"))
    with pytest.raises(InputError, match="holds no chain"):
        run([*words(tmp_path, shards), f"resume={tmp_path}"])


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
    with pytest.raises(ConfigError, match="name at least one link"):
        run(["task=chain", "chain.links=[]"])
    with pytest.raises(ConfigError, match="a chain takes one device"):
        run(["task=chain", "trainer.devices=2", "data.micro_batch=4"])
