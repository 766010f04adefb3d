"""ODE pairs: a teacher's ways through noise, stored for students to regress on.

    root/pairs.json                 the manifest, written last: teacher, geometry, how the pairs were made, the shards
    root/ode/000000.tar             KEY.ode.safetensors  KEY.text.safetensors  KEY.json
    root/ode/000000.idx             JSON: where each member lies, and its checksum

A member of states holds, for section k and level i, `s{k}.p{i}.latents` bf16 [n + 1, C, 9, h, w] and `s{k}.p{i}.timesteps` fp32
[n].

Axis letters: C latent channels, T latent frames, h w latent rows and columns of a level.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import webdataset
from torch import Tensor
from torch.utils.data import Dataset

from helios_train.data.format import TEXT, atomic, crc32, sha256_of
from helios_train.data.order import Ref
from helios_train.data.writer import member_offsets, to_json
from helios_train.errors import InputError
from helios_train.history import History

SCHEMA = 1
MANIFEST, STATES, META = "pairs.json", "ode.safetensors", "json"
REMEDY = "copy it again from its source, or remove it and run task=pairs again: what is whole is kept"


@dataclass(frozen=True)
class Walk:
    """The teacher's way through one level of a section."""

    latents: Tensor  # [n + 1, C, T, h, w]: the states before n steps, then the level's end point
    times: np.ndarray  # [n], fp32, on the host

    def __post_init__(self) -> None:
        if len(self.times) < 1 or len(self.latents) != len(self.times) + 1:
            raise ValueError(f"{len(self.latents)} states at {len(self.times)} times: a level has one more state than times")


@dataclass(frozen=True)
class Trajectory:
    """The teacher's way through one video: for each section its levels, coarse to fine, and the text [1, rows, dim]."""

    sections: tuple[tuple[Walk, ...], ...]
    text: Tensor

    def to(self, device: torch.device | str) -> Trajectory:
        """The same on the device that works on it, in fp32; times stay on the host."""
        moved = [[replace(walk, latents=walk.latents.to(device).float()) for walk in levels] for levels in self.sections]
        return Trajectory(tuple(map(tuple, moved)), self.text.to(device).float())

    def final(self, section: int) -> Tensor:
        """The section the teacher made. [1, C, T, H, W]"""
        return self.sections[section][-1].latents[-1:]

    def histories(self) -> Iterator[History]:
        """What precedes each section: the teacher's sections before it, nothing before the first."""
        first = self.final(0)
        _, channels, _, rows, columns = first.shape
        history = History.none(1, channels, rows, columns).to(first.device, first.dtype)
        for section in range(len(self.sections)):
            yield history
            history = history.followed_by(self.final(section))


@dataclass(frozen=True)
class Pair:
    """One stored trajectory and its place in the run."""

    trajectory: Trajectory
    ref: Ref

    def to(self, device: torch.device | str) -> Pair:
        """As Trajectory.to."""
        return replace(self, trajectory=self.trajectory.to(device))


@dataclass(frozen=True)
class PairShard:
    """One tar: path relative to the root, samples, bytes, sha256 of it and of its index."""

    url: str
    nsamples: int
    nbytes: int
    sha256: str
    index: str
    index_sha256: str


