"""The step of the whole cast on fake tensors: the real one, at 14 B, with no weights and no data."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from helios_train.conf.compose import compose
from helios_train.conf.schema import Config
from helios_train.data.batch import Window, WindowPair
from helios_train.data.order import Ref
from helios_train.history import FRAMES, SECTION, History
from helios_train.memory.ledger import Report
from helios_train.memory.live import LiveCounter
from helios_train.memory.places import DEVICE, materialise
from helios_train.models.loading import fill_buffers
from helios_train.models.precision import DTYPES, cast
from helios_train.models.transformer import HeliosTransformer
from helios_train.stages.distill import DistillStage
from helios_train.tasks import build, weights

GIB = 2**30
COMMON = ["stage=distill", "data.global_batch=2", "data.micro_batch=1", "stage.every=2", "stage.gan.start=0"]
TINY = [*COMMON, "model.head_dim=16", "model.rope_dim=[8,4,4]", "model.layers=1", "stage.lora.rank=4", "data.size=[64,64]"]
TINY += ["stage.student.steps=[2,2]", "stage.gan.head_width=32"]
FULL = [*COMMON, "model=14b", "codec=wan", "text=umt5", "data=folder", "data.root=/nowhere", "data.size=[384,640]"]
FULL += ["memory=plain"]


def window(config: Config, position: int) -> Window:
    rows, columns = (side // 8 for side in config.data.size)
    frames, anchor = torch.ones(1, 16, FRAMES, rows, columns), torch.ones(1, 16, 1, rows, columns)
    ref = Ref(iteration=0, position=position, epoch=0, sample=position)
    text = torch.ones(1, config.text.rows, config.text.dim)
    return Window(torch.ones(1, 16, SECTION, rows, columns), History(frames, anchor, (FRAMES,), (True,)), text, (ref,), (3,))


def cast_of(config: Config, fake: bool, shared: bool) -> DistillStage:
    def built() -> nn.Module:
        scores = HeliosTransformer(**weights.shape(config))
        student = scores if shared else HeliosTransformer(**weights.shape(config))
        for one in (student, scores):
            cast(one, DTYPES[config.model.dtype])
        build.adapt_cast(config, student, scores)
        return nn.ModuleList([student, scores])

    def filled(both: nn.Module) -> None:
        for one in both.children():
            fill_buffers(one)

    student, scores = (
        materialise(built, fake, filled).children() if not shared else [*materialise(built, fake, filled).children()] * 2
    )
    assert isinstance(student, HeliosTransformer) and isinstance(scores, HeliosTransformer)
    for weight in [] if fake else [*student.parameters(), *scores.parameters()]:
        nn.init.normal_(weight, std=0.02)
    return build.distill_of(config, student, scores)


def step(config: Config, fake: bool, iterations: int, shared: bool = False, granularity: int = 1) -> tuple[Report, DistillStage]:
    """Iterations of one device, counted; the first is the student's turn."""
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext():
        trained, counter = cast_of(config, fake, shared), LiveCounter(granularity=granularity)
        trained.alone()
        counter.claim(trained.transformer, "student's base")
        counter.claim(trained.scores, "scores' base")
        for trainee in trained.trainees:
            counter.claim(list(trainee.masters), f"{trainee.name}'s masters")
        batch = [WindowPair(window(config, place), window(config, place)) for place in range(config.data.global_batch)]
        with counter:
            for iteration in range(iterations):
                trained.training_step(batch, iteration)
        return counter.report(), trained


@pytest.mark.parametrize("shared", [pytest.param(True, marks=pytest.mark.slow), False])
def test_real_and_fake_agree_to_the_byte(shared: bool) -> None:
    """The student's turn and one of the critic alone."""
    config = compose([*TINY, f"memory.checkpointing={shared}", "stage.gan.start=9"])
    (real, trained), (fake, planned) = (step(config, fake, 2, shared) for fake in (False, True))
    assert real == fake
    assert trained.iteration == planned.iteration == 2 and trained.skipped == planned.skipped == 0


@pytest.mark.slow
@pytest.mark.parametrize("replay", [True, False])
def test_with_an_adversary_too_but_for_a_scalar(replay: bool) -> None:
    """The peaks differ by four bytes of some nine million; which scalar lives longer when real was not found."""
    config = compose([*TINY, f"memory.gan_replay={str(replay).lower()}"])
    (real, trained), (fake, planned) = (step(config, fake, 2) for fake in (False, True))
    assert real.peak[DEVICE] == pytest.approx(fake.peak[DEVICE], abs=16) and real.live == fake.live
    assert trained.iteration == planned.iteration == 2 and trained.skipped == planned.skipped == 0


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False])
def test_one_distill_iteration_at_14b(shared: bool) -> None:
    """Two adapters of rank 256 on one base or two; everything on the device, as memory=plain has it."""
    (two, _), (four, trained) = (
        step(compose([*FULL, f"model.layers={n}", "memory.checkpointing=true"]), True, 1, shared, granularity=512) for n in (2, 4)
    )
    assert trained.iteration == 1 and trained.skipped == 0

    def at_40(one: int, other: int) -> float:
        return (one + 19 * (other - one)) / GIB

    peak = at_40(two.peak[DEVICE], four.peak[DEVICE])
    left = at_40(two.live[DEVICE], four.live[DEVICE])
    owners = {name: at_40(two.owners().get(name, 0), four.owners()[name]) for name in four.owners()}
    print(f"14b, distill, {'shared' if shared else 'distinct'}: peak {peak:.2f} GiB, {left:.2f} after the step; {owners}")
    adapters = (1_251_442_688 * 4 + 1_246_314_496 * 4) / GIB  # spec: LoRA of student and critic
    masters = owners["student's masters"] + owners["critic's masters"]
    assert masters == pytest.approx(adapters, rel=0.01)
    bases = (1 if shared else 2) * 26.71
    assert left == pytest.approx(bases + masters / 2 + 3 * masters, rel=0.02)  # compute copies, masters, two moments
