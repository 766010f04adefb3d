"""Where weights come from and what of them trains: folders, runs, checkpoints, random numbers; and what a run made of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from helios_train.conf.compose import saved, typed
from helios_train.conf.schema import Config
from helios_train.conf.schema import MidStage as MidStageKeys
from helios_train.errors import InputError
from helios_train.memory.host import must_hold
from helios_train.models import adapters, checkpoint, manifest
from helios_train.models.loading import Store, fill_buffers, load_transformer, random_transformer, read_shape
from helios_train.models.precision import DTYPES
from helios_train.models.roles import CRITIC, STUDENT
from helios_train.models.transformer import HeliosTransformer
from helios_train.run import RunFolder, iteration_of
from helios_train.sampling.pipeline import SamplerSettings
from helios_train.tasks import recipes

Encoders = Mapping[str, Mapping[str, Any]]  # "codec" and "text": name, and fingerprint, rows and dim where they are known


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


def start(config: Config, weights: str = "auto", device: torch.device | str = "cpu", store: Store | None = None) -> Start:
    """The transformer of `init` (a folder, a run, a checkpoint), or a random one, on `device`. Nothing trains yet.

    Plain weights, but that of a folder each layer is as `store` makes it: while it is loaded, or never as plain weights at all.
    """
    dtype = DTYPES[config.model.dtype]
    if config.init is None:
        return Start(random_transformer(shape(config), dtype, config.seed).to(device))
    path = Path(config.init)
    if is_run(path):
        run = trained(path, weights)
        settings, plain = recipes.sampler(run.config), unadapted(run).to(device)
        return replace(run.start, transformer=plain, lineage=run.lineage(), sampler=settings, encoders=run.encoders)
    if not path.is_dir():
        raise InputError(
            f"init={path}: no such folder or checkpoint; give a merged folder, a run folder or checkpoints/<iteration>.ckpt"
        )
    known = manifest.read_manifest(path)
    if known and known.adapters and not (path / "transformer").is_dir():
        raise InputError(f"init={path}: holds adapters alone; merge their run with merge.adapter_only=false and start from that")
    _same_shape(config, path)
    transformer = load_transformer(path, dtype, device, store, partial(must_hold, what=f"init={path}: loading it"))
    if known is None:
        return Start(transformer, base=manifest.fingerprint(path))
    try:
        settings = SamplerSettings.read(known.sampler)
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


def start_lineage(config: Config) -> tuple[manifest.Link, ...]:
    """What the weights of `init` have been through, without loading them; none of somebody else's folder."""
    assert config.init is not None
    known = manifest.read_manifest(Path(config.init))
    return known.lineage if known else ()


def trains_fully(config: Config) -> bool:
    """Whether every weight trains: as asked, or (auto) where the run starts from random weights."""
    return config.stage.trainable == "full" or (config.stage.trainable == "auto" and config.init is None)


def adapt(config: Config, transformer: HeliosTransformer) -> None:
    """Makes what the stage trains trainable, and says where a coarse level's tokens are.

    InputError where the model has learned otherwise.
    """
    if isinstance(config.stage, MidStageKeys):
        learned, wanted = transformer.positions, config.stage.pyramid.positions
        if learned not in ("own", wanted):
            raise InputError(
                f"init={config.init}: has learned {learned} positions; set stage.pyramid.positions={learned}, not {wanted}"
            )
        transformer.position(wanted)
    if trains_fully(config):
        adapters.train_everything(transformer)
    else:
        adapters.add_lora(transformer, STUDENT, lora(config), config.seed)
    transformer.train()
    if config.memory.checkpointing:
        transformer.checkpoint_blocks(every=config.memory.checkpoint_every)


def lora(config: Config) -> adapters.Lora:
    """The adapter of the stage."""
    return adapters.Lora(**asdict(config.stage.lora))


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
            sampler=asdict(recipes.sampler(config)),
            codec={key: self.encoders["codec"][key] for key in ("name", "fingerprint")},
            text={key: self.encoders["text"][key] for key in ("name", "fingerprint", "rows", "dim")},
            size=config.data.size,
            base=self.start.base,
        )


def content_of(path: Path) -> tuple[Path, Config, dict[str, Any]]:
    """The checkpoint that a run folder (its newest) or a path names, the config of its run, and what it holds."""
    if path.suffix == ".ckpt":
        file, folder = path, RunFolder.open(path.parent.parent)
    else:
        folder = RunFolder.open(path)
        newest = folder.newest_checkpoint()
        if newest is None:
            raise InputError(f"{path}: holds no checkpoint yet; let the run reach one (checkpoint.every iterations)")
        file = newest
    return file, typed(saved(folder.load_config())), checkpoint.read(file)


def trained(path: Path, weights: str) -> Trained:
    """A run folder (its newest checkpoint) or one of its checkpoints. `weights`: ema, last, or auto (ema where there is one)."""
    file, config, content = content_of(path)
    averages = [state["average"] for state in content["callbacks"].values() if "average" in state]
    if weights == "ema" and not averages:
        raise InputError(f"{file}: has no EMA (stage.ema.decay was 0); use weights=last")
    which = "ema" if averages and weights != "last" else "last"
    values = averages[0] if which == "ema" else content["state_dict"]
    values = {name: value for name, value in values.items() if f".{CRITIC}." not in name}  # which is no part of the model
    begun = start(config)
    adapt(config, begun.transformer)
    expected = {name: tuple(parameter.shape) for name, parameter in adapters.trainable(begun.transformer).items()}
    checkpoint.audit(expected, values, str(file))
    data = content["WindowModule"]
    return Trained(config, begun, iteration_of(file), which, values, data["dataset"], data["encoders"])


def unadapted(run: Trained) -> HeliosTransformer:
    """A plain transformer with the run's weights folded in; those of the run's own are used up."""
    with torch.device("meta"):
        plain = HeliosTransformer(**manifest.shape_of(run.start.transformer))
    weights = dict(adapters.folding(run.start.transformer, run.values, taking=True))
    checkpoint.audit({name: tuple(value.shape) for name, value in plain.state_dict().items()}, weights, "the folded weights")
    plain.load_state_dict(weights, assign=True)
    fill_buffers(plain)
    return plain
