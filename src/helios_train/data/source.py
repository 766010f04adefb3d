"""What a user names to be prepared: a folder of videos, or a list of them, as entries; and what of it cannot be used, and why.

A folder is searched with all folders in it (hidden names are passed over): NAME.mp4 with its caption in NAME.txt and, if there is
one, what is known about it in NAME.json. A list is one of

    .csv     columns path, caption, and if wanted start, end (a cut), x0, x1, y0, y1 (a crop)
    .jsonl   an object a line: path, and if wanted caption, cut [start, end], crop [x0, x1, y0, y1]
    .json    a list of such objects

Paths are relative to the list's folder, or absolute; cuts are in frames, crops in pixels, ends not included. In place of caption,
an object may have cap, a list whose first is taken, as the manifests of the published system; its other keys are theirs and are
passed over. Text is UTF-8, with or without byte order mark.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from helios_train.data.listing import CROP, CUT, LISTS, Row, Unusable
from helios_train.errors import InputError

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")


@dataclass(frozen=True)
class Entry:
    """A video, or a part of one. `name` is what people call it: its path, relative to the source where it is inside."""

    path: Path
    name: str
    caption: str | None = None
    cut: tuple[int, int] | None = None  # frames, end not included
    crop: tuple[int, int, int, int] | None = None  # x0, x1, y0, y1 in pixels, ends not included
    truth: Any = None  # content of NAME.json beside a video of a folder


class Problem(NamedTuple):
    """An entry that cannot be used: what people call it, and a sentence that says why and what to do."""

    name: str
    reason: str


def read_source(source: Path) -> tuple[list[Entry], list[Problem]]:
    """All videos a folder or a list names, in the order of their names or of the list; and the entries that cannot be used.

    No video is opened. InputError when the source is missing, is neither folder nor list, cannot be read or names no video.
    """
    suffix = source.suffix.lower()
    if source.is_dir():
        entries, problems = _folder(source)
        nothing = f"holds no videos ({', '.join(VIDEO_SUFFIXES)}), nor do the folders in it; put some there or give another"
    elif not source.exists():
        raise InputError(f"{source}: no such folder or list; give a folder of videos, or a .csv, .jsonl or .json list of them")
    elif suffix not in LISTS or not source.is_file():
        raise InputError(f"{source}: is neither a folder nor a .csv, .jsonl or .json list; give its folder, or a list of it")
    else:
        entries, problems = _list(source, LISTS[suffix](source))
        nothing = "names no video; add some lines or give another"
    if not entries and not problems:
        raise InputError(f"{source}: {nothing}")
    return entries, problems


def _folder(root: Path) -> tuple[list[Entry], list[Problem]]:
    problems: list[Problem] = []
    names = []
    for name, path in _walk(root, problems):
        if path.suffix.lower() in VIDEO_SUFFIXES:
            names.append((name, path))
    entries = []
    for name, path in sorted(names):
        try:
            entries.append(Entry(_file(path), _utf8(name), caption=_beside(path, ".txt"), truth=_truth(path)))
        except Unusable as why:
            problems.append(Problem(name.encode(errors="backslashreplace").decode(), str(why)))
    return entries, problems


def _walk(root: Path, problems: list[Problem]) -> Iterator[tuple[str, Path]]:
    """Files under a folder, links followed, every folder once: links may run in circles."""

    def unreadable(error: OSError) -> None:
        if error.filename == str(root):
            raise InputError(f"{root}: cannot be read ({error.strerror}); make it readable") from error
        name = os.fsencode(os.path.relpath(error.filename, root)).decode(errors="backslashreplace")
        problems.append(Problem(name, f"the folder cannot be read ({error.strerror}); make it readable"))

    seen = set()
    for folder, folders, files in os.walk(root, onerror=unreadable, followlinks=True):
        state = os.stat(folder)
        if (state.st_dev, state.st_ino) in seen:
            folders.clear()
            continue
        seen.add((state.st_dev, state.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if not name.startswith("."):
                path = Path(folder, name)
                yield path.relative_to(root).as_posix(), path


def _beside(video: Path, suffix: str) -> str | None:
    """The text of the file beside a video, None where there is none."""
    path = video.with_suffix(suffix)
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise Unusable(f"{path.name} cannot be read as UTF-8 text ({error}); save it as UTF-8 or remove it") from error


def _truth(video: Path) -> Any:
    text = _beside(video, ".json")
    try:
        return None if text is None else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unusable(f"{video.with_suffix('.json').name} is not JSON ({error}); repair or remove it") from error


def _list(source: Path, rows: Iterable[Row]) -> tuple[list[Entry], list[Problem]]:
    entries, problems, first = [], [], dict[Any, str]()
    for row in rows:
        name = f"{source.name}, {row.place}"
        try:
            if isinstance(row.keys, Unusable):
                raise row.keys
            path, name = _named(source.parent, row.keys)
            entry = Entry(
                _file(path), _utf8(name), _caption(row.keys), _bounds(row.keys, "cut", CUT), _bounds(row.keys, "crop", CROP)
            )
            same = first.setdefault((str(path), entry.cut, entry.crop), row.place)
            if same != row.place:
                raise Unusable(f"is the same clip as {same}; remove one")
            entries.append(entry)
        except Unusable as why:
            problems.append(Problem(name.encode(errors="backslashreplace").decode(), f"{row.place}: {why}"))
    return entries, problems


def _named(folder: Path, keys: dict[str, Any]) -> tuple[Path, str]:
    """The video's path, and what people call it."""
    given = keys.get("path")
    if not isinstance(given, str) or not given.strip():
        raise Unusable("path is missing or empty; name a video")
    if "\0" in given:
        raise Unusable("path holds a zero byte; name a video")
    name, home = Path(os.path.normpath(given.strip())), Path(os.path.abspath(folder))
    if name.is_relative_to(home):
        name = name.relative_to(home)
    return Path(os.path.normpath(folder / name)), name.as_posix()


