"""Plain values against type hints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest

from helios_train.conf.values import Range, allowed, convert, fill
from helios_train.errors import ConfigError


@dataclass(frozen=True)
class Inner:
    share: Annotated[float, Range(at_least=0, at_most=1)]


@dataclass(frozen=True)
class Outer:
    inner: Inner
    sizes: tuple[Annotated[int, Range(multiple=16)], int]
    note: str | None
    names: dict[str, str]
    mode: Literal["a", "b"]


NODE: dict[str, Any] = {"inner": {"share": 1}, "sizes": [32, 7], "note": None, "names": {"x.y": "z"}, "mode": "b"}


def test_fill_builds_the_dataclass() -> None:
    assert fill(Outer, NODE) == Outer(Inner(1.0), (32, 7), None, {"x.y": "z"}, "b")
    assert type(fill(Outer, NODE).inner.share) is float


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inner": {"share": 1.5}}, r"^inner\.share=1\.5: must be a number >= 0 and <= 1$"),
        ({"inner": {"share": True}}, r"^inner\.share=true: must be a number"),
        ({"inner": {"share": float("nan")}}, r"^inner\.share=nan: must be"),
        ({"inner": {"shar": 1}}, r"^inner\.shar: no such key$"),
        ({"inner": {}}, r"^inner\.share: has no value; must be a number"),
        ({"inner": 3}, r"^inner=3: must be a group of keys: share$"),
        ({"sizes": [33, 7]}, r"^sizes=\[33, 7\]: must be a list: a whole number a multiple of 16, a whole number$"),
        ({"sizes": [32]}, r"^sizes=\[32\]: must be"),
        ({"sizes": 32}, r"^sizes=32: must be"),
        ({"sizes": [32, 7.0]}, r"^sizes=\[32, 7\.0\]: must be"),
        ({"note": 5}, r"^note=5: must be text or null$"),
        ({"names": {"x": 1}}, r"^names=.*: must be a group of keys$"),
        ({"mode": "c"}, r"^mode=c: must be one of a, b$"),
        ({"mode": "???"}, r"^mode: has no value"),
    ],
)
def test_wrong_values_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fill(Outer, NODE | change)


def test_bounds_include_and_exclude() -> None:
    assert convert(Annotated[float, Range(at_least=0, below=1)], 0, "k") == 0.0
    for bad in (-1e-9, 1):
        with pytest.raises(ConfigError):
            convert(Annotated[float, Range(at_least=0, below=1)], bad, "k")
    with pytest.raises(ConfigError):
        convert(Annotated[int, Range(above=0)], 0, "k")


def test_lists_and_unions() -> None:
    assert convert(str | tuple[str, ...] | None, ["a", "b"], "k") == ("a", "b")
    assert convert(list[int], [1, 2], "k") == [1, 2]
    assert convert(tuple[str, ...], [], "k") == ()
    assert convert(Inner | None, {"share": 0.5}, "k") == Inner(0.5)
    assert convert(Inner | None, None, "k") is None
    assert allowed(tuple[int, int]) == "a list of 2: each a whole number"
