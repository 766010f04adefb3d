"""What does each kernel gain, and how near is it to the copy bandwidth?

Usage: python benchmarks/kernel_speed.py [--turns 20] [--ops OP ...]

Each op at the sizes of a block, by turns, in one process: diffusers' formula in eager mode (its modulation expanded to every
token, which is made outside the clock), the reference, torch.compile of the formula, Triton (on CUDA), and liger-kernel where it
has the op and is installed. Forward alone, and forward + backward with the gradients of all inputs and parameters: medians in ms.
`floor_ms` is the time in which the bytes that must move would be copied. On CUDA: 14b's widths in bf16 at batch 1, 2, 4 and at
the three levels; on a CPU: width 1,024, 2,800 tokens, fp32. Writes results/kernel_speed.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_helios import apply_rotary_emb_transposed
from rich.console import Console
from rich.table import Table
from timing import by_turns, machine
from torch import Tensor

from helios_train.kernels.gated_residual import gated_residual, gated_residual_layer_norm, gated_residual_modulated_norm
from helios_train.kernels.gelu import gelu_tanh
from helios_train.kernels.layer_norm import layer_norm
from helios_train.kernels.modulated_norm import modulated_norm
from helios_train.kernels.qk_norm_rope import qk_norm_rope

EPS = 1e-6


class Size(NamedTuple):
    name: str
    batch: int
    length: int
    split: int  # history tokens
    width: int
    heads: int
    ffn: int
    dtype: torch.dtype


CPU = [Size("width 1024, 2800 tokens", 1, 2800, 600, 1024, 16, 4096, torch.float32)]
# 384 x 640: 2,400 history tokens and 8,640, 2,160 or 540 of the target.
CUDA = [
    *(Size(f"14b, full, batch {b}", b, 11040, 2400, 5120, 40, 13824, torch.bfloat16) for b in (1, 2, 4)),
    Size("14b, half, batch 1", 1, 4560, 2400, 5120, 40, 13824, torch.bfloat16),
    Size("14b, quarter, batch 1", 1, 2940, 2400, 5120, 40, 13824, torch.bfloat16),
]


class Contest(NamedTuple):
    """One op: ours (called with its inputs and `kernels`), the others by name with inputs of their own, what must move."""

    ours: Callable[..., Any]
    inputs: list[Tensor]
    others: dict[str, tuple[Callable[..., Any], list[Tensor]]]
    forward: int  # token tensors read and written, in units of [B, L, D]
    both: int


def contests(size: Size, device: torch.device) -> dict[str, Contest]:
    """The ops with random inputs of that size."""
    batch, length, split, width, heads, ffn, dtype = size[1:]

    def tokens(n: int = length, d: int = width) -> Tensor:
        return torch.randn(batch, n, d, device=device, dtype=dtype, requires_grad=True)

    def rows() -> Tensor:
        return torch.randn(batch, 2, width, device=device, requires_grad=True)

    def expanded() -> Tensor:
        return torch.randn(batch, length, width, device=device, requires_grad=True)

    def weight(kind: torch.dtype = torch.float32) -> Tensor:
        return torch.ones(width, device=device, dtype=kind, requires_grad=True)

    angle = torch.randn(length, width // heads // 2, device=device).repeat_interleave(2, dim=-1)
    table = torch.cat([angle.cos(), angle.sin()], dim=-1)

    def norm(x: Tensor, *affine: Tensor) -> Tensor:
        return F.layer_norm(x.float(), (width,), *affine, eps=EPS)

    def modulated(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return (norm(x) * (1 + scale) + shift).type_as(x)

    def add(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
        return (x.float() + y * gate).type_as(x)

    def cross(x: Tensor, y: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        history, target = torch.split(x, [split, length - split], dim=1)
        new = torch.cat([history, target + y], dim=1)
        return new, modulated(new, scale, shift)

    def self_(x: Tensor, y: Tensor, gate: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        new = add(x, y, gate)
        return new, norm(new[:, split:], w, b).type_as(x)

    def queries(x: Tensor, w: Tensor) -> Tensor:
        return apply_rotary_emb_transposed(F.rms_norm(x, (width,), w, EPS).unflatten(2, (heads, -1)), table[None])

    x, y, short, wide, one = tokens(), tokens(), tokens(length - split), tokens(d=ffn), weight(dtype)
    liger = _liger()
    ffn_units = -(-ffn // width)
    return {
        "modulated_norm": Contest(
            lambda x, a, b, k: modulated_norm(x, a, b, split, EPS, k),
            [x, rows(), rows()],
            {"plain": (modulated, [x, expanded(), expanded()])},
            2,
            5,
        ),
        "gated_residual": Contest(
            lambda x, y, g, k: gated_residual(x, y, g, split, k), [x, y, rows()], {"plain": (add, [x, y, expanded()])}, 3, 6
        ),
        "gated_residual_layer_norm": Contest(
            lambda x, y, g, w, b, k: gated_residual_layer_norm(x, y, g, w, b, split, EPS, k),
            [x, y, rows(), weight(), weight()],
            {"plain": (self_, [x, y, expanded(), weight(), weight()])},
            4,
            10,
        ),
        "gated_residual_modulated_norm": Contest(
            lambda x, y, a, b, k: gated_residual_modulated_norm(x, y, None, a, b, split, EPS, k),
            [x, short, rows(), rows()],
            {"plain": (cross, [x, short, expanded(), expanded()])},
            4,
            8,
        ),
        "qk_norm_rope": Contest(
            lambda x, w, k: qk_norm_rope(x, w, heads, table, 0, EPS, k), [x, one], {"plain": (queries, [x, one])}, 2, 5
        ),
        "qk_norm": Contest(
            lambda x, w, k: qk_norm_rope(x, w, heads, None, 0, EPS, k),
            [x, one],
            {"plain": (lambda x, w: F.rms_norm(x, (width,), w, EPS), [x, one])} | liger.get("rms_norm", lambda *_: {})(x, one),
            2,
            5,
        ),
        "layer_norm": Contest(
            lambda x, w, b, k: layer_norm(x, w, b, EPS, k),
            [x, weight(), weight()],
            {"plain": (lambda x, w, b: norm(x, w, b).type_as(x), [x, weight(), weight()])}
            | liger.get("layer_norm", lambda *_: {})(x, one),
            2,
            5,
        ),
        "gelu_tanh": Contest(
            lambda x, k: gelu_tanh(x, k),
            [wide],
            {"plain": (lambda x: F.gelu(x, approximate="tanh"), [wide])},
            2 * ffn_units,
            5 * ffn_units,
        ),
    }


def _liger() -> dict[str, Callable[..., dict[str, Any]]]:
    """liger-kernel's norms, where it is installed; its other activations multiply two inputs and are no match for GELU."""
    try:
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    except ImportError:
        return {}
    return {
        "rms_norm": lambda x, w: {"liger": (lambda x, w: LigerRMSNormFunction.apply(x, w, EPS, 0.0, "llama", False), [x, w])},
        "layer_norm": lambda x, w: {
            "liger": (lambda x, w, b: LigerLayerNormFunction.apply(x, w, b, EPS), [x, w, torch.zeros_like(w, requires_grad=True)])
        },
    }


