"""Reads the config, with `recipes` and `weights` beside it, and nobody else does: turns its groups into built objects."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from helios_train.conf.rules import ONE_BASE
from helios_train.conf.schema import BaseStage as BaseStageKeys
from helios_train.conf.schema import Config, ToyData, Umt5Text, WanCodec
from helios_train.conf.schema import DistillStage as DistillStageKeys
from helios_train.conf.schema import MidStage as MidStageKeys
from helios_train.conf.schema import OdeStage as OdeStageKeys
from helios_train.data.index import ClipStore
from helios_train.data.module import LoadSettings, WindowModule
from helios_train.data.toy import ToySpec
from helios_train.errors import InputError
from helios_train.kernels.dispatch import check_kernels
from helios_train.memory.offload import Offload
from helios_train.memory.parking import Parking
from helios_train.memory.places import DEVICE, HOST, Places
from helios_train.memory.quantized import FrozenLinear, quantize, storing
from helios_train.memory.stream import Streamed
from helios_train.models import adapters, manifest
from helios_train.models.adapters import NOTHING, Part
from helios_train.models.attention import check_attention
from helios_train.models.codecs import SIDE, Codec, dct_codec, wan_codec
from helios_train.models.ema import Ema
from helios_train.models.heads import Heads
from helios_train.models.loading import read_shape
from helios_train.models.precision import DTYPES
from helios_train.models.roles import CRITIC, HEADS, STUDENT, TEACHER, Backbone, Roles, as_student
from helios_train.models.text import HashText, TextEncoder, pad
from helios_train.models.text import Umt5Text as Umt5Encoder
from helios_train.models.transformer import HeliosTransformer
from helios_train.objectives.gan import crop_size
from helios_train.sampling.pipeline import SamplerSettings
from helios_train.stages.base import BaseStage
from helios_train.stages.distill import DistillStage
from helios_train.stages.mid import MidStage
from helios_train.stages.ode import OdeStage
from helios_train.stages.stage import Stage
from helios_train.stages.trainee import Training
from helios_train.tasks import recipes, weights
from helios_train.tasks.weights import Encoders

CAPTION_DROP = 0.1  # of runs that start from random weights: guidance needs it, and no base model has taught it


def device(config: Config) -> torch.device:
    """Where encoders and samplers run: as `trainer.accelerator` says, auto meaning the GPU where there is one."""
    wanted, there = config.trainer.accelerator, torch.cuda.is_available()
    if wanted == "gpu" and not there:
        raise InputError("trainer.accelerator=gpu: no GPU is seen here; use auto or cpu")
    if not there or wanted == "cpu":
        return torch.device("cpu")
    own = os.environ.get("LOCAL_RANK", "0") if config.trainer.devices > 1 else None  # of several processes this one's
    return torch.device("cuda", int(own)) if own else torch.device("cuda")


def codec(config: Config) -> Codec:
    """The video codec of `codec=`; InputError where its weights cannot be used."""
    return _codec(config, device(config))


def _codec(config: Config, where: torch.device) -> Codec:
    if not isinstance(config.codec, WanCodec):
        return dct_codec()
    if config.codec.weights is None:
        raise InputError("codec.weights=null: codec=wan needs its weights to encode and decode; name a diffusers folder")
    return wan_codec(config.codec.weights, where)


def text(config: Config) -> TextEncoder:
    """The text encoder of `text=`; umt5 loads its weights when it meets the first caption."""
    if not isinstance(config.text, Umt5Text):
        return HashText(config.text.rows, config.text.dim)
    return Umt5Encoder(config.text.weights, config.text.rows, config.text.dim, DTYPES[config.text.dtype], device(config))


def encoders(config: Config) -> Encoders:
    """What the config says of codec and text encoder. Without weights (training needs none: the shards are encoded) wan and
    umt5 have no fingerprint here; with them it is read, and UMT5 is not loaded for it."""
    of_codec: dict[str, Any] = {"name": config.codec.name}
    of_text: dict[str, Any] = {"name": config.text.name, "rows": config.text.rows, "dim": config.text.dim}
    if getattr(config.codec, "weights", "") is not None:
        of_codec["fingerprint"] = _codec(config, torch.device("cpu")).fingerprint()
    if getattr(config.text, "weights", "") is not None:
        of_text["fingerprint"] = text(config).fingerprint()
    return {"codec": of_codec, "text": of_text}


def same_encoders(one: Encoders, place: str, other: Encoders, other_place: str, remedy: str) -> None:
    """InputError unless two records of codec and text encoder agree, as far as both go; the places are for the message."""
    for what in ("codec", "text"):
        manifest.same_encoder(what, one[what], place, other[what], other_place, remedy)


def toy_spec(config: Config) -> ToySpec | None:
    """What the rendered videos look like; None unless data=toy."""
    if not isinstance(config.data, ToyData):
        return None
    return ToySpec(size=config.data.size, **asdict(config.data.toy))


def source(config: Config) -> Path:
    """The folder of videos that `data.root` is made from: `prepare.source`, or where toy videos are rendered to."""
    if isinstance(config.data, ToyData):
        return Path(config.data.root) / "videos"
    if config.prepare is None or config.prepare.source is None:
        raise InputError("prepare.source is not set: name the folder of mp4 files")
    return Path(config.prepare.source)


def data(config: Config) -> WindowModule:
    """The data of a run, out of the shards of `data.root`."""
    _can_watch(config)
    module = _module(config)
    _check_data(config, module)
    return module


def clips(config: Config) -> WindowModule:
    """The clips of `data.root`, whatever the stage trains on."""
    module = WindowModule(Path(config.data.root), _load_settings(config))
    _check_data(config, module)
    return module


def _load_settings(config: Config) -> LoadSettings:
    drop = config.stage.caption_drop
    return LoadSettings(
        global_batch=config.data.global_batch,
        micro_batch=config.data.micro_batch,
        workers=config.data.workers,
        held_out=config.data.held_out,
        text_rows=config.text.rows,
        caption_drop=drop if drop is not None else CAPTION_DROP * (config.init is None),
        seed=config.seed,
        pairs=isinstance(config.stage, DistillStageKeys),
        anchors=not isinstance(config.stage, BaseStageKeys) or config.stage.anchor,
    )


def _check_data(config: Config, module: WindowModule) -> None:
    """InputError where the shards have other encoders than the config, or no videos of its size."""
    stored = module.store.manifest
    _fits(config, {"codec": stored.codec, "text": stored.text})
    sizes = {(bucket.height, bucket.width) for bucket in module.store.buckets}
    if config.data.size not in sizes:
        have = ", ".join(f"[{h},{w}]" for h, w in sorted(sizes))
        wanted = list(config.data.size)
        raise InputError(f"{config.data.root}: holds videos of {have}, data.size is {wanted}; set data.size to one of them")


def _module(config: Config) -> WindowModule:
    """Windows of the clips; of stage=ode a teacher's trajectories beside them. InputError for those of another student."""
    root, settings = Path(config.data.root), _load_settings(config)
    if not isinstance(config.stage, OdeStageKeys):
        return WindowModule(root, settings)
    if config.stage.pairs is None:
        raise InputError(
            "stage.pairs=null: regression takes a teacher's trajectories; make them with task=pairs and name the folder"
        )
    module = WindowModule(root, settings, Path(config.stage.pairs))
    assert module.trajectories
    stored = module.trajectories.manifest
    made, wanted = stored.made, json.loads(json.dumps(asdict(config.stage.student)))
    keys = ("steps", "amplify", "edges", "gamma", "dynamic_shift", "shift_tokens")
    other = [
        f"{key}={made['student'][key]}, stage.student has {wanted[key]}" for key in keys if made["student"][key] != wanted[key]
    ]
    if other:
        raise InputError(
            f"{config.stage.pairs}: was made for a student of {other[0]}; make pairs for this one, or train that one"
        )
    if made["noise"] != config.stage.pair_noise:
        raise InputError(
            f"{config.stage.pairs}: has {made['noise']} noise, stage.pair_noise={config.stage.pair_noise}; make pairs with this "
            f"one, or set stage.pair_noise={made['noise']}"
        )
    _same_way(config, made["lineage"])
    same_encoders(
        stored.encoders,
        f"the pairs {config.stage.pairs}",
        {"codec": module.store.manifest.codec, "text": module.store.manifest.text},
        f"the dataset {config.data.root}",
        "make the pairs again from a teacher of the same encoders",
    )
    return module


