"""What a stage starts from: the link that is missing is made of a tiny model, asked for of others, the same by any path."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from helios_train.conf import compose
from helios_train.errors import InputError
from helios_train.models.manifest import read_manifest
from helios_train.run import RunFolder
from helios_train.tasks import handoff, merge

Run = Callable[..., None]


def test_a_tiny_mid_run_without_init_makes_its_base_once(
    tiny_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And merges, resumes and lineage know of it. A run that differs only in what may change shares it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(handoff.TOY, "base", ["experiment=debug"])
    tiny_run("stage=mid", "run_dir=run", "trainer.max_steps=2")
    (base,) = (tmp_path / "runs/earlier").iterdir()
    assert f"stage=mid: init=null names no base model; a toy one is made first, in {base}/merged" in capsys.readouterr().out
    assert compose.typed(RunFolder.open(Path("run")).load_config()).init == str(base / "merged")
    merge.merge(Path("run"), Path("merged"), "auto")
    known = read_manifest(Path("merged"))
    assert known is not None and [link.stage for link in known.lineage] == ["base", "mid"]
    tiny_run("stage=mid", "run_dir=run", "resume=auto", "trainer.max_steps=3", "optimizer.total=2", "data.workers=1")
    assert RunFolder(Path("run")).newest_checkpoint() == Path("run/checkpoints/00000003.ckpt")
    assert list((tmp_path / "runs/earlier").iterdir()) == [base]
    assert "is made first" not in capsys.readouterr().out


def test_a_real_mid_run_without_init_names_the_commands(tiny_run: Run, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        tiny_run("stage=mid", "model=small", f"run_dir={tmp_path}/run")
    for said in ("stage=base model=small run_dir=RUN", "task=merge init=RUN merge.output=MERGED", "give init=MERGED"):
        assert said in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_init_is_the_same_by_any_path(tiny_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_run(f"run_dir={tmp_path}/base", "trainer.max_steps=1")
    tiny_run(f"init={tmp_path}/base", f"run_dir={tmp_path}/run", "trainer.max_steps=1", "optimizer.total=2")
    (tmp_path / "link").symlink_to(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    for steps, init in ((2, "base"), (3, "link")):
        tiny_run(f"init={init}", "run_dir=run", "resume=auto", f"trainer.max_steps={steps}", "optimizer.total=2")
    with pytest.raises(InputError, match="another init;"):
        tiny_run("init=run", "run_dir=run", "resume=auto", "trainer.max_steps=4", "optimizer.total=2")
