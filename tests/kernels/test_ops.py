"""Every op against its plain formula in fp64: outputs and all gradients, over odd shapes, three dtypes, strides and splits.

Here on CPU: the reference and the formula for torch.compile. test_interpreted.py runs this file again, in a process whose Triton
interprets its kernels; tests/gpu/test_kernels.py takes the same tests to a CUDA device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helios_train.kernels import gated_residual, gelu, layer_norm, modulated_norm, qk_norm_rope, rows

try:
    from triton import knobs

    INTERPRETED = bool(knobs.runtime.interpret)
except ImportError:
    INTERPRETED = False

# Largest error over the largest value. One rounding is 2^-9 of it in bf16, 2^-12 in fp16; a residual's dy has seen up to four.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 4e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
EPS = 1e-6
HEADS = {96: 2, 130: 5, 1000: 5, 5120: 40}


class Case(NamedTuple):
    batch: int
    length: int
    width: int
    split: int
    dtype: torch.dtype
    layout: str  # dense; strided: rows with gaps, first at an odd offset; turned: the last axis is not dense


CASES = [
    Case(1, 1, 5120, 0, torch.float32, "dense"),
    Case(1, 1, 96, 1, torch.bfloat16, "dense"),
    Case(1, 3, 1000, 1, torch.float32, "strided"),
    Case(1, 3, 5120, 2, torch.bfloat16, "strided"),
    Case(1, 3, 1000, 3, torch.float16, "dense"),
    Case(1, 17, 130, 5, torch.float32, "dense"),
    Case(1, 4, 96, 0, torch.float16, "strided"),
    Case(2, 3, 130, 3, torch.bfloat16, "dense"),
    Case(2, 4, 96, 2, torch.float32, "turned"),
]


class Op(NamedTuple):
    """What is run, its formula, and its inputs' shapes: those of x's dtype first, then parameters, which are fp32."""

    run: Callable[..., Any]  # (kernels, split, heads, *inputs)
    formula: Callable[..., Any]  # (split, heads, *inputs) in fp64
    tokens: tuple[str, ...]  # of each token input: "all", or "target", from split on
    parameters: tuple[str, ...] = ()  # "rows" [B, 2, D], "weight" [D], "weights" [2, D]


def spread(rows_BRD: Tensor, split: int, length: int) -> Tensor:
    """The modulation of every token, expanded as diffusers does it."""
    late = rows_BRD[:, 1:].expand(-1, length - split, -1)
    return torch.cat([rows_BRD[:, :1].expand(-1, split, -1), late], dim=1)


def stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` as it is after a trip through `dtype`; the gradient passes."""
    return x + (x.to(dtype).double() - x).detach()


def modulate(x: Tensor, scale: Tensor, shift: Tensor, split: int) -> Tensor:
    length = x.shape[1]
    return F.layer_norm(x, x.shape[2:], eps=EPS) * (1 + spread(scale, split, length)) + spread(shift, split, length)


def add(x: Tensor, y: Tensor, gate: Tensor | None, split: int, dtype: torch.dtype) -> Tensor:
    y = torch.cat([torch.zeros_like(x[:, : x.shape[1] - y.shape[1]]), y], dim=1)
    return stored(x + (y if gate is None else y * spread(gate, split, x.shape[1])), dtype)


def turn(x: Tensor, weight: Tensor, table: Tensor | None, split: int, heads: int) -> Tensor:
    normed = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()
    normed = normed * (spread(weight[None], split, x.shape[1]) if weight.ndim == 2 else weight)
    y = normed.unflatten(2, (heads, -1))
    if table is None:
        return y
    even, odd = y[..., 0::2], y[..., 1::2]
    cosine, sine = table.to(y).unsqueeze(-2).chunk(2, dim=-1)
    turned = even * cosine[..., 0::2] - odd * sine[..., 0::2], even * sine[..., 0::2] + odd * cosine[..., 0::2]
    return torch.stack(turned, dim=-1).flatten(-2)


