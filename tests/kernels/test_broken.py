"""A kernel with a wrong formula must fail the comparison of test_ops.py. Interpreted kernels look their helpers up at each call,
so a wrong helper can be slipped in; run by test_interpreted.py.
"""

# ruff: noqa: RUF005 -- Triton compiles no starred tuples

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any, no_type_check

import pytest
import torch

from helios_train.kernels import gated_residual, gelu, modulated_norm, qk_norm_rope
from helios_train.kernels.dispatch import jit, tl


def load_ops() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ops_under_test", Path(__file__).with_name("test_ops.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ops = load_ops()


@jit()
@no_type_check
def variance_over_one_fewer(x, eps, D: tl.constexpr, TILE: tl.constexpr):
    mean, centred = modulated_norm.mean_of(x, D, TILE), ()
    for tile in tl.static_range((D + TILE - 1) // TILE):
        centred = centred + (tl.where(tile * TILE + tl.arange(0, TILE) < D, x[tile] - mean, 0.0),)
    return mean, tl.rsqrt(modulated_norm.mean_of_product(centred, centred, D, TILE) * D / (D - 1) + eps)


@jit()
@no_type_check
def padding_counted(x, eps, D: tl.constexpr, TILE: tl.constexpr):
    mean, centred = modulated_norm.mean_of(x, D, TILE), ()
    for tile in tl.static_range((D + TILE - 1) // TILE):
        centred = centred + (x[tile] - mean,)
    return mean, tl.rsqrt(modulated_norm.mean_of_product(centred, centred, D, TILE) + eps)


@jit()
@no_type_check
def scale_without_one(x, mean, rstd, scale, shift, BASE: tl.constexpr, TILES: tl.constexpr):
    row = ()
    for tile in tl.static_range(TILES):
        row = row + ((x[tile] - mean) * rstd * scale[tile] + shift[tile],)
    return row


@jit()
@no_type_check
def gradient_without_slope(dn, x, mean, rstd, scale, BASE: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr):
    g, h, dx = (), (), ()
    for tile in tl.static_range((D + TILE - 1) // TILE):
        g, h = g + (dn[tile] * (BASE + scale[tile]),), h + ((x[tile] - mean) * rstd,)
    level = modulated_norm.mean_of(g, D, TILE)
    for tile in tl.static_range((D + TILE - 1) // TILE):
        dx = dx + (rstd * (g[tile] - level),)
    return dx, h


@jit()
@no_type_check
def gate_forgotten(x, y, gate, dtype: tl.constexpr, GATE: tl.constexpr, TILES: tl.constexpr):
    row = ()
    for tile in tl.static_range(TILES):
        row = row + ((x[tile] + y[tile]).to(dtype).to(tl.float32),)
    return row


@jit()
@no_type_check
def one_segment(index, length, split, chunk):
    first = (split + chunk - 1) // chunk
    late = index >= first
    start = tl.where(late, split + (index - first) * chunk, index * chunk)
    return 1, start, tl.minimum(start + chunk, tl.where(late, length, split))


@jit()
@no_type_check
def products_dropped(total, a, b, TILES: tl.constexpr):
    return total


@jit()
@no_type_check
def turned_backwards(pointer, K: tl.constexpr, WIDE: tl.constexpr):
    planes = tl.arange(0, WIDE // 2)[None, :] * 2
    cosine = tl.load(pointer + planes, mask=planes < K, other=0.0).to(tl.float32)
    return cosine, -tl.load(pointer + K + planes, mask=planes < K, other=0.0).to(tl.float32)


@jit()
@no_type_check
def gelu_without_cube(x):
    u2 = 1.5957691216057308 * x
    return 1.0 / (1.0 + tl.exp(-u2)), 1.5957691216057308


@pytest.mark.skipif(not ops.INTERPRETED, reason="in test_interpreted.py")
@pytest.mark.parametrize(
    ("name", "module", "helper", "broken"),
    [
        ("modulated_norm", modulated_norm, "layer_norm_row", variance_over_one_fewer),
        ("layer_norm", modulated_norm, "layer_norm_row", padding_counted),
        ("modulated_norm", modulated_norm, "modulate_row", scale_without_one),
        ("modulated_norm", modulated_norm, "norm_gradient_row", gradient_without_slope),
        ("modulated_norm", modulated_norm, "chunk_of", one_segment),
        ("layer_norm", modulated_norm, "add_product", products_dropped),
        ("gated_residual", gated_residual, "residual_row", gate_forgotten),
        ("gate, affine norm of the target", gated_residual, "norm_gradient_row", gradient_without_slope),
        ("qk_norm_rope", qk_norm_rope, "load_turn", turned_backwards),
        ("qk_norm_rope, two weights", qk_norm_rope, "chunk_of", one_segment),
        ("gelu_tanh", gelu, "gate_of", gelu_without_cube),
    ],
)
def test_is_caught(name: str, module: ModuleType, helper: str, broken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = ops.Case(1, 3, 130, 1, torch.float32, "dense")  # with the right helpers it passes in test_ops.py
    monkeypatch.setattr(module, helper, broken)
    with pytest.raises(AssertionError, match="off by"):
        ops.compare(ops.OPS[name], case, "triton", "cpu")
