"""The only reader of the config: turns its groups into built objects."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from torch.optim import AdamW, Optimizer

from helios_train.conf.compose import typed
from helios_train.conf.schema import Config, ToyData, Umt5Text, WanCodec
from helios_train.conf.schema import MidStage as MidStageKeys
from helios_train.data.module import LoadSettings, WindowModule
from helios_train.data.toy import ToySpec
from helios_train.diffusion.pyramid import Pyramid
from helios_train.diffusion.schedule import NoiseLevels
from helios_train.errors import InputError
from helios_train.history.corrupt import Corrupt
from helios_train.history.mix import Mix
from helios_train.kernels.dispatch import check_kernels
from helios_train.memory.places import HOST, Places
from helios_train.models import adapters, checkpoint, manifest
from helios_train.models.attention import check_attention
from helios_train.models.codecs import Codec, dct_codec, wan_codec
from helios_train.models.ema import Ema
from helios_train.models.loading import load_transformer, random_transformer, read_shape
from helios_train.models.precision import DTYPES
from helios_train.models.text import HashText, TextEncoder
from helios_train.models.text import Umt5Text as Umt5Encoder
from helios_train.models.transformer import HeliosTransformer
from helios_train.objectives.flow import FlowObjective, Objective
from helios_train.objectives.pyramid_flow import PyramidFlowObjective
from helios_train.run import RunFolder, iteration_of
from helios_train.sampling.pipeline import SamplerSettings
from helios_train.stages.base import BaseRecipe, BaseStage
from helios_train.stages.mid import MidStage
from helios_train.stages.stage import LearningRate, Stage

Encoders = Mapping[str, Mapping[str, Any]]  # "codec" and "text": name, and fingerprint, rows and dim where they are known

STUDENT = "student"
CAPTION_DROP = 0.1  # of runs that start from random weights: guidance needs it, and no base model has taught it


def device(config: Config) -> torch.device:
    """Where encoders and samplers run: as `trainer.accelerator` says, auto meaning the GPU where there is one."""
    wanted, there = config.trainer.accelerator, torch.cuda.is_available()
    if wanted == "gpu" and not there:
        raise InputError("trainer.accelerator=gpu: no GPU is seen here; use auto or cpu")
    return torch.device("cuda" if there and wanted != "cpu" else "cpu")


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
    root = Path(config.data.root)
    drop = config.stage.caption_drop
    settings = LoadSettings(
        global_batch=config.data.global_batch,
        micro_batch=config.data.micro_batch,
        workers=config.data.workers,
        held_out=config.data.held_out,
        text_rows=config.text.rows,
        caption_drop=drop if drop is not None else CAPTION_DROP * (config.init is None),
        seed=config.seed,
    )
    _can_watch(config)
    module = WindowModule(root, settings)
    stored = module.store.manifest
    _fits(config, {"codec": stored.codec, "text": stored.text})
    sizes = {(bucket.height, bucket.width) for bucket in module.store.buckets}
    if config.data.size not in sizes:
        have = ", ".join(f"[{h},{w}]" for h, w in sorted(sizes))
        raise InputError(f"{root}: holds videos of {have}, data.size is {list(config.data.size)}; set data.size to one of them")
    return module


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
    if is_run(init):
        return _content(init)[2]["WindowModule"]["encoders"]  # type: ignore[no-any-return]
    known = manifest.read_manifest(init)
    return {"codec": known.codec, "text": known.text} if known else None


def is_run(path: Path) -> bool:
    """Whether a path that gives weights is a run folder or a checkpoint of one."""
    return path.suffix == ".ckpt" or (path / "config.yaml").is_file()


def shape(config: Config) -> dict[str, Any]:
    """The transformer's config as diffusers names it."""
    model = config.model
    return {
        "num_attention_heads": model.heads,
        "attention_head_dim": model.head_dim,
        "num_layers": model.layers,
        "ffn_dim": model.ffn_dim,
        "text_dim": model.text_dim,
        "freq_dim": model.freq_dim,
        "rope_dim": list(model.rope_dim),
        "rope_theta": float(model.rope_theta),
    }


@dataclass(frozen=True)
class Start:
    """Where a run's weights come from: the transformer, what it has been through, and the fingerprint of its first weights."""

    transformer: HeliosTransformer
    lineage: tuple[manifest.Link, ...] = ()
    base: str | None = None
    sampler: SamplerSettings | None = None
    encoders: Encoders | None = None  # what the weights learned from, where that is known


