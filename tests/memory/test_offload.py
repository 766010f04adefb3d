"""Where bytes live changes no number: host optimizer and offloaded block inputs against everything on the device."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from helios_train.conf.compose import compose
from helios_train.errors import ConfigError
from helios_train.memory.parking import Parking
from helios_train.memory.places import DEVICE, HOST
from helios_train.memory.quantized import FrozenLinear
from helios_train.tasks import build, plan

TINY = ("model.head_dim=16", "model.rope_dim=[8,4,4]", "model.ffn_dim=64", "model.layers=3", "data.size=[64,64]")
TINY += ("data.global_batch=2", "data.micro_batch=1", "stage.lora.rank=4", "init=somewhere")
STAGES = {
    "base": ("stage=base",),
    "mid": ("stage=mid", "stage.trainable=full"),
    "ode": ("stage=ode", "stage.student.steps=[2,2]"),
    "distill": ("stage=distill", "stage.student.steps=[2,2]", "stage.gan.head_width=32", "stage.gan.start=0"),
}
ON_DEVICE = ("memory.checkpointing=true",)
AWAY = ("memory=h100_80gb",)
CAST = (*STAGES["distill"], "stage.bases=distinct")


def trained(words: tuple[str, ...], how: tuple[str, ...]) -> tuple[Any, dict[str, Tensor], list[dict[str, float]]]:
    """A stage after three iterations, its weights, and what it logged."""
    config = compose(["task=plan", *TINY, *words, *how])
    stage, batch, logged = plan.stage_with_weights(config).alone(), plan.part(config), []
    for iteration in range(3):
        stage.training_step(batch, iteration)
        logged.append({name: float(value) for name, value in stage.last.items()})
    return stage, stage.state_dict(), logged


@pytest.mark.parametrize("name", list(STAGES))
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_everything_away_is_everything_there_bit_for_bit(name: str, dtype: str) -> None:
    words = (*STAGES[name], f"model.dtype={dtype}")
    (_, plain, one), (stage, away, other) = (trained(words, how) for how in (ON_DEVICE, AWAY))
    assert plain.keys() == away.keys()
    for key, value in plain.items():
        assert torch.equal(value, away[key]), key
    assert repr(one) == repr(other)
    assert stage.transformer._waiting is not nullcontext, "inputs of blocks wait on the host"
    for trainee in stage.trainees:
        for key, master in trainee.masters.masters.items():
            weight = trainee.masters.weights[key]
            assert master is not weight and weight.grad is None
            assert torch.equal(weight, master.to(weight.dtype))


def same(words: tuple[str, ...], how: tuple[str, ...]) -> Any:
    """Both ways give the same bits; the second's stage."""
    (_, plain, one), (stage, away, other) = (trained(words, each) for each in (ON_DEVICE, how))
    assert repr(one) == repr(other)
    for name in plain.keys() & away.keys():
        if plain[name].shape == away[name].shape:  # what is streamed has no weights of its own between its turns
            assert torch.equal(plain[name], away[name]), name
    assert all(torch.equal(w, away[n]) for n, w in plain.items() if ".lora_" in n or n.startswith("heads."))
    return stage


class Poisoned(Parking):
    """What is parked is NaN until it comes back, unless a step has written it meanwhile."""

    def _swap(self, weight: Tensor, place: str) -> None:
        kept = self.__dict__.setdefault("kept", {})
        if place == HOST and id(weight) in kept:  # masters are made of what waits from the beginning
            kept[id(weight)], weight.data = weight.data, torch.full_like(weight.data, float("nan"))
        elif place == DEVICE and weight.data.isnan().all():
            weight.data = kept[id(weight)]
        kept.setdefault(id(weight))


@pytest.mark.parametrize("park", ["heads", "idle"])
def test_what_is_parked_is_computed_the_same(park: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "Parking", Poisoned)
    plain, words = trained(CAST, ON_DEVICE), (*AWAY, f"memory.park={park}")
    stage, _, logged = trained(CAST, words)
    assert repr(logged) == repr(plain[2])
    for one, other in zip(stage.trainees, plain[0].trainees, strict=True):
        for name, master in other.masters.state_dict().items():
            assert torch.equal(one.masters.state_dict()[name], master), name
    assert isinstance(stage.roles.present, Parking)
    assert stage.roles.present.groups.keys() == ({"heads"} if park == "heads" else {"heads", "student", "critic"})


def test_a_lineage_in_four_bits_is_parked_too() -> None:
    """On one shared base: the same numbers, and its packed weights leave with the student's adapter."""
    words = (*STAGES["distill"], "stage.bases=shared", "model.dtype=bf16")
    (_, there, one), (stage, away, other) = (
        trained(words, ("memory=nf4_16gb", f"memory.park={park}")) for park in ("nothing", "idle")
    )
    assert repr(one) == repr(other) and all(torch.equal(value, away[name]) for name, value in there.items())
    lineage = [one for one in stage.roles.present.groups["student"] if isinstance(one, FrozenLinear)]
    assert len(lineage) == 2 * 2 * 3 * 10, "of two links A and B of ten layers in each of three blocks"


def test_a_streamed_base_computes_the_same() -> None:
    stage = same((*CAST, "model.layers=5"), ("memory=stream",))
    blocks = list(stage.scores.blocks)
    frozen = [sum(w.numel() for w in block.parameters() if not w.requires_grad) for block in blocks]
    assert stage.transformer.streamed is None and frozen.count(0) == len(blocks) - len(stage.scores.streamed.slots) == 2


@pytest.mark.slow
def test_the_host_has_what_it_should_and_the_device_the_less() -> None:
    """Masters, moments, gradients and waiting inputs are counted on the host, and only there."""
    plans = [
        plan.plan_of(compose(["task=plan", *TINY, *STAGES["distill"], "model.dtype=bf16", *how])) for how in (ON_DEVICE, AWAY)
    ]
    there, away = plans
    moved = {f"{what} {who}" for what in ("masters", "optimizer") for who in ("student", "critic")}
    assert moved <= set(there.groups) and not moved & set(away.groups)
    assert moved <= set(away.host_groups) and not any(group.startswith("gradients") for group in away.groups)
    assert away.peak < there.peak and away.host > there.host
    assert any(host > 0 for _, _, host in away.timeline) and DEVICE != HOST


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("memory.block_inputs=host",), "set memory.checkpointing=true"),
        (("memory.optimizer=host", "optimizer=adamw8bit"), "take optimizer=adamw"),
        (("memory.optimizer=host", "trainer.devices=2", "data.global_batch=4"), "take one"),
    ],
)
def test_what_does_not_go_together(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        compose([*words])


def test_a_stage_on_the_host_stays_there_in_a_checkpoint() -> None:
    stage, _, _ = trained(STAGES["base"], AWAY)
    state = stage._alone[0].state_dict()
    stage._alone[0].load_state_dict(state)
    assert build.training(compose(["memory=h100_80gb"])).host is not None and len(state["state"]) == len(stage.masters.masters)
