"""The videos of an evaluation: those of a prompt list, by their published names, or all of a folder with captions beside them."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import NamedTuple

from helios_train.errors import InputError

NAMED = re.compile(r"(\d+)_(\d+)_ori(\d+)")  # id, frames that were asked for, frames that are there
COLUMNS = ("id", "prompt", "duration")


class Prompt(NamedTuple):
    """A row of a prompt list: `duration` in frames."""

    id: int
    prompt: str
    duration: int


class Video(NamedTuple):
    """A video to score: what it is called in results, its file, and its caption ("": none known)."""

    id: int | str
    path: Path
    text: str


class Found(NamedTuple):
    """Videos in order, ids of the list that have none, files that are left out with the reason, and the names of planned videos
    that are not there yet."""

    videos: list[Video]
    missing: list[int]
    left_out: dict[str, str]
    unmade: tuple[str, ...] = ()


def read_prompts(path: Path) -> list[Prompt]:
    """A CSV with columns id, prompt, duration (frames); others are ignored. InputError where it is none, or an id comes twice."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            absent = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            if absent:
                raise InputError(f"{path}: has no column {absent[0]}; its first line must name {', '.join(COLUMNS)}")
            rows = [_prompt(row) for row in reader]
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise InputError(f"{path}: is no list of prompts ({error}); give a CSV with columns {', '.join(COLUMNS)}") from error
    twice = sorted({row.id for row in rows if sum(other.id == row.id for other in rows) > 1})
    if twice or not rows:
        raise InputError(f"{path}: {f'id {twice[0]} comes twice' if twice else 'holds no prompt'}; repair the list")
    return rows


def _prompt(row: dict[str, str]) -> Prompt:
    """ValueError where a row lacks something."""
    prompt = Prompt(int(row["id"]), row["prompt"] or "", int(row["duration"]))
    if not prompt.prompt.strip() or prompt.duration < 1:
        raise ValueError(f"id {prompt.id} has {'no prompt' if prompt.duration > 0 else f'{prompt.duration} frames'}")
    return prompt


def find(folder: Path, prompts: list[Prompt] | None, planned: list[str] | None = None) -> Found:
    """The mp4 files of a folder: with prompts those called {id}_{frames}_ori{frames}.mp4, else all, with the "caption" of the
    JSON of the same name. planned: names, without .mp4, of the videos that there are to be; others, of an earlier plan, are left
    out. InputError where there are none, or two videos have one id."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of videos")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() == ".mp4" and path.is_file())
    others = [] if planned is None else [path for path in files if path.stem not in planned]
    files = [path for path in files if path not in others]
    if prompts is None:
        found = Found([Video(path.stem, path, _caption(path)) for path in files], [], {})
    else:
        found = _listed(files, {row.id: row for row in prompts})
    earlier = {path.name: "is none of those that are sampled now" for path in others}
    unmade = tuple(sorted(set(planned or ()) - {path.stem for path in files}))
    found = found._replace(left_out=found.left_out | earlier, unmade=unmade)
    if not found.videos and not unmade:
        wanted = "mp4 files" if prompts is None else "videos {id}_{frames}_ori{frames}.mp4 with an id of the prompt list"
        raise InputError(f"{folder}: holds no {wanted}; name the folder that does")
    return found


def _listed(files: list[Path], prompts: dict[int, Prompt]) -> Found:
    of: dict[int, Video] = {}
    left_out: dict[str, str] = {}
    for path in files:
        match = NAMED.fullmatch(path.stem)
        number = int(match[1]) if match else -1
        if match is None:
            left_out[path.name] = "is not called {id}_{frames}_ori{frames}.mp4"
        elif number not in prompts:
            left_out[path.name] = f"id {number} is not in the prompt list"
        elif number in of:
            raise InputError(f"{path}: id {number} is that of {of[number].path.name} too; remove one of them")
        else:
            of[number] = Video(number, path, prompts[number].prompt)
    return Found([of[number] for number in sorted(of)], sorted(set(prompts) - set(of)), left_out)


def _caption(path: Path) -> str:
    """Of the JSON beside a video, "" where there is none. InputError for one that cannot be read."""
    beside = path.with_suffix(".json")
    if not beside.is_file():
        return ""
    try:
        facts = json.loads(beside.read_text(encoding="utf-8"))
        return str(facts.get("caption") or "")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{beside}: no JSON object with a caption ({error}); repair or remove it") from error
