"""What a dataset will hold, decided before anything is encoded, and the receipts of what is done.

    root/prepare/plan.json                     every shard and its clips; shared by all processes that work on the root
    root/prepare/b00132x64x128_000000.json     the receipt of a shard, written when all its files are there
    root/prepare/lock                          bytes of it are locked, one a shard, by whoever is at work on it

A shard follows from the plan alone, so that any process can make any of them, at any time, once or twice.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from helios_train.data.format import Bucket, RawInfo, ShardInfo, atomic, writable
from helios_train.errors import InputError

FOLDER = "prepare"
SHOWN = 5  # problems named in one message
PLAN_PLACE = 0  # byte of the lock file that stands for the plan and dataset.json; shard i has byte 1 + i


@dataclass(frozen=True)
class PrepareSettings:
    """How videos become clips and shards. The bytes follow from all but `part`, `bad` and `timeout`.

    `sizes`: resolution buckets (H, W); None: the one size. `lengths`: length buckets in frames; None: every whole section.
    `start`: where a clip shorter than its video begins. `batch`: sections encoded at once (a network's last digits depend on
    it). `part`: (k, n), the k-th of n shares of the shards. `bad`: what a video that cannot be used does. `timeout`: seconds a
    video may take to decode. `negative_text`: embedded beside the captions, for guidance to lead away from.
    """

    sizes: tuple[tuple[int, int], ...] | None = None
    lengths: tuple[int, ...] | None = None
    start: Literal["first", "random"] = "first"
    stride: int = 1
    shard_samples: int = 64
    raw: bool = True
    batch: int = 4
    part: tuple[int, int] = (1, 1)
    bad: Literal["stop", "skip"] = "stop"
    timeout: float = 120.0
    negative_text: str | None = None

    def followed(self) -> dict[str, Any]:
        """What the bytes of the dataset follow from."""
        without = ("part", "bad", "timeout", *(["negative_text"] if self.negative_text is None else []))
        return {name: value for name, value in asdict(self).items() if name not in without}


@dataclass(frozen=True)
class Skipped:
    """A video that is not in the dataset: what people call it, which kind of reason, and the sentence."""

    name: str
    kind: str
    reason: str


TOO_SHORT = "too short"  # the one kind that nobody need look at


@dataclass(frozen=True)
class ShardPlan:
    """One shard: its bucket (with the clips planned), its number in it, and what the source needs to find the clips again."""

    bucket: Bucket
    number: int
    clips: list[Any]

    @property
    def name(self) -> str:
        """The shard's name in messages and file names."""
        return f"{self.bucket.name}_{self.number:06d}"


@dataclass(frozen=True)
class Plan:
    """All shards in the order of the dataset, what is left out already, and the sha256 of what all of it follows from."""

    identity: str
    shards: tuple[ShardPlan, ...]
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True)
class Receipt:
    """What became of a shard. `lat` and `raw` are None where no clip was left. `files`: bytes of each file, by path."""

    identity: str
    lat: ShardInfo | None
    raw: RawInfo | None
    suffixes: tuple[str, ...]
    files: dict[str, int]
    captions: dict[str, int]
    skipped: tuple[Skipped, ...]


def write_plan(root: Path, plan: Plan) -> None:
    """Write root/prepare/plan.json."""
    shards = [[list(vars(shard.bucket).values()), shard.number, shard.clips] for shard in plan.shards]
    content = {"identity": plan.identity, "skipped": [asdict(one) for one in plan.skipped], "shards": shards}
    with atomic(root / FOLDER / "plan.json") as file:
        file.write(json.dumps(content, separators=(",", ":")).encode())


def read_plan(root: Path) -> Plan | None:
    """The plan of `root`, None where there is none; InputError when it is damaged."""
    path = root / FOLDER / "plan.json"
    try:
        content = json.loads(path.read_bytes())
        shards = tuple(ShardPlan(Bucket(*bucket), number, clips) for bucket, number, clips in content["shards"])
        return Plan(content["identity"], shards, tuple(Skipped(**one) for one in content["skipped"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a readable plan ({error}); remove it, and the videos are looked at again") from error


def write_receipt(root: Path, shard: ShardPlan, receipt: Receipt) -> None:
    """Write root/prepare/SHARD.json, the act that makes the shard exist."""
    with atomic(root / FOLDER / f"{shard.name}.json") as file:
        file.write((json.dumps(asdict(receipt), indent=1) + "\n").encode())


def read_receipt(root: Path, plan: Plan, shard: ShardPlan) -> Receipt | None:
    """The receipt of a shard whose files are all there with the right size, None where the shard is to be made."""
    try:
        content = json.loads((root / FOLDER / f"{shard.name}.json").read_bytes())
        lat = ShardInfo(**content.pop("lat")) if content["lat"] else content.pop("lat")
        raw = RawInfo(**content.pop("raw")) if content["raw"] else content.pop("raw")
        skipped, suffixes = (tuple(content.pop(name)) for name in ("skipped", "suffixes"))
        receipt = Receipt(lat=lat, raw=raw, suffixes=suffixes, skipped=tuple(Skipped(**one) for one in skipped), **content)
        whole = all((root / url).stat().st_size == size for url, size in receipt.files.items())
    except (OSError, ValueError, KeyError, TypeError):  # missing or damaged: the shard is made again
        return None
    return receipt if whole and receipt.identity == plan.identity else None


def refusal(source: Path, skipped: list[Skipped], total: int) -> InputError | None:
    """One error for all videos that cannot be used; None where there is none."""
    bad = [one for one in skipped if one.kind != TOO_SHORT]
    if not bad:
        return None
    shown = "; ".join(f"{one.name}: {one.reason}" for one in bad[:SHOWN])
    more = f"; and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
    return InputError(
        f"{source}: {len(bad)} of {total} videos cannot be used: {shown}{more}. "
        "Repair or remove them, or leave them out with prepare.bad=skip"
    )


class Locks:
    """Locks on the shards of a root, held until their context is left or the process is gone, kill -9 included.

    Record locks on bytes of one file: a child process does not inherit them, and nothing is left to clear away.
    """

    def __init__(self, root: Path):
        self._path = root / FOLDER / "lock"
        with writable(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)

    @contextmanager
    def hold(self, place: int, wait: bool = False) -> Iterator[bool]:
        """Context in which a place is this process's own; yields whether it is: another may have it, unless `wait`ed for."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, place)
        except (BlockingIOError, PermissionError):  # what POSIX allows to mean: taken
            yield False
            return
        except OSError as error:
            raise InputError(f"{self._path}: cannot be locked ({error.strerror}); put the dataset on a disk that can") from error
        try:
            yield True
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, place)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)
