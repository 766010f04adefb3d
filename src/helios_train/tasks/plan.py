"""task=plan: what one iteration of a stage needs, traced on a CPU without weights or data.

The real step runs on fake tensors, on one micro-batch (in ode and distill one sample), with what optimizers remember and, where
others came before it, the gradients already there. Of stage=distill that is a student's turn after the adversary's start whose
rollout keeps the most graphs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from helios_train import rng
from helios_train.conf import compose, rules
from helios_train.conf.rules import AUTO
from helios_train.conf.schema import Config, DistillStage, Memory, OdeStage
from helios_train.conf.schema import Plan as PlanKeys
from helios_train.data.batch import Window, WindowPair
from helios_train.data.format import atomic
from helios_train.data.order import Ref
from helios_train.data.pairs import Pair, Trajectory, Walk
from helios_train.diffusion.rollout import Rollout
from helios_train.errors import InputError
from helios_train.history import FRAMES, SECTION, History
from helios_train.kernels.dispatch import triton
from helios_train.memory.flops import FlopCounter
from helios_train.memory.live import LiveCounter
from helios_train.memory.parking import Parking
from helios_train.memory.places import HOST, label, materialise, placing, tensors_of
from helios_train.memory.plan import CARDS, CONTEXT, FRAGMENTATION, GIB, Costs, Plan, extended, extended_flops, moments, planned
from helios_train.models.adapters import NOTHING, Part
from helios_train.models.codecs import SIDE
from helios_train.models.loading import fill_buffers
from helios_train.models.precision import DTYPES
from helios_train.models.transformer import HeliosTransformer
from helios_train.stages import distill
from helios_train.stages.stage import Stage
from helios_train.tasks import build, needs, weights
from helios_train.tasks.needs import LINKS

FEWEST = 2  # blocks that are traced, and two more
BLOCK = 512  # bytes to which CUDA's allocator rounds
PRESETS = ("plain", "single", "h100_80gb", "stream", "shared_48gb", "nf4_24gb", "nf4_16gb")  # memory= choices, fastest first
CHANNELS = 16
BETWEEN = "between"  # what is computed outside of every moment: gradients taken at once
CARD = CARDS["80 GB"]  # that memory=auto is planned for where there is no GPU
STD = 0.02  # of weights that are drawn only to be there
FEW = 0.02  # share of a card that a base must take for a run to be planned before it starts


def run(config: Config, raw: dict[str, Any]) -> None:
    """Prints the plan of `stage=`, and writes it where `plan.output` and `plan.picture` say."""
    keys = config.plan
    assert keys is not None
    if config.memory.name == AUTO:
        memory, why, _ = chosen(config, keys.card or card_of(config) or CARD)
        config = replace(config, memory=memory)
        print(why)
    plan = plan_of(config)
    print(f"stage {config.stage.name}, model {config.model.name}, memory {config.memory.name}, {_sizes(config)}")
    print(plan.text(), end="", flush=True)
    record = plan.record()
    if keys.all:
        others = {config.memory.name: plan, **beside(config)}
        print(table(others), end="", flush=True)
        record["all"] = {name: other.record() for name, other in others.items()}
    if keys.output is not None:
        with atomic(Path(keys.output)) as file:
            file.write((json.dumps(record, indent=1) + "\n").encode())
    if keys.picture is not None:
        with atomic(Path(keys.picture)) as file:
            plan.picture().save(file, format="PNG")


def _sizes(config: Config) -> str:
    height, width = config.data.size
    return f"{height}x{width} pixels, {config.data.micro_batch} samples at once"


def plan_of(config: Config) -> Plan:
    """The plan of one iteration: traced at two depths and extended, or with `plan.exact` at the model's own."""
    assert config.plan is not None
    costs, depth, heads = Costs(config.plan.tflops * 1e12, config.plan.hfu), config.model.layers, _heads(config)
    few = max(FEWEST, heads)
    depths = few, few + 2
    if config.plan.exact or depth <= depths[1]:
        report, flops = traced(config)
        return planned(report, flops, costs)
    (one, some), (other, more) = (traced(with_blocks(config, blocks, heads)) for blocks in depths)
    return planned(extended(one, other, depths, depth), extended_flops(some, more, depths, depth), costs)


