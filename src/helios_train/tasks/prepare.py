"""prepare: videos with captions become a dataset of shards: divisible, resumable, the same bytes every time."""

from __future__ import annotations

import hashlib
import json
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from helios_train.conf.schema import Config
from helios_train.data.buckets import LENGTHS, RESOLUTIONS
from helios_train.data.decode import Decoder
from helios_train.data.footage import Source, Videos
from helios_train.data.format import (
    CAPTION,
    MANIFEST,
    MEMBERS,
    META,
    SCHEMA,
    SECTION_FRAMES,
    Manifest,
    atomic,
    read_manifest,
    write_manifest,
)
from helios_train.data.plan import (
    FOLDER,
    PLAN_PLACE,
    Locks,
    Plan,
    PrepareSettings,
    Receipt,
    Skipped,
    read_plan,
    read_receipt,
    refusal,
    write_plan,
    write_receipt,
)
from helios_train.data.reencode import RawShards
from helios_train.data.toy import render_folder
from helios_train.data.writer import write_negative
from helios_train.errors import HeliosError, InputError
from helios_train.models.codecs import Codec
from helios_train.models.text import TextEncoder
from helios_train.tasks import build
from helios_train.tasks.progress import Progress
from helios_train.tasks.shards import Encoders, ShardMaker

SIDE_STEP = 16  # the transformer's patches are 16 pixels wide, and diffusers' pipelines take no other sides
FULL_HISTORY = 4  # sections a clip needs for one of them to have all 19 frames of history
SKIPPED = "skipped.json"
DEFAULTS = PrepareSettings()
# The negative prompt that Wan's models, and Helios after them, are guided away from.
NEGATIVE_PROMPT = (
    "Bright tones, overexposed, static, blurred details, subtitles, style, works, paintings, images, static, overall gray, worst "
    "quality, low quality, JPEG compression residue, ugly, incomplete, extra fingers, poorly drawn hands, poorly drawn faces, "
    "deformed, disfigured, misshapen limbs, fused fingers, still picture, messy background, three legs, many people in the "
    "background, walking backwards"
)


class Stopped(HeliosError):
    """SIGTERM came; `exit_code` is 143."""

    exit_code = 128 + signal.SIGTERM


def run(config: Config, raw: dict[str, Any]) -> None:
    """Makes the shards of `data.root`: of the videos of `prepare.source`, or of rendered ones where data=toy."""
    prepared(config)


def prepared(config: Config) -> Manifest | None:
    """The dataset of `data.root`, None while other parts of it are missing; videos are rendered first where data=toy.

    Toy videos have a seed of their own: runs of any `seed` share them.
    """
    root, spec, source = Path(config.data.root), build.toy_spec(config), build.source(config)
    if spec is not None:
        render_folder(source, spec)
    encoders, seed = (build.codec(config), build.text(config)), spec.seed if spec else config.seed
    return prepare_folder(source, root, *encoders, config.data.size, settings=settings_of(config), seed=seed)


def toy_shards(config: Config) -> None:
    """Renders and encodes the toy videos of a config whose dataset is not there yet, and says so."""
    if build.toy_spec(config) is not None and not (Path(config.data.root) / MANIFEST).is_file():
        print(f"{config.data.root}: no toy videos yet; rendering and encoding them", flush=True)
        prepared(config)


def settings_of(config: Config) -> PrepareSettings:
    """What the keys of `prepare` say; of another task, which has none, the defaults."""
    keys = config.prepare
    if keys is None:
        return DEFAULTS
    own = {name: getattr(keys, name) for name in ("start", "stride", "shard_samples", "raw", "bad", "timeout", "batch")}
    part, _, parts = keys.part.partition("/")
    return PrepareSettings(
        sizes=RESOLUTIONS if keys.sizes == "published" else keys.sizes,
        lengths=LENGTHS if keys.lengths == "published" else keys.lengths,
        part=(int(part), int(parts)),
        negative_text=NEGATIVE_PROMPT if keys.negative_text == "published" else keys.negative_text,
        **own,
    )