def _same_way(config: Config, teacher: Sequence[Mapping[str, Any]]) -> None:
    """InputError where pairs come from a teacher that is neither the model the student starts from, nor made from it, nor what it
    was made from; `teacher`: what it has been through. Nothing is refused where either is unknown."""
    own = json.loads(json.dumps([asdict(link) for link in weights.start_lineage(config)])) if config.init else []
    links = min(len(own), len(teacher))
    if list(teacher[:links]) == own[:links]:
        return
    assert isinstance(config.stage, OdeStageKeys)
    one, other = next((one, other) for one, other in zip(teacher, own, strict=False) if one != other)
    differ = next(name for name in one if one[name] != other.get(name))
    raise InputError(
        f"{config.stage.pairs}: its teacher was not made as init={config.init} ({one['stage']} of {differ}={one[differ]}, here "
        f"{other['stage']} of {differ}={other.get(differ)}); make pairs from this model, or start from that teacher"
    )


def _can_watch(config: Config) -> None:
    """InputError where the run is to sample videos that it could not decode: found now, not when the first is due."""
    if isinstance(config.codec, WanCodec) and config.codec.weights is None and config.watch.sample:
        raise InputError(
            "codec.weights=null: watch.sample=true decodes videos with them; name the folder of the Wan VAE, or set "
            "watch.sample=false"
        )