def _on_cpu(config: Config) -> Config:
    """The same on the device that plans, also where there is a GPU: fake tensors are the CPU's."""
    trainer, model = replace(config.trainer, accelerator="cpu"), replace(config.model, attention="sdpa", compile=False)
    kernels = "auto" if model.kernels in ("triton", "compile") else model.kernels
    return replace(config, trainer=trainer, model=replace(model, kernels=kernels))


def _as_there(config: Config, stage: Stage) -> None:
    """Gives the networks the row-wise ops of the planned machine: a GPU's unless `trainer.accelerator=cpu`."""
    kernels = config.model.kernels
    if config.trainer.accelerator == "cpu" or kernels == "reference" or triton is None:
        return
    for transformer in {id(one): one for one in stage.modules() if isinstance(one, HeliosTransformer)}.values():
        transformer.kernels = "triton"


def _heads(config: Config) -> int:
    """How many blocks have a discriminator head, which is no matter of depth."""
    if not isinstance(config.stage, DistillStage) or not config.stage.gan.enabled:
        return 0
    blocks = config.stage.gan.blocks
    return len(build.head_blocks(config.model.layers) if blocks is None else blocks)


def with_blocks(config: Config, blocks: int, heads: int) -> Config:
    """The same model with so few blocks, and as many heads."""
    smaller = replace(config, model=replace(config.model, layers=blocks))
    if not heads or not isinstance(config.stage, DistillStage):
        return smaller
    return replace(smaller, stage=replace(config.stage, gan=replace(config.stage.gan, blocks=tuple(range(heads)))))


def beside(config: Config) -> dict[str, Plan]:
    """The plans of the other `memory=` choices that go with this stage, fastest first."""
    return {name: plan_of(other) for name, other in presets(config).items() if name != config.memory.name}


def table(plans: Mapping[str, Plan]) -> str:
    """Memory choices side by side: what each takes, in how long, and the cards that hold it."""
    lines = [f"{'memory':<14}{'peak':>8}{'taken':>8}{'host':>8}{'seconds':>9}  fits"]
    for name, plan in plans.items():
        cards = ", ".join(card for card, fits in plan.fits().items() if fits) or "none"
        lines.append(f"{name:<14}{plan.peak:8.1f}{plan.reserved:8.1f}{plan.host:8.1f}{plan.seconds:9.1f}  {cards}")
    return "\n".join(lines) + "\n"


def card_of(config: Config) -> float | None:
    """GiB of the GPU that a run computes on; None on a CPU."""
    where = build.device(config)
    return torch.cuda.get_device_properties(where).total_memory / GIB if where.type == "cuda" else None


def chosen(config: Config, capacity: float | None) -> tuple[Memory, str, Plan | None]:
    """What `memory=auto` takes on a card of that many GiB, why, and its plan: the fastest choice that fits. None of a CPU.

    Bases are as stage.bases says, of two `auto` means distinct: what is computed is no matter of the card. InputError where
    nothing fits.
    """
    if capacity is None:
        return preset("plain"), "memory=auto: plain, for a CPU has no memory of its own", None
    if _few(config, capacity):
        return preset("plain"), f"memory=auto: plain, for so small a model takes little of {capacity:.1f} GiB", None
    passed = []
    for name, other in presets(config).items():
        least = _least(other)
        if least > capacity:
            passed.append(f"{name} takes more than {least:.1f} GiB")
            continue
        plan = plan_of(other)
        if plan.reserved <= capacity:
            why = "".join(f"; {one}" for one in passed)
            return other.memory, f"memory=auto: {name} takes {plan.reserved:.1f} of the card's {capacity:.1f} GiB{why}", plan
        passed.append(f"{name} takes {plan.reserved:.1f} GiB")
    raise InputError(
        f"memory=auto: nothing fits a card of {capacity:.1f} GiB ({', '.join(passed)}); take smaller data.size or "
        "data.micro_batch, stage.bases=shared in stage=distill, or a larger card"
    )


def presets(config: Config) -> dict[str, Config]:
    """The config under each `memory=` choice that goes with it, fastest first."""
    found = {}
    if isinstance(config.stage, DistillStage) and config.stage.bases == "auto" and config.memory.name == AUTO:
        config = replace(config, stage=replace(config.stage, bases="distinct"))
    for name in PRESETS:
        other = replace(config, memory=preset(name), plan=config.plan or _defaults())
        if not any(True for _ in rules.memory_fits(other)):
            found[name] = other
    return found


