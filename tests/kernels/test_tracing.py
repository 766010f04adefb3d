"""What surrounds the ops' numbers: the choice of an implementation, fp64 gradients, fake tensors, torch.compile."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from helios_train.errors import InputError
from helios_train.kernels import rows
from helios_train.kernels.dispatch import choose
from helios_train.kernels.gelu import gelu_tanh

spec = importlib.util.spec_from_file_location("ops_traced", Path(__file__).with_name("test_ops.py"))
ops: Any = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
spec.loader.exec_module(ops)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ops.OPS)
@pytest.mark.parametrize("split", [0, 1, 3])
def test_reference_gradients_in_fp64(name: str, split: int) -> None:
    inputs = ops.inputs_of(ops.OPS[name], ops.Case(2, 3, 96, split, torch.float64, "strided"), "cpu")
    inputs = [x[..., :12].clone().requires_grad_() for x in inputs]  # 12 columns: gradcheck runs the op twice a number
    assert torch.autograd.gradcheck(
        lambda *x: ops.OPS[name].run("reference", split, 2, *x), inputs, nondet_tol=0.0, fast_mode=True
    )


def gradients(name: str, kernels: str, inputs: list[Tensor], split: int, heads: int) -> list[Tensor | None]:
    outputs = ops.OPS[name].run(kernels, split, heads, *inputs)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    return outputs + list(torch.autograd.grad([y.float().sum() for y in outputs], inputs))


@pytest.mark.parametrize("kernels", ["reference", "triton", "compile"])
@pytest.mark.parametrize("name", ops.OPS)
def test_fake_tensors_trace(name: str, kernels: str) -> None:
    """On fake CPU tensors each implementation has the shapes and dtypes of the reference on real ones, and ours its strides."""
    inputs = ops.inputs_of(ops.OPS[name], ops.Case(2, 4, 96, 1, torch.bfloat16, "dense"), "cpu")
    real = gradients(name, "reference", [x.requires_grad_() for x in inputs], 1, 2)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(x.detach()).requires_grad_() for x in inputs]
        traced = gradients(name, kernels, fake, 1, 2)
    for a, b in zip(traced, real, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert kernels == "compile" or a.is_contiguous() == b.is_contiguous()


def block(kernels: str, x: Tensor, rows_B26D: Tensor, weight: Tensor, table: Tensor) -> Tensor:
    """Every op once, in a block's order, history being one token."""
    shift, scale, gate = rows_B26D[:, :, 0], rows_B26D[:, :, 1], rows_B26D[:, :, 2]
    n = ops.modulated_norm.modulated_norm(x, scale, shift, 1, kernels=kernels)
    queries = ops.qk_norm_rope.qk_norm_rope(n, torch.stack([2 * weight, weight]), 2, table, 1, kernels=kernels)
    new, n = ops.gated_residual.gated_residual_layer_norm(x, queries.flatten(2), gate, weight, weight + 1, 1, kernels=kernels)
    new, n = ops.gated_residual.gated_residual_modulated_norm(new, n, None, scale, shift, 1, kernels=kernels)
    new = ops.gated_residual.gated_residual(new, gelu_tanh(n, kernels), gate, 1, kernels)
    return ops.layer_norm.layer_norm(new, weight, weight + 1, kernels=kernels)


def block_inputs() -> list[Tensor]:
    normal = torch.Generator().manual_seed(0)
    sizes = ((1, 3, 96), (1, 2, 6, 96), (96,))
    return [torch.randn(*size, generator=normal).requires_grad_() for size in sizes] + [ops.table_of(torch.zeros(1, 3, 96), 2)]


@pytest.mark.parametrize("kernels", ["reference", "compile"])
def test_torch_compile_takes_a_block_whole(kernels: str) -> None:
    """One graph each way, with the eager numbers (traced and differentiated, no code generated)."""
    inputs = block_inputs()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")(kernels, *inputs)
    eager = block("reference", *inputs)
    torch.testing.assert_close(compiled, eager)
    ours, truth = (torch.autograd.grad(y.square().sum(), inputs[:3]) for y in (compiled, eager))
    torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-4)


def test_torch_compile_keeps_the_triton_ops() -> None:
    """They enter the graph as what they are, without a break."""
    graph = torch._dynamo.export(lambda *x: block("triton", *x))(*block_inputs()).graph_module
    assert "autograd_function_apply" in str(graph.graph) or "helios_train" in str(graph.graph)


def test_choice() -> None:
    x = torch.zeros(1)
    assert choose("auto", x) == "reference"
    assert [choose(name, x) for name in ("reference", "compile", "triton")] == ["reference", "compile", "triton"]
    with pytest.raises(InputError, match="kernels='tritn' is none of auto, reference, triton, compile"):
        gelu_tanh(x, "tritn")
    with pytest.raises(InputError, match="computes in fp32"):
        choose("triton", x.double())


@pytest.mark.parametrize(
    ("batch", "length", "split"), [(1, 11040, 2400), (1, 2640, 5), (2, 4560, 0), (4, 2940, 2940), (8, 100, 3), (1, 1, 1)]
)
def test_launch_covers_every_token_once(batch: int, length: int, split: int) -> None:
    """Chunks of a segment hold it whole, and where there are sums, all of them fit on the device at once."""
    for sums in (False, True):
        cut = rows.launch(torch.empty(batch, length, 64), split, sums)
        chunks, samples = cut.grid
        assert samples == batch and 0 <= cut.first * cut.chunk - split < cut.chunk
        assert 0 <= (chunks - cut.first) * cut.chunk - (length - split) < cut.chunk
        assert not sums or chunks * samples <= max(2 * 132, 2 * batch)


def test_wrong_shapes_are_named() -> None:
    x = torch.zeros(1, 4, 8)
    with pytest.raises(ValueError, match="split=5 does not fit"):
        ops.modulated_norm.modulated_norm(x, x[:, :2], x[:, :2], 5)
    with pytest.raises(ValueError, match="neither x's tokens"):
        ops.gated_residual.gated_residual(x, x[:, 1:], None, 2)
    with pytest.raises(ValueError, match="do not fit x"):
        ops.qk_norm_rope.qk_norm_rope(x, torch.ones(8), 2, torch.zeros(4, 4))
