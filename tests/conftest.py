"""Fixtures of every folder."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from diffusers import HeliosTransformer3DModel

from helios_train import rng


@pytest.fixture
def tiny_transformer() -> Callable[..., HeliosTransformer3DModel]:
    """Factory of diffusers' transformer in miniature (140,528 random parameters); keywords change its config."""

    def build(**changes: object) -> HeliosTransformer3DModel:
        config: dict[str, object] = {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "text_dim": 32,
            "ffn_dim": 32,
            "num_layers": 2,
            "rope_dim": (4, 4, 4),
        }
        with rng.forked(0, "tiny transformer"):
            return HeliosTransformer3DModel(**(config | changes))

    return build
