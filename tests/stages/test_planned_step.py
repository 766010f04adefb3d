"""The Base step on fake tensors: the real step, at 14 B, with no weights and no data."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from helios_train.conf.compose import compose
from helios_train.conf.schema import Config
from helios_train.data.batch import Window
from helios_train.data.order import Ref
from helios_train.history import FRAMES, SECTION, History
from helios_train.memory.ledger import Report
from helios_train.memory.live import LiveCounter
from helios_train.memory.places import DEVICE, materialise
from helios_train.models.loading import fill_buffers
from helios_train.models.precision import DTYPES, cast
from helios_train.models.transformer import HeliosTransformer
from helios_train.stages.base import BaseStage
from helios_train.tasks import build, weights

GIB = 2**30
FULL = [
    "data.root=/nowhere",
    "text=umt5",
    "codec=wan",
    "codec.weights=/nowhere",
    "init=/nowhere",
    "data.global_batch=2",
    "memory=plain",
    "memory.checkpointing=true",
]
TINY = ["model.head_dim=16", "model.rope_dim=[8,4,4]", "init=/nowhere", "memory.checkpointing=true", "stage.lora.rank=4"]


def window(config: Config, samples: int) -> Window:
    rows, columns = (side // 8 for side in config.data.size)
    refs = tuple(Ref(iteration=0, position=sample, epoch=0, sample=sample) for sample in range(samples))
    history = History(
        torch.ones(samples, 16, FRAMES, rows, columns),
        torch.ones(samples, 16, 1, rows, columns),
        (FRAMES,) * samples,
        (True,) * samples,
    )
    text = torch.ones(samples, config.text.rows, config.text.dim)
    return Window(torch.ones(samples, 16, SECTION, rows, columns), history, text, refs, (3,) * samples)


def stage(config: Config, fake: bool) -> BaseStage:
    def built() -> nn.Module:
        transformer = HeliosTransformer(**weights.shape(config))
        cast(transformer, DTYPES[config.model.dtype])
        weights.adapt(config, transformer)
        return transformer

    transformer = materialise(built, fake, fill_buffers)
    assert isinstance(transformer, HeliosTransformer)
    for weight in [] if fake else transformer.parameters():
        nn.init.normal_(weight, std=0.02)
    return build.stage_of(config, transformer)


def step(config: Config, fake: bool, iterations: int = 2, granularity: int = 1) -> tuple[Report, BaseStage]:
    """Iterations of one device, counted."""
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext():
        trained, counter = stage(config, fake), LiveCounter(granularity=granularity)
        trained.alone()
        counter.claim(trained.transformer, "base")
        counter.claim(list(trained.masters), "masters")
        parts = config.data.global_batch // config.data.micro_batch
        batch = [window(config, config.data.micro_batch) for _ in range(parts)]
        counter.claim([[part.target, part.text, part.history.frames, part.history.anchor] for part in batch], "data")
        with counter, counter.gradients(trained.masters, "gradients"):
            for iteration in range(iterations):
                with counter.moment(f"iteration {iteration}"):
                    trained.training_step(batch, iteration)
        return counter.report(), trained


@pytest.mark.parametrize(
    ("name", "trainable"),
    [("base", "lora"), pytest.param("base", "full", marks=pytest.mark.slow), pytest.param("mid", "lora", marks=pytest.mark.slow)],
)
def test_real_and_fake_agree_to_the_byte(name: str, trainable: str) -> None:
    """Two iterations of two micro-batches."""
    config = compose([f"stage={name}", *TINY, f"stage.trainable={trainable}", "data.global_batch=4", "data.micro_batch=2"])
    (real, trained), (fake, planned) = (step(config, fake) for fake in (False, True))
    assert real == fake
    assert trained.iteration == planned.iteration == 2 and trained.skipped == planned.skipped == 0


@pytest.mark.slow
def test_levels_take_the_activations_of_the_largest() -> None:
    """A mid step of three passes against a base step, which is one pass at full size."""
    given = [*TINY, "data.size=[64,128]", "stage.trainable=full", "data.global_batch=2", "data.micro_batch=2"]
    given.append("memory.checkpointing=false")
    peaks = {}
    for name in ("base", "mid"):
        report, _ = step(compose([f"stage={name}", *given]), fake=True)
        owners = report.owners()
        peaks[name] = report.peak[DEVICE] - sum(owners.get(owner, 0) for owner in ("base", "masters", "data"))
    latents = 2 * 16 * SECTION * 8 * 16 * 4  # bytes of the target; start and end points of all levels are about ten of it
    assert peaks["mid"] - peaks["base"] < 12 * latents < 0.1 * peaks["base"], peaks


def extended(two: int, four: int) -> float:
    """GiB of 40 blocks, from bytes of 2 and 4."""
    return (two + 19 * (four - two)) / GIB


def at_14b(experiment: str) -> tuple[dict[str, float], float, float]:
    """GiB by owner at the peak, at the peak, and after the step, of one iteration with two micro-batches."""
    given = [f"experiment={experiment}", *FULL]
    (two, _), (four, trained) = (step(compose([*given, f"model.layers={n}"]), True, 1, granularity=512) for n in (2, 4))
    assert trained.iteration == 1 and trained.skipped == 0
    owners = {name: extended(two.owners()[name], four.owners()[name]) for name in four.owners()}
    peak, left = (extended(getattr(two, name)[DEVICE], getattr(four, name)[DEVICE]) for name in ("peak", "live"))
    print(f"14b, {experiment}, memory=plain: peak {peak:.2f} GiB, {left:.2f} GiB after the step; at the peak {owners}")
    return owners, peak, left


def test_one_base_iteration_at_14b() -> None:
    """Rank-128 adapters, and history patches in full."""
    owners, peak, left = at_14b("base_init")
    assert owners["masters"] * GIB / 4 == pytest.approx(1.25e9 / 2 + 5120 * 16 * (4 + 32 + 256), rel=0.01)
    assert owners["base"] == pytest.approx(26.71 + owners["masters"] / 2, abs=0.05)  # the compute copies are bf16
    assert left == pytest.approx(owners["base"] + 3 * owners["masters"] + owners["data"], abs=0.05)  # and two moments
    activations = peak - owners["base"] - 2 * owners["masters"]  # and gradients
    assert 5.5 < activations < 8.5


@pytest.mark.slow
def test_one_mid_iteration_at_14b() -> None:
    """Rank-256 adapters; four passes a micro-batch, and the activations of the largest alone."""
    owners, peak, left = at_14b("mid_init")
    assert owners["masters"] * GIB / 4 == pytest.approx(1.25e9, rel=0.01)
    assert left == pytest.approx(owners["base"] + 3 * owners["masters"] + owners["data"], abs=0.05)
    activations = peak - owners["base"] - 2 * owners["masters"]
    assert 5.5 < activations < 9.0