@dataclass(frozen=True)
class PairsManifest:
    """What pairs.json says.

    made: the teacher, how it was run, the student's steps. encoders: codec and text encoder of the teacher. latent: (C, 9, H, W)
    of a section at full resolution.
    """

    shards: tuple[PairShard, ...]
    made: dict[str, Any]
    encoders: dict[str, Any]
    latent: tuple[int, ...]
    schema: int = SCHEMA

    @cached_property
    def sha(self) -> str:
        """sha256 of the content: equal for equal pairs, in any folder."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def write_pairs_manifest(root: Path, manifest: PairsManifest) -> None:
    """Writes root/pairs.json, which makes the pairs exist."""
    with atomic(root / MANIFEST) as file:
        file.write((json.dumps({"sha": manifest.sha, **asdict(manifest)}, indent=1) + "\n").encode())


def read_pairs_manifest(root: Path) -> PairsManifest:
    """Reads and checks root/pairs.json; InputError where it is missing, damaged, edited or newer."""
    path = root / MANIFEST
    try:
        raw = json.loads(path.read_bytes())
        if raw["schema"] > SCHEMA:
            raise InputError(f"{path}: schema {raw['schema']} is newer than the {SCHEMA} known here; update helios_train")
        sha, shards = raw.pop("sha"), tuple(PairShard(**shard) for shard in raw.pop("shards"))
        manifest = PairsManifest(shards, **{**raw, "latent": tuple(raw["latent"])})
    except FileNotFoundError:
        raise InputError(f"{root}: no {MANIFEST}, so no finished pairs; run task=pairs, or give another folder") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a readable manifest ({error}); restore it, or run task=pairs again") from error
    if manifest.sha != sha:
        raise InputError(f"{path}: its content does not match its sha; restore it, or run task=pairs again")
    return manifest


def pack(trajectory: Trajectory) -> bytes:
    """The member of states: a safetensors file, latents in bf16. InputError where numbers are not finite."""
    tensors: dict[str, Tensor] = {}
    for section, levels in enumerate(trajectory.sections):
        for level, walk in enumerate(levels):
            if not walk.latents.isfinite().all():
                raise InputError(f"section {section}, level {level}: the teacher's states are not finite; look at its weights")
            tensors[f"s{section}.p{level}.latents"] = walk.latents.to(torch.bfloat16).contiguous()
            tensors[f"s{section}.p{level}.timesteps"] = torch.from_numpy(np.asarray(walk.times, dtype=np.float32))
    return safetensors.torch.save(tensors)


def unpack(states: bytes, text: Tensor) -> Trajectory:
    """What `pack` packed; text [1, rows, dim]."""
    tensors = safetensors.torch.load(states)
    shape = [tuple(int(part[1:]) for part in name.split(".")[:2]) for name in tensors if name.endswith(".latents")]
    sections, levels = (max(numbers) + 1 for numbers in zip(*shape, strict=True))
    return Trajectory(
        tuple(
            tuple(
                Walk(tensors[f"s{section}.p{level}.latents"], tensors[f"s{section}.p{level}.timesteps"].numpy())
                for level in range(levels)
            )
            for section in range(sections)
        ),
        text,
    )


def write_pair_shard(root: Path, number: int, samples: Iterable[tuple[str, Trajectory, dict[str, Any]]]) -> None:
    """Writes shard `number`: (key, trajectory, record) a sample; the same bytes for the same samples.

    Of the text the first `record["text"]["rows"]` rows are stored: the others are zeros. InputError where numbers are not finite.
    """
    url, index = f"ode/{number:06d}.tar", f"ode/{number:06d}.idx"
    places: dict[str, list[tuple[str, int, int]]] = {}
    with atomic(root / url) as file:
        with webdataset.TarWriter(file, mtime=0) as tar:
            for key, trajectory, record in samples:
                text = trajectory.text[0, : int(record["text"]["rows"])].to(torch.bfloat16).contiguous()
                content = {
                    STATES: pack(trajectory),
                    TEXT: safetensors.torch.save({"prompt_embed": text}),
                    META: to_json(record),
                }
                tar.write({"__key__": key, **content})
                places[key] = [(suffix, len(data), crc32(data)) for suffix, data in content.items()]
        offsets = member_offsets(file)
    rows = {key: {name: [offsets[f"{key}.{name}"], size, crc] for name, size, crc in own} for key, own in places.items()}
    with atomic(root / index) as file:  # last: a shard is whole once it has an index
        file.write((json.dumps(rows) + "\n").encode())


def pair_shard(root: Path, number: int) -> PairShard | None:
    """Shard `number` where it is whole: its index is there, and its bytes are as many as that lists. Else None."""
    url, index = f"ode/{number:06d}.tar", f"ode/{number:06d}.idx"
    try:
        listed = (root / index).read_bytes()
        rows, size = json.loads(listed), (root / url).stat().st_size
    except (OSError, ValueError):
        return None
    if max(start + length for own in rows.values() for start, length, _ in own.values()) > size:
        return None
    return PairShard(url, len(rows), size, sha256_of(root / url), index, hashlib.sha256(listed).hexdigest())


class PairStore(Dataset[Pair]):
    """The pairs under `root`, one by one; texts are padded with zeros to `rows`.

    InputError where something is missing, cut short or damaged.
    """

    def __init__(self, root: Path, rows: int):
        self.root, self.rows, self.manifest = Path(root), rows, read_pairs_manifest(Path(root))
        self.ends = np.cumsum([shard.nsamples for shard in self.manifest.shards])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def by_shard(self) -> list[np.ndarray]:
        """Sample ids, shard by shard."""
        firsts = [0, *self.ends[:-1]]
        return [np.arange(first, end) for first, end in zip(firsts, self.ends, strict=True)]

    def __getitem__(self, ref: Ref) -> Pair:
        number = int(np.searchsorted(self.ends, ref.sample, side="right"))
        rows = _index(self.root, self.manifest.shards[number])
        key = list(rows)[ref.sample - int(self.ends[number]) + self.manifest.shards[number].nsamples]
        states, text = (self._member(number, key, suffix, rows[key][suffix]) for suffix in (STATES, TEXT))
        stored = safetensors.torch.load(text)["prompt_embed"]
        padded = stored.new_zeros(1, self.rows, stored.shape[1])
        if len(stored) > self.rows:
            raise InputError(f"{self.root}, pair {key}: {len(stored)} text rows, the model takes {self.rows}; take the text=")
        padded[0, : len(stored)] = stored
        return Pair(unpack(states, padded), ref)

    def _member(self, number: int, key: str, suffix: str, place: Sequence[int]) -> bytes:
        start, size, wanted = place
        path = self.root / self.manifest.shards[number].url
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapping:
                data = mapping[start : start + size]
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be read ({error}); {REMEDY}") from error
        if len(data) != size or crc32(data) != wanted:
            raise InputError(f"{path}, pair {key}: {suffix} is damaged or cut short (crc32 differs from the index); {REMEDY}")
        return data


@lru_cache(maxsize=64)
def _index(root: Path, shard: PairShard) -> dict[str, dict[str, list[int]]]:
    path = root / shard.index
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {REMEDY}") from error
    if hashlib.sha256(content).hexdigest() != shard.index_sha256:
        raise InputError(f"{path}: its sha256 is not the one {MANIFEST} lists; {REMEDY}")
    return dict(json.loads(content))
