"""From the command line to a `Config`: Hydra composes, then nothing is taken on trust."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from hydra import initialize_config_module
from hydra._internal.utils import get_args_parser
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from helios_train.conf import overrides as strict
from helios_train.conf import rules
from helios_train.conf.schema import GROUPS, TASKS, Config
from helios_train.conf.values import fill
from helios_train.errors import ConfigError
from helios_train.evaluation.alarms import RULES

MODULE, NAME, VERSION = "helios_train.conf", "config", "1.3"  # the tree, its root, the Hydra it is written for
CHOSEN = {group: classes for group, classes in GROUPS.items() if "" not in classes}  # groups whose option chooses the class
# Keys that are newer than some runs, as those had them.
ADDED_MEMORY = {"lineage": "bf16", "stream": False, "park": "nothing"}
ADDED_WATCH = {"alarms": {"enabled": False, "start": 0} | dict.fromkeys(RULES)}


@dataclass(frozen=True)
class Command:
    """What was asked for: the page of --help where that is all, and whether a sweep needs a folder for Hydra's multirun.yaml."""

    page: str | None
    needs_sweep_dir: bool


def compose(overrides: Sequence[str] = ()) -> Config:
    """The config of one run; ConfigError where the command line would refuse."""
    return typed(compose_plain(overrides))


def compose_plain(overrides: Sequence[str] = ()) -> DictConfig:
    """The same before it is typed, interpolations kept."""
    register_resolvers()
    with _loader() as loader:
        strict.read(overrides, loader, multirun=False)
        return _load(list(overrides), loader)


def saved(config: Mapping[str, Any]) -> dict[str, Any]:
    """The saved config of a run, with keys that came later as runs of its time had them."""
    stage = {"anchor": True} if config.get("stage", {}).get("name") == "base" else {}
    added: dict[str, Mapping[str, Any]] = {"stage": stage, "memory": ADDED_MEMORY, "watch": ADDED_WATCH}
    return {**config, **{group: {**keys, **config.get(group, {})} for group, keys in added.items()}}


def typed(config: DictConfig | Mapping[str, Any], sweep: bool = False) -> Config:
    """Check every key, type, range and rule of a composed config; ConfigError names the first that is wrong."""
    node = config if isinstance(config, dict) else plain(config)
    try:
        filled = _typed(node)
    except ConfigError as error:
        key, said, _ = str(error).partition(": no such key")
        raise strict.unknown(key, node) if said else error from None
    rules.check(filled, sweep)
    return filled


def _typed(node: Mapping[str, Any]) -> Config:
    """Config, each group by its class. Classes are chosen first: a union cannot say what is wrong with its one right member."""
    groups = {}
    for group, classes in CHOSEN.items():
        name = node[group].get("name") if isinstance(node.get(group), Mapping) else None
        if name not in classes:
            raise ConfigError(f"{group}: choose one of {', '.join(f'{group}={option}' for option in classes)}")
        groups[group] = classes[name]
    return fill(Config, dict.fromkeys(TASKS) | dict(node), chosen=groups)


def plain(config: Any) -> dict[str, Any]:
    """A composed config as plain dicts, lists and scalars, interpolations resolved: what is saved and compared."""
    register_resolvers()
    try:
        node = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key or 'config'}: {strict.first_line(error)}") from None
    assert isinstance(node, dict)
    return {str(key): value for key, value in node.items() if key != "hydra"}


def check_arguments(arguments: Sequence[str]) -> Command:
    """Read the command line before Hydra does; ConfigError for what Hydra would let pass or answer with a page."""
    register_resolvers()
    parser = get_args_parser()
    parser.error = _refuse  # type: ignore[method-assign]
    args = parser.parse_args(list(arguments))
    for flag, value in {"--config-path": args.config_path, "--config-name": args.config_name}.items():
        if value is not None:
            raise ConfigError(f"{flag}: the config has one root; add a folder of your own options with --config-dir")
    if args.experimental_rerun is not None:
        raise ConfigError("--experimental-rerun: runs are continued with resume=RUN")
    shows = [args.help, args.hydra_help, args.cfg is not None, args.info is not None, args.shell_completion]
    if sum(map(bool, [*shows, args.run, args.multirun])) > 1:
        raise ConfigError("give one of --help, --hydra-help, --cfg, --info, --shell-completion, --run, --multirun")
    if args.resolve and not (args.cfg or args.help):
        raise ConfigError("--resolve: goes with --cfg or --help")
    lines = list(args.overrides) + _search_path(args.config_dir)
    sweep = args.multirun or any(line.lower() == "hydra.mode=multirun" for line in lines)
    if not args.shell_completion:
        _check_runs(lines, sweep)
    own = any(line.lstrip("+").startswith("hydra.sweep.dir=") for line in lines)
    return Command(_page(lines) if args.help else None, sweep and not own and not any(shows))


def _refuse(message: str) -> NoReturn:
    raise ConfigError(f"{message}; see --help")


def _search_path(folder: str | None) -> list[str]:
    if folder is None:
        return []
    if not Path(folder).is_dir():
        raise ConfigError(f"--config-dir={folder}: no such folder")
    return [f'hydra.searchpath=["file://{Path(folder).absolute()}"]']


def _check_runs(lines: list[str], sweep: bool) -> None:
    """Compose and type every run that the lines stand for."""
    with _loader() as loader:
        for combination in strict.combinations(lines, strict.read(lines, loader, sweep)):
            typed(_load(combination, loader), sweep)


def _page(lines: list[str]) -> str | None:
    """The page of --help; None where it wants filling in ($CONFIG and the like), which Hydra does at twice the time."""
    with _loader() as loader:
        page = str(loader.load_configuration(NAME, lines, RunMode.RUN, from_shell=False).hydra.help.template)
    return None if "$" in page else page


@contextmanager
def _loader() -> Iterator[ConfigLoader]:
    if GlobalHydra.instance().is_initialized():  # inside a run, whose own --config-dir holds
        yield GlobalHydra.instance().config_loader()
        return
    with initialize_config_module(MODULE, job_name="helios_train", version_base=VERSION):
        yield GlobalHydra.instance().config_loader()


def _load(lines: list[str], loader: ConfigLoader) -> DictConfig:
    """Compose lines without a sweep; where Hydra fails, say which key or what."""
    try:
        config = loader.load_configuration(NAME, lines, RunMode.RUN, from_shell=False)
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # ValueError: Hydra's, of group overrides
        raise _explained(lines, loader, error) from None
    return OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])


def _explained(lines: list[str], loader: ConfigLoader, error: Exception) -> ConfigError:
    chosen = strict.choices_only(lines)
    if len(chosen) < len(lines):
        config = plain(_load(chosen, loader))
        for line in lines:
            key = line.partition("=")[0]
            if line not in chosen and key not in strict.keys(config):
                return strict.unknown(key, config)
        cause = error.__cause__
        if isinstance(cause, ConfigKeyError | ConfigAttributeError) and cause.full_key:
            return strict.unknown(str(cause.full_key), config)
    return ConfigError(f"{strict.first_line(error)} ({' '.join(lines)})")


def register_resolvers() -> None:
    """The two functions the YAML files use: join a list, and a short digest that names a combination of settings."""
    OmegaConf.register_new_resolver("helios.join", _join, replace=True)
    OmegaConf.register_new_resolver("helios.digest", _digest, replace=True)


def _join(between: str, items: Any) -> str:
    return between.join(map(str, items)) if OmegaConf.is_list(items) else str(items)


def _digest(*nodes: Any) -> str:
    settings = [OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node for node in nodes]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
