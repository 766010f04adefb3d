"""Fixtures of every folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from diffusers import AutoencoderKLWan, HeliosTransformer3DModel
from transformers import T5TokenizerFast, UMT5Config, UMT5EncoderModel

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


FIRST = ("resume", "tasks", "stages")  # folders whose files take minutes: begun last, one of them would run alone at the end


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long ones first."""
    items.sort(key=lambda item: item.path.parent.name not in FIRST)


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


@pytest.fixture(scope="session")
def tiny_encoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder with a random Wan VAE (16 channels) in vae/ and a random UMT5 (32 wide) in text_encoder/, tokenizer/."""
    folder = tmp_path_factory.mktemp("tiny_encoders")
    letters = [f"{start}{letter}" for letter in "abcdefghijklmnopqrstuvwxyz0123456789.,!&<>" for start in ("▁", "")]
    words = ["<pad>", "</s>", "<unk>", *letters, "▁", "▁red", "▁circle", "▁on", "ing", "▁the"]
    T5TokenizerFast(vocab=[(word, -1.0) for word in words], extra_ids=0).save_pretrained(folder / "tokenizer")
    shape = UMT5Config(vocab_size=len(words), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    with rng.forked(0, "tiny encoders"):
        vae = AutoencoderKLWan(
            base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        )
        text = UMT5EncoderModel(shape)
    vae.save_pretrained(folder / "vae")
    text.save_pretrained(folder / "text_encoder")
    return folder
