"""task=chain: one model through several stages. Each link is trained, merged and checked, and gives the next its weights; then
videos are sampled from the last.

A link is written as one would write it behind `python -m helios_train`; words of this command that are not the chain's
own (data.toy.clips=16, seed=3) are given to every link. The folder holds chain.json, a lock, a run folder and a merged folder a
link, and the samples. Going on does again only what was not finished, bit for bit.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from shlex import split
from typing import Any

from hydra.core.hydra_config import HydraConfig

from helios_train.conf import compose, rules
from helios_train.conf.schema import Config
from helios_train.errors import ConfigError, InputError
from helios_train.models import manifest
from helios_train.run import RunFolder, default_folder, make_unique, newest_first, write, writing
from helios_train.tasks import handoff, merge, sameness, sample, train, weights

NAME = "chain.json"
OWN = ("task", "experiment", "run_dir", "resume", "init", "chain.", "hydra")  # words that are the chain's, not a link's


@dataclass(frozen=True)
class Link:
    """One stage: its words, the config they compose to, and the name of its run in the chain's folder."""

    words: tuple[str, ...]
    config: dict[str, Any]
    name: str


@dataclass(frozen=True)
class Plan:
    """What a command asks for: weights to begin with (an absolute path), links, and how to sample: its words, its config.

    pairs: by the name of an ode link, the config of the task that makes its trajectories.
    """

    init: str | None
    links: tuple[Link, ...]
    words: str
    sampling: dict[str, Any]
    pairs: dict[str, dict[str, Any]]

    def record(self) -> dict[str, Any]:
        """What chain.json says of it at first. `samples`: the words of the samplings that were finished."""
        return {"init": self.init, "links": [{"words": link.words, "config": link.config} for link in self.links], "samples": []}

    def changed(self, record: dict[str, Any]) -> list[str]:
        """What differs from a chain on record and may not: as of a run, and iterations, for the next link stands on them."""
        known = [link["config"] for link in record["links"]]
        if len(known) != len(self.links):
            return [f"number of links ({len(known)})"]
        keys = [] if record["init"] == self.init else ["init"]
        for number, (saved, link) in enumerate(zip(known, self.links, strict=True), start=1):
            keys += [f"{key} in link {number}" for key in sameness.changed(saved, link.config, ("trainer.max_steps",))]
        return keys

    def sampled(self, folder: Path, record: dict[str, Any]) -> bool:
        """Whether the samples are there, and all they were made of."""
        places = [_samples(folder, record, self.words), *(_merged(folder, link) for link in self.links)]
        return self.words in record["samples"] and all(place.is_dir() for place in places)


def run(config: Config, raw: dict[str, Any], words: Sequence[str] | None = None) -> None:
    """Trains `chain.links` one after the other, then samples. `words`: of this command; None: Hydra's.

    ConfigError where a word cannot be a link's; InputError where the folder holds another chain, or somebody works on it.
    """
    plan = _plan(config, list(HydraConfig.get().overrides.task) if words is None else words)
    folder = RunFolder(_place(config, plan).resolve())
    with writing(folder.path):
        folder.path.mkdir(parents=True, exist_ok=True)
    folder.lock()
    try:
        _run(plan, folder.path, _record(config, plan, folder.path))
    finally:
        folder.unlock()


def _run(plan: Plan, folder: Path, record: dict[str, Any]) -> None:
    print(f"chain folder {folder}", flush=True)
    before = _begun(plan.init, folder)
    for number, link in enumerate(plan.links, start=1):
        print(f"link {number} of {len(plan.links)}: {' '.join(link.words)}", flush=True)
        merged = _merged(folder, link)
        if not merged.is_dir():
            handoff.make(_placed(plan, link, folder, before), merged, train.run)
        _check(link, merged, before)
        before = merged
    output = _samples(folder, record, plan.words)
    if plan.sampled(folder, record):
        print(f"nothing is left to do; the samples are in {output}", flush=True)
        return
    shutil.rmtree(output, ignore_errors=True)  # of a sampling that did not finish
    final = {**plan.sampling, "init": str(before), "sample": {**plan.sampling["sample"], "output": str(output)}}
    sample.run(compose.typed(final), final)
    if plan.words not in record["samples"]:
        _write(folder, {**record, "samples": [*record["samples"], plan.words]})


def _placed(plan: Plan, link: Link, folder: Path, before: Path | None) -> dict[str, Any]:
    """A link's config with what only the chain knows: its folder and weights, an ode link's trajectories, a student's teacher."""
    places = {"run_dir": str(folder / link.name), "resume": "auto", "init": str(before) if before else None}
    raw = {**link.config, **places}
    if link.name in plan.pairs:
        return handoff.with_trajectories(raw, plan.pairs[link.name])
    if raw["stage"].get("teacher", "none is asked for") is None:
        bases = [one for one in plan.links if one.config["stage"]["name"] == "base"]
        raw["stage"] = {**raw["stage"], "teacher": str(_merged(folder, bases[-1])) if bases else None}
    return raw


