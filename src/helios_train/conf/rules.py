"""What no single value shows: keys that must agree with one another. One ConfigError, one sentence, for the first that do not."""

from __future__ import annotations

import re
from collections.abc import Iterator

from helios_train.conf.schema import (
    Config,
    Data,
    DistillStage,
    Evaluate,
    FewSteps,
    FolderData,
    HistoryStage,
    Memory,
    MidStage,
    Model,
    OdeStage,
    Prepare,
    Pyramid,
    Sample,
    Stage,
    ToyData,
)
from helios_train.errors import ConfigError

ONE_BASE = ("shared_48gb", "nf4_24gb", "nf4_16gb")  # memory presets that hold one base alone
AUTO = "auto"  # chooses among the others
MOST_LEVELS, TABLE = 4, 1000  # of a pyramid; entries of the table of noise levels
NOMINAL_SIDE = 64  # pixels of the shorter side that lengths of toy videos are given for
ROUNDING = 1e-6  # shares may sum to 1 within this


def check(config: Config, sweep: bool = False) -> None:
    """Raise ConfigError for the first rule broken; `sweep`: the config is one run of a sweep."""
    if sweep and config.trainer.devices > 1:
        # the processes of further devices are started with the same command line: each would run the whole sweep
        raise ConfigError(
            f"trainer.devices={config.trainer.devices}: runs of a sweep take one device each; start them one by one"
        )
    for broken in _broken(config):
        raise ConfigError(broken)


def _broken(config: Config) -> Iterator[str]:
    if isinstance(config.stage, HistoryStage):
        mix, corrupt = config.stage.mix, config.stage.corrupt
        yield from _sum_to_one("stage.mix", {"t2v": mix.t2v, "i2v": mix.i2v, "v2v": mix.v2v, "full": mix.full})
        modes = {"noise": corrupt.noise, "blur": corrupt.blur, "saturation": corrupt.saturation, "clean": corrupt.clean}
        yield from _sum_to_one("stage.corrupt", modes)
    yield from memory_fits(config)
    yield from _model(config.model)
    if isinstance(config.stage, MidStage):
        pyramid = config.stage.pyramid
        yield from _pyramid("stage.pyramid.ratios", pyramid.ratios, pyramid, config.data)
        if pyramid.shift != 1:
            yield (
                f"stage.pyramid.shift={pyramid.shift:g}: diffusers' scheduler has no fixed shift beside the dynamic one that "
                "pyramids are sampled with; leave it at 1"
            )
    if isinstance(config.stage, OdeStage | DistillStage):
        yield from _pyramid("stage.student.steps", config.stage.student.steps, config.stage.student, config.data)
    if isinstance(config.stage, DistillStage):
        yield from _distill(config.stage)
    yield from _data(config.data, config.trainer.devices)
    if not config.watch.sigmas:
        yield "watch.sigmas=[]: name at least one noise level, or set watch.every=0"
    yield from steps_fit("watch.sample_steps", config.watch.sample_steps, config.stage)
    if config.task.name == "train" and config.model.text_dim != config.text.dim:
        yield (
            f"model.text_dim={config.model.text_dim} and text.dim={config.text.dim}: must be equal; "
            f"choose a text of that width, or set text.dim={config.model.text_dim}"
        )
    if config.prepare:
        yield from _prepare(config.prepare, config)
    if config.pairs:
        yield from _part("pairs.part", config.pairs.part)
    if config.sample:
        yield from _sample(config.sample)
    if config.evaluate:
        yield from _evaluate(config.evaluate, config)
    if config.chain:
        if not config.chain.links:
            yield "chain.links=[]: name at least one link, the words one would write to train it"
        if config.trainer.devices > 1:
            yield f"trainer.devices={config.trainer.devices}: a chain takes one device; run its links one by one on several"


def _prepare(prepare: Prepare, config: Config) -> Iterator[str]:
    if isinstance(config.data, FolderData) and prepare.source is None:
        yield "prepare.source=null: name the folder of videos to prepare (or choose data=toy)"
    yield from _part("prepare.part", prepare.part)
    for name, key, group in (("codec", config.codec, "wan"), ("text", config.text, "umt5")):
        if key.name == group and getattr(key, "weights", None) is None:
            yield f"{name}.weights=null: {name}={group} needs its weights to encode; name a diffusers folder"
    for listed in ("sizes", "lengths"):
        if getattr(prepare, listed) == ():
            yield f"prepare.{listed}=[]: name at least one, or null"


