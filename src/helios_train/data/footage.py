"""The videos that a folder or a list names, as clips: what they follow from, which shard each goes to, and one after another."""

from __future__ import annotations

import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from helios_train import rng
from helios_train.data import trim
from helios_train.data.buckets import nearest, whole_sections
from helios_train.data.decode import Decoder
from helios_train.data.format import SCHEMA, SECTION_FRAMES, Bucket, RawInfo, sha256_of
from helios_train.data.plan import TOO_SHORT, PrepareSettings, ShardPlan, Skipped
from helios_train.data.source import Entry, Problem, read_source
from helios_train.data.video import VideoInfo
from helios_train.errors import InputError

ENDS = 1 << 16  # bytes of each end of a file that tell it from another of its size
Size = tuple[int, int]


@dataclass(frozen=True)
class Clip:
    """One clip to encode: frames first, first + stride, ... of a video file, and all that the shards say of it.

    `record`: schema, uttid, ordinal, source, fps, start_frame, stride, frames, caption (a list; empty: none was given) and,
    where they apply, cut, crop, notes, truth. `stored`: a file with the part of the video that is worth keeping, in which the
    clip begins at frame `stored_first`; None: the whole.
    """

    key: str
    path: Path
    first: int
    record: dict[str, Any]
    stored: Path | None = None
    stored_first: int = 0

    @property
    def sections(self) -> int:
        """Sections of the clip."""
        return int(self.record["frames"]) // SECTION_FRAMES

    @property
    def caption(self) -> str:
        """The caption, empty where none was given."""
        return self.record["caption"][0] if self.record["caption"] else ""

    @property
    def name(self) -> str:
        """What people call it."""
        return called(self.record["source"]["file"], self.record.get("cut"))

    def indices(self, first: int, sections: range) -> range:
        """The frames of some of its sections in a file where the clip begins at frame `first`."""
        stride = int(self.record["stride"])
        return range(first + sections.start * SECTION_FRAMES * stride, first + sections.stop * SECTION_FRAMES * stride, stride)


class Source(Protocol):
    """What `task=prepare` makes shards of."""

    path: Path
    slug: str
    total: int  # videos named
    takes_all: bool  # whether no clip of a shard may be left out, for its videos are not written anew
    suffixes: tuple[str, ...]  # of the videos in raw shards that it has already

    def identity(self) -> Any:
        """JSON-able: what the clips follow from, settings and encoders aside. Equal on all machines."""

    def plan(self, decoder: Decoder, seen: Callable[[], None]) -> tuple[list[ShardPlan], list[Skipped]]:
        """All shards, and what is left out; calls `seen` after each video."""

    def clips(self, shard: ShardPlan, work: Path) -> Iterator[Clip | Skipped]:
        """The clips of a shard, in order. Files needed on the way are made as `work`_KEY.tmp and are the taker's to remove."""

    def keeps(self, shard: ShardPlan, root: Path) -> RawInfo | None:
        """The raw shard, put under `root`; None where it is to be written of the clips."""


def called(name: str, cut: Any) -> str:
    """What people call a video, or a cut of one."""
    return f"{name} [{cut[0]}, {cut[1]})" if cut else name


