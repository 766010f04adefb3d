"""task=merge: a run becomes a diffusers folder with a manifest, checked on the way."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from helios_train import rng
from helios_train.conf.schema import Config
from helios_train.errors import HeliosError, InputError
from helios_train.history import FRAMES, SECTION, History
from helios_train.models import adapters, manifest
from helios_train.models.loading import load_transformer
from helios_train.models.roles import STUDENT
from helios_train.models.transformer import HeliosTransformer
from helios_train.tasks import recipes, weights

# Largest relative change of a forward that folding may make: rounding of sums in fp32, of weights in bf16.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2}


def run(config: Config, raw: dict[str, Any]) -> None:
    """Merges the run or checkpoint `init` into `merge.output`, or writes its adapter alone."""
    assert config.merge is not None
    if config.init is None:
        raise InputError("task=merge needs init=<run folder or checkpoints/<iteration>.ckpt>")
    source, alone = Path(config.init), config.merge.adapter_only
    beside = (source.parent.parent if source.suffix == ".ckpt" else source) / ("adapter" if alone else "merged")
    output = Path(config.merge.output) if config.merge.output else beside
    files = merge(source, output, config.merge.weights, alone)
    print(f"wrote the adapter of {source} into {output}" if alone else f"merged {source} into {output}")
    for file in files:
        print(f"  {output / file}{': layers that trained in full; the adapter needs them' if 'trained_layers' in file else ''}")


def merge(source: Path, output: Path, which: str, adapter_only: bool = False) -> list[str]:
    """Folds what a run trained into its base and writes the folder, which has its name only once it is whole and checked.

    `adapter_only`: writes what the run trained, and no base. Returns the files of the run's own adapter, relative to `output`.
    InputError where `output` holds something already or cannot be written, or there is no adapter to write.
    """
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise InputError(f"{output}: is not empty; choose another merge.output, nothing was overwritten")
    run_ = weights.trained(source, which)
    adapted = run_.start.transformer
    whole = weights.trains_fully(run_.config)
    if whole and adapter_only:
        raise InputError(f"{source}: every weight was trained, so there is no adapter; use merge.adapter_only=false")
    plain = {} if adapter_only else run_.folded()
    _put(adapted, run_.values)
    links = {} if whole else {_link_name(run_): adapters.link_state(adapted, STUDENT, run_.values)}
    with _appears_whole(output) as unfinished:
        own = {name: manifest.write_adapter(unfinished, name, tensors) for name, tensors in links.items()}
        if adapter_only:
            manifest.write_manifest(unfinished, replace(run_.model_manifest(), adapters=own))
        else:
            about = replace(run_.model_manifest(), adapters=_copy_earlier(run_, unfinished) | own)
            settings = recipes.sampler(run_.config)
            index = settings.pipeline_index()
            manifest.write_folder(unfinished, manifest.shape_of(adapted), plain, settings.scheduler(), index, about)
            check_forward(adapted, load_transformer(unfinished, adapted.proj_out.weight.dtype))
    return [file for files in own.values() for file in files]


@contextmanager
def _appears_whole(output: Path) -> Iterator[Path]:
    """A folder to write into that gets its name at the end; nothing is left of it after an error, which is an InputError where
    the disk is full or the place cannot be written to."""
    unfinished = output.with_name(output.name + ".tmp")
    try:
        if unfinished.exists():
            shutil.rmtree(unfinished)  # of a merge that was killed
        unfinished.mkdir(parents=True)
        yield unfinished
        unfinished.replace(output)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{output}: cannot be written ({error}); make room, or choose another merge.output") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _link_name(run_: weights.Trained) -> str:
    """The stage; a second link of one stage is `<stage>_2`, and so on."""
    stage = run_.config.stage.name
    before = sum(link.stage == stage for link in run_.start.lineage)
    return f"{stage}_{before + 1}" if before else stage


def _copy_earlier(run_: weights.Trained, folder: Path) -> dict[str, list[str]]:
    """Copies the adapters of the folder that the run started from; returns their files by link."""
    origin = Path(run_.config.init) if run_.config.init else None
    known = manifest.read_manifest(origin) if origin else None
    if origin is None or known is None:
        return {}
    for file in (origin / file for files in known.adapters.values() for file in files):
        if not file.is_file():
            raise InputError(f"{file}: is missing, but {manifest.NAME} lists it; copy or merge that folder again")
        (folder / "adapters").mkdir(exist_ok=True)
        shutil.copy(file, folder / "adapters")
    return known.adapters


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
