"""A run's memory: what it chooses, what its card says, what is refused before weights are there, and running out of it."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from helios_train.callbacks.memory import Device, moment_of
from helios_train.callbacks.metrics_csv import read_rows
from helios_train.conf.compose import compose
from helios_train.conf.schema import Config
from helios_train.errors import ConfigError, HeliosError, InputError
from helios_train.memory import host
from helios_train.memory.plan import GIB, Plan
from helios_train.models import precision, roles
from helios_train.models.block import Block
from helios_train.run import RunFolder
from helios_train.tasks import build, needs, plan, train

Run = Callable[..., None]
REAL = ("model=14b", "text=umt5", "codec=wan", "data=folder", "data.root=/nowhere", "watch.sample=false", "init=/nowhere")
REAL += ("model.layers=2",)  # the figures are a table's
TINY = ("model.head_dim=16", "model.rope_dim=[8,4,4]", "model.ffn_dim=64", "data.size=[64,64]", "data.global_batch=1")
TINY += ("data.micro_batch=1", "stage.lora.rank=4")
PEAKS = {
    "plain": 90.0,
    "single": 70.0,
    "h100_80gb": 62.6,
    "stream": 36.0,
    "shared_48gb": 36.5,
    "nf4_24gb": 17.2,
    "nf4_16gb": 14.1,
}


def of_table(config: Config) -> Plan:
    return Plan(PEAKS[config.memory.name], "teacher", {}, 54.0, {}, [], {}, 1.0)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Plans come out of a table; the choices that were planned."""
    asked: list[str] = []
    monkeypatch.setattr(plan, "plan_of", lambda config: asked.append(config.memory.name) or of_table(config))
    monkeypatch.setattr(plan, "FEW", 0.0)
    return asked


@pytest.fixture
def weighs_14b(monkeypatch: pytest.MonkeyPatch) -> None:
    """A base of 14 B, of stage=distill two unless they share one, and what trains."""

    def _counted(config: Config) -> needs.Counted:
        two = config.stage.name == "distill" and not build.shares_base(config)
        return needs.Counted(round((1 + two) * 26.66 * GIB), 3_500_000_000, 0)

    monkeypatch.setattr(needs, "counted", _counted)


@pytest.mark.parametrize(
    ("words", "capacity", "name", "planned"),
    [
        (("stage=distill",), 79.2, "h100_80gb", ["h100_80gb"]),
        (("stage=distill",), 47.4, "stream", ["stream"]),
        (("stage=distill", "stage.bases=shared"), 47.4, "shared_48gb", ["h100_80gb", "shared_48gb"]),
        (("stage=distill", "stage.bases=shared"), 23.5, "nf4_24gb", ["shared_48gb", "nf4_24gb"]),
        (("stage=base",), 139.8, "plain", ["plain"]),
        (("stage=base",), 79.2, "single", ["plain", "single"]),
    ],
)
def test_auto_takes_the_fastest_that_fits(
    table: list[str], weighs_14b: None, words: tuple[str, ...], capacity: float, name: str, planned: list[str]
) -> None:
    """Of the given bases; what weights alone rule out is not traced."""
    config = compose([*REAL, *words])
    assert config.memory.name == "auto"
    memory, why, found = plan.chosen(config, capacity)
    assert memory == compose([*REAL, *words, f"memory={name}"]).memory and table == planned
    assert found is not None and found.peak == PEAKS[name]
    assert why.startswith(f"memory=auto: {name} takes {found.reserved:.1f} of the card's {capacity:.1f} GiB")
    assert ("plain takes more than" in why) == ("plain" not in planned)


def test_auto_where_nothing_fits(table: list[str], weighs_14b: None) -> None:
    with pytest.raises(InputError, match=r"nothing fits a card of 20.0 GiB .*stream takes .*stage.bases=shared"):
        plan.chosen(compose([*REAL, "stage=distill"]), 20.0)
    assert table == ["stream"]