def table_of(x: Tensor, heads: int, samples: bool = False) -> Tensor:
    size = (*x.shape[: 1 if samples else 0], x.shape[1], x.shape[2] // heads // 2)
    angle = torch.randn(size, generator=torch.Generator().manual_seed(7)).repeat_interleave(2, dim=-1)
    return torch.cat([angle.cos(), angle.sin()], dim=-1).to(x.device)


def queries(samples: bool | None) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Run and formula with a table for all (False), one a sample (True), none (None)."""

    def run(kernels: str, split: int, heads: int, x: Tensor, weight: Tensor) -> Tensor:
        table = None if samples is None else table_of(x, heads, samples)
        return qk_norm_rope.qk_norm_rope(x, weight, heads, table, split, EPS, kernels)

    def formula(split: int, heads: int, dtype: torch.dtype, x: Tensor, weight: Tensor) -> Tensor:
        return turn(x, weight, None if samples is None else table_of(x, heads, samples), split, heads)

    return run, formula


def normed_residual(gate: bool, affine: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Run and formula of a residual with a norm behind it."""
    op = gated_residual.gated_residual_layer_norm if affine else gated_residual.gated_residual_modulated_norm

    def run(kernels: str, split: int, heads: int, x: Tensor, y: Tensor, *rest: Tensor) -> Any:
        return op(x, y, *(rest if gate else (None, *rest)), split, EPS, kernels)

    def formula(split: int, heads: int, dtype: torch.dtype, x: Tensor, y: Tensor, *rest: Tensor) -> Any:
        new = add(x, y, rest[0] if gate else None, split, dtype)
        if affine:
            return new, F.layer_norm(new[:, split:], new.shape[2:], *rest[-2:], EPS)
        return new, modulate(new, *rest[-2:], split)

    return run, formula


OPS = {
    "modulated_norm": Op(
        lambda k, split, n, x, scale, shift: modulated_norm.modulated_norm(x, scale, shift, split, EPS, k),
        lambda split, n, dtype, x, scale, shift: modulate(x, scale, shift, split),
        ("all",),
        ("rows", "rows"),
    ),
    "gated_residual": Op(
        lambda k, split, n, x, y, gate: gated_residual.gated_residual(x, y, gate, split, k),
        lambda split, n, dtype, x, y, gate: add(x, y, gate, split, dtype),
        ("all", "all"),
        ("rows",),
    ),
    "residual": Op(
        lambda k, split, n, x, y: gated_residual.gated_residual(x, y, None, split, k),
        lambda split, n, dtype, x, y: add(x, y, None, split, dtype),
        ("all", "target"),
    ),
    "gate, affine norm of the target": Op(*normed_residual(True, True), ("all", "all"), ("rows", "weight", "weight")),
    "target added, modulated norm": Op(*normed_residual(False, False), ("all", "target"), ("rows", "rows")),
    "gated target, modulated norm": Op(*normed_residual(True, False), ("all", "target"), ("rows", "rows", "rows")),
    "qk_norm": Op(*queries(None), ("all",), ("weight",)),
    "qk_norm_rope": Op(*queries(False), ("all",), ("weight",)),
    "qk_norm_rope, two weights": Op(*queries(True), ("all",), ("weights",)),
    "layer_norm": Op(
        lambda k, split, n, x, weight, bias: layer_norm.layer_norm(x, weight, bias, EPS, k),
        lambda split, n, dtype, x, weight, bias: F.layer_norm(x, x.shape[2:], weight, bias, EPS),
        ("all",),
        ("weight", "weight"),
    ),
    "gelu_tanh": Op(
        lambda k, split, n, x: gelu.gelu_tanh(x, k),
        lambda split, n, dtype, x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        ("all",),
    ),
}


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values with other strides."""
    if layout == "strided":
        wide = x.new_full((x.shape[0], 2 * x.shape[1] + 1, x.shape[2] + 7), math.nan)
        wide[:, 1::2, 3:-4] = x
        return wide[:, 1::2, 3:-4]
    return x.transpose(1, 2).contiguous().transpose(1, 2) if layout == "turned" else x


def inputs_of(op: Op, case: Case, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = {"all": case.length, "target": case.length - case.split}
    sizes = {"rows": (case.batch, 2, case.width), "weight": (case.width,), "weights": (2, case.width)}

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(device)

    inputs = [laid_out(random(case.batch, tokens[kind], case.width).to(case.dtype), case.layout) for kind in op.tokens]
    parameter = torch.float64 if case.dtype == torch.float64 else torch.float32
    # Every second number of a wider table: rows of the modulation are slices of one.
    return inputs + [random(*sizes[kind][:-1], 2, sizes[kind][-1]).to(parameter)[..., 1, :] for kind in op.parameters]


def measured(op: Op, case: Case, kernels: str, device: str) -> list[tuple[str, Tensor, Tensor]]:
    """(name, found, expected in fp64) of each output and gradient."""
    inputs, heads = inputs_of(op, case, device), HEADS[case.width]
    exact = [x.double().requires_grad_() for x in inputs]
    for x in inputs:
        x.requires_grad_()
    found, expected = op.run(kernels, case.split, heads, *inputs), op.formula(case.split, heads, case.dtype, *exact)
    found, expected = ((out,) if isinstance(out, Tensor) else out for out in (found, expected))
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(y.shape, generator=generator).to(y.dtype).to(device) for y in found]
    upstream = [laid_out(g, case.layout) if g.ndim == 3 else g for g in upstream]
    ours = torch.autograd.grad(found, inputs, upstream, allow_unused=True)
    truth = torch.autograd.grad(expected, exact, [g.double() for g in upstream], allow_unused=True)
    names = [f"output {i}" for i in range(len(found))] + [f"gradient {i}" for i in range(len(inputs))]
    for output in found:
        assert output.dtype == case.dtype and (output.is_contiguous() or case.layout == "turned")
    return [
        (name, f, e)
        for name, f, e in zip(names, (*found, *ours), (*expected, *truth), strict=True)
        if e is not None and f is not None
    ]


def compare(op: Op, case: Case, kernels: str, device: str) -> None:
    for name, found, expected in measured(op, case, kernels, device):
        assert found.shape == expected.shape
        if expected.numel():
            error = (found.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-3)
            assert error <= TOLERANCE[case.dtype], f"{name}: off by {error:.2e}"


@pytest.fixture(params=["reference", "compile", "triton"])
def kernels(request: pytest.FixtureRequest) -> str:
    if request.param == "triton" and not INTERPRETED:
        pytest.skip("in test_interpreted.py")
    return request.param


@pytest.fixture
def device() -> str:
    return "cpu"


def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of several tokens in backward, as on a device with more tokens than programs."""
    monkeypatch.setattr(rows, "_processors", lambda device: 1)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_output_and_gradients(name: str, case: Case, kernels: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if case.length > 3:  # the shorter ones: a program a token
        few_programs(monkeypatch)
    compare(OPS[name], case, kernels, device)


@pytest.mark.parametrize("name", OPS)
def test_only_gradients_asked_for(name: str, kernels: str, device: str) -> None:
    op, case = OPS[name], Case(1, 2, 96, 1, torch.float32, "dense")
    inputs, heads = inputs_of(op, case, device), HEADS[96]
    for asked in range(len(inputs)):
        for number, x in enumerate(inputs):
            x.requires_grad_(number == asked)
        outputs = op.run(kernels, case.split, heads, *inputs)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        total = sum(y.square().sum() for y in outputs)
        alone = torch.autograd.grad(total, inputs[asked])[0]
        exact = [x.detach().double().requires_grad_() for x in inputs]
        truth = op.formula(case.split, heads, case.dtype, *exact)
        truth = (truth,) if isinstance(truth, Tensor) else truth
        expected = torch.autograd.grad(sum(y.square().sum() for y in truth), exact[asked])[0]
        assert (alone.double() - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1)


@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("name", ["gate, affine norm of the target", "target added, modulated norm"])
def test_one_output_used(name: str, used: int, kernels: str, device: str) -> None:
    """Where the residual or its norm leads nowhere, the other's gradient is still right."""
    op, case = OPS[name], Case(2, 3, 96, 1, torch.float32, "dense")
    inputs = inputs_of(op, case, device)
    exact = [x.double().requires_grad_() for x in inputs]
    for x in inputs:
        x.requires_grad_()
    ours = torch.autograd.grad(op.run(kernels, 1, 2, *inputs)[used].square().sum(), inputs, allow_unused=True)
    truth = torch.autograd.grad(op.formula(1, 2, case.dtype, *exact)[used].square().sum(), exact, allow_unused=True)
    for found, expected in zip(ours, truth, strict=True):
        size = 0 if expected is None else expected.abs().max()
        if found is not None and size > 0:
            assert (found.double() - expected).abs().max() <= 1e-5 * size
        else:
            assert size == 0


def test_gradients_are_left_alone(kernels: str, device: str) -> None:
    """Upstream gradients and inputs hold the same numbers after backward, and the same backward twice gives the same."""
    for name, op in OPS.items():
        inputs = inputs_of(op, Case(1, 2, 96, 1, torch.float32, "dense"), device)
        for x in inputs:
            x.requires_grad_()
        outputs = op.run(kernels, 1, 2, *inputs)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        upstream = [torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(device) for y in outputs]
        before = [t.detach().clone() for t in (*upstream, *inputs)]
        first = torch.autograd.grad(outputs, inputs, upstream, retain_graph=True)
        second = torch.autograd.grad(outputs, inputs, upstream)
        assert all(torch.equal(a, b) for a, b in zip(before, (*upstream, *inputs), strict=True)), name
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gelus_gradient_takes_its_place(kernels: str, device: str, dtype: torch.dtype) -> None:
    """To the bit that of the op, in the memory of the gradient it was given; x as a slice of wider rows too."""
    wide = torch.linspace(-4, 4, 5 * 300, dtype=torch.float64).view(5, 300).to(dtype).to(device)
    for x in (wide, wide[:, 7:203]):
        dy = torch.cos(3 * x.double()).to(dtype).contiguous()
        leaf = x.clone().requires_grad_()
        (expected,) = torch.autograd.grad(gelu.gelu_tanh(leaf, kernels), leaf, dy)
        before = x.clone()
        found = gelu.gelu_tanh_backward_(dy, x, kernels)
        assert torch.equal(found, expected) and torch.equal(x, before)
        assert found.data_ptr() == dy.data_ptr() and torch.equal(dy, expected)


@pytest.mark.parametrize("name", OPS)
def test_saves_inputs_and_statistics_alone(name: str, kernels: str, device: str) -> None:
    """What backward keeps is an input, the new residual, or at most RoPE's table in size: no product of the way."""
    if kernels == "compile":
        pytest.skip("its memory is torch.compile's to choose")
    op, case, kept = OPS[name], Case(1, 2, 1000, 1, torch.float32, "dense"), []
    inputs = inputs_of(op, case, device)
    for x in inputs:
        x.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        outputs = op.run(kernels, case.split, HEADS[1000], *inputs)
    known = inputs if isinstance(outputs, Tensor) else [*inputs, outputs[0]]
    pointers, table = {x.untyped_storage().data_ptr() for x in known}, 2 * 2 * 200
    extra = [x.shape for x in kept if x.untyped_storage().data_ptr() not in pointers and x.numel() > table]
    assert not extra
