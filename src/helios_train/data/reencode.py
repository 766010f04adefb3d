"""The videos another dataset keeps in raw shards, as clips: taken over shard by shard, and only encoded anew."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from helios_train.data.buckets import nearest
from helios_train.data.decode import Decoder
from helios_train.data.footage import Clip, Size
from helios_train.data.format import CAPTION, KEY, MANIFEST, META, Bucket, RawInfo, atomic, read_manifest, sha256_of, writable
from helios_train.data.plan import PrepareSettings, ShardPlan, Skipped
from helios_train.data.writer import shard_paths
from helios_train.errors import InputError


class RawShards:
    """The videos another dataset keeps: its shards are taken over as they are, clip for clip, and only encoded anew."""

    takes_all = True

    def __init__(self, path: Path, sizes: tuple[Size, ...], settings: PrepareSettings):
        self.path, self.sizes, self.settings = path, sizes, settings
        self.manifest = read_manifest(path)
        if not self.manifest.raw:
            raise InputError(
                f"{path}: keeps no videos (prepare.raw=false made it); name the folder or list of the videos instead"
            )
        if settings.lengths is not None or settings.start != "first" or settings.stride != 1:
            raise InputError(
                f"{path}: a dataset keeps the lengths, starts and stride of its clips; leave prepare.lengths, prepare.start and "
                "prepare.stride as they are, or name the folder or list of the videos"
            )
        self.slug = path.resolve().name
        self.suffixes = tuple(name for name in self.manifest.columns["raw"] if name not in (META, CAPTION))
        self.total = sum(shard.nsamples for shard in self.manifest.raw)

    def identity(self) -> Any:
        """The shards' checksums."""
        return [[shard.sha256, shard.bucket] for shard in self.manifest.raw]

    def plan(self, decoder: Decoder, seen: Callable[[], None]) -> tuple[list[ShardPlan], list[Skipped]]:
        """A shard for each raw shard, numbered anew where several shapes become one."""
        old = {bucket.name: bucket for bucket in self.manifest.buckets}
        numbers: Counter[tuple[int, int, int]] = Counter()
        shards = []
        for place, raw in enumerate(self.manifest.raw):
            bucket = old[raw.bucket]
            shape = (bucket.frames, *nearest(bucket.height, bucket.width, self.sizes))
            shards.append(ShardPlan(Bucket(*shape, n=raw.nsamples), numbers[shape], [place]))
            numbers[shape] += 1
            for _ in range(raw.nsamples):
                seen()
        return sorted(shards, key=lambda shard: (shard.bucket.name, shard.number)), []

    def clips(self, shard: ShardPlan, work: Path) -> Iterator[Clip | Skipped]:
        """The clips, each video a file of its own while it is needed."""
        path = self._tar(shard)
        video: tuple[str, Path] | None = None
        with tarfile.open(path, mode="r:") as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                content = tar.extractfile(member)
                if content is None or not KEY.fullmatch(key):
                    raise InputError(f"{path}: {member.name} is no member that task=prepare wrote; copy the dataset again")
                if suffix == META and video is not None and video[0] == key:
                    record = json.loads(content.read())
                    first = int(record.pop("stored_start"))
                    yield Clip(key, video[1], first, record)
                    video[1].unlink(missing_ok=True)
                elif suffix != CAPTION:
                    video = (key, work.with_name(f"{work.name}_{key}.tmp"))
                    with writable(video[1]), open(video[1], "wb") as file:
                        shutil.copyfileobj(content, file, 1 << 20)

    def keeps(self, shard: ShardPlan, root: Path) -> RawInfo | None:
        """The shard under `root`: a second name of the same file where the disk allows it, otherwise a copy."""
        path, raw = self._tar(shard), self.manifest.raw[shard.clips[0]]
        if not path.is_file() or sha256_of(path) != raw.sha256:
            raise InputError(
                f"{path}: missing or not the file its {MANIFEST} lists; copy the dataset again, or prepare its videos"
            )
        if not self.settings.raw:
            return None
        url = shard_paths(shard.bucket.name, shard.number)[2]
        with writable(root / url):
            (root / url).parent.mkdir(parents=True, exist_ok=True)
            (root / url).unlink(missing_ok=True)
        try:
            os.link(path, root / url)
        except OSError:  # another disk, or one without such links
            with open(path, "rb") as old, atomic(root / url) as new:
                shutil.copyfileobj(old, new, 1 << 20)
        return replace(raw, url=url, bucket=shard.bucket.name)

    def _tar(self, shard: ShardPlan) -> Path:
        return self.path / self.manifest.raw[shard.clips[0]].url
