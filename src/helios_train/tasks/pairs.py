"""task=pairs: a teacher's ways through noise for the captions of a dataset, as shards that stage=ode regresses on.

Which pair holds which caption and noise is decided by its number alone: every shard can be made by any process at any time, a
shard that is whole is kept, and the manifest is written when all are there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from helios_train.conf.schema import Config, OdeStage
from helios_train.data.format import atomic
from helios_train.data.module import WindowModule
from helios_train.data.pairs import PairShard, PairsManifest, Trajectory, pair_shard, write_pair_shard, write_pairs_manifest
from helios_train.data.plan import Locks
from helios_train.diffusion.rollout import RolloutDraw
from helios_train.errors import ConfigError, InputError
from helios_train.models import manifest
from helios_train.models.codecs import SIDE
from helios_train.models.text import pad
from helios_train.sampling.trajectory import Teacher
from helios_train.tasks import build, prepare, recipes, weights
from helios_train.tasks.progress import Progress

PLAN = "pairs_plan.json"
WHOLE = 0  # place of the lock for plan and manifest; shard i has 1 + i


@dataclass(frozen=True)
class _Maker:
    """Makes pairs by number."""

    config: Config
    teacher: Teacher
    data: WindowModule
    clips: list[int]
    device: torch.device

    def samples(self, numbers: range) -> Iterator[tuple[str, Trajectory, dict[str, Any]]]:
        """(key, trajectory, record) of each."""
        keys = self.config.pairs
        assert keys is not None
        for first in range(numbers.start, numbers.stop, keys.batch):
            some = range(first, min(first + keys.batch, numbers.stop))
            clips = [self.clips[number % len(self.clips)] for number in some]
            stored = [self.data.store.text(clip) for clip in clips]
            text = pad([rows.float() for rows in stored], self.config.text.rows).to(self.device)
            made = self.teacher.sections([self._draw(some, section) for section in range(keys.sections)], text)
            for number, clip, rows, sections, padded in zip(some, clips, stored, made, text.cpu(), strict=True):
                caption = self.data.store.meta(clip)["caption"]
                record = {"caption": caption, "number": number, "seed": self.config.seed, "text": {"rows": len(rows)}}
                yield f"pair-{number:09d}", Trajectory(tuple(map(tuple, sections)), padded[None]), record

    def _draw(self, numbers: range, section: int) -> RolloutDraw:
        """Each pair has noise of its own, or (stage.pair_noise=one) all have that of the first."""
        assert isinstance(self.config.stage, OdeStage)
        one = self.config.stage.pair_noise == "one"
        size = (side // SIDE for side in self.config.data.size)
        shape = (self.data.store.manifest.buckets[0].section_shape[0], 9, *size)
        draws = [
            self.teacher.rollout.draw(
                self.config.seed, "pairs", (0 if one else number, section), shape, section == 0, early=False
            )
            for number in numbers
        ]
        blocks = zip(*(draw.blocks for draw in draws), strict=True)
        return RolloutDraw(torch.cat([draw.start for draw in draws]), tuple(map(torch.cat, blocks)), None)


def run(config: Config, raw: dict[str, Any]) -> None:
    """Makes `pairs.count` trajectories of the teacher `init` under `pairs.output`."""
    keys = config.pairs
    assert keys is not None
    if not isinstance(config.stage, OdeStage):
        raise ConfigError(f"stage={config.stage.name}: task=pairs keeps the steps of a student of stage=ode; add stage=ode")
    if config.init is None:
        raise InputError("task=pairs needs init=<merged folder of the teacher>, a Mid or Base model")
    prepare.toy_shards(config)
    root, shards = Path(keys.output), -(-keys.count // keys.shard_samples)
    part, parts = map(int, keys.part.split("/"))
    maker = _maker(config)
    about: dict[str, Any] = {
        "made": _made(config, maker),
        "encoders": _encoders(maker.data),
        "latent": _latent(config, maker.data),
    }
    with closing(Locks(root)) as locks:
        with locks.hold(WHOLE, wait=True):
            _claim(root, about)
        mine = [number for number in range(shards) if number % parts == part - 1 and pair_shard(root, number) is None]
        with Progress("teacher", sum(len(_numbers(config, number)) for number in mine), "pairs") as progress:
            for number in mine:
                with locks.hold(1 + number) as own:
                    if own and pair_shard(root, number) is None:
                        write_pair_shard(root, number, maker.samples(_numbers(config, number)))
                        progress.advance(len(_numbers(config, number)))
        with locks.hold(WHOLE, wait=True):
            found = [pair_shard(root, number) for number in range(shards)]
            whole = [shard for shard in found if isinstance(shard, PairShard)]
            if len(whole) < shards:
                print(f"{root}: {len(whole)} of {shards} shards are there; the others are left to other parts", flush=True)
                return
            write_pairs_manifest(root, PairsManifest(tuple(whole), **about))
    print(f"{root}: {keys.count} pairs of {keys.sections} sections in {shards} shards", flush=True)


def _maker(config: Config) -> _Maker:
    assert config.pairs is not None
    begun = weights.start(config)
    if begun.sampler is None:
        raise InputError(
            f"init={config.init}: does not say how it is sampled (helios_train.json is missing); merge its run again"
        )
    build.computes(config, begun.transformer, trains=False)
    device, few = build.device(config), recipes.rollout(config)
    transformer = begun.transformer.to(device).eval()
    try:
        teacher = Teacher(transformer.velocity, begun.sampler, few, config.pairs.steps, config.pairs.guidance)
    except ValueError as error:
        raise InputError(f"init={config.init}: teacher and student do not go together ({error}); change stage.student") from error
    data = build.clips(config)
    held = set(data.held_out)
    return _Maker(config, teacher, data, [clip for clip in range(len(data.store)) if clip not in held], device)


def _numbers(config: Config, shard: int) -> range:
    assert config.pairs is not None
    size = config.pairs.shard_samples
    return range(shard * size, min((shard + 1) * size, config.pairs.count))


def _made(config: Config, maker: _Maker) -> dict[str, Any]:
    """What the bytes of all pairs follow from."""
    assert config.pairs is not None and isinstance(config.stage, OdeStage) and config.init is not None
    lineage = [asdict(link) for link in weights.start_lineage(config)]
    student = {name: value for name, value in asdict(config.stage.student).items() if name not in ("timesteps", "sigmas")}
    own = {name: value for name, value in asdict(config.pairs).items() if name not in ("output", "part")}
    teacher = manifest.fingerprint(Path(config.init))
    made = {"teacher": teacher, "lineage": lineage, "dataset": maker.data.store.manifest.manifest_sha, "seed": config.seed, **own}
    return json.loads(json.dumps({**made, "student": student, "noise": config.stage.pair_noise}))  # type: ignore[no-any-return]


def _encoders(data: WindowModule) -> dict[str, Any]:
    return {"codec": data.store.manifest.codec, "text": data.store.manifest.text}


def _latent(config: Config, data: WindowModule) -> tuple[int, ...]:
    channels, frames = data.store.manifest.buckets[0].section_shape[:2]
    return (channels, frames, *(side // SIDE for side in config.data.size))


def _claim(root: Path, about: dict[str, Any]) -> None:
    """Writes what will be made, or checks that the folder is of the same."""
    content = json.dumps(about, sort_keys=True)
    path = root / PLAN
    if path.is_file():
        if path.read_text() != content:
            raise InputError(
                f"{root}: holds pairs of another teacher, dataset or settings; choose another pairs.output, or remove it"
            )
        return
    with atomic(path) as file:
        file.write(content.encode())