def start(config: Config, weights: str = "auto") -> Start:
    """The transformer of `init` (a folder, a run, a checkpoint), or a random one. Plain weights, nothing trains yet."""
    dtype = DTYPES[config.model.dtype]
    if config.init is None:
        return Start(random_transformer(shape(config), dtype, config.seed))
    path = Path(config.init)
    if is_run(path):
        run = trained(path, weights)
        settings = sampler(run.config)
        return replace(run.start, transformer=unadapted(run), lineage=run.lineage(), sampler=settings, encoders=run.encoders)
    if not path.is_dir():
        raise InputError(
            f"init={path}: no such folder or checkpoint; give a merged folder, a run folder or checkpoints/<iteration>.ckpt"
        )
    known = manifest.read_manifest(path)
    if known and known.adapters and not (path / "transformer").is_dir():
        raise InputError(f"init={path}: holds adapters alone; merge their run with merge.adapter_only=false and start from that")
    _same_shape(config, path)
    transformer = load_transformer(path, dtype)
    if known is None:
        return Start(transformer, base=manifest.fingerprint(path))
    try:
        edges = known.sampler.get("edges")
        settings = SamplerSettings(**known.sampler | {"edges": tuple(edges) if edges else None})
    except TypeError as error:
        raise InputError(f"{path / manifest.NAME}: sampler has unknown settings ({error}); merge the run again") from error
    learned = {"codec": known.codec, "text": known.text}
    return Start(transformer, known.lineage, known.base or manifest.fingerprint(path), settings, learned)


def _same_shape(config: Config, folder: Path) -> None:
    found, wanted = read_shape(folder), shape(config)
    for name, value in wanted.items():
        there = found.get(name, value)
        if (list(there) if isinstance(there, (list, tuple)) else there) != value:
            raise InputError(
                f"init={folder}: has {name}={there}, model={config.model.name} has {value}; choose the model of that folder"
            )


def trains_fully(config: Config) -> bool:
    """Whether every weight trains: as asked, or (auto) where the run starts from random weights."""
    return config.stage.trainable == "full" or (config.stage.trainable == "auto" and config.init is None)


def adapt(config: Config, transformer: HeliosTransformer) -> None:
    """Makes what the stage trains trainable."""
    if trains_fully(config):
        adapters.train_everything(transformer)
    else:
        adapters.add_lora(transformer, STUDENT, lora(config), config.seed)
    transformer.train()
    if config.memory.checkpointing:
        transformer.checkpoint_blocks(every=config.memory.checkpoint_every)


def computes(config: Config, transformer: HeliosTransformer, trains: bool) -> None:
    """Sets how the transformer computes, as `model=` says; InputError where this machine cannot."""
    model, where = config.model, device(config)
    check_kernels(model.kernels, where)
    shape = transformer.config
    heads = shape.num_attention_heads, shape.attention_head_dim
    check_attention(model.attention, *heads, DTYPES[model.dtype], where, trains)
    transformer.compute_with(model.kernels, model.attention, model.compile)


def lora(config: Config) -> adapters.Lora:
    """The adapter of the stage."""
    return adapters.Lora(**asdict(config.stage.lora))


def objective(config: Config) -> Objective:
    """What the stage trains."""
    if isinstance(config.stage, MidStageKeys):
        keys = config.stage.pyramid
        return PyramidFlowObjective(
            Pyramid(len(keys.ratios), keys.edges, keys.gamma, keys.shift),
            ratios=keys.ratios,
            dynamic=keys.dynamic_shift,
            cap=keys.shift_cap,
            timesteps=keys.timesteps,
            sigmas=keys.sigmas,
            stratified=keys.stratified,
        )
    flow = config.stage.flow
    levels = NoiseLevels(
        density=flow.density,
        mean=flow.logit_mean,
        std=flow.logit_std,
        mode_scale=flow.mode_scale,
        stratified=flow.stratified,
        fixed=flow.shift,
        dynamic=flow.dynamic_shift,
        cap=flow.shift_cap,
        weighting=flow.weighting,
    )
    return FlowObjective(levels)


def base_recipe(config: Config) -> BaseRecipe:
    """Objective, history mix and corruption of a stage that trains on one section given its history."""
    stage = config.stage
    mix, corrupt = asdict(stage.mix), asdict(stage.corrupt)
    group = {"sample": 1, "micro_batch": config.data.micro_batch}
    mix_group, corrupt_group = group[mix.pop("draw")], group[corrupt.pop("draw")]
    return BaseRecipe(
        objective(config),
        Mix(**mix, group=mix_group),
        Corrupt(**corrupt, group=corrupt_group),
        config.seed,
        config.data.global_batch,
    )


def value_of(config: Config, key: str) -> Any:
    """The value of a dotted key; a dict for a group of keys."""
    value: Any = asdict(config)
    for part in key.split("."):
        value = value[part]
    return value


def published_value(config: Config, key: str) -> Any:
    """What the recipe's own file gives a dotted key."""
    file = resources.files("helios_train.conf") / "recipe" / f"{config.stage.name}_{config.recipe.name}.yaml"
    value: Any = yaml.safe_load(file.read_text())
    for part in key.split("."):
        value = value[part]
    return value


def optimizer(config: Config, parameters: Iterable[nn.Parameter]) -> Optimizer:
    """AdamW in fp32, or with 8-bit moments."""
    o = config.optimizer
    common = {"lr": o.lr, "betas": o.betas, "eps": o.eps, "weight_decay": o.weight_decay}
    if o.name == "adamw":
        return AdamW(list(parameters), fused=True, **common)  # type: ignore[arg-type]
    from bitsandbytes.optim import AdamW8bit  # here: it probes for CUDA when imported

    return AdamW8bit(list(parameters), **common)  # type: ignore[arg-type]


