"""FLOPs against closed forms; attention on the CPU is counted, real or fake."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from helios_train.memory.flops import count_flops


@pytest.fixture(params=["real", "fake"], autouse=True)
def kind(request: pytest.FixtureRequest) -> Iterator[str]:
    with FakeTensorMode(allow_non_fake_inputs=True) if request.param == "fake" else nullcontext():
        yield request.param


def test_products() -> None:
    layer, x = nn.Linear(8, 16), torch.randn(4, 8)
    forward = 2 * 4 * 8 * 16
    assert count_flops(lambda: layer(x)) == forward
    assert count_flops(lambda: layer(x).sum().backward()) == 2 * forward  # x wants no gradient
    x.requires_grad_()
    assert count_flops(lambda: layer(x).sum().backward()) == 3 * forward
    twice = 4 * forward - forward  # the recompute stops before the product, whose result nobody saved
    assert count_flops(lambda: checkpoint(layer, x, use_reentrant=False).sum().backward()) == twice


def test_products_in_place() -> None:
    out, a, b = torch.zeros(4, 16), torch.ones(4, 8), torch.ones(8, 16)
    assert count_flops(lambda: out.addmm_(a, b)) == 2 * 4 * 8 * 16


def test_attention() -> None:
    q, k, v = (torch.randn(2, 3, rows, 8, requires_grad=True) for rows in (5, 7, 7))
    scores = 2 * 2 * 3 * 5 * 7 * 8  # as many as the product with the values
    assert count_flops(lambda: scaled_dot_product_attention(q, k, v)) == 2 * scores
    assert count_flops(lambda: scaled_dot_product_attention(q, k, v).sum().backward()) == 2 * scores + 5 * scores