def _fits(config: Config, stored: Encoders) -> None:
    """InputError where the shards come from another codec or text encoder than the config's, or than the weights of `init`."""
    remedy = "choose the codec and text of the dataset, or prepare it again"
    dataset = f"the dataset {config.data.root}"
    same_encoders(stored, dataset, encoders(config), "this config", remedy)
    learned = _learned_from(Path(config.init)) if config.init else None
    if learned:
        remedy = "train on latents and texts of the same encoders: prepare the videos again with them, or choose another init"
        same_encoders(stored, dataset, learned, f"init={config.init}", remedy)


def _learned_from(init: Path) -> Encoders | None:
    """What the weights of a merged folder, run or checkpoint learned from; None for somebody else's folder, or none."""
    if weights.is_run(init):
        return weights.content_of(init)[2]["WindowModule"]["encoders"]  # type: ignore[no-any-return]
    known = manifest.read_manifest(init)
    return {"codec": known.codec, "text": known.text} if known else None


def computes(config: Config, transformer: HeliosTransformer, trains: bool) -> None:
    """Sets how the transformer computes, as `model=` says; InputError where this machine cannot."""
    model, where = config.model, device(config)
    check_kernels(model.kernels, where)
    shape = transformer.config
    heads = shape.num_attention_heads, shape.attention_head_dim
    check_attention(model.attention, *heads, DTYPES[model.dtype], where, trains)
    transformer.compute_with(model.kernels, model.attention, model.compile)
    if trains and config.memory.bases != "bf16":
        quantize(transformer.blocks, config.memory.bases, lineage=config.memory.lineage == "as_bases")
    if trains and config.memory.block_inputs == "host":
        transformer.keep_inputs(Offload(Places(where)))


def stage(config: Config) -> Stage:
    """The stage of a run, from its first weights on."""
    if isinstance(config.stage, DistillStageKeys):
        return distill_stage(config)
    begun = _begun(config)
    if isinstance(config.stage, OdeStageKeys):
        _same_levels(config, begun)
    weights.adapt(config, begun.transformer)
    computes(config, begun.transformer, trains=True)
    return stage_of(config, begun.transformer)


def _begun(config: Config, streams: bool = False) -> weights.Start:
    """Where a run's weights come from: loaded to where they will stand, as `memory.bases` stores them where they stay frozen."""
    bases = config.memory.bases
    store = None if bases == "bf16" or weights.trains_fully(config) else storing(bases)
    return weights.start(config, device="cpu" if streams else device(config), store=store)


def stage_of(config: Config, transformer: HeliosTransformer) -> Stage:
    """The stage over a transformer that is ready to train."""
    if isinstance(config.stage, OdeStageKeys):
        return OdeStage(recipes.ode_objective(config), config.seed, transformer, training(config))
    kind = MidStage if isinstance(config.stage, MidStageKeys) else BaseStage
    return kind(recipes.base_recipe(config), transformer, training(config))


def training(config: Config) -> Training:
    """How what is trained first is stepped, and where."""
    host = Places(device(config)) if config.memory.optimizer == "host" else None
    return replace(recipes.training(config), host=host)