def learning_rate(config: Config) -> LearningRate:
    """The schedule."""
    o = config.optimizer
    return LearningRate(o.lr, o.schedule, o.warmup, o.decay, o.total)


def stage(config: Config) -> BaseStage:
    """The stage of a run, from its first weights on."""
    transformer = start(config).transformer
    adapt(config, transformer)
    computes(config, transformer, trains=True)
    return stage_of(config, transformer)


def stage_of(config: Config, transformer: HeliosTransformer) -> BaseStage:
    """The stage over a transformer that is ready to train."""
    kind = MidStage if isinstance(config.stage, MidStageKeys) else BaseStage
    return kind(
        base_recipe(config),
        transformer=transformer,
        optimizer=partial(optimizer, config),
        rate=learning_rate(config),
        clip=config.optimizer.clip,
    )


def ema(config: Config, stage: Stage) -> Ema | None:
    """The moving average of what the stage trains; None where it is off."""
    settings = config.stage.ema
    to_host = partial(Places(device(config)).put, place=HOST)
    return Ema(stage.masters.state_dict(), settings.decay, settings.start, to_host) if settings.decay else None


def sampler(config: Config) -> SamplerSettings:
    """How the trained model is sampled: shifted as trained, and where training has no dynamic shift, as diffusers' pipelines."""
    solver = config.sample.solver if config.sample else "unipc"
    if isinstance(config.stage, MidStageKeys):
        keys = config.stage.pyramid
        linear = keys.dynamic_shift if keys.dynamic_shift != "none" else "linear"
        return SamplerSettings(linear, solver, len(keys.ratios), keys.edges, keys.gamma, keys.shift)
    dynamic = config.stage.flow.dynamic_shift
    return SamplerSettings(dynamic if dynamic != "none" else "exponential", solver)


@dataclass(frozen=True)
class Trained:
    """A run's weights at a checkpoint: its config, adapted transformer, and what it trained (fp32, by name)."""

    config: Config
    start: Start
    iteration: int
    which: str
    values: dict[str, torch.Tensor]
    dataset: str  # sha256 of the manifest of what it learned from
    encoders: Encoders  # and how that was encoded

    def folded(self) -> dict[str, torch.Tensor]:
        """The plain state dict with the trained weights in place."""
        return adapters.folded(self.start.transformer, self.values)

    def lineage(self) -> tuple[manifest.Link, ...]:
        """The lineage with this run as its last link."""
        trained_how = "full" if trains_fully(self.config) else "lora"
        link = manifest.Link(
            self.config.stage.name,
            self.config.recipe.name,
            self.iteration,
            self.which,
            trained_how,
            self.config.seed,
            self.dataset,
        )
        return (*self.start.lineage, link)

    def model_manifest(self) -> manifest.ModelManifest:
        """What the merged folder says of itself."""
        config = self.config
        return manifest.ModelManifest(
            lineage=self.lineage(),
            sampler=asdict(sampler(config)),
            codec={key: self.encoders["codec"][key] for key in ("name", "fingerprint")},
            text={key: self.encoders["text"][key] for key in ("name", "fingerprint", "rows", "dim")},
            size=config.data.size,
            base=self.start.base,
        )


def _content(path: Path) -> tuple[Path, Config, dict[str, Any]]:
    """The checkpoint that a run folder (its newest) or a path names, the config of its run, and what it holds."""
    if path.suffix == ".ckpt":
        file, folder = path, RunFolder.open(path.parent.parent)
    else:
        folder = RunFolder.open(path)
        newest = folder.newest_checkpoint()
        if newest is None:
            raise InputError(f"{path}: holds no checkpoint yet; let the run reach one (checkpoint.every iterations)")
        file = newest
    return file, typed(folder.load_config()), checkpoint.read(file)


def trained(path: Path, weights: str) -> Trained:
    """A run folder (its newest checkpoint) or one of its checkpoints. `weights`: ema, last, or auto (ema where there is one)."""
    file, config, content = _content(path)
    averages = [state["average"] for state in content["callbacks"].values() if "average" in state]
    if weights == "ema" and not averages:
        raise InputError(f"{file}: has no EMA (stage.ema.decay was 0); use weights=last")
    which = "ema" if averages and weights != "last" else "last"
    values = averages[0] if which == "ema" else content["state_dict"]
    begun = start(config)
    adapt(config, begun.transformer)
    expected = {name: tuple(parameter.shape) for name, parameter in adapters.trainable(begun.transformer).items()}
    checkpoint.audit(expected, values, str(file))
    data = content["WindowModule"]
    return Trained(config, begun, iteration_of(file), which, values, data["dataset"], data["encoders"])


def unadapted(run: Trained) -> HeliosTransformer:
    """A plain transformer with the run's weights folded in."""
    plain = random_transformer(manifest.shape_of(run.start.transformer), DTYPES[run.config.model.dtype], 0)
    weights = run.folded()
    checkpoint.audit({name: tuple(value.shape) for name, value in plain.state_dict().items()}, weights, "the folded weights")
    plain.load_state_dict(weights)
    return plain
