"""The run card: the page printed before iteration 0, and kept in the run folder."""

from __future__ import annotations

from collections import Counter
from typing import Any

from helios_train.callbacks.validation import FULL_HISTORY
from helios_train.conf.schema import Config, MidStage
from helios_train.data.format import Manifest
from helios_train.data.module import WindowModule
from helios_train.models.adapters import group_of
from helios_train.models.manifest import shown_encoder
from helios_train.models.precision import Masters
from helios_train.stages.stage import Stage
from helios_train.tasks import recipes, weights


def counts(masters: Masters) -> dict[str, int]:
    """Trainable parameters by group."""
    groups: Counter[str] = Counter()
    for name, master in masters.masters.items():
        groups[group_of(name)] += master.numel()
    return dict(groups)


def card(config: Config, stage: Stage, data: WindowModule, disk: int, memory: str) -> str:
    """The page: what trains, on what, how, and where each number of the recipe comes from.

    `disk`: bytes of checkpoints kept. `memory`: where bytes live, why, and what was planned.
    """
    total = sum(parameter.numel() for parameter in stage.transformer.parameters())
    trained = counts(stage.masters)
    how = "every weight" if weights.trains_fully(config) else f"LoRA rank {config.stage.lora.rank} and what is named below"
    batch, micro, devices = config.data.global_batch, config.data.micro_batch, config.trainer.devices
    accumulated = f"{batch // micro // devices} accumulated{_levels(config)}"
    clips, stored = len(data.store) - len(data.held_out), data.store.manifest
    warned = warnings(stored, clips, batch)
    lines = [
        f"helios_train: stage {config.stage.name}, recipe {config.recipe.name} ({config.recipe.about})",
        f"experiment {config.experiment.name}: {config.experiment.about}",
        "",
        f"model {config.model.name}, {total:,} parameters, {config.model.dtype}; weights from {config.init or 'random numbers'}",
        f"trains {how}: {sum(trained.values()):,} parameters",
        *(f"  {group:<16} {number:>15,}" for group, number in trained.items()),
        "",
        f"data {config.data.root}: {clips} clips to train on, {len(data.held_out)} held out",
        f"made with codec {shown_encoder(stored.codec)}, text {shown_encoder(stored.text)}",
        f"captions dropped with probability {data.settings.caption_drop:g}",
        f"epoch of {data.order.batches} iterations; {data.order.fill} samples an epoch repeat to fill the last batch",
        f"global batch {batch} = micro batch {micro} x {devices} devices x {accumulated}",
        f"{config.trainer.max_steps} iterations = {batch * config.trainer.max_steps:,} windows",
        f"disk for checkpoints: {disk / 1e6:,.0f} MB",
        memory,
        "",
        "recipe",
        *(line for key, source in config.recipe.sources.items() for line in _recipe_lines(config, key, source)),
        *(["", f"WARNINGS: {len(warned)}", *(f"  ! {line}" for line in warned)] if warned else []),
    ]
    return "\n".join(lines) + "\n"


def _levels(config: Config) -> str:
    """What the levels of a pyramid add to the work of a step."""
    if not isinstance(config.stage, MidStage):
        return ""
    ratios = config.stage.pyramid.ratios
    return f" (x {len(ratios)} levels, {sum(ratios)} passes)"


def warnings(stored: Manifest, clips: int, batch: int) -> list[str]:
    """What is amiss with the data, a line each: `clips` are left to train on, in global batches of `batch` samples."""
    health, lines = stored.health, []
    short = sum(bucket.n for bucket in stored.buckets if bucket.sections <= FULL_HISTORY)
    if short:
        share = f"{short} of {stored.total} clips ({short / stored.total:.0%})"
        lines.append(f"{share} have under {FULL_HISTORY + 1} sections: they never show a full history")
    silent = health.get("caption_missing", 0) + health.get("caption_empty", 0)
    if silent:
        lines.append(f"{silent} of {stored.total} clips ({silent / stored.total:.0%}) have no caption: they train the null text")
    if clips < batch:
        lines.append(f"{clips} clips are fewer than the global batch of {batch}: each iteration repeats some of them")
    skipped = health.get("skipped", {})
    if skipped:
        kinds = ", ".join(f"{number} {kind}" for kind, number in skipped.items())
        lines.append(f"{sum(skipped.values())} videos were left out of the dataset ({kinds}): its skipped.json names them")
    return lines


def _recipe_lines(config: Config, key: str, source: str) -> list[str]:
    """A key's value and where it comes from: the recipe's source, unless an experiment or the command line changed it."""
    value, published = recipes.value_of(config, key), recipes.published_value(config, key)
    names = sorted(published) if isinstance(published, dict) else []
    changed = {name: value[name] for name in names if value[name] != published[name]} if names else {}
    lines = [f"  {key} = {_shown(published if changed else value)}", f"    from: {source}"]
    if changed:
        lines.append(f"    changed by the experiment or the command line: {_shown(changed)}")
    elif not names and value != published:
        lines[1] = f"    changed by the experiment or the command line; the recipe has {_shown(published)}"
    return lines


def _shown(value: Any) -> str:
    return ", ".join(f"{name} {part}" for name, part in value.items()) if isinstance(value, dict) else str(value)


def hours(config: Config, done: int, seconds: float) -> str:
    """The line added once a step's time is known."""
    left = config.trainer.max_steps - done
    return f"measured {seconds:.3f} s an iteration: {left} iterations take {left * seconds / 3600:.2f} hours\n"