@cache
def preset(name: str) -> Memory:
    """What `memory=` and that name compose to."""
    return Memory(**compose.plain(compose.compose_plain([f"memory={name}"]))["memory"])


def smaller(config: Config) -> list[str]:
    """The `memory=` choices after the config's own that go with it."""
    names = list(presets(config))
    return names[names.index(config.memory.name) + 1 :] if config.memory.name in names else names


def _least(config: Config) -> float:
    """GiB that weights, and what is remembered of them on the device, take of a card, and no step less."""
    if config.memory.stream or config.memory.park != "nothing":
        return 0.0
    there, width = needs.counted(config), DTYPES[config.model.dtype].itemsize
    own = 0 if config.memory.optimizer == "host" else 2 * needs.FP32 * (config.optimizer.name != "adamw8bit")
    return (there.frozen + there.trained * (width + own)) / GIB * (1 + FRAGMENTATION) + CONTEXT


def _few(config: Config, capacity: float) -> bool:
    """Whether the weights are so few that tracing a step would be for nothing."""
    with torch.device("meta"):
        weighs = sum(weight.numel() for weight in HeliosTransformer(**weights.shape(config)).parameters())
    return weighs * DTYPES[config.model.dtype].itemsize < FEW * capacity * GIB


def must_fit(config: Config, capacity: float) -> Plan | None:
    """The plan of a run on a card of that many GiB; None where the weights are so few that tracing it would be for nothing.

    InputError where it does not fit, with the choices that do.
    """
    if _few(config, capacity):
        return None
    plan = plan_of(replace(config, plan=config.plan or _defaults()))
    if plan.reserved <= capacity:
        return plan
    others = {name: other for name, other in beside(replace(config, plan=_defaults())).items() if other.reserved <= capacity}
    instead = (
        "take " + " or ".join(f"memory={name} ({other.reserved:.1f} GiB)" for name, other in others.items())
        if others
        else "no memory= choice does: take smaller data.size or data.micro_batch, or a larger card"
    )
    raise InputError(
        f"memory={config.memory.name}: an iteration takes {plan.reserved:.1f} GiB, in {plan.moment}, the card has "
        f"{capacity:.1f}; {instead} (python -m helios_train task=plan tells what it is made of)"
    )


@cache
def _defaults() -> PlanKeys:
    return PlanKeys(**compose.plain(compose.compose_plain(["task=plan"]))["plan"])


def traced(config: Config) -> tuple[list[Any], dict[str, float]]:
    """The moments of an iteration, and FLOPs by what they are spent on."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        counter, flops, spent = LiveCounter(granularity=BLOCK), FlopCounter(), dict[str, float]()
        stage, batch = _stage(_on_cpu(config)).alone(), part(config)
        _as_there(config, stage)
        with placing(HOST):
            ema = build.ema(_on_cpu(config), stage)
        for trainee, optimizer in zip(stage.trainees, stage._alone, strict=True):
            trainee.masters.fill()
            optimizer.step()  # what it remembers is there from now on
            made = [[one.grad for one in trainee.masters], [list(state.values()) for state in optimizer.state.values()]]
            for tensor in tensors_of(made) if trainee.how.host else ():
                label(tensor.untyped_storage(), HOST)
            if _parts(config) == 1:
                trainee.masters.clear()
        _claim(counter, stage, batch, ema)

        @contextmanager
        def _moment(name: str) -> Iterator[None]:
            before, own = flops.total, sum(spent.values())
            with counter.moment(name):
                yield
            spent[name] = spent.get(name, 0.0) + flops.total - before - (sum(spent.values()) - own)

        _label(stage, _moment)
        with counter, flops, _gradients(counter, stage):
            stage.training_step(batch, 0)
            if ema is not None:
                with counter.moment("average"), placing(HOST):
                    ema.update(stage.masters.state_dict())
            report = counter.report()
    spent[BETWEEN] = flops.total - sum(spent.values())
    return moments(report), {name: _parts(config) * count for name, count in spent.items() if count}


def _parts(config: Config) -> int:
    """How many parts, each differentiated alone, one device's share of a global batch has."""
    alone = isinstance(config.stage, DistillStage | OdeStage)
    return config.data.global_batch // config.trainer.devices // (1 if alone else config.data.micro_batch)


