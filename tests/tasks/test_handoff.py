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
    assert (
        f"stage=mid: init=null names no base model; a toy base model is made first, in {base}/merged" in capsys.readouterr().out
    )
    assert compose.typed(RunFolder.open(Path("run")).load_config()).init == str(base / "merged")
    merge.merge(Path("run"), Path("merged"), "auto")
    known = read_manifest(Path("merged"))
    assert known is not None and [link.stage for link in known.lineage] == ["base", "mid"]
    tiny_run("stage=mid", "run_dir=run", "resume=auto", "trainer.max_steps=3", "optimizer.total=2", "data.workers=1")
    assert RunFolder(Path("run")).newest_checkpoint() == Path("run/checkpoints/00000003.ckpt")
    assert list((tmp_path / "runs/earlier").iterdir()) == [base]
    assert "is made first" not in capsys.readouterr().out


def test_a_tiny_student_without_init_makes_every_link_before_it(
    tiny_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Base, mid, trajectories, regression; the base is the teacher. A second student finds them all."""
    monkeypatch.chdir(tmp_path)
    toy = {stage: ["experiment=debug", f"stage={stage}", "trainer.max_steps=1"] for stage in handoff.TOY}
    monkeypatch.setattr(handoff, "TOY", toy)
    monkeypatch.setattr(handoff, "TRAJECTORIES", ("pairs.count=2", "pairs.sections=1", "pairs.steps=3", "pairs.batch=2"))
    tiny_run("stage=distill", "data.size=[64,64]", "run_dir=run", "trainer.max_steps=1")
    config = compose.typed(RunFolder.open(Path("run")).load_config())
    made = sorted(path.name.removesuffix("_pairs") for path in Path("runs/earlier").iterdir())
    base, mid, ode, again = made  # of regression the run and its trajectories
    assert (base[:4], mid[:3], ode[:3], again) == ("base", "mid", "ode", ode)
    assert config.stage.teacher == str(tmp_path / "runs/earlier" / base / "merged") and Path(config.init).parent.name.startswith(
        "ode_"
    )
    merge.merge(Path("run"), Path("merged"), "auto")
    known = read_manifest(Path("merged"))
    assert known is not None and [link.stage for link in known.lineage] == ["base", "mid", "ode", "distill"]
    assert capsys.readouterr().out.count("is made first") == 3
    tiny_run("stage=distill", "data.size=[64,64]", "run_dir=other", "trainer.max_steps=1", "stage.every=2")
    assert "is made first" not in capsys.readouterr().out and len(list((tmp_path / "runs/earlier").iterdir())) == 4


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
