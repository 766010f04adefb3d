"""One shard of `task=prepare`: its clips decoded, encoded and written, decoding one block ahead of encoding."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch

from helios_train.data.decode import Decoder
from helios_train.data.footage import Clip, Source, sentence
from helios_train.data.format import SECTION_FRAMES
from helios_train.data.plan import FOLDER, Plan, PrepareSettings, Receipt, ShardPlan, Skipped, refusal
from helios_train.data.video import centre_crop_resize
from helios_train.data.writer import RawShard, Sample, raw_info, raw_shard, shard_paths, suffix_of, write_shard
from helios_train.errors import InputError
from helios_train.models.codecs import Codec
from helios_train.models.text import TextEncoder
from helios_train.rng import torch_generator

T = TypeVar("T")


class Encoders:
    """Codec and text encoder, and the records that the manifest and every clip keep of them."""

    def __init__(self, codec: Codec, text: TextEncoder):
        self.codec, self.text = codec, text
        constants = {"latents_mean": codec.latents_mean, "latents_std": codec.latents_std}
        self.codec_record: dict[str, Any] = {"name": codec.name, "fingerprint": codec.fingerprint(), **constants}
        self.text_record: dict[str, Any] = {
            "name": text.name,
            "fingerprint": text.fingerprint(),
            "rows": text.rows,
            "dim": text.dim,
        }
        self.device = next((one.device for one in chain(codec.vae.parameters(), codec.vae.buffers())), torch.device("cpu"))


class Clock:
    """Seconds by what they were spent on."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    @contextmanager
    def on(self, what: str) -> Iterator[None]:
        """Context whose time counts."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] += time.perf_counter() - start  # type: ignore[assignment]


@dataclass(frozen=True)
class _Block:
    """Some sections of a clip: video [B, 3, 33, H, W] in [-1, 1]. `stored`: whether the stored part showed the same so far."""

    clip: Clip
    sections: range
    video: torch.Tensor
    stored: bool


@dataclass
class _Tally:
    """What the receipt of a shard counts."""

    captions: Counter[str] = field(default_factory=Counter)
    skipped: list[Skipped] = field(default_factory=list)


class ShardMaker:
    """Makes shards of a plan, in any order: a context manager, for it decodes in a thread of its own.

    `done` is told how many sections are finished, `clock` keeps the time.
    """

    def __init__(
        self,
        root: Path,
        source: Source,
        encoders: Encoders,
        settings: PrepareSettings,
        seed: int,
        decoder: Decoder,
        done: Callable[[int], None],
    ):
        self.root, self.source, self.encoders, self.settings = root, source, encoders, settings
        self.seed, self.decoder, self.done = seed, decoder, done
        self.clock = Clock()
        self.clips = self.sections = 0
        # One for all shards: the decoder's worker lives no longer than the thread that started it.
        self._thread = ThreadPoolExecutor(1, "decoding")

    def __enter__(self) -> ShardMaker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._thread.shutdown()

    def make(self, plan: Plan, shard: ShardPlan) -> Receipt:
        """Write the files of a shard, whatever is there already; the caller writes the receipt.

        InputError, and no file with the name of a shard, when a video cannot be decoded (and prepare.bad=stop), numbers are
        not finite or do not fit, or the disk is full.
        """
        lat_url, index_url, raw_url = shard_paths(shard.bucket.name, shard.number)
        tally = _Tally()
        self._tidy(shard)
        kept = self.source.keeps(shard, self.root)
        raw = None
        try:
            with ExitStack() as stack:
                if self.settings.raw and kept is None:
                    raw = stack.enter_context(raw_shard(self.root, raw_url))
                samples = stack.enter_context(closing(self._samples(shard, raw, tally)))
                first = next(samples, None)
                lat = write_shard(self.root, shard.bucket, shard.number, chain([first], samples)) if first else None
        finally:
            self._tidy(shard)
        if lat is None:
            for url in (lat_url, index_url, raw_url):
                (self.root / url).unlink(missing_ok=True)
            return Receipt(plan.identity, None, None, (), {}, {}, tuple(tally.skipped))
        suffixes: tuple[str, ...] = tuple(sorted(raw.suffixes)) if raw else self.source.suffixes
        stored = kept if raw is None else raw_info(self.root, raw_url, shard.bucket.name, raw.samples)
        urls = [lat_url, index_url, *([raw_url] if stored else [])]
        files = {url: (self.root / url).stat().st_size for url in urls}
        return Receipt(plan.identity, lat, stored, suffixes, files, dict(tally.captions), tuple(tally.skipped))

    def _samples(self, shard: ShardPlan, raw: RawShard | None, tally: _Tally) -> Generator[Sample]:
        """The clips of a shard as they are to be stored; their videos go to `raw` on the way."""
        latents: list[torch.Tensor] = []
        with closing(self._ahead(self._blocks(shard))) as blocks:
            for block in blocks:
                if isinstance(block, Skipped):
                    if self.settings.bad == "stop" or self.source.takes_all:
                        raise refusal(self.source.path, [block], self.source.total) or AssertionError
                    tally.skipped.append(block)
                    latents = []
                else:
                    with self.clock.on("encode"):
                        latents.append(self._encode(block))
                    if block.sections.stop < block.clip.sections:
                        continue
                    yield self._sample(block, torch.cat(latents), shard, raw)
                    tally.captions[_caption_state(block.clip)] += 1
                    latents = []
                self.done(shard.bucket.sections)

    def _ahead(self, items: Iterator[T]) -> Generator[T]:
        """The same items, the next one always in the making in the other thread."""
        end = object()
        coming = self._thread.submit(next, items, end)
        try:
            while True:
                with self.clock.on("wait"):
                    item = coming.result()
                if item is end:
                    return
                coming = self._thread.submit(next, items, end)
                yield item  # type: ignore[misc]
        finally:
            if not coming.done() and (worker := self.decoder.pid) is not None:
                with suppress(ProcessLookupError):  # whoever stops need not wait for a video that may hang
                    os.kill(worker, signal.SIGKILL)
            wait([coming])  # the decoder is one thread's at a time

    def _blocks(self, shard: ShardPlan) -> Iterator[_Block | Skipped]:
        """Every clip in blocks of sections, or why it is to be left out."""
        for clip in self.source.clips(shard, self.root / FOLDER / shard.name):
            if isinstance(clip, Skipped):
                yield clip
                continue
            stored = clip.stored is not None
            try:
                for first in range(0, clip.sections, self.settings.batch):
                    sections = range(first, min(first + self.settings.batch, clip.sections))
                    with self.clock.on("decode"):
                        frames = self.decoder.read(clip.path, clip.indices(clip.first, sections))
                        stored = stored and self._shows(clip, sections, frames)
                        video = _pixels(frames, clip.record.get("crop"), (shard.bucket.height, shard.bucket.width))
                    yield _Block(clip, sections, video, stored)
            except InputError as error:
                yield Skipped(clip.name, "undecodable", sentence(error, clip.path))

    def _shows(self, clip: Clip, sections: range, frames: torch.Tensor) -> bool:
        """Whether the part of the video that would be stored decodes to the same frames."""
        assert clip.stored is not None
        try:
            return torch.equal(self.decoder.read(clip.stored, clip.indices(clip.stored_first, sections)), frames)
        except InputError:
            return False

    def _encode(self, block: _Block) -> torch.Tensor:
        """Normalised latents [B, 16, 9, h, w]; a section's draw depends on nothing but seed, clip and section."""
        ordinal = block.clip.record["ordinal"]
        draws = [torch_generator(self.seed, "posterior", ordinal, section) for section in block.sections]
        return self.encoders.codec.encode(block.video.to(self.encoders.device), draws)

    def _sample(self, block: _Block, latents: torch.Tensor, shard: ShardPlan, raw: RawShard | None) -> Sample:
        """What is stored of a clip, its video put into `raw`."""
        clip, codec, text = block.clip, self.encoders.codec_record, self.encoders.text_record
        if raw is not None:
            video, first = (clip.stored, clip.stored_first) if clip.stored and block.stored else (clip.path, clip.first)
            suffix = suffix_of(clip.record["source"]["file"])
            raw.add(clip.key, video, suffix, clip.record | {"stored_start": first}, clip.caption)
        if clip.stored is not None:
            clip.stored.unlink(missing_ok=True)
        with self.clock.on("encode"):
            rows = self.encoders.text.encode([clip.caption])[0]
        self.clips, self.sections = self.clips + 1, self.sections + clip.sections
        meta = clip.record | {
            "height": shard.bucket.height,
            "width": shard.bucket.width,
            "sections": clip.sections,
            "codec": {"name": codec["name"], "fingerprint": codec["fingerprint"], "normalized": True},
            "posterior": {"draw": "sample", "seed": self.seed},
            "text": {"name": text["name"], "fingerprint": text["fingerprint"], "rows": len(rows)},
        }
        return Sample(clip.key, latents, rows, meta)

    def _tidy(self, shard: ShardPlan) -> None:
        """Remove the files that were needed on the way, of a killed run too."""
        for leftover in (self.root / FOLDER).glob(f"{shard.name}_*.tmp"):
            with suppress(OSError):
                leftover.unlink()


def _pixels(frames: torch.Tensor, crop: tuple[int, int, int, int] | None, size: tuple[int, int]) -> torch.Tensor:
    """uint8 [B * 33, h, w, 3] to sections [B, 3, 33, H, W] in [-1, 1]."""
    if crop:
        x0, x1, y0, y1 = crop
        frames = frames[:, y0:y1, x0:x1]
    return centre_crop_resize(frames, size).unflatten(1, (-1, SECTION_FRAMES)).transpose(0, 1)


def _caption_state(clip: Clip) -> str:
    if not clip.record["caption"]:
        return "missing"
    return "given" if clip.caption else "empty"