def _same_levels(config: Config, begun: weights.Start) -> None:
    """InputError where a few-step student starts from a model of other levels."""
    assert isinstance(config.stage, OdeStageKeys | DistillStageKeys)
    few, known = recipes.sampler(config), begun.sampler
    own = known and (known.levels, known.edges, known.gamma)
    if own and own != (few.levels, few.edges, few.gamma):
        raise InputError(
            f"init={config.init}: has levels, edges, gamma {own}, stage.student has {(few.levels, few.edges, few.gamma)}; make "
            "stage.student.steps, edges and gamma those of the model"
        )


def distill_stage(config: Config) -> DistillStage:
    """The cast: teacher and critic on the teacher's base, the student on its own, or (shared) with its lineage on theirs."""
    assert isinstance(config.stage, DistillStageKeys)
    scores = teacher(config)
    if shares_base(config):
        student, lineage = scores, shared_lineage(config, scores)
        assert config.init is not None
        # as the student learned them; to the teacher, which has one level, all are the same
        student.position(read_shape(Path(config.init)).get("positions", "own"))
    else:
        begun = _begun(config)
        _same_levels(config, begun)
        student, lineage = begun.transformer, NOTHING
    adapt_cast(config, student, scores)
    return distill_of(config, student, scores, lineage, negative_text(config))


def shares_base(config: Config) -> bool:
    """Whether all roles of stage=distill stand on one base: as said, or (auto) as the memory preset needs."""
    assert isinstance(config.stage, DistillStageKeys)
    return config.stage.bases == "shared" or (config.stage.bases == "auto" and config.memory.name in ONE_BASE)


def adapt_cast(config: Config, student: HeliosTransformer, scores: HeliosTransformer) -> None:
    """Puts the adapters of student and critic on plain transformers, which may be one and the same."""
    adapters.add_lora(student, STUDENT, weights.lora(config), config.seed)
    following = replace(weights.lora(config), history_adapters=False, history_patches=False)
    adapters.add_lora(scores, CRITIC, following, config.seed)


def distill_of(
    config: Config,
    student: HeliosTransformer,
    scores: HeliosTransformer,
    lineage: Part = NOTHING,
    negative: torch.Tensor | None = None,
) -> DistillStage:
    """The stage over transformers that have their adapters."""
    assert isinstance(config.stage, DistillStageKeys)
    own = as_student(student, lineage)
    roles = Roles(own, own if student is scores else Backbone(scores), lineage)
    for backbone in (roles.student,) if roles.shared else (roles.student, roles.scores):
        computes(config, backbone.transformer.train(), trains=True)
        if config.memory.checkpointing:
            backbone.checkpoint_blocks(config.memory.checkpoint_every)
    judging = heads(config, scores)
    if judging:
        Places(device(config)).put(judging, DEVICE)  # as all that trains, before masters are made of it
    if config.memory.park != "nothing":  # of the weights as they are stored now
        roles = replace(roles, present=_parking(config, roles, judging))
    if config.memory.stream:
        scores.streamed = Streamed(list(scores.blocks), Places(device(config)))
    how, keys = training(config), config.stage.critic
    critic = replace(how, rate=replace(how.rate, base=keys.lr), clip=keys.clip)
    return DistillStage(recipes.distill_recipe(config, negative), roles, how, critic, judging)


def _parking(config: Config, roles: Roles, judging: Heads | None) -> Parking:
    """What of the cast waits on the host while others compute."""
    groups: dict[str, list[Any]] = {HEADS: list(judging.parameters())} if judging else {}
    if config.memory.park == "idle":
        groups |= {role: list(roles.trainable(role).values()) for role in (STUDENT, CRITIC)}
        named = list(roles.student.transformer.named_parameters())
        modules = list(roles.student.transformer.named_modules())
        for link in roles.lineage.adapters:
            groups[STUDENT] += [weight for name, weight in named if f".{link}." in name]
            groups[STUDENT] += [one for name, one in modules if name.endswith(f".{link}") and isinstance(one, FrozenLinear)]
    needs = {STUDENT: [STUDENT], TEACHER: [], CRITIC: [CRITIC], HEADS: [HEADS, CRITIC]}
    return Parking(Places(device(config)), groups, needs)