@contextmanager
def _gradients(counter: LiveCounter, stage: Stage) -> Iterator[None]:
    """Gradients are somebody's."""
    names = [f"gradients {trainee.name}".strip() for trainee in stage.trainees]
    with counter.gradients(stage.trainees[0].masters, names[0]):
        with counter.gradients(stage.trainees[-1].masters, names[-1]) if len(names) > 1 else nullcontext():
            yield


def _claim(counter: LiveCounter, stage: Stage, batch: Any, ema: Any) -> None:
    """Whose the storages are that the step begins with."""
    trained = {id(weight) for trainee in stage.trainees for weight in trainee.masters.weights.values()}
    backbones = {"": stage.transformer}
    if isinstance(stage, distill.DistillStage):
        shared = stage.roles.shared
        backbones = {"": stage.transformer} if shared else {"student": stage.transformer, "teacher and critic": stage.scores}
    for name, transformer in backbones.items():
        frozen = {key: weight for key, weight in transformer.named_parameters() if id(weight) not in trained}
        lineage = {key for key in frozen if ".lora_" in key}
        counter.claim([weight for key, weight in frozen.items() if key not in lineage], f"weights {name}".strip())
        counter.claim([frozen[key] for key in lineage], "lineage")
        counter.claim(list(transformer.buffers()), f"weights {name}".strip())
        if transformer.streamed is not None:
            counter.claim([transformer.streamed.host, transformer.streamed.slots], f"weights {name}".strip())
    for trainee, optimizer in zip(stage.trainees, stage._alone, strict=True):
        counter.claim(list(trainee.masters.weights.values()), f"trainable {trainee.name}".strip())
        counter.claim([one for one in trainee.masters if id(one) not in trained], f"masters {trainee.name}".strip())
        counter.claim([one.grad for one in trainee.masters if one.grad is not None], f"gradients {trainee.name}".strip())
        counter.claim([list(state.values()) for state in optimizer.state.values()], f"optimizer {trainee.name}".strip())
    if isinstance(stage, distill.DistillStage) and isinstance(stage.roles.present, Parking):

        def _moved(name: str, group: list[Tensor | nn.Module]) -> None:
            own = [one for one in group if isinstance(one, Tensor) and one.requires_grad]
            counter.claim(own, f"trainable {name}")
            counter.claim([one for one in group if not isinstance(one, Tensor) or not one.requires_grad], "lineage")

        stage.roles.present.moved = _moved
    counter.claim(_tensors(batch), "data")
    if ema is not None:
        with placing(HOST):
            counter.claim(ema.average, "EMA")


def _tensors(batch: Any) -> list[Tensor]:
    """Those of windows, pairs of them, trajectories."""
    if isinstance(batch, Tensor):
        return [batch]
    if isinstance(batch, list | tuple):
        return [tensor for item in batch for tensor in _tensors(item)]
    return [tensor for item in vars(batch).values() for tensor in _tensors(item)] if hasattr(batch, "__dict__") else []


