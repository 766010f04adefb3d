"""RoPE against diffusers' HeliosRotaryPosEmbed and apply_rotary_emb_transposed, and against its own law."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.transformers.transformer_helios import (
    HeliosRotaryPosEmbed,
    apply_rotary_emb_transposed,
    center_down_sample_3d,
    pad_for_3d_conv,
)
from torch import Tensor

from helios_train.errors import InputError
from helios_train.kernels.rope import apply_rope, rope_frequencies, rope_table

SHAPES = [((24, 20, 20), 100.0), ((44, 42, 42), 10000.0), ((4, 4, 4), 10000.0)]


def diffusers_table(indices: Tensor, height: int, width: int, rope_dim: tuple[int, ...], theta: float, pool: int) -> Tensor:
    table = HeliosRotaryPosEmbed(rope_dim, theta)(indices[None], height, width, "cpu")
    if pool > 1:
        table = table.double()  # the sum of 64 entries in fp32 alone is off by 1e-6
        table = center_down_sample_3d(pad_for_3d_conv(table, (pool,) * 3), (pool,) * 3)
    return table.flatten(2).transpose(1, 2)[0]


def random_table(tokens: int, width: int) -> Tensor:
    angle = torch.randn(tokens, width // 2, generator=torch.Generator().manual_seed(1)).repeat_interleave(2, dim=-1)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize(("rope_dim", "theta"), SHAPES)
@pytest.mark.parametrize(
    ("first", "frames", "pool"),
    [(20, 9, 1), (17, 2, 2), (1, 16, 4), (1, 5, 4), (3, 3, 2)],
    ids=["target", "mid", "long", "padded4", "padded2"],
)
@pytest.mark.parametrize(("height", "width"), [(4, 8), (5, 7), (1, 1), (24, 40)])
def test_table_equals_diffusers(
    rope_dim: tuple[int, ...], theta: float, first: int, frames: int, pool: int, height: int, width: int
) -> None:
    indices = torch.arange(first, first + frames)
    table = rope_table(indices, height, width, rope_dim, theta, pool)
    assert table.dtype == torch.float32
    expected = diffusers_table(indices, height, width, rope_dim, theta, pool)
    torch.testing.assert_close(table.to(expected), expected, rtol=0, atol=3e-7 if pool > 1 else 0)


def test_table_of_anchor_and_short_history() -> None:
    indices = torch.tensor([0, 19])
    table = rope_table(indices, 4, 6, (24, 20, 20), 100.0)
    assert torch.equal(table, diffusers_table(indices, 4, 6, (24, 20, 20), 100.0, 1))
    assert table.shape == (2 * 4 * 6, 128)


@pytest.mark.parametrize("rope_dim", [(24, 20), (24, 21, 20), (24, 0, 20)])
def test_widths_that_make_no_planes_are_refused(rope_dim: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="three positive even widths"):
        rope_frequencies(rope_dim, 100.0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.0), (torch.float16, 0.0)])
def test_apply_equals_diffusers(dtype: torch.dtype, tolerance: float) -> None:
    x, table = normal(2, 11, 3, 12, dtype=dtype), random_table(11, 12)
    turned = apply_rope(x, table)
    assert turned.dtype == dtype and turned.is_contiguous()
    torch.testing.assert_close(turned, apply_rotary_emb_transposed(x, table[None]), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (3, 2, 1, 0), (1, 3, 0, 2)])
def test_apply_takes_any_strides_and_leaves_its_input(order: tuple[int, ...]) -> None:
    shape = (2, 11, 3, 12)
    stored = normal(*(shape[axis] for axis in order))
    x = stored.permute(*(order.index(axis) for axis in range(4)))
    assert x.shape == shape
    before, table = x.clone(), random_table(11, 12)
    assert torch.equal(apply_rope(x, table), apply_rope(before, table))
    assert torch.equal(x, before)
    odd = normal(2, 11, 3, 13)[..., 1:]  # rows of 13: no view of pairs exists
    torch.testing.assert_close(apply_rope(odd, table), apply_rotary_emb_transposed(odd, table[None]), rtol=1e-6, atol=1e-6)


def test_a_table_a_sample() -> None:
    x, tables = normal(2, 11, 3, 12), torch.stack([random_table(11, 12), random_table(11, 12).flip(0)])
    apart = torch.cat([apply_rope(x[i : i + 1], tables[i]) for i in range(2)])
    assert torch.equal(apply_rope(x, tables), apart)


def test_gradients() -> None:
    x, table = normal(2, 5, 2, 8, dtype=torch.float64).requires_grad_(), random_table(5, 8).double()
    assert torch.autograd.gradcheck(apply_rope, (x, table))
    assert torch.autograd.gradgradcheck(apply_rope, (x, table))


def test_scores_depend_on_distance_alone() -> None:
    """The law of rotary embedding: moving queries and keys by the same step leaves their products as they were."""
    q, k = normal(1, 6, 1, 64), normal(1, 6, 1, 64).flip(1)

    def scores(first: int) -> Tensor:
        table = rope_table(torch.arange(first, first + 6), 1, 1, (24, 20, 20), 100.0)
        return torch.einsum("blnk,bmnk->bnlm", apply_rope(q, table), apply_rope(k, table))

    torch.testing.assert_close(scores(0), scores(17), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(scores(0), torch.einsum("blnk,bmnk->bnlm", q, k), atol=0.1)
