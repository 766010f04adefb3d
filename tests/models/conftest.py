"""Miniatures that the tests of models share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import HeliosTransformer3DModel
from torch import Tensor

from helios_train import rng
from helios_train.history import FRAMES, SECTION, History
from helios_train.models.transformer import HeliosTransformer

Inputs = tuple[Tensor, Tensor, Tensor, History]


@pytest.fixture
def ours(tiny_transformer: Callable[..., HeliosTransformer3DModel]) -> HeliosTransformer:
    """diffusers' miniature as ours, with the same weights."""
    plain = tiny_transformer()
    model = HeliosTransformer(**{key: value for key, value in plain.config.items() if not key.startswith("_")})
    model.load_state_dict(plain.state_dict())
    return model


@pytest.fixture
def inputs() -> Inputs:
    """x_t, t, text and history of two samples: one with all its history, one with its newest frame alone."""
    draw = rng.generator(0, "inputs")
    frames, anchor = rng.normal(draw, (2, 16, FRAMES, 6, 10)), rng.normal(draw, (2, 16, 1, 6, 10))
    history = History(frames, anchor, (FRAMES, FRAMES), (True, True)).keep((FRAMES, 1), (True, True))
    return rng.normal(draw, (2, 16, SECTION, 6, 10)), torch.tensor([431.7, 12.0]), rng.normal(draw, (2, 5, 32)), history
