"""Fixtures of every folder."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from diffusers import HeliosTransformer3DModel

from helios_train import rng
from helios_train.conf import compose
from helios_train.tasks import run_task

TINY_RUN = (
    "experiment=debug",
    "model.head_dim=16",
    "model.rope_dim=[8,4,4]",
    "data.toy.clips=8",
    "trainer.max_steps=3",
    "trainer.accelerator=cpu",
    "watch.every=0",
    "watch.sample=false",
)


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


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    """Does a task in this process, as the command line would, on a miniature and shards that all tests share."""
    shards = tmp_path_factory.mktemp("shards") / "toy"

    def run(*overrides: str) -> None:
        raw = compose.plain(compose.compose_plain([*TINY_RUN, f"data.root={shards}", *overrides]))
        run_task(compose.typed(raw), raw)

    return run
