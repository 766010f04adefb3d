"""From a plain dict to a dataclass, by its type hints: every key known, every value of the right type and in its range.

Understood hints: bool, int, float, str, None, Literal, X | Y, list[T], tuple[T, ...], tuple[T, T], dict[str, T], dataclasses,
and Annotated[T, Range]. A whole number is a float, a float is no whole number, true is no number, a number is no text.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from helios_train.errors import ConfigError

T = TypeVar("T")
WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}


@dataclass(frozen=True)
class Range:
    """What a number may be; bounds are included unless named otherwise."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    multiple: int | None = None

    def holds(self, number: float) -> bool:
        """Whether `number` is inside."""
        return (
            (self.at_least is None or number >= self.at_least)
            and (self.above is None or number > self.above)
            and (self.at_most is None or number <= self.at_most)
            and (self.below is None or number < self.below)
            and (self.multiple is None or number % self.multiple == 0)
        )

    def __str__(self) -> str:
        words = {"at_least": ">=", "above": ">", "at_most": "<=", "below": "<", "multiple": "a multiple of"}
        bounds = [(words[f.name], getattr(self, f.name)) for f in fields(self)]
        return " and ".join(f"{word} {bound:g}" for word, bound in bounds if bound is not None)


def fill(cls: Callable[..., T], node: object, key: str = "", chosen: Mapping[str, type] | None = None) -> T:
    """An instance of the dataclass `cls` from the dict `node` that stands at `key`; ConfigError names the first wrong key.

    `chosen` gives for some fields the class to use, where the hint is a union.
    """
    if not isinstance(node, Mapping):
        raise ConfigError(f"{key}={shown(node)}: must be a group of keys: {', '.join(hints(cls))}")
    prefix = f"{key}." if key else ""
    for name in node:
        if name not in hints(cls):
            raise ConfigError(f"{prefix}{name}: no such key")
    missing = [name for name in hints(cls) if name not in node or node[name] == "???"]
    if missing:
        raise ConfigError(f"{prefix}{missing[0]}: has no value; must be {allowed(hints(cls)[missing[0]])}")
    wanted = hints(cls) | dict(chosen or {})
    return cls(**{name: convert(hint, node[name], prefix + name) for name, hint in wanted.items()})


def convert(hint: Any, value: object, key: str) -> Any:
    """`value` as `hint` wants it (lists become tuples where it says tuple); ConfigError names key, value and what is allowed."""
    if is_dataclass(hint) and isinstance(hint, type):
        return fill(hint, value, key)
    nested = [part for part in get_args(hint) if is_dataclass(part) and isinstance(part, type)]
    if nested and isinstance(value, Mapping):
        return fill(nested[0], value, key)
    for result in _readings(hint, value):
        return result
    raise ConfigError(f"{key}={shown(value)}: must be {allowed(hint)}")


def _readings(hint: Any, value: object) -> Iterator[Any]:
    """At most one thing: `value` read as `hint`."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        yield from (r for r in _readings(parts[0], value) if all(rule.holds(r) for rule in parts[1:]))
    elif origin is Literal:
        yield from (part for part in parts if part == value and type(part) is type(value))
    elif origin in (Union, types.UnionType):
        yield from [r for part in parts for r in _readings(part, value)][:1]
    elif origin in (list, tuple) and isinstance(value, (list, tuple)):
        wanted = parts if origin is tuple and parts[-1] is not Ellipsis else parts[:1] * len(value)
        items = [list(_readings(part, item)) for part, item in zip(wanted, value, strict=False)]
        if len(wanted) == len(value) and all(items):
            yield origin(item[0] for item in items)
    elif origin is dict and isinstance(value, Mapping):
        pairs = {name: list(_readings(parts[1], item)) for name, item in value.items()}
        if all(pairs.values()) and all(isinstance(name, str) for name in pairs):
            yield {name: item[0] for name, item in pairs.items()}
    elif hint is float and type(value) in (int, float):
        if math.isfinite(value):  # type: ignore[arg-type]
            yield float(value)  # type: ignore[arg-type]
    elif isinstance(hint, type) and type(value) is hint:
        yield value


def allowed(hint: Any) -> str:
    """What `hint` allows, in words."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return " ".join([allowed(parts[0]), *(str(rule) for rule in parts[1:])])
    if origin is Literal:
        return ("one of " if len(parts) > 1 else "") + ", ".join(str(part) for part in parts)
    if origin in (Union, types.UnionType):
        return " or ".join(allowed(part) for part in parts)
    if origin is tuple and parts[-1] is not Ellipsis:
        same = len(set(parts)) == 1
        return f"a list of {len(parts)}: each {allowed(parts[0])}" if same else f"a list: {', '.join(allowed(p) for p in parts)}"
    if origin in (list, tuple):
        return f"a list: each {allowed(parts[0])}"
    if origin is dict or is_dataclass(hint):
        return "a group of keys"
    return WORDS.get(hint, str(hint))


@cache
def hints(cls: Any) -> dict[str, Any]:
    """Type hints of the fields of the dataclass `cls`, in order."""
    found = get_type_hints(cls, include_extras=True)
    return {f.name: found[f.name] for f in fields(cls)}


def shown(value: object) -> str:
    """A value as one would write it on the command line, cut to what one line holds."""
    text = {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else str(value)
    return text if len(text) <= 80 else text[:77] + "..."
