"""What stands on the command line, read strictly: which keys exist, which options a group has, what a sweep runs through."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from itertools import product
from typing import Any, get_args

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException

from helios_train.conf.schema import GROUPS, TASKS
from helios_train.conf.values import hints, shown
from helios_train.errors import ConfigError


def read(lines: Sequence[str], loader: ConfigLoader, multirun: bool) -> list[Override]:
    """Parse `lines`; ConfigError for what is no `key=value`, for +key, ++key, ~key, key@package, unknown options, stray sweeps.

    Overrides of Hydra's own keys pass as they are.
    """
    parser = OverridesParser.create(config_loader=loader)
    overrides = []
    for line in lines:
        try:
            override = parser.parse_override(line)
        except HydraException as error:
            why = f"cannot be read ({first_line(error)}); quote what is not plain" if "=" in line else "write key=value"
            raise ConfigError(f"{shown(line)}: {why}") from None
        overrides.append(override)
        if not _of_hydra(override):
            _check(line, override, multirun)
    hydra = [line for line, override in zip(lines, overrides, strict=True) if _of_hydra(override)]
    for override in overrides:
        if override.key_or_group in GROUPS:
            _check_options(override, options(override.key_or_group, loader, hydra))
    return overrides


def _of_hydra(override: Override) -> bool:
    return override.key_or_group == "hydra" or override.is_hydra_override()


def _check(line: str, override: Override, multirun: bool) -> None:
    key = override.key_or_group
    if not key:
        raise ConfigError(f"{line}: names no key; write key=value")
    if override.is_delete():
        raise ConfigError(f"{line}: keys cannot be removed (~); set {key} to another value")
    if override.is_add() or override.is_force_add():
        raise ConfigError(f"{line}: keys cannot be added (+); write {line.lstrip('+')} if {key} is a key of the config")
    if override.package is not None:
        raise ConfigError(f"{line}: groups cannot be moved (@); write {key}=...")
    if override.is_sweep_override() and not multirun:
        raise ConfigError(f"{line}: several values are a sweep; put -m before it, or write [..] for a list, quotes for text")
    group, _, name = key.partition(".")
    if name == "name" and group in GROUPS and group != "experiment":
        raise ConfigError(f"{line}: {key} is the group's own; choose another option by {group}=...")


def options(group: str, loader: ConfigLoader, hydra: list[str]) -> list[str]:
    """What `group=` can be. What a recipe sets in each stage (recipe/<stage>_<name>) is no option of its own."""
    found = loader.get_group_options(group, config_name="config", overrides=hydra)
    return [name for name in found if group != "recipe" or name.partition("_")[0] not in GROUPS["stage"]]


def _check_options(override: Override, known: list[str]) -> None:
    group = override.key_or_group
    for value in values(override):
        if value not in known:
            near = nearest(value, known)
            raise ConfigError(f"{group}={shown(value)}: no such option; nearest: {group}={near} (of {', '.join(known)})")


def values(override: Override) -> list[str]:
    """The values of an override as one would write them: one, or all of a sweep; of an interval its two ends."""
    value = override.value()
    if isinstance(value, IntervalSweep):
        return [str(value.start), str(value.end)]
    if override.is_sweep_override():
        return list(override.sweep_string_iterator())
    return [override.get_value_element_as_str()]


def combinations(lines: Sequence[str], overrides: Sequence[Override]) -> Iterator[list[str]]:
    """Every run of a sweep, as lines without a sweep; without a sweep the lines themselves."""
    written = []
    for line, override in zip(lines, overrides, strict=True):
        swept = override.is_sweep_override() and not _of_hydra(override)
        written.append([f"{override.key_or_group}={value}" for value in values(override)] if swept else [line])
    for combination in product(*written):
        yield list(combination)


def choices_only(overrides: Sequence[str]) -> list[str]:
    """Of lines without a sweep, those that choose options (of groups, of Hydra): with them the set of keys is settled."""
    return [line for line in overrides if line.partition("=")[0] in GROUPS or line.lstrip("+~").startswith("hydra")]


def unknown(key: str, config: Mapping[str, Any]) -> ConfigError:
    """The error for `key`, which `config` has not: who else has it, or the nearest key there is."""
    group, _, rest = key.partition(".")
    chosen = config[group]["name"] if group in config and group in GROUPS else None
    for name, cls in GROUPS.get(group, {}).items():
        if rest and name and name != chosen and _has(cls, rest.split(".")):
            return ConfigError(f"{key}: {group}={chosen} has no such key; {group}={name} has it")
    if group in TASKS and group not in config:
        return ConfigError(f"{key}: task={config['task']['name']} has no such key; task={group} has it")
    others = [known for known in keys(config) if not f"{known}.".startswith(f"{key}.")]
    return ConfigError(f"{key}: no such key; nearest: {nearest(key, others)}")


def _has(cls: Any, path: Sequence[str]) -> bool:
    """Whether the dataclass has a field at `path`."""
    nested = [cls, *get_args(cls)]
    found = [hints(part)[path[0]] for part in nested if hasattr(part, "__dataclass_fields__") and path[0] in hints(part)]
    return bool(found) and (len(path) == 1 or _has(found[0], path[1:]))


def keys(config: Mapping[str, Any], prefix: str = "") -> list[str]:
    """All keys of a config, dotted."""
    found = []
    for name, value in config.items():
        found.append(f"{prefix}{name}")
        if isinstance(value, Mapping) and name != "sources":
            found += keys(value, f"{prefix}{name}.")
    return found


def nearest(asked: str, known: Iterable[str]) -> str:
    """The most similar of `known`: by the whole name and by what follows its last dot."""

    def likeness(name: str) -> float:
        ends = asked.rpartition(".")[2], name.rpartition(".")[2]
        return SequenceMatcher(None, asked, name).ratio() + SequenceMatcher(None, *ends).ratio()

    return max(known, key=likeness)


def first_line(error: BaseException) -> str:
    """What an exception says first."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
