"""How stages follow one another: which needs which, a link of a chain from run to merged folder, and the link that is missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

from helios_train.conf import compose
from helios_train.conf.schema import Config
from helios_train.data.pairs import MANIFEST as PAIRS
from helios_train.errors import InputError
from helios_train.run import RunFolder, fixed_leaves, iteration_of
from helios_train.tasks import merge, pairs, sameness

Train = Callable[[Config, dict[str, Any]], None]

ROAD = ("base", "mid", "ode", "distill")  # each stage starts from the merged folder of the one before
BEFORE = dict(zip(ROAD[1:], ROAD, strict=False))
TOY = {stage: [f"experiment=toy_{stage}"] for stage in ROAD[:-1]}  # stage -> its toy default
TRAJECTORIES = ("pairs.count=96", "pairs.sections=4", "pairs.steps=10", "pairs.guidance=2", "pairs.batch=8")  # of a toy's ode
ALIKE = ("model", "codec", "text", "data", "memory", "seed")  # what a missing link takes from the run it is made for
MADE = Path("runs/earlier")  # where missing links are made


def missing(config: Config) -> str | None:
    """The stage that must come before this one and that no `init` stands for; None where nothing is missing."""
    return BEFORE.get(config.stage.name) if config.init is None else None


def provided(config: Config, raw: dict[str, Any], train: Train) -> tuple[Config, dict[str, Any]]:
    """The config with an `init`, where its stage needs one: a tiny model's missing links are made first, once for all runs alike.

    Of stage=distill the teacher too, if none is named. InputError for other models: their links take days, and are somebody's
    decision.
    """
    stage = missing(config)
    if stage is None:
        return config, raw
    if config.model.name != "tiny":
        command = "python -m helios_train"
        raise InputError(
            f"stage={config.stage.name} starts from a {stage} model, and init=null names none; make one with "
            f"`{command} stage={stage} model={config.model.name} run_dir=RUN ...` and "
            f"`{command} task=merge init=RUN merge.output=MERGED`, then give init=MERGED"
        )
    merged: dict[str, Path] = {}
    for earlier in ROAD[: ROAD.index(config.stage.name)]:
        link = _toy_default(earlier, raw, merged)
        merged[earlier] = Path(link["run_dir"]) / "merged"
        if not merged[earlier].is_dir():
            print(
                f"stage={config.stage.name}: init=null names no {stage} model; a toy {earlier} model is made first, in "
                f"{merged[earlier]}",
                flush=True,
            )
            if earlier == "ode":
                trajectories = compose.plain(compose.compose_plain([*TOY["ode"], "task=pairs", *TRAJECTORIES]))
                link = with_trajectories(link, {**link, **{name: trajectories[name] for name in ("task", "pairs")}})
        make(link, merged[earlier], train)
    raw = {**raw, "init": str(merged[stage])}
    if raw["stage"].get("teacher", "none is asked for") is None:
        raw["stage"] = {**raw["stage"], "teacher": str(merged["base"])}
    return compose.typed(raw), raw


def _toy_default(stage: str, raw: dict[str, Any], merged: dict[str, Path]) -> dict[str, Any]:
    """The config of a stage at its toy default, for the model and data of `raw`, in a folder that only the like share."""
    toy = compose.plain(compose.compose_plain(TOY[stage]))
    alike = {group: raw[group] for group in ALIKE}
    digest = sha256(json.dumps(fixed_leaves(alike, sameness.CHANGEABLE), sort_keys=True).encode()).hexdigest()[:8]
    loop = {name: raw["trainer"][name] for name in ("accelerator", "progress")}
    before = BEFORE.get(stage)
    return {
        **toy,
        **alike,
        "trainer": {**toy["trainer"], **loop},
        "watch": {**toy["watch"], "sample": raw["watch"]["sample"]},
        "run_dir": str((MADE / f"{stage}_{digest}").resolve()),
        "init": str(merged[before]) if before else None,
        "resume": "auto",
    }


def with_trajectories(link: dict[str, Any], how: dict[str, Any]) -> dict[str, Any]:
    """The config of an ode run with its pairs, made by the task that `how` describes unless they are there or it names others."""
    if link["stage"]["pairs"] is not None:
        return link
    output = Path(f"{link['run_dir']}_pairs")
    if not (output / PAIRS).is_file():
        raw = {**how, "init": link["init"], "pairs": {**how["pairs"], "output": str(output)}, "run_dir": None, "resume": None}
        pairs.run(compose.typed(raw), raw)
    return {**link, "stage": {**link["stage"], "pairs": str(output)}}


def make(raw: dict[str, Any], merged: Path, train: Train) -> None:
    """Trains what is left of the run that `raw` describes (run_dir, resume=auto) and merges it, unless that is done."""
    if merged.is_dir():  # it has its name only once it is whole
        return
    run = RunFolder(Path(raw["run_dir"]))
    newest = run.newest_checkpoint()
    if newest is None or iteration_of(newest) < raw["trainer"]["max_steps"]:
        train(compose.typed(raw), raw)
    merge.merge(run.path, merged, "auto")
