"""What does the adversary cost? FLOPs counted in the real step of the whole cast, beside a formula, and on `small` the time.

The counted step runs on fake tensors: no weights, no data. The formula counts passes. A judged crop costs the critic's network
one forward `c` of its tokens, and the heads `h`. The student's turn adds forward, recompute and backward by the inputs: (3 c + 2
h) with heads recomputed. The critic adds for each of its three samples a forward, a recompute and a backward, and with replay one
forward more. A mean iteration is four of the critic's and one of both (`stage.every`). The published system's figure at 14 B is
+47 %, without replay.

Usage: python benchmarks/gan_cost.py [--models small 14b] [--turns 3]
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from timing import all_turns, machine
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from helios_train.conf.compose import compose
from helios_train.conf.schema import Config
from helios_train.data.batch import Window, WindowPair
from helios_train.data.order import Ref
from helios_train.history import FRAMES, SECTION, History
from helios_train.memory.flops import count_flops
from helios_train.memory.places import materialise
from helios_train.models.codecs import SIDE
from helios_train.models.loading import fill_buffers
from helios_train.models.precision import DTYPES, cast
from helios_train.models.roles import CRITIC
from helios_train.models.transformer import HeliosTransformer
from helios_train.objectives.gan import crop_size
from helios_train.stages.distill import DistillStage
from helios_train.tasks import build, weights

RESULT = Path(__file__).parent / "results" / "gan_cost.json"
CPU = torch.device("cpu")
EVERY = 5  # iterations to one turn of the student, as published
SAMPLES = 3  # the critic's: the student's section, a real one, and that disturbed
COMMON = ["stage=distill", "data.global_batch=1", "data.micro_batch=1", "stage.gan.start=0", "memory.checkpointing=true"]
MODELS = {
    "small": ["model=small", "data.size=[128,256]", "stage.lora.rank=32"],
    "14b": ["model=14b", "codec=wan", "text=umt5", "data=folder", "data.root=/nowhere", "data.size=[384,640]"],
}
ARMS = {
    "off": ["stage.gan.enabled=false"],
    "published": ["memory.gan_replay=false"],
    "light": ["memory.gan_replay=false", "stage.gan.heads=light"],
    "published, replay": [],
    "light, replay": ["stage.gan.heads=light"],
}


def config_of(model: str, arm: str) -> Config:
    """The config of one measurement."""
    return compose([*COMMON, *MODELS[model], *ARMS[arm]])


def stage_of(config: Config, fake: bool) -> DistillStage:
    """The cast on two bases with random or no weights."""

    def _built() -> nn.Module:
        both = [HeliosTransformer(**weights.shape(config)) for _ in range(2)]
        for one in both:
            cast(one, DTYPES[config.model.dtype])
        build.adapt_cast(config, *both)
        return nn.ModuleList(both)

    def _filled(both: nn.Module) -> None:
        for one in both.children():
            fill_buffers(one)

    student, scores = materialise(_built, fake, _filled).children()
    assert isinstance(student, HeliosTransformer) and isinstance(scores, HeliosTransformer)
    for weight in [] if fake else [*student.parameters(), *scores.parameters()]:
        nn.init.normal_(weight, std=0.02)
    return build.distill_of(config, student, scores).alone()


def batch_of(config: Config) -> list[WindowPair]:
    """One pair of windows of ones, with a full history."""
    rows, columns = (side // SIDE for side in config.data.size)
    history = History(torch.ones(1, 16, FRAMES, rows, columns), torch.ones(1, 16, 1, rows, columns), (FRAMES,), (True,))
    text = torch.ones(1, config.text.rows, config.text.dim)
    window = Window(torch.ones(1, 16, SECTION, rows, columns), history, text, (Ref(0, 0, 0, 0),), (3,))
    return [WindowPair(window, window)]


def counted(config: Config) -> dict[str, int]:
    """FLOPs of the student's turn alone and of the critic's, on fake tensors, exits as drawn for iteration 0."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        stage, batch = stage_of(config, fake=True), batch_of(config)
        (pair,) = batch
        student = count_flops(lambda: stage.train_student(pair.first.samples()))
        critic = count_flops(lambda: stage.train_critic([(pair.second.samples()[0], pair.first.samples()[0])]))
    return {"student": student, "critic": critic}


def passes(config: Config) -> dict[str, int]:
    """FLOPs of one forward of the critic on a crop, and of the heads on it."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        stage, (pair,) = stage_of(config, fake=True), batch_of(config)
        rows, columns = crop_size(*(side // SIDE for side in config.data.size))
        x, t = pair.first.target[..., :rows, :columns], torch.ones(1)
        velocity = stage.roles.velocity(CRITIC)
        network = count_flops(lambda: velocity(x, t, pair.first.text, pair.first.history))
        assert stage.cast.logits is not None
        logits = stage.cast.logits
        whole = count_flops(lambda: logits(x, t, pair.first.text, pair.first.history, (0, 0)))
    return {"network": network, "heads": whole - network}


def formula(config: Config) -> dict[str, float]:
    """What the adversary adds to each turn, in FLOPs."""
    cost, again = passes(config), float(config.memory.gan_replay)
    one = cost["network"] + cost["heads"]
    return {
        "student": 3 * one,  # forward, recompute, backward by the input
        "critic": SAMPLES * ((3 + again) * cost["network"] + (4 + again) * cost["heads"]),  # heads: by their weights too
    }


def mean(found: dict[str, float]) -> float:
    """Of an iteration: the critic's always, the student's one in EVERY."""
    return found["critic"] + found["student"] / EVERY


def shares(model: str) -> dict[str, Any]:
    """What a mean iteration costs above one without the adversary, counted and by the formula."""
    plain = mean({name: float(value) for name, value in counted(config_of(model, "off")).items()})
    result: dict[str, Any] = {"off": {"pflop": plain / 1e15}}
    for arm in list(ARMS)[1:]:
        config = config_of(model, arm)
        found = mean({name: float(value) for name, value in counted(config).items()})
        result[arm] = {"pflop": found / 1e15, "counted": found / plain - 1, "formula": mean(formula(config)) / plain}
        print(model, arm, json.dumps(result[arm]), flush=True)
    return result


def measured(model: str, turns: int) -> dict[str, float]:
    """Seconds of a mean iteration above those without the adversary: medians of the same turns' ratios."""
    works = {}
    for arm in ARMS:
        config = config_of(model, arm)
        stage, batch = stage_of(config, fake=False), batch_of(config)

        def _work(stage: DistillStage = stage, batch: list[WindowPair] = batch) -> None:
            for iteration in range(EVERY):
                stage.training_step(batch, iteration)

        works[arm] = _work
    times = all_turns(works, turns, CPU)
    return {
        arm: statistics.median(own / off for own, off in zip(times[arm], times["off"], strict=True)) - 1 for arm in list(ARMS)[1:]
    }


def main() -> None:
    """All models."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["small"])
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    result: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.is_file() else {"models": {}}
    result |= {"machine": machine(CPU), "torch": torch.__version__}
    for model in arguments.models:
        result["models"][model] = shares(model)
        if model == "small":
            took = measured(model, arguments.turns)
            for arm, share in took.items():
                result["models"][model][arm]["measured"] = share
        print(json.dumps(result["models"][model], indent=1), flush=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
