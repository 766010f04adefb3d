"""How much of the host's memory does loading a base take? Peak of a process of its own, beside what it loads and its shards.

Writes a sharded fp32 folder of random weights, then loads it as bf16, int8 and NF4, each in a fresh process whose peak is
resident memory (mapped pages of files among it) above that before loading. Writes results/loading.json.

Usage: python benchmarks/loading.py [--width 1024] [--layers 24] [--shard 200MB]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from helios_train.memory.quantized import storing
from helios_train.models.loading import load_transformer, random_transformer

RESULT = Path(__file__).parent / "results" / "loading.json"
KINDS = ("bf16", "int8", "nf4")
HEAD, BLOCK = 64, 4  # width of an attention head; of the feed-forward in widths


def write(folder: Path, width: int, layers: int, shard: str) -> None:
    """The folder of a model that wide and deep, fp32, in shards of at most that size."""
    shape = {
        "num_attention_heads": width // HEAD,
        "attention_head_dim": HEAD,
        "num_layers": layers,
        "ffn_dim": BLOCK * width,
        "text_dim": HEAD,
        "rope_dim": [24, 20, 20],
    }
    random_transformer(shape, torch.float32, 0).save_pretrained(folder, max_shard_size=shard)


def _resident(name: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at its peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def load(folder: Path, kind: str) -> dict[str, float]:
    """What loading takes, in MB; to be called in a process that has done nothing else."""
    torch.ones(8).to(torch.bfloat16)
    store = None if kind == "bf16" else storing(kind)  # type: ignore[arg-type]
    if store:
        store("blocks.0", torch.nn.Linear(64, 64))  # loads what it needs
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, begun = _resident("VmRSS"), time.perf_counter()
    model = load_transformer(folder, torch.bfloat16, store=store)
    seconds, peak = time.perf_counter() - begun, _resident("VmHWM") - before
    kept = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    shard = max(file.stat().st_size for file in folder.glob("*.safetensors"))
    return {
        "kept": kept / 1e6,
        "shard": shard / 1e6,
        "peak": peak / 1e6,
        "shards_above": (peak - kept) / shard,
        "seconds": seconds,
    }


def measured(folder: Path, kind: str) -> dict[str, float]:
    """The same from a new process, whose allocator gives back at once what is let go of: else it counts as taken."""
    words = [sys.executable, __file__, "--load", str(folder), kind]
    given = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=given)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def main() -> None:
    """All kinds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--shard", default="200MB")
    parser.add_argument("--load", nargs=2, metavar=("FOLDER", "KIND"), help="this process loads, and prints what that took")
    given = parser.parse_args()
    if given.load:
        print(json.dumps(load(Path(given.load[0]), given.load[1])))
        return
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), given.width, given.layers, given.shard)
        found: dict[str, Any] = {"width": given.width, "layers": given.layers}
        for kind in KINDS:
            found[kind] = {name: round(value, 2) for name, value in measured(Path(folder), kind).items()}
            print(kind, json.dumps(found[kind]), flush=True)
    RESULT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
