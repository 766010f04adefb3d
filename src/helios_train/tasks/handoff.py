"""How stages follow one another: which needs which, a link of a chain from run to merged folder, and the link that is missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

from helios_train.conf import compose
from helios_train.conf.schema import Config
from helios_train.errors import InputError
from helios_train.run import RunFolder, fixed_leaves, iteration_of
from helios_train.tasks import merge, sameness

Train = Callable[[Config, dict[str, Any]], None]

FOLLOWS = {"mid": "base", "ode": "mid", "distill": "ode"}  # stage -> the one whose merged folder it starts from
TOY = {"base": ["experiment=toy_base"]}  # stage -> its toy default
ALIKE = ("model", "codec", "text", "data", "memory", "seed")  # what a missing link takes from the run it is made for
MADE = Path("runs/earlier")  # where missing links are made


def missing(config: Config) -> str | None:
    """The stage that must come before this one and that no `init` stands for; None where nothing is missing."""
    return FOLLOWS.get(config.stage.name) if config.init is None else None


def provided(config: Config, raw: dict[str, Any], train: Train) -> tuple[Config, dict[str, Any]]:
    """The config with an `init`, where its stage needs one: a tiny model's missing link is made first, once for all runs alike.

    InputError for other models (their links take days, and are somebody's decision), and for stages with several links to make.
    """
    stage = missing(config)
    if stage is None:
        return config, raw
    if config.model.name != "tiny" or stage not in TOY:
        command = "python -m helios_train"
        raise InputError(
            f"stage={config.stage.name} starts from a {stage} model, and init=null names none; make one with "
            f"`{command} stage={stage} model={config.model.name} run_dir=RUN ...` and "
            f"`{command} task=merge init=RUN merge.output=MERGED`, then give init=MERGED"
        )
    earlier = _toy_default(stage, raw)
    merged = Path(earlier["run_dir"]) / "merged"
    if not merged.is_dir():
        print(f"stage={config.stage.name}: init=null names no {stage} model; a toy one is made first, in {merged}", flush=True)
    make(earlier, merged, train)
    raw = {**raw, "init": str(merged)}
    return compose.typed(raw), raw


def _toy_default(stage: str, raw: dict[str, Any]) -> dict[str, Any]:
    """The config of a stage at its toy default, for the model and data of `raw`, in a folder that only the like share."""
    toy = compose.plain(compose.compose_plain(TOY[stage]))
    alike = {group: raw[group] for group in ALIKE}
    digest = sha256(json.dumps(fixed_leaves(alike, sameness.CHANGEABLE), sort_keys=True).encode()).hexdigest()[:8]
    loop = {name: raw["trainer"][name] for name in ("accelerator", "progress")}
    return {
        **toy,
        **alike,
        "trainer": {**toy["trainer"], **loop},
        "watch": {**toy["watch"], "sample": raw["watch"]["sample"]},
        "run_dir": str((MADE / f"{stage}_{digest}").resolve()),
        "resume": "auto",
    }


def make(raw: dict[str, Any], merged: Path, train: Train) -> None:
    """Trains what is left of the run that `raw` describes (run_dir, resume=auto) and merges it, unless that is done."""
    if merged.is_dir():  # it has its name only once it is whole
        return
    run = RunFolder(Path(raw["run_dir"]))
    newest = run.newest_checkpoint()
    if newest is None or iteration_of(newest) < raw["trainer"]["max_steps"]:
        train(compose.typed(raw), raw)
    merge.merge(run.path, merged, "auto")
