"""Discriminator heads: the published one's logit, its size, and a light one's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helios_train import rng
from helios_train.models.heads import Head, Heads

GOLDEN = Path(__file__).parents[1] / "parity" / "golden" / "discriminator_head.safetensors"
CROP = (24, 40)  # latents, of 384x640 pixels
PUBLISHED = 4 * 218_839_297 + 113_002_753


def test_the_logit_of_the_published_code() -> None:
    stored = load_file(GOLDEN)
    head = Head(48, (8, 12), width=64)
    head.load_state_dict({name.removeprefix("head."): value for name, value in stored.items() if name.startswith("head.")})
    torch.testing.assert_close(head(stored["features"]), stored["logit"], rtol=1e-5, atol=1e-5)


def parameters(kind: str) -> list[int]:
    with torch.device("meta"):
        heads = [Head(5120, (12, 20), light=kind == "light"), Head(16, CROP, light=kind == "light")]
    return [sum(weight.numel() for weight in head.parameters()) for head in heads]


def test_the_published_heads_have_the_published_sizes_and_light_ones_a_tenth() -> None:
    published, light = parameters("published"), parameters("light")
    assert published == [218_839_297, 113_002_753] and 4 * published[0] + published[1] == PUBLISHED
    assert all(small <= 0.1 * large for small, large in zip(light, published, strict=True))


@pytest.mark.parametrize("kind", ["published", "light"])
@pytest.mark.parametrize("size", [(24, 40), (4, 8), (4, 4), (2, 2)])
def test_a_logit_for_every_head_at_any_size(kind: str, size: tuple[int, int]) -> None:
    """Also of crops so small that the published strides would leave nothing; the velocity's logit first."""
    heads = Heads([0, 2], 16, 24, size, head_width=32, kind=kind, seed=3)
    draw = rng.generator(0, "inputs")
    velocity = rng.normal(draw, (2, 16, 9, *size))
    tokens = [rng.normal(draw, (2, 9 * size[0] * size[1] // 4, 24)) for _ in range(2)]
    logits = heads(velocity, tokens)
    assert logits.shape == (2, 3) and logits.dtype == torch.float32
    torch.testing.assert_close(logits[:, :1], heads.velocity(velocity))
    grid = tokens[1].transpose(1, 2).reshape(2, 24, 9, size[0] // 2, size[1] // 2)
    torch.testing.assert_close(logits[:, 2:], heads.tokens[1](grid))
    again = Heads([0, 2], 16, 24, size, head_width=32, kind=kind, seed=3)
    assert all(torch.equal(one, other) for one, other in zip(heads.parameters(), again.parameters(), strict=True))


def test_blocks_rise() -> None:
    for blocks in ([], [2, 1], [1, 1]):
        with pytest.raises(ValueError, match="at least one, rising"):
            Heads(blocks, 16, 24, (4, 4), head_width=32)
