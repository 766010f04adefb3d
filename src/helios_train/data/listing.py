"""Lists of videos, .csv, .jsonl or .json, as rows of keys; what they say is checked by `source`."""

from __future__ import annotations

import codecs
import csv
import difflib
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from helios_train.errors import InputError

NEEDED = ("path", "caption")
CUT, CROP = ("start", "end"), ("x0", "x1", "y0", "y1")
KEYS = ("path", "caption", "cap", "cut", "crop")


class Unusable(Exception):
    """Why one entry cannot be used, and what to do."""


class Row(NamedTuple):
    """One entry of a list: where it stands; path, caption or cap, cut and crop as far as they are given, or why it has none."""

    place: str
    keys: dict[str, Any] | Unusable


def _text(source: Path) -> str:
    """The text of a list; bytes that are not UTF-8 become lone surrogates, so that the rest can be used."""
    try:
        data = source.read_bytes()
    except OSError as error:
        raise InputError(f"{source}: cannot be read ({error.strerror}); make it readable") from error
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise InputError(f"{source}: is UTF-16; save it as UTF-8")
    return data.removeprefix(codecs.BOM_UTF8).decode(errors="surrogateescape")


def csv_rows(source: Path) -> Iterator[Row]:
    """Rows of comma-separated values. InputError for unknown, missing or doubled columns, and for what is not CSV at all."""
    reader = csv.reader(io.StringIO(_text(source), newline=""), strict=True, skipinitialspace=True)
    try:
        columns = [name.strip() for name in next(reader, [])]
        _check_columns(source, columns)
        for cells in reader:
            if any(cells):
                yield Row(f"line {reader.line_num}", _csv_keys(columns, cells))
    except csv.Error as error:
        raise InputError(f"{source}: line {reader.line_num} is not CSV ({error}); put text with commas in quotes") from error


def _check_columns(source: Path, columns: list[str]) -> None:
    known = (*NEEDED, *CUT, *CROP)
    for name in columns:
        if name not in known:
            raise InputError(f"{source}: unknown column {name!r}{_nearest(name, known)}; the columns are {', '.join(known)}")
    for group in (NEEDED, CUT, CROP):
        missing = [name for name in group if name not in columns]
        if missing and (group is NEEDED or len(missing) < len(group)):
            raise InputError(f"{source}: has no column {missing[0]}; its first line must name the columns, between commas")
    if len(set(columns)) < len(columns):
        raise InputError(f"{source}: names a column twice; remove one")


def _csv_keys(columns: list[str], cells: list[str]) -> dict[str, Any] | Unusable:
    if len(cells) != len(columns):
        return Unusable(f"{len(cells)} cells under {len(columns)} columns; put text with commas in quotes")
    row = {name: cell.strip() for name, cell in zip(columns, cells, strict=True)}
    keys: dict[str, Any] = {"path": row["path"], "caption": row["caption"] or None}
    for key, names in (("cut", CUT), ("crop", CROP)):
        bounds = [row.get(name, "") for name in names]
        if any(bounds):
            keys[key] = [int(bound) if re.fullmatch("[0-9]{1,18}", bound) else bound for bound in bounds]
    return keys


def jsonl_rows(source: Path) -> Iterator[Row]:
    """Rows of JSON objects, one a line."""
    for number, line in enumerate(_text(source).split("\n"), start=1):
        if line.strip():
            try:
                yield Row(f"line {number}", _json_keys(json.loads(line)))
            except (ValueError, RecursionError) as error:
                yield Row(f"line {number}", Unusable(f"is not JSON ({error}); repair or remove it"))


def json_rows(source: Path) -> Iterator[Row]:
    """Items of one JSON list of objects. InputError where it is something else."""
    try:
        items = json.loads(_text(source))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source}: is not JSON ({error}); repair it") from error
    if not isinstance(items, list):
        raise InputError(f"{source}: is not a JSON list of objects with path, caption, cut and crop; make it one")
    for number, item in enumerate(items, start=1):
        yield Row(f"item {number}", _json_keys(item))


def _json_keys(item: Any) -> dict[str, Any] | Unusable:
    if not isinstance(item, dict):
        return Unusable("is not an object with path, caption, cut and crop; make it one")
    unknown = [key for key in item if key not in KEYS]
    if unknown and "cap" not in item:  # with it, the item is of a published manifest, which has keys of its own
        return Unusable(f"unknown key {unknown[0]!r}{_nearest(unknown[0], KEYS)}; the keys are {', '.join(KEYS)}")
    return item


def _nearest(name: str, known: tuple[str, ...]) -> str:
    """A hint where a known name is near."""
    near = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


LISTS = {".csv": csv_rows, ".jsonl": jsonl_rows, ".json": json_rows}
