"""task=plan: the plan of every stage from the command line, extension by depth, what is written, and an independent witness."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from helios_train.conf.compose import compose
from helios_train.errors import InputError
from helios_train.memory.ledger import Stretch
from helios_train.memory.live import LiveCounter
from helios_train.memory.places import DEVICE
from helios_train.memory.plan import CARDS, Costs, extended, planned
from helios_train.tasks import build, plan

Run = Callable[..., None]
TINY = ("model.head_dim=16", "model.rope_dim=[8,4,4]", "model.ffn_dim=64", "data.size=[64,64]", "data.global_batch=2")
TINY += ("data.micro_batch=1", "memory.checkpointing=true", "init=somewhere", "stage.lora.rank=4", "stage.ema.decay=0.9")
FEW = ("stage.student.steps=[2,2]",)
STAGES = {
    "base": (),
    "mid": (),
    "ode": FEW,
    "distill": (*FEW, "stage.bases=distinct", "stage.gan.head_width=32"),
    "shared": ("stage=distill", *FEW, "stage.bases=shared", "stage.gan.enabled=false"),
}


def words(name: str, *more: str) -> list[str]:
    return ["task=plan", f"stage={name}" if name != "shared" else "stage=distill", *TINY, *STAGES[name], *more]


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_extension_by_depth_is_the_exact_trace(name: str) -> None:
    """Eight blocks from two and four (with four heads from four and six): peak, groups, FLOPs and the peak's moment within 1
    %."""
    near, exact = (plan.plan_of(compose(words(name, "model.layers=8", f"plan.exact={how}"))) for how in ("false", "true"))
    assert near.peak == pytest.approx(exact.peak, rel=0.01) and near.host == pytest.approx(exact.host, rel=0.01)
    assert near.moment == exact.moment
    for group, size in exact.groups.items():
        assert near.groups[group] == pytest.approx(size, rel=0.02, abs=0.01 * exact.peak), group
    for what, flops in exact.flops.items():
        assert near.flops[what] == pytest.approx(flops, rel=0.01), what


@pytest.mark.slow
def test_the_whole_cast_by_group() -> None:
    """Two bases, two adapters with heads, their moments and gradients, the average on the host; nothing is nobody's for long."""
    found = plan.plan_of(compose(words("distill", "model.layers=2")))
    assert {"weights student", "weights teacher and critic", "trainable student", "trainable critic", "gradients student"} <= set(
        found.groups
    )
    assert 0 < found.host_groups["EMA"] <= found.host == pytest.approx(sum(found.host_groups.values()))
    moments = [name for name, _, _ in found.timeline]
    assert moments.index("student") < moments.index("teacher") < moments.index("backward student") < moments.index("step student")
    assert moments[-3:] == ["backward critic", "step critic", "average"] and "adversary" in moments


