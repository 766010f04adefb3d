"""Which implementation an op runs: the fast torch reference, Triton, or the plain formula for torch.compile.

Every public op takes `kernels`, one of CHOICES: `auto` is Triton for what lies on a CUDA device and the reference elsewhere;
`reference` is a hand-written forward and backward in torch calls; `compile` is the formula as one would write it, whose
backward and fusion are left to torch.compile. The Triton launchers are custom ops with shapes of their own: under
FakeTensorMode `triton` traces on CPU tensors and allocates what it would allocate on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from helios_train.errors import InputError

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton on this platform: its kernels are defined, never called
    triton = tl = None

CHOICES = ("auto", "reference", "triton", "compile")
NARROW = (torch.bfloat16, torch.float16, torch.float32)  # what Triton's fp32 arithmetic is for


def choose(kernels: str, x: Tensor) -> str:
    """`reference`, `triton` or `compile` for an op on `x`.

    `auto` keeps fp64 from Triton, whose arithmetic is fp32, and gives torch.compile the formula: it cannot trace the reference.
    InputError for an unknown name, for Triton where it is not installed or on fp64.
    """
    if kernels == "auto":
        if x.is_cuda and triton is not None and x.dtype in NARROW:
            return "triton"
        return "compile" if torch.compiler.is_compiling() else "reference"
    if kernels not in CHOICES:
        raise InputError(f"kernels={kernels!r} is none of {', '.join(CHOICES)}")
    if kernels == "triton" and triton is None:
        raise InputError("kernels=triton: Triton is not installed here; install it (Linux) or set kernels=reference")
    if kernels == "triton" and x.dtype not in NARROW:
        raise InputError(f"kernels=triton computes in fp32, not {x.dtype}; set kernels=reference")
    return kernels


def check_kernels(kernels: str, device: torch.device) -> None:
    """InputError where Triton is asked for and cannot run on `device`."""
    if kernels == "triton" and device.type != "cuda" and not (triton and triton.knobs.runtime.interpret):
        raise InputError(f"kernels=triton runs on a GPU, not on {device.type}; set kernels=auto or reference")


def wide(x: Tensor) -> Tensor:
    """`x` in the dtype that arithmetic and statistics use: fp64 stays, everything else is fp32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def jit(*without_specialising: str) -> Callable[[Any], Any]:
    """`triton.jit`, which compiles no extra variants for the values of the named arguments; nothing without Triton."""
    if triton is None:
        return lambda function: function
    return triton.jit(do_not_specialize=without_specialising)  # type: ignore[no-any-return]
