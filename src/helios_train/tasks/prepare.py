"""prepare: a folder of videos with captions beside them becomes a dataset of latents."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from helios_train.conf.schema import Config
from helios_train.data.format import MANIFEST, SCHEMA, SECTION_FRAMES, Bucket, Manifest, read_manifest, sha256_of, write_manifest
from helios_train.data.toy import render_folder
from helios_train.data.video import VideoInfo, centre_crop_resize, probe, read_frames
from helios_train.data.writer import Sample, write_shard
from helios_train.errors import InputError
from helios_train.models.codecs import Codec
from helios_train.models.text import HashText
from helios_train.rng import torch_generator
from helios_train.tasks import build

SIDE_STEP = 16  # the transformer's patches are 16 pixels wide, and diffusers' pipelines take no other sides
SECTIONS_AT_ONCE = 4  # decoded and encoded together: bounds the memory a long video takes


@dataclass(frozen=True)
class _Clip:
    """One video to store: its place among all videos, what its header says, and the texts beside it."""

    path: Path
    ordinal: int
    info: VideoInfo
    sha256: str
    caption: str | None
    truth: Any

    @property
    def sections(self) -> int:
        return self.info.frames // SECTION_FRAMES


@dataclass(frozen=True)
class _Job:
    """What all clips share; the records are what the manifest and every clip say of codec and text."""

    source: str
    codec: Codec
    text: HashText
    size: tuple[int, int]
    seed: int
    codec_record: dict[str, Any]
    text_record: dict[str, Any]


def run(config: Config, raw: dict[str, Any]) -> None:
    """Makes the shards of `data.root`: of the videos of `prepare.source`, or of rendered ones where data=toy."""
    assert config.prepare is not None
    prepared(config, config.prepare.shard_samples)


def prepared(config: Config, shard_samples: int = 64) -> Manifest:
    """The dataset of `data.root`; videos are rendered first where data=toy."""
    root, spec, source = Path(config.data.root), build.toy_spec(config), build.source(config)
    if spec is not None:
        render_folder(source, spec)
    encoders = build.codec(config), build.text(config)
    return prepare_folder(source, root, *encoders, config.data.size, shard_samples=shard_samples, seed=config.seed)


def toy_shards(config: Config) -> None:
    """Renders and encodes the toy videos of a config whose dataset is not there yet, and says so."""
    if build.toy_spec(config) is not None and not (Path(config.data.root) / MANIFEST).is_file():
        print(f"{config.data.root}: no toy videos yet; rendering and encoding them", flush=True)
        prepared(config)


def prepare_folder(
    source: Path, root: Path, codec: Codec, text: HashText, size: tuple[int, int], *, shard_samples: int = 64, seed: int = 0
) -> Manifest:
    """Encode every `*.mp4` of `source`, in the order of their names, into the dataset `root`; returns its manifest.

    NAME.txt beside NAME.mp4 is the caption (missing: empty, and counted), NAME.json what is known of the content. Videos are
    cropped to the middle and resized to `size` (H, W), cut into floor(F / 33) sections and encoded section by section; shorter
    ones are left out and counted. `seed` draws from the posterior of codecs that have one. The same arguments give the same
    bytes, and a finished dataset made from the same is left as it is. InputError when there is nothing to encode, a file
    cannot be read, `size` does not fit the model, or `root` holds another dataset.
    """
    source, root = Path(source), Path(root)
    if any(side < SIDE_STEP or side % SIDE_STEP for side in size):
        raise InputError(f"size {size[0]}x{size[1]}: both sides must be multiples of {SIDE_STEP} pixels")
    if shard_samples < 1:
        raise InputError(f"{shard_samples} samples a shard: at least 1 is needed")
    job = _job(source, codec, text, size, seed)
    clips, short = _survey(source)
    made_from = _made_from(job, clips, shard_samples)
    manifest = _finished(root, made_from)
    if manifest is None:
        manifest = _write(root, job, clips, shard_samples, made_from)
    without = sum(clip.caption is None for clip in clips)
    Console().print(
        f"{root}: {manifest.total} clips, {sum(clip.sections for clip in clips)} sections of {size[0]}x{size[1]} in "
        f"{len(manifest.shards)} shards; {short} videos under {SECTION_FRAMES} frames left out, {without} without caption",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    return manifest


def _job(source: Path, codec: Codec, text: HashText, size: tuple[int, int], seed: int) -> _Job:
    constants = {"latents_mean": codec.latents_mean, "latents_std": codec.latents_std}
    return _Job(
        # Keys carry the folder's name, in the letters they may have.
        source=re.sub(r"[^a-z0-9_-]+", "_", source.resolve().name.lower())[:60] or "clip",
        codec=codec,
        text=text,
        size=(int(size[0]), int(size[1])),
        seed=seed,
        codec_record={"name": codec.name, "fingerprint": codec.fingerprint(), **constants},
        text_record={"name": text.name, "fingerprint": text.fingerprint(), "rows": text.rows, "dim": text.dim},
    )


def _survey(source: Path) -> tuple[list[_Clip], int]:
    """The videos long enough for a section, in order, and how many are too short. Nothing is decoded yet."""
    if not source.is_dir():
        raise InputError(f"{source}: no such folder; give one with NAME.mp4 files and NAME.txt captions beside them")
    videos = sorted(source.glob("*.mp4"))
    clips = []
    for ordinal, path in enumerate(videos):
        info = probe(path)
        if info.frames >= SECTION_FRAMES:
            truth = _beside(path, ".json")
            try:
                known = json.loads(truth) if truth is not None else None
            except ValueError as error:
                raise InputError(f"{path.with_suffix('.json')}: not JSON ({error}); repair or remove it") from error
            clips.append(_Clip(path, ordinal, info, sha256_of(path), _beside(path, ".txt"), known))
    if not clips:
        raise InputError(f"{source}: {len(videos)} mp4 files, none of {SECTION_FRAMES} frames or more; nothing to prepare")
    return clips, len(videos) - len(clips)


def _beside(video: Path, suffix: str) -> str | None:
    """The text of the file beside a video, None when there is none."""
    path = video.with_suffix(suffix)
    try:
        return path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not readable as UTF-8 text ({error}); repair or remove it") from error


def _made_from(job: _Job, clips: list[_Clip], shard_samples: int) -> str:
    """sha256 of everything the dataset's bytes follow from."""
    settings = [SCHEMA, job.source, job.size, job.seed, shard_samples, job.codec_record, job.text_record]
    files = [[clip.path.name, clip.ordinal, clip.sha256, clip.caption, clip.truth] for clip in clips]
    return hashlib.sha256(json.dumps([settings, files], sort_keys=True).encode()).hexdigest()