class Videos:
    """Videos that a folder or a list names."""

    takes_all = False
    suffixes: tuple[str, ...] = ()

    def __init__(self, path: Path, sizes: tuple[Size, ...], settings: PrepareSettings, seed: int):
        self.path, self.sizes, self.settings, self.seed = path, sizes, settings, seed
        # Keys carry the source's name, in the letters they may have.
        name = path.stem if path.is_file() else path.resolve().name
        self.slug = re.sub(r"[^a-z0-9_-]+", "_", name.lower())[:60] or "clip"
        self.entries: list[Entry]
        self.problems: list[Problem]
        self.entries, self.problems = read_source(path)
        self.total = len(self.entries) + len(self.problems)
        self._sha256 = lru_cache(maxsize=256)(sha256_of)  # many clips may be cut from one file

    def identity(self) -> Any:
        """Names, captions, cuts, crops, truths, and size and ends of every file."""
        ends = lru_cache(maxsize=None)(_ends)
        files = [[one.name, ends(one.path), one.caption, one.cut, one.crop, one.truth] for one in self.entries]
        return [self.slug, files, [one.name for one in self.problems]]

    def plan(self, decoder: Decoder, seen: Callable[[], None]) -> tuple[list[ShardPlan], list[Skipped]]:
        """Headers are read, nothing is decoded."""
        skipped = [Skipped(one.name, "unusable", one.reason) for one in self.problems]
        buckets: defaultdict[tuple[int, int, int], list[Any]] = defaultdict(list)
        probe = lru_cache(maxsize=4096)(lambda path: _attempt(decoder, path))
        for ordinal, entry in enumerate(self.entries):
            placed = self._place(ordinal, entry, probe(entry.path))
            if isinstance(placed, Skipped):
                skipped.append(placed)
            else:
                buckets[placed[0]].append(placed[1])
            seen()
        shards, most = [], self.settings.shard_samples
        for shape, clips in sorted(buckets.items()):
            for number, at in enumerate(range(0, len(clips), most)):
                own = clips[at : at + most]
                shards.append(ShardPlan(Bucket(*shape, n=len(own)), number, own))
        return shards, skipped

    def _place(self, ordinal: int, entry: Entry, info: VideoInfo | str) -> Skipped | tuple[tuple[int, int, int], list[Any]]:
        """The bucket of a clip and what the plan keeps of it; `info` may be the reason why there is none."""
        name = called(entry.name, entry.cut)
        if isinstance(info, str):
            return Skipped(name, "unreadable", info)
        start, end = entry.cut or (0, info.frames)
        if not 0 <= start < end <= info.frames:
            return Skipped(name, "cut outside", f"the cut does not lie in its {info.frames} frames; correct it")
        x0, x1, y0, y1 = entry.crop or (0, info.width, 0, info.height)
        if not (0 <= x0 < x1 <= info.width and 0 <= y0 < y1 <= info.height):
            inside = f"its {info.width} columns and {info.height} rows"
            return Skipped(name, "crop outside", f"the crop {[x0, x1, y0, y1]} does not lie in {inside}; correct it")
        stride = self.settings.stride
        taken = len(range(start, end, stride))
        frames = whole_sections(taken, self.settings.lengths)
        if not frames:
            least = max(SECTION_FRAMES, min(self.settings.lengths or (0,)))
            return Skipped(name, TOO_SHORT, f"{taken} frames, {least} are needed")
        if self.settings.start == "random":
            free = end - start - ((frames - 1) * stride + 1)
            start += int(rng.generator(self.seed, "start", ordinal).integers(free + 1))
        shape = (frames, *nearest(y1 - y0, x1 - x0, self.sizes))
        return shape, [ordinal, start, info.frames, info.height, info.width, info.fps, list(info.notes)]

    def clips(self, shard: ShardPlan, work: Path) -> Iterator[Clip | Skipped]:
        """The clips; of a cut video the packets that the cut needs are copied into a file of their own."""
        for ordinal, start, frames, height, width, fps, notes in shard.clips:
            entry = self.entries[ordinal]
            try:
                source = {"file": entry.name, "sha256": self._sha256(entry.path), "height": height, "width": width}
            except OSError as error:
                yield Skipped(called(entry.name, entry.cut), "unreadable", f"cannot be read any more ({error.strerror})")
                continue
            record = {
                "schema": SCHEMA,
                "uttid": Path(entry.name).stem + (f"_{entry.cut[0]}-{entry.cut[1]}" if entry.cut else ""),
                "ordinal": ordinal,
                "source": source,
                "fps": fps,
                "start_frame": start,
                "stride": self.settings.stride,
                "frames": shard.bucket.frames,
                "caption": [] if entry.caption is None else [entry.caption],
            }
            record |= {name: value for name, value in (("cut", entry.cut), ("crop", entry.crop), ("notes", notes)) if value}
            if entry.truth is not None:
                record["truth"] = entry.truth
            clip = Clip(f"{self.slug}-{ordinal:09d}", entry.path, start, record)
            yield self._trimmed(clip, entry, frames, work) if self.settings.raw else clip

    def _trimmed(self, clip: Clip, entry: Entry, frames: int, work: Path) -> Clip:
        """The clip with the part of its video that is worth keeping, where that is less than the whole."""
        if entry.cut is None or entry.cut == (0, frames):
            return clip
        copy = work.with_name(f"{work.name}_{clip.key}.tmp")
        before = trim.copy_range(entry.path, copy, *entry.cut)
        return clip if before is None else replace(clip, stored=copy, stored_first=before + clip.first - entry.cut[0])

    def keeps(self, shard: ShardPlan, root: Path) -> RawInfo | None:
        """None: the videos are put into shards for the first time."""
        return None


def _attempt(decoder: Decoder, path: Path) -> VideoInfo | str:
    """What the header says, or why it cannot be used."""
    try:
        return decoder.probe(path)
    except InputError as error:
        return sentence(error, path)


def sentence(error: InputError, path: Path) -> str:
    """An error about a video without its folder, for where the video is named already: the same on all machines."""
    return str(error).removeprefix(f"{path}: ").replace(str(path), path.name)


def _ends(path: Path) -> list[Any]:
    """Size of a file and sha256 of its two ends; of one that cannot be read, nothing: its turn comes."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.sha256(file.read(ENDS))
            file.seek(max(0, size - ENDS))
            digest.update(file.read(ENDS))
        return [size, digest.hexdigest()]
    except OSError:
        return []