def prepare_folder(
    source: Path,
    root: Path,
    codec: Codec,
    text: TextEncoder,
    size: tuple[int, int],
    *,
    settings: PrepareSettings = DEFAULTS,
    seed: int = 0,
) -> Manifest | None:
    """Encode the videos of `source` into the dataset `root`; returns its manifest, None while other parts are missing.

    `source`: a folder of videos with captions in .txt files of the same names, a list, or another dataset, whose raw shards
    are taken over and encoded anew. Videos are cropped and resized to `size` (H, W), or the nearest of `settings.sizes`, cut
    into whole sections and encoded section by section; clips too short are left out and counted. `seed` draws starts and from
    the posterior of codecs that have one. Which shard holds what is decided first; then every shard is made by itself, so
    that the same call goes on after a stop at any moment and several processes may work on one root. The same arguments give
    the same bytes, and a finished dataset made from the same is left as it is. InputError when there is nothing to encode, a
    video cannot be used (unless settings.bad is "skip"), a size does not fit the model, `root` holds another dataset or
    cannot be written. Seconds by what they were spent on are left in root/prepare/times_K_of_N.json.
    """
    source, root = Path(source), Path(root)
    sizes = settings.sizes or (size,)
    _check(source, root, sizes, settings)
    encoders = Encoders(codec, text)
    footage = _source(source, sizes, settings, seed)
    identity = _identity(footage, sizes, settings, seed, encoders)
    manifest = _finished(root, identity)
    if manifest is None:
        with _stoppable(root), closing(Locks(root)) as locks, Decoder(settings.timeout) as decoder:
            plan = _plan(root, identity, footage, decoder, settings, locks)
            _make_shards(root, plan, footage, encoders, settings, seed, decoder, locks)
            with locks.hold(PLAN_PLACE, wait=True):
                manifest = _assembled(root, plan, footage, encoders, settings)
    if manifest is not None:
        _say(_summary(root, manifest))
    return manifest


def _check(source: Path, root: Path, sizes: tuple[tuple[int, int], ...], settings: PrepareSettings) -> None:
    """InputError for what no dataset can be made with."""
    for height, width in sizes:
        if min(height, width) < SIDE_STEP or height % SIDE_STEP or width % SIDE_STEP:
            raise InputError(f"size {height}x{width}: both sides must be multiples of {SIDE_STEP} pixels")
    for name in ("shard_samples", "stride", "batch"):
        if getattr(settings, name) < 1:
            raise InputError(f"{name}={getattr(settings, name)}: at least 1 is needed")
    part, parts = settings.part
    if not 1 <= part <= parts:
        raise InputError(f"part {part}/{parts}: must be the k-th of n shares, 1 <= k <= n")
    if source.resolve() == root.resolve():
        raise InputError(f"{source}: is both the source and the new dataset; choose another data.root")


def _source(path: Path, sizes: tuple[tuple[int, int], ...], settings: PrepareSettings, seed: int) -> Source:
    return RawShards(path, sizes, settings) if (path / MANIFEST).is_file() else Videos(path, sizes, settings, seed)


def _identity(
    source: Source, sizes: tuple[tuple[int, int], ...], settings: PrepareSettings, seed: int, encoders: Encoders
) -> str:
    """sha256 of everything the dataset's bytes follow from."""
    made = replace(settings, sizes=sizes).followed()
    content = [SCHEMA, source.identity(), made, seed, encoders.codec_record, encoders.text_record]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _other(root: Path) -> NoReturn:
    raise InputError(
        f"{root}: holds a dataset of other videos, captions or settings; choose another folder or delete it; "
        "nothing was overwritten"
    )


def _finished(root: Path, identity: str) -> Manifest | None:
    """The manifest of a whole dataset made from the same, None where something is to be done; InputError when it is another."""
    if not (root / MANIFEST).exists():
        return None
    manifest = read_manifest(root)
    if manifest.source_sha256 != identity:
        _other(root)
    sizes = [(shard.url, shard.nbytes) for shard in manifest.shards] + [(shard.url, shard.nbytes) for shard in manifest.raw]
    whole = all((root / url).is_file() and (root / url).stat().st_size == size for url, size in sizes)
    return manifest if whole and all((root / shard.index).is_file() for shard in manifest.shards) else None


