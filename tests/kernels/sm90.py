"""Compiles every launch of the Triton kernels for sm_90 without a GPU and prints what ptxas says of it, one JSON line a kernel.

Run by test_sm90.py in a process of its own, for TRITON_INTERPRET must not be set where kernels are to be compiled. The
launchers run on CPU tensors with each kernel replaced by a recorder, so that what is compiled is what is launched: the same
types, divisibility, constants and warps.
"""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from helios_train.kernels import gated_residual, gelu, layer_norm, modulated_norm, qk_norm_rope

TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
DIVISIBLE = [["tt.divisibility", 16]]
WIDTH, HEADS, FFN = 5120, 40, 13824  # 14b


class Recorder:
    """Stands in for a kernel: keeps the arguments of each launch."""

    def __init__(self, kernel: Any):
        self.kernel, self.launches = kernel, []

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *arguments, **options: self.launches.append((arguments, options))


def source(kernel: Any, arguments: tuple[Any, ...]) -> ASTSource:
    """The kernel with the types, constants and divisibility that Triton would read off these arguments at a launch."""
    signature, constants, attributes = {}, {}, {}
    bound = inspect.signature(kernel.fn).bind(*arguments).arguments
    for parameter in kernel.params:
        value = bound[parameter.name]
        if isinstance(value, torch.Tensor):
            signature[parameter.name], attributes[(parameter.num,)] = TYPES[value.dtype], DIVISIBLE
        elif parameter.is_constexpr or value is None or (type(value) is int and value == 1 and not parameter.do_not_specialize):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(parameter.num,)] = DIVISIBLE
    return ASTSource(kernel, signature, constants, attributes)


def ptxas(ptx: str) -> str:
    """What `ptxas -v` prints for the PTX, with the flags that Triton itself compiles with."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        tool = getattr(knobs.nvidia, "ptxas_blackwell", knobs.nvidia.ptxas)  # Triton 3.9 takes this one from sm_90 on
        flags = ["-lineinfo", "-v", "--regAllocOptLevel=2", "--gpu-name=sm_90a", str(path), "-o", str(path) + ".o"]
        return subprocess.run([tool.path, *flags], capture_output=True, text=True, check=True).stderr


def figures(kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
    """Registers a thread, bytes spilled, warps, shared memory of one launch."""
    compiled = triton.compile(source(kernel, arguments), target=GPUTarget("cuda", 90, 32), options=options)
    log = ptxas(compiled.asm["ptx"])

    def number(pattern: str) -> int:
        return max(int(found) for found in re.findall(pattern, log))

    return {
        "registers": number(r"Used (\d+) registers"),
        "spill_stores": number(r"(\d+) bytes spill stores"),
        "spill_loads": number(r"(\d+) bytes spill loads"),
        "stack": number(r"(\d+) bytes stack frame"),
        "warps": compiled.metadata.num_warps,
        "shared": compiled.metadata.shared,
        "async_copies": len(re.findall(r"cp\.async\.c[ag]", compiled.asm["ptx"])),
    }


def launches(module: ModuleType, run: Callable[[], None]) -> list[tuple[str, Any, tuple[Any, ...], dict[str, Any]]]:
    """(name, kernel, arguments, options) of every launch of the module's kernels that `run` makes."""
    kernels = {name: value for name, value in vars(module).items() if name.endswith("_kernel")}
    recorders = {name: Recorder(kernel) for name, kernel in kernels.items()}
    vars(module).update(recorders)
    try:
        run()
    finally:
        vars(module).update(kernels)
    return [(name, r.kernel, *launch) for name, r in recorders.items() for launch in r.launches]


def bf16(*size: int) -> torch.Tensor:
    """Random bf16 values that ask for a gradient."""
    return torch.randn(*size, dtype=torch.bfloat16, requires_grad=True)


def norms() -> None:
    """With and without gradients of the modulation, whose rows are strided as the block's are."""
    for asked in (False, True):
        rows = torch.randn(1, 2, 6, WIDTH, requires_grad=asked)
        modulated_norm.modulated_norm(bf16(1, 64, WIDTH), rows[:, :, 1], rows[:, :, 0], 16, kernels="triton").sum().backward()
    weight = torch.randn(WIDTH, requires_grad=True)
    layer_norm.layer_norm(bf16(1, 64, WIDTH), weight, weight, kernels="triton").sum().backward()


def residuals() -> None:
    """The three forms that a block needs, with every gradient: those without keep less."""
    rows, weight = torch.randn(1, 2, 6, WIDTH, requires_grad=True), torch.randn(WIDTH, requires_grad=True)
    x, y, short = bf16(1, 64, WIDTH), bf16(1, 64, WIDTH), bf16(1, 48, WIDTH)
    gate, scale, shift = rows[:, :, 2], rows[:, :, 4], rows[:, :, 3]
    new, n = gated_residual.gated_residual_layer_norm(x, y, gate, weight, weight, 16, kernels="triton")
    (new.sum() + n.sum()).backward()
    new, n = gated_residual.gated_residual_modulated_norm(x, short, None, scale, shift, 16, kernels="triton")
    (new.sum() + n.sum()).backward()
    gated_residual.gated_residual(x, y, gate, 16, kernels="triton").sum().backward()


def queries() -> None:
    """Self-attention without and with a gradient of the weight (and amplified history), and cross-attention."""
    table, weight = torch.randn(64, 2 * WIDTH // HEADS), bf16(2, WIDTH)
    for rows, turn, split in ((weight[0].detach(), table, 0), (weight, table, 16), (weight[0], None, 0)):
        qk_norm_rope.qk_norm_rope(bf16(1, 64, WIDTH), rows, HEADS, turn, split, kernels="triton").sum().backward()


def activations() -> None:
    """The feed-forward's width."""
    gelu.gelu_tanh(bf16(1, 64, FFN), kernels="triton").sum().backward()


RUNS = {modulated_norm: norms, gated_residual: residuals, qk_norm_rope: queries, gelu: activations}

if __name__ == "__main__":
    seen = set()
    for module, run in RUNS.items():
        for name, kernel, arguments, options in launches(module, run):
            op = module.__name__.removeprefix("helios_train.kernels.")
            flags = {k: v for k, v in zip(kernel.arg_names, arguments, strict=True) if isinstance(v, bool)}
            if str((op, name, flags)) in seen or (sys.argv[1:] and op not in sys.argv):
                continue
            seen.add(str((op, name, flags)))
            print(json.dumps({"op": op, "kernel": name, "flags": flags} | figures(kernel, arguments, options)), flush=True)