def _part(key: str, value: str) -> Iterator[str]:
    part = re.fullmatch(r"(\d+)/(\d+)", value)
    if part is None or not 1 <= int(part[1]) <= int(part[2]):
        yield f"{key}={value}: must be k/n with 1 <= k <= n, the k-th of n shares, such as 3/16"


def _sample(sample: Sample) -> Iterator[str]:
    if sample.image is not None and sample.video is not None:
        yield "sample.image and sample.video: a video begins from one of them; give one"
    if sample.prompt == ():
        yield "sample.prompt=[]: name at least one caption, or null"
    if sample.script is None:
        return
    if sample.prompt is not None:
        yield "sample.prompt and sample.script: one video has one of them; give one"
    sections = [section for section, _ in sample.script]
    if not sections or sections[0] != 0 or any(a >= b for a, b in zip(sections, sections[1:], strict=False)):
        yield f"sample.script: sections must rise from 0, got {sections}; the first caption stands at section 0"
    elif sections[-1] >= sample.sections:
        yield f"sample.script: section {sections[-1]} lies past the end; sample.sections={sample.sections}"


def _evaluate(evaluate: Evaluate, config: Config) -> Iterator[str]:
    sources = {"evaluate.videos": evaluate.videos, "init": config.init, "evaluate.compare": evaluate.compare or None}
    given = [key for key, value in sources.items() if value is not None]
    if len(given) > 1:
        yield f"{' and '.join(given)}: one command evaluates one thing; give one"
    if evaluate.metrics == ():
        yield "evaluate.metrics=[]: name at least one metric, or null"
    if config.trainer.devices > 1:
        yield (
            f"trainer.devices={config.trainer.devices}: task=evaluate takes one device a process; start several, each with its "
            "evaluate.part"
        )
    yield from _part("evaluate.part", evaluate.part)


def levels_of(stage: Stage) -> int:
    """Levels of resolution of the model that a stage trains."""
    if isinstance(stage, OdeStage | DistillStage):
        return len(stage.student.steps)
    return len(stage.pyramid.ratios) if isinstance(stage, MidStage) else 1


def steps_fit(key: str, steps: int | tuple[int, ...] | None, stage: Stage) -> Iterator[str]:
    """What is wrong with the denoising steps at `key` for a model that `stage` trains: a list of them names each level."""
    levels = levels_of(stage)
    if isinstance(steps, tuple) and len(steps) != levels:
        yield f"{key}={list(steps)}: the model has {levels} level{'s' * (levels > 1)}; give a number, or a list of {levels}"


def _sum_to_one(key: str, shares: dict[str, float]) -> Iterator[str]:
    if abs(sum(shares.values()) - 1) > ROUNDING:
        written = " + ".join(f"{name} {share:g}" for name, share in shares.items())
        yield f"{key}: shares must sum to 1; {written} = {sum(shares.values()):g}"


def _model(model: Model) -> Iterator[str]:
    if model.compile and model.kernels == "reference":
        yield "model.compile=true and model.kernels=reference: torch.compile cannot trace the reference; set model.kernels=auto"
    if sum(model.rope_dim) != model.head_dim:
        written = " + ".join(str(dim) for dim in model.rope_dim)
        yield f"model.rope_dim: must sum to model.head_dim={model.head_dim}; {written} = {sum(model.rope_dim)}"


def memory_fits(config: Config) -> Iterator[str]:
    """What a memory choice cannot do for this run."""
    if config.memory.name == AUTO:
        if config.memory != Memory(AUTO, "bf16", "bf16", False, "nothing", False, 1, "device", "device", True):
            yield "memory=auto: chooses all of the group's keys; choose one of the others to set some of them"
        return
    if config.memory.name in ONE_BASE and isinstance(config.stage, DistillStage) and config.stage.bases == "distinct":
        yield f"memory={config.memory.name}: holds one base, stage.bases=distinct has two; set stage.bases=shared (or auto)"
    distinct = isinstance(config.stage, DistillStage) and not (
        config.stage.bases == "shared" or (config.stage.bases == "auto" and config.memory.name in ONE_BASE)
    )
    if config.memory.stream and not distinct:
        yield (
            f"memory={config.memory.name}: streams the base of teacher and critic, which only stage=distill on distinct bases "
            "has; set memory.stream=false, or choose another memory"
        )
    if config.memory.stream and not (config.memory.checkpointing and config.memory.checkpoint_every == 1):
        yield "memory.stream=true: a block's weights leave before its backward; set memory.checkpointing=true, checkpoint_every=1"
    if config.memory.stream and config.model.compile:
        yield "memory.stream=true and model.compile=true: a compiled block cannot have its weights changed; leave one out"
    if config.memory.park != "nothing" and config.memory.optimizer != "host":
        yield "memory.park: what is stepped on the device cannot wait on the host; set memory.optimizer=host, or park=nothing"
    if config.memory.park == "idle" and not (config.memory.checkpointing and config.memory.checkpoint_every == 1):
        yield "memory.park=idle: adapters leave before their backward; set memory.checkpointing=true, checkpoint_every=1"
    if config.memory.block_inputs == "host" and not config.memory.checkpointing:
        yield "memory.block_inputs=host: blocks that are not recomputed have no inputs that wait; set memory.checkpointing=true"
    if config.memory.optimizer == "host" and config.optimizer.name == "adamw8bit":
        yield "memory.optimizer=host: 8-bit moments live on the device; take optimizer=adamw, or memory.optimizer=device"
    devices = config.trainer.devices
    if config.memory.optimizer == "host" and devices > 1:
        yield f"memory.optimizer=host: gradients on the host are one device's, trainer.devices={devices}; take one"
    if (config.memory.park != "nothing" or config.memory.stream) and devices > 1:
        yield f"memory={config.memory.name}: what waits on the host is one device's, trainer.devices={devices}; take one"


