"""How fast is our transformer beside diffusers' module, and how much memory does it take?

Usage: python benchmarks/transformer_step.py [--turns 10] [--sizes NAME ...] [--variants NAME ...] [--trains frozen lora all]

All share one set of weights and are called alike, by turns, in one process: a forward without gradients, and forward + backward
with every block checkpointed. What trains: `frozen` nothing (the gradient goes to the target's latents), `lora` rank-128
adapters, `all` every weight. Medians in ms, and of the ratio to diffusers in the same turn; tokens a second; the peak above what
stood before (CUDA: of the allocator; and planned on fake tensors); the share of the machine's matrix products: HFU counts what is
computed, recomputed too, MFU what the same step computes without checkpointing. On CUDA: 14b in bf16 at 384 x 640, batch 1, 2, 4,
and the two lower levels; on a CPU: width 1,024, 8 blocks, 2,760 tokens, fp32, and 14b planned. Writes
results/transformer_step.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import HeliosTransformer3DModel
from rich.console import Console
from rich.table import Table
from timing import all_turns, by_turns, machine
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from helios_train.history import ANCHOR_INDEX, LONG_INDICES, MID_INDICES, SECTION, SHORT_INDICES, TARGET_INDICES
from helios_train.memory.flops import count_flops
from helios_train.memory.live import LiveCounter
from helios_train.memory.offload import Offload
from helios_train.memory.places import DEVICE, Places, materialise
from helios_train.models.adapters import Lora, add_lora
from helios_train.models.loading import fill_buffers
from helios_train.models.precision import cast
from helios_train.models.transformer import HeliosTransformer

GIB = 2**30
TFLOPS = {"H100": 989.4, "H200": 989.4}  # bf16, dense, of the data sheets; elsewhere what a large product reaches here
TEXT_ROWS = 512
CPU_DEVICE = torch.device("cpu")


class Size(NamedTuple):
    name: str
    shape: dict[str, Any]
    batch: int
    history: tuple[int, int]  # rows and columns of its latents
    target: tuple[int, int]
    dtype: torch.dtype


class Variant(NamedTuple):
    kind: type[HeliosTransformer3DModel]
    kernels: str
    compiled: bool
    offloaded: bool = False  # the inputs of its blocks wait for the backward on the host


SMALL = {"num_attention_heads": 8, "num_layers": 8, "ffn_dim": 4096, "text_dim": 1024}
CPU = [Size("width 1024, 8 blocks, 2760 tokens", SMALL, 1, (24, 40), (24, 40), torch.float32)]
CUDA = [
    *(Size(f"14b, full, batch {b}", {}, b, (48, 80), (48, 80), torch.bfloat16) for b in (1, 2, 4)),
    Size("14b, half, batch 1", {}, 1, (48, 80), (24, 40), torch.bfloat16),
    Size("14b, quarter, batch 1", {}, 1, (48, 80), (12, 20), torch.bfloat16),
]
VARIANTS = {
    "diffusers": Variant(HeliosTransformer3DModel, "", False),
    "diffusers, compiled": Variant(HeliosTransformer3DModel, "", True),
    "ours": Variant(HeliosTransformer, "auto", False),
    "ours, offloaded": Variant(HeliosTransformer, "auto", False, offloaded=True),
    "ours, compiled": Variant(HeliosTransformer, "auto", True),
    "torch.compile alone": Variant(HeliosTransformer, "compile", True),
}
PLAIN, TRAINS = "diffusers", ("frozen", "lora", "all")


def build(variant: Variant, size: Size, blocks: int | None = None) -> HeliosTransformer3DModel:
    """A frozen model as its class makes it."""
    module = variant.kind(**size.shape | ({"num_layers": blocks} if blocks else {}))
    cast(module, size.dtype)
    if isinstance(module, HeliosTransformer):
        module.kernels = variant.kernels
    return module.requires_grad_(False).train()  # type: ignore[no-any-return]


def prepare(
    module: HeliosTransformer3DModel, trains: str, checkpointing: bool, variant: Variant, device: torch.device = CPU_DEVICE
) -> None:
    """What trains, and checkpointing."""
    if trains == "lora":
        add_lora(module, "student", Lora(), seed=0)  # type: ignore[arg-type]
    elif trains == "all":
        module.requires_grad_(True)
    if checkpointing and isinstance(module, HeliosTransformer):
        module.checkpoint_blocks(spare_last=not variant.offloaded)
        if variant.offloaded:
            module.keep_inputs(Offload(Places(device)))
    elif checkpointing:
        module.enable_gradient_checkpointing()


def inputs(size: Size, variant: Variant, device: torch.device) -> dict[str, Any]:
    """Arguments of diffusers' forward, which ours takes too."""
    draw = partial(torch.randn, device=device, dtype=size.dtype)
    given = {
        "hidden_states": draw(size.batch, 16, SECTION, *size.target),
        "timestep": torch.full((size.batch,), 500.0, device=device),
        "encoder_hidden_states": draw(size.batch, TEXT_ROWS, size.shape.get("text_dim", 4096)),
    }
    parts = {"short": (ANCHOR_INDEX, *SHORT_INDICES), "mid": MID_INDICES, "long": LONG_INDICES}
    indices = {f"indices_latents_history_{name}": frames for name, frames in parts.items()}
    indices["indices_hidden_states"] = TARGET_INDICES
    if variant.kind is not HeliosTransformer:  # diffusers keeps them on the device
        given |= {name: torch.tensor(frames, device=device)[None] for name, frames in indices.items()}
    else:
        given |= indices
    latents = {f"latents_history_{name}": draw(size.batch, 16, len(frames), *size.history) for name, frames in parts.items()}
    given["hidden_states"].requires_grad_()
    return given | latents


