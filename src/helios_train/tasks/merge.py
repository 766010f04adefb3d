"""task=merge: a run becomes a diffusers folder with a manifest, checked on the way."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from helios_train import rng
from helios_train.conf.schema import Config
from helios_train.errors import HeliosError, InputError
from helios_train.history import FRAMES, SECTION, History
from helios_train.models import adapters, manifest
from helios_train.models.transformer import HeliosTransformer, load_transformer
from helios_train.tasks import build

# Largest relative change of a forward that folding may make: rounding of sums in fp32, of weights in bf16.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2}


def run(config: Config, raw: dict[str, Any]) -> None:
    """Merges the run or checkpoint `init` into `merge.output`."""
    assert config.merge is not None
    if config.init is None:
        raise InputError("task=merge needs init=<run folder or checkpoints/<iteration>.ckpt>")
    source = Path(config.init)
    output = (
        Path(config.merge.output) if config.merge.output else (source if source.is_dir() else source.parent.parent) / "merged"
    )
    merge(source, output, config.merge.weights)
    print(f"merged {source} into {output}")


def merge(source: Path, output: Path, weights: str) -> Path:
    """Folds what a run trained into its base and writes the folder, which has its name only once it is whole and checked.

    InputError where `output` holds something already.
    """
    if output.exists() and any(output.iterdir()):
        raise InputError(f"{output}: is not empty; choose another merge.output, nothing was overwritten")
    run_ = build.trained(source, weights)
    plain = run_.folded()
    adapted = run_.start.transformer
    _put(adapted, run_.values)
    links: dict[str, dict[str, torch.Tensor]] = {}
    if not build.trains_fully(run_.config):
        links[_link_name(run_)] = adapters.link_state(adapted, build.STUDENT, run_.values)
    settings = build.sampler(run_.config)
    unfinished = output.with_name(output.name + ".tmp")
    if unfinished.exists():
        shutil.rmtree(unfinished)  # of a merge that was killed
    try:
        shape = manifest.shape_of(adapted)
        manifest.write_folder(unfinished, shape, plain, settings.scheduler(), run_.model_manifest(), links)
        for file in _earlier_links(run_):
            shutil.copy(file, unfinished / "adapters")
        check_forward(adapted, load_transformer(unfinished, adapted.proj_out.weight.dtype))
        unfinished.replace(output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return output


def _link_name(run_: build.Trained) -> str:
    """The stage; a second link of one stage is `<stage>_2`, and so on."""
    stage = run_.config.stage.name
    before = sum(link.stage == stage for link in run_.start.lineage)
    return f"{stage}_{before + 1}" if before else stage


def _earlier_links(run_: build.Trained) -> list[Path]:
    """The adapters of the folder the run started from."""
    return sorted((Path(run_.config.init) / "adapters").glob("*.safetensors")) if run_.config.init else []


@torch.no_grad()
def check_forward(before: HeliosTransformer, after: HeliosTransformer) -> float:
    """Relative distance of one forward before merging from the one after; HeliosError where it is more than rounding."""
    dtype = after.proj_out.weight.dtype
    draw = rng.generator(0, "merge check")
    x_t = rng.normal(draw, (1, 16, SECTION, 8, 8))
    frames, anchor = rng.normal(draw, (1, 16, FRAMES, 8, 8)), rng.normal(draw, (1, 16, 1, 8, 8))
    history = History(frames, anchor, (FRAMES,), (True,))
    text = rng.normal(draw, (1, 8, int(after.config.text_dim)))
    one, other = (model.eval().velocity(x_t, torch.tensor([500.0]), text, history) for model in (before, after))
    distance = float((one - other).norm() / one.norm().clamp_min(1e-12))
    if not distance <= TOLERANCE[dtype]:
        raise HeliosError(
            f"the merged weights compute something else than the run's: relative distance {distance:.2e}; keep the run"
        )
    return distance


@torch.no_grad()
def _put(transformer: HeliosTransformer, values: dict[str, torch.Tensor]) -> None:
    for name, parameter in adapters.trainable(transformer).items():
        parameter.copy_(values[name])
