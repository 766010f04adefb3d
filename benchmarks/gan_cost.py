"""What does the adversary cost? FLOPs counted in the real step of the whole cast, beside a formula, and on `small` the time.

The counted step runs on fake tensors: no weights, no data. The formula counts passes over a judged crop: of the critic's network
with its adapters `c`, of which `a` in attention and `w` in adapters, and of the heads `h`. The student's turn adds a forward, a
recompute and a backward by the inputs: 3 c + 1.5 a + 3 h (attention's backward has five products for the forward's two). The
critic adds for each of its three samples as much, and the gradients of what trains: 3 c + 1.5 a + w + 4 h, and with replay one
forward more. A mean iteration is five turns of the critic's to one of the student's (`stage.every`). The published system's
figure at 14 B is +47 %, without replay.

What is counted already is not counted again.
Usage: python benchmarks/gan_cost.py [--models small 14b] [--turns 5]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timing import machine
from torch._subclasses.fake_tensor import FakeTensorMode

from helios_train.conf.compose import compose
from helios_train.conf.schema import Config
from helios_train.memory.flops import FlopCounter, count_flops
from helios_train.memory.plan import extended_flops
from helios_train.models.codecs import SIDE
from helios_train.models.roles import CRITIC, TEACHER
from helios_train.objectives.gan import crop_size
from helios_train.stages.distill import DistillStage
from helios_train.tasks.plan import bare_stage, part, with_blocks

RESULT = Path(__file__).parent / "results" / "gan_cost.json"
CPU = torch.device("cpu")
DEPTHS, HEADS = (4, 6), 4  # blocks that are traced of a deep model, and discriminator heads on them
EVERY = 5  # iterations to one turn of the student, as published
SAMPLES = 3  # the critic's: the student's section, a real one, and that disturbed
COMMON = [
    "task=plan",
    "stage=distill",
    "data.global_batch=1",
    "data.micro_batch=1",
    "stage.gan.start=0",
    "memory=plain",
    "memory.checkpointing=true",
]
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
    stage = bare_stage(config, fake).alone()
    assert isinstance(stage, DistillStage)
    return stage


def at_depth(count: Callable[[Config], Mapping[str, float]], config: Config) -> dict[str, float]:
    """What is counted of a config, of a deep model by extension from two few blocks with as many heads."""
    if config.model.layers <= DEPTHS[1]:
        return dict(count(config))
    one, other = (count(with_blocks(config, blocks, HEADS)) for blocks in DEPTHS)
    return extended_flops(one, other, DEPTHS, config.model.layers)


def turns_of(config: Config) -> dict[str, float]:
    """FLOPs of the student's turn alone and of the critic's, on fake tensors, exits as drawn for iteration 0."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        stage, batch = stage_of(config, fake=True), part(config)
        (pair,) = batch
        student = count_flops(lambda: stage.train_student(pair.first.samples()))
        critic = count_flops(lambda: stage.train_critic([(pair.second.samples()[0], pair.first.samples()[0])]))
    return {"student": student, "critic": critic}


def passes(config: Config) -> dict[str, float]:
    """FLOPs of one forward on a crop: of the critic's network, of that in attention and in the adapters, and of the heads."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        stage, (pair,) = stage_of(config, fake=True), part(config)
        rows, columns = crop_size(*(side // SIDE for side in config.data.size))
        x, t = pair.first.target[..., :rows, :columns], torch.ones(1)
        logits = stage.cast.logits
        assert logits is not None
        network, plain = (
            count_flops(lambda role=role: stage.roles.velocity(role)(x, t, pair.first.text, pair.first.history))
            for role in (CRITIC, TEACHER)
        )
        with FlopCounter() as attention:
            attention.formulas = {op: one for op, one in FlopCounter.formulas.items() if "attention" in str(op)}
            logits(x, t, pair.first.text, pair.first.history, (0, 0))
        whole = count_flops(lambda: logits(x, t, pair.first.text, pair.first.history, (0, 0)))
    return {"network": network, "attention": attention.total, "adapters": network - plain, "heads": whole - network}


def formula(config: Config) -> dict[str, float]:
    """What the adversary adds to each turn, in FLOPs."""
    cost, again = at_depth(passes, config), float(config.memory.gan_replay)
    network, heads = cost["network"], cost["heads"]
    once = 3 * network + 1.5 * cost["attention"]  # forward, recompute, backward by the input: attention has five products for two
    return {
        "student": once + 3 * heads,
        "critic": SAMPLES * (once + again * network + cost["adapters"] + (4 + again) * heads),  # and by the weights that train
    }


def mean(found: dict[str, float]) -> float:
    """Of an iteration: the critic's always, the student's one in EVERY."""
    return found["critic"] + found["student"] / EVERY


def shares(model: str) -> dict[str, Any]:
    """What a mean iteration costs above one without the adversary, counted and by the formula."""
    plain = mean(at_depth(turns_of, config_of(model, "off")))
    result: dict[str, Any] = {"off": {"pflop": plain / 1e15}}
    for arm in list(ARMS)[1:]:
        config = config_of(model, arm)
        found = mean(at_depth(turns_of, config))
        result[arm] = {"pflop": found / 1e15, "counted": found / plain - 1, "formula": mean(formula(config)) / plain}
        print(model, arm, json.dumps(result[arm]), flush=True)
    return result


def measured(model: str, turns: int) -> dict[str, float]:
    """CPU seconds of a mean iteration above those without the adversary: medians of the same turns' ratios.

    A mean iteration is one with the student's turn and four without, each timed once a turn.
    """
    works = {}
    for arm in ARMS:
        config = config_of(model, arm)
        stage, batch = stage_of(config, fake=False), part(config)
        for iteration, what in enumerate(("student", "critic")):
            works[f"{arm}: {what}"] = partial(stage.training_step, batch, iteration)
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(turns):
        for name, work in works.items():
            begin = time.process_time()  # of one thread: what else runs on the machine does not count
            work()
            times[name].append(time.process_time() - begin)
    took = {
        arm: [one + (EVERY - 1) * other for one, other in zip(times[f"{arm}: student"], times[f"{arm}: critic"], strict=True)]
        for arm in ARMS
    }
    shares = {arm: [own / off for own, off in zip(took[arm], took["off"], strict=True)] for arm in list(ARMS)[1:]}
    return {arm: statistics.median(found) - 1 for arm, found in shares.items()}


def main() -> None:
    """All models."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["small"])
    parser.add_argument("--turns", type=int, default=5)
    given = parser.parse_args()
    result: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.is_file() else {"models": {}}
    result |= {"machine": machine(CPU), "torch": torch.__version__}

    def _write() -> None:
        RESULT.write_text(json.dumps(result, indent=1) + "\n")

    for model in given.models:
        if model not in result["models"]:
            result["models"][model] = shares(model)
            _write()
        if model == "small":
            for arm, share in measured(model, given.turns).items():
                result["models"][model][arm]["measured"] = share
            result["turns"] = given.turns
            _write()
        print(json.dumps(result["models"][model], indent=1), flush=True)


if __name__ == "__main__":
    main()