def _plan(root: Path, identity: str, source: Source, decoder: Decoder, settings: PrepareSettings, locks: Locks) -> Plan:
    """The plan of `root`, made by the first process that comes; the others wait for it."""
    with locks.hold(PLAN_PLACE) as first:
        if first:
            return _read_or_make_plan(root, identity, source, decoder, settings)
    _say(f"{root}: another process is at the plan; waiting for it")
    with locks.hold(PLAN_PLACE, wait=True):
        return _read_or_make_plan(root, identity, source, decoder, settings)


def _read_or_make_plan(root: Path, identity: str, source: Source, decoder: Decoder, settings: PrepareSettings) -> Plan:
    plan = read_plan(root)
    new = plan is None
    if plan is None:
        with Progress(f"looking at {source.slug}", source.total, "videos") as progress:
            shards, skipped = source.plan(decoder, progress.advance)
        plan = Plan(identity, tuple(shards), tuple(skipped))
    elif plan.identity != identity:
        _other(root)
    refused = refusal(source.path, list(plan.skipped), source.total)
    if refused is not None and settings.bad == "stop":
        raise refused
    if not plan.shards:
        least = max(SECTION_FRAMES, min(settings.lengths or (0,)))
        why = f" ({refused})" if refused else ""
        raise InputError(f"{source.path}: {source.total} videos, none usable of {least} frames or more; nothing to prepare{why}")
    if new:
        write_plan(root, plan)
    return plan


def _make_shards(
    root: Path,
    plan: Plan,
    source: Source,
    encoders: Encoders,
    settings: PrepareSettings,
    seed: int,
    decoder: Decoder,
    locks: Locks,
) -> None:
    """Make every shard of this part that is not there and that no other process is at."""
    part, parts = settings.part
    mine = [(place, shard) for place, shard in enumerate(plan.shards) if place % parts == part - 1]
    open_ = [(place, shard) for place, shard in mine if read_receipt(root, plan, shard) is None]
    if not open_:
        return
    start = time.perf_counter()
    total = sum(shard.bucket.n * shard.bucket.sections for _, shard in open_)
    with (
        Progress(f"encoding {source.slug}", total, "sections") as progress,
        ShardMaker(root, source, encoders, settings, seed, decoder, progress.advance) as maker,
    ):
        for place, shard in open_:
            with locks.hold(PLAN_PLACE + 1 + place) as free:
                if free and read_receipt(root, plan, shard) is None:  # another process may have been faster
                    write_receipt(root, shard, maker.make(plan, shard))
    spent = {"clips": maker.clips, "sections": maker.sections, **_shares(maker, time.perf_counter() - start)}
    with locks.hold(PLAN_PLACE, wait=True), atomic(root / FOLDER / f"times_{part}_of_{parts}.json") as file:
        file.write((json.dumps(spent, indent=1) + "\n").encode())
    each = ", ".join(
        f"{name} {spent[name]:.1f} s ({spent[name] / spent['seconds']:.0%})" for name in ("decode", "encode", "write")
    )
    _say(
        f"encoded {maker.clips} clips, {maker.sections} sections in {spent['seconds']:.1f} s, "
        f"{maker.sections / spent['seconds']:.2f} sections/s: {each}; decoding runs beside the rest"
    )


def _shares(maker: ShardMaker, seconds: float) -> dict[str, float]:
    """Seconds in all and of each kind of work; writing is what neither encoded nor waited for a decoded block."""
    spent = maker.clock.seconds
    write = seconds - spent["encode"] - spent["wait"]
    return {"seconds": seconds, "decode": spent["decode"], "encode": spent["encode"], "write": write, "wait": spent["wait"]}