def tokens(size: Size) -> int:
    """Of all samples, history and target."""
    grid, target = (rows * columns // 4 for rows, columns in (size.history, size.target))
    halved, quartered = (-(-size.history[0] // 2 // part) * -(-size.history[1] // 2 // part) for part in (2, 4))
    return size.batch * (SECTION * target + 2 * grid + halved + 4 * quartered)


def forward(module: HeliosTransformer3DModel, given: dict[str, Any]) -> None:
    """Without gradients."""
    with torch.no_grad():
        module(**given, return_dict=False)


def forward_backward(module: HeliosTransformer3DModel, given: dict[str, Any]) -> None:
    """Gradients of the target's latents and of what trains, dropped at the end."""
    output = module(**given, return_dict=False)[0]
    output.backward(torch.ones_like(output))
    module.zero_grad()
    given["hidden_states"].grad = None


WORK: dict[str, Callable[[HeliosTransformer3DModel, dict[str, Any]], None]] = {
    "forward": forward,
    "forward_backward": forward_backward,
}


def planned(variant: Variant, size: Size, trains: str) -> dict[str, dict[str, int]]:
    """FLOPs as run and without checkpointing, and the peak above what stood before, on fake tensors; of 2 blocks and of 4,
    extended to all."""
    blocks = size.shape.get("num_layers", 40)
    kernels = {"auto": "triton"}.get(variant.kernels, variant.kernels) if size in CUDA else variant.kernels
    two, four = (_planned(variant._replace(kernels=kernels), size, trains, few) for few in (2, 4))
    return {
        work: {name: two[work][name] + (blocks - 2) * (four[work][name] - two[work][name]) // 2 for name in two[work]}
        for work in WORK
    }


def _planned(variant: Variant, size: Size, trains: str, blocks: int) -> dict[str, dict[str, int]]:
    counted: dict[str, dict[str, int]] = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        for checkpointing in (True, False):
            module = materialise(partial(_traced, variant, size, trains, blocks, checkpointing), True, fill_buffers)
            assert isinstance(module, HeliosTransformer3DModel)
            given = inputs(size, variant, CPU_DEVICE)
            for name, work in WORK.items():
                step = partial(work, module, given)
                if not checkpointing:
                    counted[name]["model_flops"] = count_flops(step)
                    continue
                with LiveCounter(granularity=512) as counter:
                    before = counter.claim([module, list(given.values())], "before")
                    step()
                counted[name] = {"flops": count_flops(step), "peak": counter.report().peak[DEVICE] - before}
    return counted


def _traced(variant: Variant, size: Size, trains: str, blocks: int, checkpointing: bool) -> nn.Module:
    module = build(variant, size, blocks)
    prepare(module, trains, checkpointing, variant)
    return module


def modules(size: Size, names: list[str], trains: str, device: torch.device) -> dict[str, HeliosTransformer3DModel]:
    """One module a variant, over one set of random weights."""
    first = materialise(partial(build, VARIANTS[PLAIN], size), False, fill_buffers, device)
    for weight in first.parameters():
        nn.init.normal_(weight, std=0.02)
    found = {}
    for name in names:
        with torch.device("meta"):
            module = build(VARIANTS[name], size)
        module.load_state_dict(first.state_dict(), assign=True)
        fill_buffers(module)
        module.requires_grad_(False)
        prepare(module.to(device), trains, True, VARIANTS[name], device)
        if VARIANTS[name].compiled:
            module.compile_repeated_blocks()
        found[name] = module
    return found


def peak(step: Callable[[], None], device: torch.device) -> int:
    """Bytes of the allocator's peak above what was allocated before; 0 where it keeps no book."""
    if device.type != "cuda":
        return 0
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() - before


def product_speed(size: Size, device: torch.device, turns: int) -> float:
    """FLOP a ms of a large matrix product."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=size.dtype) for _ in range(2))
    return 2 * side**3 / by_turns({"product": lambda: a @ b}, turns, device)["product"]


def measure(size: Size, names: list[str], trains: str, turns: int, device: torch.device) -> dict[str, Any]:
    """Times and memory of all variants at one size."""
    reached = product_speed(size, device, turns)
    best = next((tflops * 1e9 for name, tflops in TFLOPS.items() if name in machine(device)), reached)
    found = modules(size, names, trains, device)
    given = {name: inputs(size, VARIANTS[name], device) for name in names}
    result: dict[str, Any] = {"tokens": tokens(size), "product_tflops": reached / 1e9, "peak_tflops": best / 1e9, "work": {}}
    plans = {name: planned(VARIANTS[name], size, trains) for name in names}
    for kind, work in WORK.items():
        steps = {name: partial(work, found[name], given[name]) for name in names}
        every = all_turns(steps, turns, device)
        times = {name: statistics.median(took) for name, took in every.items()}
        result["work"][kind] = {
            name: {
                "ms": times[name],
                "of_diffusers": statistics.median(a / b for a, b in zip(every[name], every[PLAIN], strict=True)),
                "tokens_per_second": tokens(size) / times[name] * 1e3,
                "peak_GiB": peak(steps[name], device) / GIB,
                "planned_GiB": plans[name][kind]["peak"] / GIB,
                "hfu": plans[name][kind]["flops"] / times[name] / best,
                "mfu": plans[name][kind]["model_flops"] / times[name] / best,
            }
            for name in names
        }
    return result


def plan(size: Size, names: list[str], trains: str) -> dict[str, Any]:
    """What `measure` gives, of a size that does not run here: memory and FLOPs alone."""
    plans = {name: planned(VARIANTS[name], size, trains) for name in names if not VARIANTS[name].compiled}
    return {
        kind: {
            name: {"planned_GiB": plan[kind]["peak"] / GIB, "pflop": plan[kind]["flops"] / 1e15} for name, plan in plans.items()
        }
        for kind in WORK
    }


def show(title: str, measured: dict[str, Any]) -> None:
    """A table of one size."""
    table = Table("", "", "ms", "of diffusers", "tokens/s", "peak GiB", "planned", "HFU", "MFU", title=title)
    for kind, variants in measured["work"].items():
        for name, found in variants.items():
            figures = (
                f"{found['ms']:.1f}",
                f"{found['of_diffusers']:.3f}",
                f"{found['tokens_per_second']:.0f}",
                f"{found['peak_GiB']:.2f}",
            )
            table.add_row(kind, name, *figures, f"{found['planned_GiB']:.2f}", f"{found['hfu']:.0%}", f"{found['mfu']:.0%}")
    Console(width=130).print(table)


def main() -> None:
    """Measure, print the tables, write the JSON."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = {size.name: size for size in (CUDA if device.type == "cuda" else CPU)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=10, help="runs behind each median")
    parser.add_argument("--sizes", nargs="*", choices=sizes, default=list(sizes), help="only these")
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS), help="only these; diffusers always")
    parser.add_argument("--trains", nargs="*", choices=TRAINS, default=["frozen", "lora"], help="what trains")
    parser.add_argument("--scale", type=int, default=1, help="divides the rows and columns of latents, for a try")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "transformer_step.json")
    chosen = parser.parse_args()
    chosen.variants = list(dict.fromkeys([PLAIN, *chosen.variants]))
    result: dict[str, Any] = {"machine": machine(device), "torch": torch.__version__, "turns": chosen.turns, "sizes": {}}
    for name in chosen.sizes:
        for trains in chosen.trains:
            size = sizes[name]
            grids = [(rows // chosen.scale, columns // chosen.scale) for rows, columns in (size.history, size.target)]
            size = size._replace(history=grids[0], target=grids[1])
            measured = measure(size, chosen.variants, trains, chosen.turns, device)
            result["sizes"].setdefault(name, {})[trains] = measured
            show(f"{name}, {trains}", measured)
            chosen.output.write_text(json.dumps(result, indent=1) + "\n")
    if device.type != "cuda":
        result["planned"] = {CUDA[0].name: {trains: plan(CUDA[0], chosen.variants, trains) for trains in ("frozen", "lora")}}
        Console(width=130).print_json(data=result["planned"])
        chosen.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
