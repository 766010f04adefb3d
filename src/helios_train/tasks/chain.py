"""task=chain: one model through several stages. Each link is trained, merged and checked, and gives the next its weights; then
videos are sampled from the last.

A link is written as one would write it behind `python -m helios_train`; words of this command that are not the chain's
own (data.toy.clips=16, seed=3) are given to every link. The folder holds chain.json, a run folder and a merged folder a link, and
the samples. Going on does again only what was not finished, bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from shlex import split
from typing import Any

from hydra.core.hydra_config import HydraConfig

from helios_train.conf import compose
from helios_train.conf.schema import Config
from helios_train.errors import InputError
from helios_train.models import manifest
from helios_train.run import RunFolder, default_folder, iteration_of, write
from helios_train.tasks import merge, sample, train

NAME = "chain.json"
OWN = ("task", "experiment", "run_dir", "resume", "init", "chain.", "hydra")  # words that are the chain's, not a link's


@dataclass(frozen=True)
class Link:
    """One stage: its words, and where its run and its merged folder stand."""

    words: tuple[str, ...]
    run: Path
    merged: Path


def run(config: Config, raw: dict[str, Any], words: Sequence[str] | None = None) -> None:
    """Trains `chain.links` one after the other, then samples. `words`: of this command; None: Hydra's.

    InputError where a word cannot be a link's, or the folder holds another chain.
    """
    assert config.chain is not None
    given = list(HydraConfig.get().overrides.task) if words is None else list(words)
    shared = [word for word in given if not word.startswith(OWN)]
    folder = _folder(config, {"links": [[*split(link), *shared] for link in config.chain.links], "init": config.init})
    links = _links(config, shared, folder)
    for link in links:  # all of them can be composed before the first one trains for hours
        _composed("train", link.words)
    before = Path(config.init) if config.init else None
    for number, link in enumerate(links, start=1):
        print(f"link {number} of {len(links)}: {' '.join(link.words)}", flush=True)
        _train_and_merge(link, before)
        _check(link, before)
        before = link.merged
    output = folder / "samples"
    places = _word("init", links[-1].merged), _word("sample.output", output)
    final = _composed("sample", (*links[-1].words, *split(config.chain.sample), *places))
    sample.run(compose.typed(final), final)


def _folder(config: Config, asked: dict[str, Any]) -> Path:
    """The chain's folder: `run_dir`, or a new one by date; with `resume`, one that holds this chain already."""
    parent = default_folder("chain", config.experiment.name, datetime.now())
    if config.resume == "auto" and config.run_dir is None:
        older = sorted((path for path in parent.parent.glob("*") if _asked(path) == asked), key=lambda path: path.name)
        folder = older[-1] if older else parent
    else:
        folder = Path(config.resume if config.resume not in (None, "auto") else config.run_dir or parent)
    there = _asked(folder)
    if there is None:
        if config.resume not in (None, "auto"):
            raise InputError(f"resume={folder}: holds no chain ({NAME} is missing); give the folder of one, or resume=auto")
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / NAME, json.dumps(asked, indent=1) + "\n")
    elif config.resume is None:
        raise InputError(f"run_dir={folder} already holds a chain: go on with resume=auto, or choose another run_dir")
    elif there != asked:
        raise InputError(f"{folder}: holds another chain, its words are in {NAME}; put them back, or choose another run_dir")
    print(f"chain folder {folder}", flush=True)
    return folder


def _asked(folder: Path) -> dict[str, Any] | None:
    path = folder / NAME
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); choose another run_dir") from error


def _links(config: Config, shared: Sequence[str], folder: Path) -> list[Link]:
    assert config.chain is not None
    links = []
    for number, written in enumerate(config.chain.links, start=1):
        words = split(written)
        stage = _composed("train", (*words, *shared))["stage"]["name"]
        place = folder / f"{number}_{stage}"
        links.append(Link((*words, *shared), place, folder / f"{number}_{stage}_merged"))
    return links


def _composed(task: str, words: Sequence[str]) -> dict[str, Any]:
    raw = compose.plain(compose.compose_plain([f"task={task}", *words]))
    compose.typed(raw)
    return raw


def _word(key: str, path: Path) -> str:
    escaped = str(path).replace("\\", "\\\\").replace('"', '\\"')
    return f'{key}="{escaped}"'


def _train_and_merge(link: Link, before: Path | None) -> None:
    """Trains what is left of a link, and merges it where that is not done."""
    words = [*link.words, _word("run_dir", link.run), *([_word("init", before)] if before else [])]
    raw = _composed("train", [*words, "resume=auto"])
    config = compose.typed(raw)
    newest = RunFolder(link.run).newest_checkpoint()
    if newest is None or iteration_of(newest) < config.trainer.max_steps:
        train.run(config, raw)
    if not link.merged.is_dir():  # it has its name only once it is whole
        merge.merge(link.run, link.merged, "auto")


def _check(link: Link, before: Path | None) -> None:
    """InputError unless the merged folder says of itself what this chain made: the links before, then this one."""
    raw = _composed("train", link.words)
    known = manifest.read_manifest(link.merged)
    earlier = manifest.read_manifest(before) if before else None
    lineage = earlier.lineage if earlier else ()
    own = known.lineage[-1] if known and known.lineage else None
    wanted = (raw["stage"]["name"], raw["recipe"]["name"], raw["trainer"]["max_steps"], raw["seed"])
    found = (own.stage, own.recipe, own.iterations, own.seed) if own else None
    if known is None or known.lineage[:-1] != lineage or found != wanted:
        raise InputError(
            f"{link.merged}: its manifest says {found}, this chain made {wanted} after {len(lineage)} other links; remove the "
            "folder, or choose another run_dir"
        )