def _assembled(root: Path, plan: Plan, source: Source, encoders: Encoders, settings: PrepareSettings) -> Manifest | None:
    """Write dataset.json of the receipts, if all are there; otherwise say which shards are open."""
    found = [(shard, read_receipt(root, plan, shard)) for shard in plan.shards]
    receipts = [receipt for _, receipt in found if receipt is not None]
    if len(receipts) < len(found):
        open_ = [shard.name for shard, receipt in found if receipt is None]
        named = ", ".join(open_[:5]) + (", ..." if len(open_) > 5 else "")
        _say(
            f"{root}: this part is done; {len(open_)} of {len(found)} shards are still open ({named}); "
            f"the process that finishes the last of them writes {MANIFEST}"
        )
        return None
    skipped = [*plan.skipped, *(one for receipt in receipts for one in receipt.skipped)]
    manifest = _manifest(plan, receipts, skipped, encoders)
    if not manifest.total:
        raise InputError(f"{root}: no clip is left ({refusal(source.path, skipped, source.total)})")
    if skipped:
        with atomic(root / SKIPPED) as file:
            file.write((json.dumps([asdict(one) for one in skipped], indent=1, ensure_ascii=False) + "\n").encode())
    for leftover in (root / FOLDER).glob("*.tmp"):  # of killed runs; nobody is at work any more
        leftover.unlink(missing_ok=True)
    if settings.negative_text is not None:
        rows = encoders.text.encode([settings.negative_text])[0]
        manifest = replace(manifest, text={**manifest.text, "negative": write_negative(root, settings.negative_text, rows)})
    write_manifest(root, manifest)
    return manifest


def _manifest(plan: Plan, receipts: list[Receipt], skipped: list[Skipped], encoders: Encoders) -> Manifest:
    """What dataset.json says: a function of the plan and of the bytes of the shards."""
    lat = tuple(receipt.lat for receipt in receipts if receipt.lat)
    raw = tuple(receipt.raw for receipt in receipts if receipt.raw)
    counts: Counter[str] = Counter()
    for info in lat:
        counts[info.bucket] += info.nsamples
    shapes = {shard.bucket.name: shard.bucket for shard in plan.shards}
    buckets = tuple(replace(shapes[name], n=n) for name, n in counts.items())
    captions: Counter[str] = Counter()
    for receipt in receipts:
        captions.update(receipt.captions)
    health = {
        "short_history": sum(bucket.n for bucket in buckets if bucket.sections < FULL_HISTORY),
        "caption_missing": captions["missing"],
        "caption_empty": captions["empty"],
        "skipped": dict(sorted(Counter(one.kind for one in skipped).items())),
    }
    columns = {"lat": list(MEMBERS)}
    if raw:
        columns["raw"] = [*sorted({name for receipt in receipts for name in receipt.suffixes}), META, CAPTION]
    return Manifest(buckets, lat, encoders.codec_record, encoders.text_record, plan.identity, columns, raw, health)


def _summary(root: Path, manifest: Manifest) -> str:
    """What the dataset holds and what it does not."""
    health = manifest.health
    sections = sum(bucket.n * bucket.sections for bucket in manifest.buckets)
    left_out = ", ".join(f"{n} {kind}" for kind, n in health["skipped"].items())
    lines = [f"{root}: {manifest.total} clips, {sections} sections in {len(manifest.shards)} shards"]
    lines += [f"  {bucket.name}: {bucket.n} clips of {bucket.sections} sections" for bucket in manifest.buckets]
    lines.append(f"  left out: {left_out}; named in {root / SKIPPED}" if left_out else "  left out: none")
    lines.append(f"  captions: {health['caption_missing']} missing, {health['caption_empty']} empty")
    return "\n".join(lines)


def _say(text: str) -> None:
    Console().print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _stoppable(root: Path) -> Iterator[None]:
    """Context in which SIGTERM is an error like any other: half-written files go, the worker of the decoder too."""

    def stop(number: int, frame: Any) -> NoReturn:
        raise Stopped(f"stopped by signal {number}; finished shards stay in {root}, and the same command goes on from there")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