def variants(contest: Contest, device: torch.device) -> dict[str, tuple[Callable[..., Any], list[Tensor]]]:
    """Every implementation that works here, compiled and run once."""
    torch._dynamo.reset()  # the ops share a line of code, whose compiled forms are limited
    compiled = torch.compile(lambda *inputs: contest.ours(*inputs, "compile"))
    found = {
        **contest.others,
        "reference": (lambda *inputs: contest.ours(*inputs, "reference"), contest.inputs),
        "compile": (compiled, contest.inputs),
    }
    if device.type == "cuda":
        found["triton"] = (lambda *inputs: contest.ours(*inputs, "triton"), contest.inputs)
    for name, (run, inputs) in list(found.items()):
        try:
            _both(run, inputs, _upstream(run, inputs))
        except Exception as error:
            if name not in ("compile", "liger"):
                raise
            Console().print(f"{name} does not run here: {str(error).splitlines()[0][:100]}")
            del found[name]
    return found


def _upstream(run: Callable[..., Any], inputs: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        outputs = run(*inputs)
    return [torch.randn_like(y) for y in ((outputs,) if isinstance(outputs, Tensor) else outputs)]


def _both(run: Callable[..., Any], inputs: list[Tensor], upstream: list[Tensor]) -> None:
    outputs = run(*inputs)
    torch.autograd.grad(outputs, [x for x in inputs if x.requires_grad], upstream)


def _forward(run: Callable[..., Any], inputs: list[Tensor], upstream: list[Tensor]) -> None:
    with torch.no_grad():
        run(*inputs)


def bandwidth(unit: Tensor, turns: int) -> float:
    """Bytes a ms of a copy of such a tensor, read and write counted."""
    target = torch.empty_like(unit)
    return 2 * unit.nbytes / by_turns({"copy": lambda: target.copy_(unit)}, turns, unit.device)["copy"]


def measure(size: Size, device: torch.device, turns: int, ops: list[str] | None) -> dict[str, Any]:
    """Times of every op at one size."""
    unit = torch.randn(size.batch, size.length, size.width, device=device, dtype=size.dtype)
    speed, result = bandwidth(unit, turns), {}
    for op, contest in contests(size, device).items():
        if ops and op not in ops:
            continue
        found, result[op] = variants(contest, device), {}
        for kind, run, units in (("forward", _forward, contest.forward), ("forward_backward", _both, contest.both)):
            works = {name: partial(run, call, inputs, _upstream(call, inputs)) for name, (call, inputs) in found.items()}
            result[op][kind] = by_turns(works, turns, device) | {"floor_ms": units * unit.nbytes / speed}
    return {"copy_GB_s": speed / 1e6, "ops": result}


def show(name: str, measured: dict[str, Any]) -> None:
    """A table of one size."""
    table = Table("op", "", "ms", "of plain", "of the copy bandwidth", title=f"{name}, copy {measured['copy_GB_s']:.0f} GB/s")
    for op, kinds in measured["ops"].items():
        for kind, times in kinds.items():
            for variant, took in times.items():
                if variant != "floor_ms":
                    share, near = took / times["plain"], times["floor_ms"] / took
                    table.add_row(op, f"{kind} {variant}", f"{took:.3f}", f"{share:.2f}", f"{near:.0%}")
    Console().print(table)


def main() -> None:
    """Measure, print the tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=20, help="runs behind each median")
    parser.add_argument("--ops", nargs="*", help="only these")
    parser.add_argument("--tokens", type=int, help="another number of tokens (the split keeps its share)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "kernel_speed.json")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = {}
    for size in CUDA if device.type == "cuda" else CPU:
        if arguments.tokens:
            size = size._replace(length=arguments.tokens, split=arguments.tokens * size.split // size.length)
        sizes[size.name] = measure(size, device, arguments.turns, arguments.ops)
        show(size.name, sizes[size.name])
    result = {"machine": machine(device), "torch": torch.__version__, "turns": arguments.turns, "sizes": sizes}
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
