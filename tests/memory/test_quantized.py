"""Frozen layers in 4 and 8 bits: near the layer they were made from, gradients of the input alone, adapters above, sizes."""

from __future__ import annotations

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from helios_train import rng
from helios_train.memory.quantized import FrozenLinear, Kind, quantize
from helios_train.models import adapters
from helios_train.models.loading import random_transformer

SHAPE = {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "text_dim": 32,
    "ffn_dim": 128,
    "num_layers": 2,
    "rope_dim": [12, 10, 10],
}
NEAR = {"int8": 0.01, "nf4": 0.1}  # mean error of a weight, by the mean weight


def layer(dtype: torch.dtype = torch.float32) -> nn.Linear:
    with rng.forked(0, "layer"):
        return nn.Linear(256, 192).to(dtype).requires_grad_(False)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_near_its_layer(kind: Kind, dtype: torch.dtype) -> None:
    plain = layer(dtype)
    frozen = FrozenLinear(plain, kind)
    off = (frozen.weight.float() - plain.weight.float()).abs().mean() / plain.weight.float().abs().mean()
    assert 0 < off < NEAR[kind] and frozen.weight.dtype == dtype and not list(frozen.parameters())
    x = rng.normal(rng.generator(0, "x"), (3, 5, 256)).to(dtype).requires_grad_()
    out = frozen(x)
    torch.testing.assert_close(out, torch.nn.functional.linear(x, frozen.weight, plain.bias))
    out.sum().backward()
    torch.testing.assert_close(x.grad, torch.ones_like(out) @ frozen.weight)
    stored = sum(
        buffer.numel() * buffer.element_size() for name, buffer in frozen.named_buffers() if name not in ("bias", "code")
    )
    bits = 8 * stored / plain.weight.numel()
    assert bits == pytest.approx({"int8": 8.125, "nf4": 4.13}[kind], rel=0.01)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_transformer_below_its_adapters(kind: Kind) -> None:
    """Every frozen linear layer of the blocks, no adapter; gradients reach the adapters, and the answer stays near."""
    transformer = random_transformer(SHAPE, torch.float32, 0)
    adapters.add_lora(transformer, "student", adapters.Lora(rank=4, alpha=4, history_patches=False), 0)
    before = {name for name, weight in transformer.named_parameters() if weight.requires_grad}
    linears = [module for module in transformer.blocks.modules() if isinstance(module, LoraLayer)]
    assert quantize(transformer.blocks, kind) == len(linears) == 2 * 10
    assert all(isinstance(module.base_layer, FrozenLinear) for module in linears)
    assert {name for name, weight in transformer.named_parameters() if weight.requires_grad} == before
    assert quantize(transformer.blocks, kind) == 0


def test_on_fake_tensors() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        plain = nn.Linear(256, 192).requires_grad_(False)
        for kind in ("int8", "nf4"):
            x = torch.zeros(2, 256, requires_grad=True)
            FrozenLinear(plain, kind)(x).sum().backward()
            assert x.grad is not None and x.grad.shape == x.shape


def test_each_row_has_a_scale_of_its_own() -> None:
    """int8: a row's error is at most half a step of its own largest weight, however large the others are."""
    plain = nn.Linear(64, 7).requires_grad_(False)
    with torch.no_grad():
        plain.weight.copy_(torch.linspace(-1, 1, 7 * 64).view(7, 64) * 10.0 ** torch.arange(-3, 4).view(7, 1))
    error = (FrozenLinear(plain, "int8").weight - plain.weight).abs().amax(dim=1)
    assert (error <= 0.501 * plain.weight.abs().amax(dim=1) / 127).all() and error.max() > 0