def _plan(config: Config, words: Sequence[str]) -> Plan:
    """Everything composed and checked, before the first link trains for hours."""
    assert config.chain is not None
    shared = [word for word in words if not word.startswith(OWN)]
    links = []
    for number, written in enumerate(config.chain.links, start=1):
        own = (*_split("chain.links", written), *shared)
        found = _composed("chain.links", "train", own)
        links.append(Link(own, found, f"{number}_{found['stage']['name']}"))
    first = replace(compose.typed(links[0].config), init=config.init)
    before = handoff.missing(first)
    if before:
        raise ConfigError(
            f"chain.links: stage={first.stage.name} cannot come first; put stage={before} before it, or give an init"
        )
    final = _composed("chain.sample", "sample", ("task=sample", *links[-1].words, *_split("chain.sample", config.chain.sample)))
    typed = compose.typed(final)
    assert typed.sample is not None
    for broken in rules.steps_fit("chain.sample: sample.steps", typed.sample.steps, typed.stage):
        raise ConfigError(broken)
    how = ("task=pairs", *_split("chain.pairs", config.chain.pairs))
    odes = [link for link in links if link.config["stage"]["name"] == "ode"]
    trajectories = {link.name: _composed("chain.pairs", "pairs", (*link.words, *how)) for link in odes}
    return Plan(sameness.place(config.init), tuple(links), config.chain.sample, final, trajectories)


def _split(key: str, written: str) -> list[str]:
    try:
        return split(written)
    except ValueError as error:  # a quotation mark without its fellow
        raise ConfigError(f"{key}: {written!r} cannot be read ({error}); write it as behind python -m helios_train") from None


def _composed(key: str, task: str, words: Sequence[str]) -> dict[str, Any]:
    """The config of a link or of the sampling; ConfigError where it sets what a chain sets itself."""
    raw = compose.plain(compose.compose_plain(words))
    own = [name for name in ("init", "run_dir", "resume") if raw[name] is not None]
    own += ["task"] if raw["task"]["name"] != task else []
    own += ["trainer.devices"] if raw["trainer"]["devices"] != 1 else []
    own += [word.partition("=")[0] for word in words if word.startswith(("sample.output=", "pairs.output="))]
    if own:
        raise ConfigError(
            f"{key}: {' '.join(words)!r} sets {', '.join(own)}; take that out: a chain gives its links their task, folders and "
            "weights, on one device (init, run_dir and resume of the whole chain stand outside its links)"
        )
    compose.typed(raw)
    return raw


def _place(config: Config, plan: Plan) -> Path:
    """The chain's folder: the one named, or with resume=auto the newest unfinished of this chain, or a new one by date."""
    if config.resume not in (None, "auto"):
        if not (Path(config.resume) / NAME).is_file():
            raise InputError(f"resume={config.resume}: holds no chain ({NAME} is missing); give a chain's folder, or resume=auto")
        return Path(config.resume)
    if config.run_dir is not None:
        return Path(config.run_dir)
    new = default_folder("chain", config.experiment.name, datetime.now())
    if config.resume == "auto":
        for older in newest_first(new.parent):
            if _unfinished(plan, older):
                return older
        print(f"resume=auto: no unfinished chain like this one in {new.parent}; starting a new one", flush=True)
    with writing(new):
        return make_unique(new)


def _unfinished(plan: Plan, folder: Path) -> bool:
    """Whether a folder holds this chain, with something left to do, and nobody works on it."""
    try:
        record = _read(folder)
    except InputError:  # a damaged chain is no reason not to start another
        return False
    if record is None or plan.changed(record) or plan.sampled(folder, record):
        return False
    return not RunFolder(folder).locked()


def _record(config: Config, plan: Plan, folder: Path) -> dict[str, Any]:
    """What chain.json says, or from now on says; InputError where that is another chain."""
    record = _read(folder)
    if record is None:
        _write(folder, plan.record())
        return plan.record()
    if config.resume is None:
        raise InputError(f"run_dir={folder} already holds a chain: go on with resume=auto, or choose another run_dir")
    sameness.refuse(plan.changed(record), folder, NAME)
    return record


def _read(folder: Path) -> dict[str, Any] | None:
    path = folder / NAME
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text())
        return {
            "init": record["init"],
            "links": [{"words": link["words"], "config": dict(link["config"])} for link in record["links"]],
            "samples": list(record["samples"]),
        }
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: is damaged ({type(error).__name__}: {error}); choose another run_dir") from None


def _write(folder: Path, record: dict[str, Any]) -> None:
    write(folder / NAME, json.dumps(record, indent=1) + "\n")


def _merged(folder: Path, link: Link) -> Path:
    return folder / f"{link.name}_merged"


def _samples(folder: Path, record: dict[str, Any], words: str) -> Path:
    """Where samples asked for in these words are: those of other words keep their folders."""
    known = record["samples"]
    number = 1 + (known.index(words) if words in known else len(known))
    return folder / ("samples" if number == 1 else f"samples_{number}")


def _begun(init: str | None, folder: Path) -> Path | None:
    """The weights to begin with. A run or checkpoint is merged first: a merged folder knows its lineage, and stays as it is."""
    if init is None or not weights.is_run(Path(init)):
        return Path(init) if init else None
    merged = folder / "0_init_merged"
    if not merged.is_dir():
        merge.merge(Path(init), merged, "auto")
    return merged


def _check(link: Link, merged: Path, before: Path | None) -> None:
    """InputError unless the merged folder says of itself what this chain made: the links before, then this one."""
    raw, known = link.config, manifest.read_manifest(merged)
    earlier = manifest.read_manifest(before) if before else None
    lineage = earlier.lineage if earlier else ()
    own = known.lineage[-1] if known and known.lineage else None
    wanted = (raw["stage"]["name"], raw["recipe"]["name"], raw["trainer"]["max_steps"], raw["seed"])
    found = (own.stage, own.recipe, own.iterations, own.seed) if own else None
    if known is None or known.lineage[:-1] != lineage or found != wanted:
        raise InputError(
            f"{merged}: its manifest says {found}, this chain made {wanted} after {len(lineage)} other links; remove the "
            "folder, or choose another run_dir"
        )