def _finished(root: Path, made_from: str) -> Manifest | None:
    """The manifest of a whole dataset made from the same, None where it has to be written; InputError when it is another."""
    if not (root / MANIFEST).exists():
        return None
    manifest = read_manifest(root)
    if manifest.source_sha256 != made_from:
        raise InputError(f"{root}: holds a dataset of other videos, captions or settings; choose another folder or delete it")
    paths = [(root / shard.url, root / shard.index, shard.nbytes) for shard in manifest.shards]
    whole = all(tar.is_file() and index.is_file() and tar.stat().st_size == nbytes for tar, index, nbytes in paths)
    return manifest if whole else None


def _write(root: Path, job: _Job, clips: list[_Clip], shard_samples: int, made_from: str) -> Manifest:
    """All shards, bucket by bucket, then the manifest."""
    counts = sorted(Counter(clip.sections for clip in clips).items())
    buckets = tuple(Bucket(sections * SECTION_FRAMES, *job.size, n=n) for sections, n in counts)
    shards = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("clips"), TimeRemainingColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task(f"encoding {job.source}", total=len(clips))

        def samples(group: list[_Clip]) -> Iterator[Sample]:
            for clip in group:
                yield _sample(clip, job)
                progress.advance(bar)

        for bucket in buckets:
            own = [clip for clip in clips if clip.sections == bucket.sections]
            for number, start in enumerate(range(0, len(own), shard_samples)):
                shards.append(write_shard(root, bucket, number, samples(own[start : start + shard_samples])))
    manifest = Manifest(buckets, tuple(shards), job.codec_record, job.text_record, made_from)
    write_manifest(root, manifest)
    return manifest


def _sample(clip: _Clip, job: _Job) -> Sample:
    """Decode, encode and describe one clip."""
    latents = []
    for first in range(0, clip.sections, SECTIONS_AT_ONCE):
        block = range(first, min(first + SECTIONS_AT_ONCE, clip.sections))
        frames = read_frames(clip.path, range(block.start * SECTION_FRAMES, block.stop * SECTION_FRAMES))
        sections = centre_crop_resize(frames, job.size).unflatten(1, (len(block), SECTION_FRAMES)).transpose(0, 1)
        draws = [torch_generator(job.seed, "posterior", clip.ordinal, section) for section in block]
        latents.append(job.codec.encode(sections, draws))
    caption = clip.caption or ""
    rows = job.text.encode([caption])[0]
    meta = {
        "schema": SCHEMA,
        "uttid": clip.path.stem,
        "source": {"file": clip.path.name, "sha256": clip.sha256, "height": clip.info.height, "width": clip.info.width},
        "fps": clip.info.fps,
        "start_frame": 0,
        "stride": 1,
        "frames": clip.sections * SECTION_FRAMES,
        "height": job.size[0],
        "width": job.size[1],
        "sections": clip.sections,
        "caption": [caption],
        "codec": {"name": job.codec_record["name"], "fingerprint": job.codec_record["fingerprint"], "normalized": True},
        "posterior": {"draw": "sample", "seed": job.seed},
        "text": {"name": job.text_record["name"], "fingerprint": job.text_record["fingerprint"], "rows": len(rows)},
    }
    if clip.truth is not None:
        meta["truth"] = clip.truth
    return Sample(f"{job.source}-{clip.ordinal:09d}", torch.cat(latents), rows, meta)