def head_blocks(depth: int) -> list[int]:
    """The blocks whose tokens have a head, of so many: 5, 15, 25 and 35 of the published 40, and as deep in others."""
    return sorted({depth * eighth // 8 for eighth in (1, 3, 5, 7)})


def heads(config: Config, scores: HeliosTransformer) -> Heads | None:
    """The heads of the adversary on the critic's network; None where there is no adversary. InputError for blocks it lacks."""
    assert isinstance(config.stage, DistillStageKeys)
    keys, shape = config.stage.gan, scores.config
    if not keys.enabled:
        return None
    width, depth = shape.num_attention_heads * shape.attention_head_dim, shape.num_layers
    blocks = head_blocks(depth) if keys.blocks is None else list(keys.blocks)
    if not blocks or blocks != sorted(set(blocks)) or blocks[-1] >= depth:
        raise InputError(f"stage.gan.blocks={blocks}: the model has blocks 0 to {depth - 1}; give some of them, rising")
    rows, columns = (side // SIDE for side in config.data.size)
    return Heads(
        blocks,
        shape.in_channels,
        width,
        crop_size(rows, columns),
        head_width=keys.head_width or max(32, round(0.15 * width / 32) * 32),
        kind=keys.heads,
        seed=config.seed,
        dtype=DTYPES[config.model.dtype],
    )


def negative_text(config: Config) -> torch.Tensor | None:
    """What guidance leads away from, [rows, dim]: the dataset's negative prompt where that is asked for, None for zeros.

    InputError where the dataset has none.
    """
    assert isinstance(config.stage, DistillStageKeys)
    if config.stage.negative_text is None:
        return None
    rows = ClipStore(Path(config.data.root)).negative_text()
    if rows is None:
        raise InputError(
            f"stage.negative_text=prompt: the dataset {config.data.root} has no negative prompt; prepare it with "
            "prepare.negative_text=published (or a prompt of yours), or set stage.negative_text=null for zeros"
        )
    return pad([rows.float()], config.text.rows)[0]


def shared_lineage(config: Config, base: HeliosTransformer) -> Part:
    """The student's links after the teacher's, frozen on the teacher's base.

    InputError where a lineage is unknown, the student does not come from this teacher, or a link trained every weight.
    """
    assert isinstance(config.stage, DistillStageKeys)
    folders = config.init, config.stage.teacher
    known = [manifest.read_manifest(Path(folder)) if folder else None for folder in folders]
    for folder, one in zip(folders, known, strict=True):
        if one is None:
            raise InputError(f"{folder}: its lineage is unknown (no {manifest.NAME}); merge its run, or set stage.bases=distinct")
    student, teacher = known
    assert student and teacher and config.init
    later = student.lineage[len(teacher.lineage) :]
    if student.lineage[: len(teacher.lineage)] != teacher.lineage or any(link.trained != "lora" for link in later):
        raise InputError(
            f"init={config.init}: no chain of adapters leads there from {config.stage.teacher}, so they cannot share a base; "
            "name the teacher it comes from, or set stage.bases=distinct"
        )
    links = [name for name in student.adapters if name not in teacher.adapters]
    return adapters.add_lineage(base, {name: [Path(config.init) / file for file in student.adapters[name]] for name in links})


def teacher(config: Config) -> HeliosTransformer:
    """The plain weights of `stage.teacher`. InputError where it is none, or of another shape than the student."""
    assert isinstance(config.stage, DistillStageKeys)
    if config.stage.teacher is None:
        raise InputError(
            "stage.teacher=null: distribution matching takes a teacher; name the merged folder of the Base model that the "
            "student comes from"
        )
    return _begun(replace(config, init=config.stage.teacher), streams=config.memory.stream).transformer


def teacher_sampler(config: Config) -> SamplerSettings:
    """How the teacher is sampled; a folder that does not say is a Base model's."""
    assert isinstance(config.stage, DistillStageKeys) and config.stage.teacher is not None
    folder = Path(config.stage.teacher)
    if weights.is_run(folder):
        return recipes.sampler(weights.content_of(folder)[1])
    known = manifest.read_manifest(folder)
    return SamplerSettings.read(known.sampler) if known else SamplerSettings()


def ema(config: Config, stage: Stage) -> Ema | None:
    """The moving average of what the stage trains; None where it is off."""
    settings = config.stage.ema
    every = config.stage.every if isinstance(config.stage, DistillStageKeys) else 1  # iterations from one update to the next
    to_host = partial(Places(device(config)).put, place=HOST)
    return Ema(stage.masters.state_dict(), settings.decay, settings.start // every, to_host) if settings.decay else None