def _distill(stage: DistillStage) -> Iterator[str]:
    fewest, most = stage.rollout.sections
    if fewest > most:
        yield f"stage.rollout.sections=[{fewest},{most}]: must be [fewest, most]"
    if stage.rollout.history == "own" and stage.gan.enabled:
        yield (
            "stage.rollout.history=own: the adversary compares with the clip's own next section, which does not follow the "
            "student's history; set stage.gan.enabled=false, or stage.rollout.history=given"
        )
    if stage.rollout.history == "given" and most > 1:
        yield (
            f"stage.rollout.sections=[{fewest},{most}]: after a clip's own history there is one section; set "
            "stage.rollout.history=own"
        )
    if not stage.renoise.low <= stage.renoise.high <= TABLE:
        yield f"stage.renoise.low={stage.renoise.low}, high={stage.renoise.high}: times rise from low to high, at most {TABLE}"


def _pyramid(key: str, numbers: tuple[int, ...], pyramid: Pyramid | FewSteps, data: Data) -> Iterator[str]:
    """`numbers`: one a level, under `key`."""
    levels, group = len(numbers), key.rpartition(".")[0]
    if not 1 <= levels <= MOST_LEVELS:
        yield f"{key}={list(numbers)}: has a number for each level; there are 1 to {MOST_LEVELS} levels"
        return
    if pyramid.gamma > 1 / 3 + ROUNDING:
        yield f"{group}.gamma={pyramid.gamma:g}: no noise has correlation below -1/3 inside a 2x2 block; at most 1/3"
    edges = [int(edge * TABLE) for edge in pyramid.edges or ()]
    if pyramid.edges is not None and (len(edges) != levels + 1 or edges[0] or edges[-1] != TABLE or sorted(set(edges)) != edges):
        yield (
            f"{group}.edges={list(pyramid.edges)}: {levels} levels need {levels + 1} numbers that rise from 0 to 1, "
            ".001 apart or more"
        )
    unit = 16 * 2 ** (levels - 1)
    if any(side % unit for side in data.size):
        fitting = [sorted({max(unit, side // unit * unit), -(-side // unit) * unit}) for side in data.size]
        named = ", ".join(f"[{height},{width}]" for height in fitting[0] for width in fitting[1])
        yield f"data.size={list(data.size)}: {levels} levels need sides that are multiples of {unit} pixels, such as {named}"


def _data(data: Data, devices: int) -> Iterator[str]:
    if data.global_batch % (data.micro_batch * devices):
        yield (
            f"data.global_batch={data.global_batch}: must be a multiple of data.micro_batch={data.micro_batch} x "
            f"trainer.devices={devices}; the number of micro-batches a device accumulates is their quotient"
        )
    if not isinstance(data, ToyData):
        return
    toy = data.toy
    if data.held_out >= toy.clips:
        yield f"data.held_out={data.held_out}: must be less than data.toy.clips={toy.clips}; nothing is left to train on"
    if not toy.shapes:
        yield "data.toy.shapes=[]: name at least one shape"
    for name, (low, high) in (("radius", toy.radius), ("speed", toy.speed)):
        if low > high:
            yield f"data.toy.{name}=[{low:g},{high:g}]: must be [smallest, largest]"
    if 2 * toy.radius[1] >= NOMINAL_SIDE:
        yield f"data.toy.radius: {toy.radius[1]:g} px does not fit; it is given for videos whose shorter side is {NOMINAL_SIDE}"