def test_what_is_written(tiny_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_run(*words("base"), f"plan.output={tmp_path}/plan.json", f"plan.picture={tmp_path}/plan.png")
    record = json.loads((tmp_path / "plan.json").read_text())
    assert {"peak_gib", "moment", "by_group", "host_gib", "flops", "seconds"} <= record.keys()
    assert sum(record["by_group"].values()) == pytest.approx(record["peak_gib"], rel=1e-6)
    assert record["fits"] == dict.fromkeys(CARDS, True) and record["seconds"] > 0
    assert (tmp_path / "plan.png").read_bytes()[:4] == b"\x89PNG"
    said = capsys.readouterr().out
    assert "stage base, model tiny" in said and f"in {record['moment']}" in said and "fits 16 GB, 24 GB" in said


def test_a_plan_that_fits_some_cards() -> None:
    stretch = Stretch("backward", {"device": 60 * 2**30, "host": 2**30}, {"device": {("weights", ""): 60 * 2**30}, "host": {}})
    found = planned([stretch], {"network": 9.89e14}, Costs(989e12, 0.5))
    assert found.reserved == pytest.approx(60 * 1.03 + 0.6) and found.seconds == pytest.approx(2)
    assert found.fits() == {"16 GB": False, "24 GB": False, "48 GB": False, "80 GB": True, "141 GB": True}
    assert "not 48 GB, 80 GB" in found.text()
    other = Stretch("forward", stretch.peak, stretch.cells)
    with pytest.raises(ValueError, match=r"plan.exact=true"):
        extended([stretch], [other], (2, 4), 40)
    assert extended([stretch], [stretch], (2, 4), 40)[0].peak[DEVICE] == 60 * 2**30


ONE, CAST = ("plain", "single", "h100_80gb"), ("plain", "h100_80gb", "stream")
SHARED = ("shared_48gb", "nf4_24gb", "nf4_16gb")
MARK = 12_345_677  # bytes that nothing else allocates
EIGHT_BIT = "bitsandbytes::optimizer_update_8bit_blockwise"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "memory"),
    [
        *((name, memory) for name in ("base", "mid", "ode") for memory in ONE),
        *(("distill", memory) for memory in CAST),
        *(("shared", memory) for memory in SHARED),
    ],
)
def test_a_profiler_says_the_same(name: str, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An independent witness on a real step: torch's own record of allocations, against the plan, within 5 %.

    On a CPU device and host are one memory: the plan is asked for both together. What bitsandbytes takes inside its update of
    8-bit moments, which is one kernel on a GPU and eager arithmetic here, is not the step's.
    """
    monkeypatch.setattr(LiveCounter, "_place", lambda *_: DEVICE)
    size = ("model=small", "model.layers=4", "data.size=[128,128]", "data.global_batch=1", "data.micro_batch=1")
    given = [*size, f"memory={memory}", "init=somewhere", "trainer.accelerator=cpu", "stage.ema.decay=0"]
    given += ["stage.trainable=lora"] if name != "distill" and name != "shared" else []
    given += ["optimizer=adamw8bit"] if memory == "single" else []
    stages = {"ode": FEW, "distill": (*FEW, "stage.every=1"), "shared": ("stage=distill", *FEW, "stage.every=1")}
    config = compose(["task=plan", f"stage={name if name != 'shared' else 'distill'}", *given, *stages.get(name, ())])
    found = plan.plan_of(config)
    gc.collect()  # an earlier test's stage, let go of meanwhile, would be taken off
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, record_shapes=False) as seen:
        own = name in ("distill", "shared")  # which need folders to be built from
        stage = (plan.stage_with_weights(config) if own else build.stage(replace(config, init=None))).alone()
        batch = plan.part(config)
        stage.training_step(batch, 0)  # what the optimizer remembers is there from now on
        torch.empty(MARK, dtype=torch.uint8)
        stage.training_step(batch, 1)
    live, peak, marked = 0, 0, False
    events = list(seen.profiler.kineto_results.events())
    inside = [(e.start_ns(), e.start_ns() + e.duration_ns()) for e in events if e.name() == EIGHT_BIT]
    assert bool(inside) == (memory == "single")
    for event in events:
        if event.name() == "[memory]":
            live += event.nbytes()
            marked = marked or event.nbytes() == MARK
            counts = marked and not any(start <= event.start_ns() < end for start, end in inside)
            peak = max(peak, live if counts else 0)
    assert peak / 2**30 == pytest.approx(found.peak, rel=0.05)


def test_a_run_that_does_not_fit_is_refused_with_what_would(
    tiny_run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = compose(words("base", "model.dtype=bf16", "stage.trainable=full", "model.layers=3", "model.ffn_dim=4096"))
    assert plan.must_fit(config, 79.2) is None, "a model this small is not worth a trace"
    monkeypatch.setattr(plan, "FEW", 0.0)
    plain = plan.must_fit(config, 1.5)
    assert plain is not None
    others = plan.beside(config)
    away = others["h100_80gb"]
    assert away.peak < plain.peak and away.host > plain.host and others["nf4_24gb"].peak <= away.peak
    between = (plain.reserved + away.reserved) / 2
    with pytest.raises(
        InputError,
        match=r"memory=plain: an iteration takes .* GiB, in .*; take memory=h100_80gb .* or memory=shared",
    ):
        plan.must_fit(config, between)
    with pytest.raises(InputError, match="no memory= choice does"):
        plan.must_fit(config, 0.5)
    tiny_run(*words("base", "plan.all=true"))
    rows = capsys.readouterr().out.splitlines()[-7:]
    assert [row.split()[0] for row in rows] == [
        "memory",
        "plain",
        *(one for one in plan.PRESETS if one not in ("plain", "stream")),
    ]
    assert rows[1].endswith("141 GB")


def test_a_machine_with_a_gpu_plans_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trace is the CPU's: nothing of it is put on the GPU that a run there would use."""
    config = compose(words("base", "model.layers=1", "memory=h100_80gb"))
    here = plan.plan_of(config)
    device = build.device
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(build, "device", lambda config: device(config) if config.trainer.accelerator == "cpu" else gpu)
    assert plan.plan_of(config) == here