def _label(stage: Stage, moment: Callable[[str], Any]) -> None:
    """From now on every call of a network, every backward and every optimizer step of this stage is a moment."""

    def _named(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def _call(*given: Any, **words: Any) -> Any:
            with moment(name):
                return work(*given, **words)

        return _call

    if isinstance(stage, distill.DistillStage):
        whole = stage.cast
        stage.cast = replace(
            whole,
            student=_named("student", whole.student),
            teacher=_named("teacher", whole.teacher),
            critic=_named("critic", whole.critic),
            logits=_named("adversary", whole.logits) if whole.logits else None,
        )
    else:
        stage.transformer.velocity = _named("network", stage.transformer.velocity)  # type: ignore[method-assign]
    for trainee in stage.trainees:
        trainee.add = _named(f"backward {trainee.name}".strip(), trainee.add)  # type: ignore[method-assign]
        trainee.step = _named(f"step {trainee.name}".strip(), trainee.step)  # type: ignore[method-assign]


class _MostGraphs(Rollout):
    """A rollout whose every level has a graph: the later ones are left at their first step, which starts from the level
    before."""

    def exits(self, seed: int, who: str, where: Any, empty: bool) -> tuple[int, ...]:
        """The first level's last step, the others' first."""
        counts = self.counts(empty)
        return (counts[0] - 1, *(0 for _ in counts[1:]))


def stage_with_weights(config: Config, device: torch.device | str = "cpu") -> Stage:
    """The stage that is planned, with small random weights on `device`: for running what a plan describes.

    On a CPU they are the same each time; a GPU draws its own, in the dtype they are kept in.
    """
    return _stage(config, fake=False, device=device)


def _stage(config: Config, fake: bool = True, device: torch.device | str = "cpu") -> Stage:
    """The stage of a run in its worst case: of distill, after the adversary's start, with the rollout that keeps most graphs."""
    if not isinstance(config.stage, DistillStage):
        return bare_stage(config, fake, device)
    stage = bare_stage(replace(config, stage=replace(config.stage, gan=replace(config.stage.gan, start=0))), fake, device)
    assert isinstance(stage, distill.DistillStage)
    own = stage.recipe.student.rollout
    most = _MostGraphs(**{field.name: getattr(own, field.name) for field in fields(own)})
    stage.recipe = replace(stage.recipe, student=replace(stage.recipe.student, rollout=most))
    return stage


def bare_stage(config: Config, fake: bool = True, device: torch.device | str = "cpu") -> Stage:
    """The stage of a run with no weights (inside a FakeTensorMode) or small random ones."""
    if not isinstance(config.stage, DistillStage):
        transformer = materialise(partial(_adapted, config), fake, fill_buffers, device)
        _fill(transformer, fake)
        assert isinstance(transformer, HeliosTransformer)
        build.computes(config, transformer, trains=True)
        return build.stage_of(config, transformer)
    shared = build.shares_base(config)
    modules = materialise(partial(_cast, config), fake, _fill_all, device)
    _fill(modules, fake)
    both = list(modules.children())
    student, scores = both[0], both[-1]
    assert isinstance(student, HeliosTransformer) and isinstance(scores, HeliosTransformer)
    return build.distill_of(config, student, scores, Part(LINKS) if shared else NOTHING)


@torch.no_grad()
def _fill(module: nn.Module, fake: bool) -> None:
    for number, weight in enumerate([] if fake else module.parameters()):
        if weight.is_cuda:
            weight.normal_(0, STD, generator=torch.Generator(weight.device).manual_seed(number))
        else:
            weight.copy_(STD * rng.normal(rng.generator(0, "weight", number), weight.shape))
    if not fake:
        module.to(next(module.parameters()).device)  # buffers that were computed on the host


def _adapted(config: Config) -> nn.Module:
    (transformer,) = needs.bare(replace(config, init=config.init or "somewhere"))
    return transformer


def _cast(config: Config) -> nn.Module:
    """One transformer that plays all roles, with a lineage of two links, or two."""
    return nn.ModuleList(needs.bare(config))


def _fill_all(modules: nn.Module) -> None:
    for module in modules.children():
        fill_buffers(module)


def part(config: Config) -> Any:
    """One part of an iteration, of ones: what a stage's training_step takes."""
    if isinstance(config.stage, OdeStage):
        return [Pair(_trajectory(config), Ref(0, 0, 0, 0))]
    if isinstance(config.stage, DistillStage):
        window = _window(config, 1)
        return [WindowPair(window, window)]
    return [_window(config, config.data.micro_batch)]


def _window(config: Config, samples: int) -> Window:
    rows, columns = (side // SIDE for side in config.data.size)
    history = History(
        torch.ones(samples, CHANNELS, FRAMES, rows, columns),
        torch.ones(samples, CHANNELS, 1, rows, columns),
        (FRAMES,) * samples,
        (True,) * samples,
    )
    refs = tuple(Ref(0, sample, 0, sample) for sample in range(samples))
    target = torch.ones(samples, CHANNELS, SECTION, rows, columns)
    return Window(target, history, torch.ones(samples, config.text.rows, config.text.dim), refs, (3,) * samples)


def _trajectory(config: Config) -> Trajectory:
    """As many sections as a sample learns from, after one more."""
    assert isinstance(config.stage, OdeStage)
    few, (rows, columns) = config.stage.student, (side // SIDE for side in config.data.size)
    levels = len(few.steps)

    def _walk(level: int, count: int) -> Walk:
        size = (rows >> (levels - 1 - level), columns >> (levels - 1 - level))
        times = np.linspace(900, 500, count, dtype=np.float32)
        return Walk(torch.ones(count + 1, CHANNELS, SECTION, *size), times)

    sections = tuple(
        tuple(_walk(level, count) for level, count in enumerate(few.steps)) for _ in range(config.stage.sections + 1)
    )
    return Trajectory(sections, torch.ones(1, config.text.rows, config.text.dim))