def _file(path: Path) -> Path:
    try:
        if path.is_file():
            return path
        found = path.exists()
    except OSError as error:  # a name longer than the file system allows
        raise Unusable(f"cannot be looked up ({error.strerror}); correct the path") from error
    raise Unusable("is not a file; remove it" if found else "no such file, or a link to nothing; correct the path or remove it")


def _utf8(text: str) -> str:
    """The text, where it was UTF-8: bytes that are not come as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Unusable("its name is not UTF-8; rename it") from error
    return text


def _caption(keys: dict[str, Any]) -> str | None:
    caption = keys.get("caption")
    if caption is None:
        captions = keys.get("cap")
        caption = captions[0] if isinstance(captions, list) and captions else captions or None
    if caption is None:
        return None
    if not isinstance(caption, str):
        raise Unusable(f"caption is {json.dumps(caption)[:60]}, not text; put it in quotes")
    try:
        caption.encode()
    except UnicodeEncodeError as error:
        raise Unusable("caption is not UTF-8; save the list as UTF-8") from error
    return caption.strip()


def _bounds(keys: dict[str, Any], key: str, names: tuple[str, ...]) -> Any:
    """A cut or a crop: pairs of whole numbers, the first of each pair below the second."""
    bounds = keys.get(key)
    if bounds is None:
        return None
    whole = isinstance(bounds, list) and len(bounds) == len(names) and all(type(bound) is int for bound in bounds)
    if not whole or any(not 0 <= low < high for low, high in zip(bounds[::2], bounds[1::2], strict=True)):
        wanted = " and ".join(f"0 <= {low} < {high}" for low, high in zip(names[::2], names[1::2], strict=True))
        raise Unusable(f"{key} is {json.dumps(bounds)[:60]}, not whole numbers [{', '.join(names)}] with {wanted}; correct it")
    return tuple(bounds)