def test_auto_and_what_goes_with_it() -> None:
    """The default of 14b alone; a command line's choice goes before it; its keys are not to be set."""
    assert compose([]).memory.name == "plain" and compose(["model=small"]).memory.name == "plain"
    assert compose([*REAL, "memory=single"]).memory.name == "single"
    with pytest.raises(ConfigError, match="memory=auto: chooses all of the group's keys"):
        compose([*REAL, "memory.checkpointing=true"])
    small = compose(["memory=auto"])
    assert plan.chosen(small, None)[0].name == "plain" and "for a CPU" in plan.chosen(small, None)[1]
    assert plan.chosen(small, 79.2)[0].name == "plain" and "so small a model" in plan.chosen(small, 79.2)[1]


def test_a_choice_holds_when_the_run_goes_on(tiny_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("memory=auto", f"run_dir={tmp_path}/run", "optimizer.total=4", "checkpoint.every=1")
    tiny_run(*words, "trainer.max_steps=1")
    folder = RunFolder(tmp_path / "run")
    assert "memory=auto: plain, for a CPU has no memory of its own\n" in folder.card.read_text()
    saved = yaml.safe_load(folder.config.read_text())
    assert saved["memory"]["name"] == "plain" and not folder.plan.exists()
    saved["memory"]["checkpointing"] = True  # as if something else had been chosen
    folder.save_config(saved)
    monkeypatch.setattr(plan, "chosen", lambda *_: pytest.fail("chosen again"))
    seen: list[Any] = []
    made = build.stage
    monkeypatch.setattr(build, "stage", lambda config: seen.append(config.memory) or made(config))
    tiny_run(*words, "trainer.max_steps=2", "resume=auto")
    assert seen[0].name == "plain" and seen[0].checkpointing
    tiny_run(*words, "memory=plain", "trainer.max_steps=3", "resume=auto")  # said aloud it is what is said
    assert not seen[1].checkpointing and not folder.load_config()["memory"]["checkpointing"]


def test_plan_and_measured_peak_of_a_gpu(
    tiny_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: list[str]
) -> None:
    """The card has the plan, plan.json too, and the measured peak stands beside it."""
    monkeypatch.setattr(plan, "card_of", lambda config: 79.2)
    monkeypatch.setattr(plan, "FEW", 0.0)
    monkeypatch.setattr(train, "device_of", lambda where: Device(lambda: 3 * GIB, dict))
    tiny_run("memory=single", "trainer.max_steps=2", "trainer.log_every=1", f"run_dir={tmp_path}/run")
    folder = RunFolder(tmp_path / "run")
    assert "memory single: planned peak 70.00 GiB, in teacher; 72.70 with context" in folder.card.read_text()
    assert json.loads(folder.plan.read_text()) == json.loads(json.dumps(of_table(compose(["memory=single"])).record()))
    rows = [row for _, row in read_rows(folder.metrics) if "memory/peak_gib" in row]
    assert [(row["memory/peak_gib"], row["memory/planned_gib"]) for row in rows] == [(3.0, 70.0)] * 2
    with pytest.raises(InputError, match=r"memory=plain: an iteration takes 93.3 GiB, in teacher, .*take memory=single \(72.7"):
        tiny_run("trainer.max_steps=2", f"run_dir={tmp_path}/other")
    assert not (tmp_path / "other").exists()


def test_running_out(tiny_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence with the moment, what would take less, and a snapshot; exit 1; the checkpoint before it resumes."""
    words = (f"run_dir={tmp_path}/run", "checkpoint.every=1", "trainer.max_steps=3", "model.layers=2")
    forward, calls = Block.forward, []

    def _too_much(self: Block, *given: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
        return forward(self, *given, **more)

    monkeypatch.setattr(train, "device_of", lambda where: Device(lambda: 3 * GIB, lambda: {"segments": [7]}))
    with monkeypatch.context() as broken:
        broken.setattr(Block, "forward", _too_much)
        with pytest.raises(HeliosError) as caught:
            tiny_run(*words)
    said, folder = str(caught.value), RunFolder(tmp_path / "run")
    newest = folder.newest_checkpoint()
    assert caught.value.exit_code == 1 and newest is not None
    done = int(newest.stem)
    assert f"out of memory in iteration {done}, in network (CUDA out of memory. Tried to allocate 2.00 GiB.)" in said
    assert (
        "measured peak 3.0 GiB; there was no plan" in said
        and "or with memory=single or h100_80gb or shared_48gb, which take less" in said
    )
    snapshot = folder.path / "memory_snapshot.pickle"
    assert str(snapshot) in said and pickle.loads(snapshot.read_bytes()) == {"segments": [7]}
    tiny_run(*words, "memory=h100_80gb", "resume=auto")  # as it says
    assert folder.newest_checkpoint() == folder.checkpoints / "00000003.ckpt"


def test_moments_are_read_off_the_way() -> None:
    def _raised(where: str, name: str, **own: Any) -> BaseException:
        """An error out of a function of that name in that module, which has these names."""
        scope: dict[str, Any] = {"__name__": where}
        exec(f"def {name}({', '.join(own)}):\n    raise MemoryError", scope)
        with pytest.raises(MemoryError) as caught:
            scope[name](**own)
        return caught.value

    trainee = SimpleNamespace(name="critic")
    assert moment_of(_raised("helios_train.stages.trainee", "add", self=trainee)) == "backward critic"
    assert moment_of(_raised("helios_train.stages.trainee", "step", self=trainee)) == "step critic"
    assert moment_of(_raised(roles.__name__, "_velocity", role="teacher")) == "teacher"
    assert moment_of(_raised(roles.__name__, "_logits")) == "adversary"
    assert moment_of(_raised(precision.__name__, "add", self=trainee)) == "between"


@pytest.mark.parametrize(
    "words",
    [
        ("stage=base", "init=somewhere"),
        ("stage=base", "stage.trainable=full"),
        ("stage=distill", "init=somewhere", "stage.bases=distinct", "stage.gan.head_width=32", "stage.student.steps=[2,2]"),
        ("stage=distill", "init=somewhere", "memory=nf4_24gb", "stage.gan.enabled=false", "stage.student.steps=[2,2]"),
    ],
)
def test_what_is_counted_is_what_is_built(words: tuple[str, ...]) -> None:
    """On meta, before weights are there, as of the stage itself."""
    config = compose(["task=plan", *TINY, "stage.ema.decay=0.9", *words])
    stage, found = plan.stage_with_weights(config), needs.counted(config)
    trained = [sum(one.numel() for one in trainee.masters) for trainee in stage.trainees]
    assert found.trained == sum(trained) and found.followed == trained[0]
    tensors = {id(one): one for one in (*stage.parameters(), *stage.buffers()) if not one.requires_grad}
    assert found.frozen == sum(one.nbytes for one in tensors.values())
    assert needs.disk(config, found) == (config.checkpoint.keep + 1) * 4 * (3 * sum(trained) + trained[0])
    assert needs.disk(config, replace(found, followed=0)) < needs.disk(config, found)


@pytest.mark.parametrize("lacks", ["disk", "host"])
def test_refused_before_weights_are_there(tiny_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacks: str) -> None:
    """And nothing is left behind."""
    monkeypatch.setattr(build, "stage", lambda config: pytest.fail("weights were made"))
    if lacks == "disk":
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    else:
        monkeypatch.setattr(host, "available", lambda: 1000)
    said = {"disk": "the run needs .* GB of disk and .* are free", "host": "the run without its activations takes .* GiB"}
    with pytest.raises(InputError, match=said[lacks]):
        tiny_run(f"run_dir={tmp_path}/run")
    assert not (tmp_path / "run").exists()


def test_ctrl_c_before_the_first_iteration(tiny_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves no run folder, and not what somebody else put there."""

    def _stopped(config: Config) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "stage", _stopped)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "notes.txt").write_text("mine")
    for name, left in (("run", []), ("own", ["notes.txt"])):
        with pytest.raises(KeyboardInterrupt):
            tiny_run(f"run_dir={tmp_path}/{name}")
        assert sorted(path.name for path in (tmp_path / name).glob("*")) == left
    assert not (tmp_path / "run").exists()
