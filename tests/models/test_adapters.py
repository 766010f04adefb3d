"""Adapters: on which layers, how large, what trains, and that folding them changes nothing but rounding."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import Tensor

from helios_train import rng
from helios_train.history import History
from helios_train.models.adapters import (
    Lora,
    add_lora,
    folded,
    group_of,
    link_state,
    lora_targets,
    train_everything,
    trainable,
)
from helios_train.models.precision import cast
from helios_train.models.transformer import HeliosTransformer

Inputs = tuple[Tensor, Tensor, Tensor, History]
ROLE = "student"
SMALL = Lora(rank=3, alpha=6)
BLOCK = {f"{attn}.{part}" for attn in ("attn1", "attn2") for part in ("to_q", "to_k", "to_v", "to_out.0")} | {
    "ffn.net.0.proj",
    "ffn.net.2",
}
OUTSIDE = {
    "condition_embedder.time_embedder.linear_1",
    "condition_embedder.time_embedder.linear_2",
    "condition_embedder.time_proj",
    "condition_embedder.text_embedder.linear_1",
    "condition_embedder.text_embedder.linear_2",
    "proj_out",
}


@torch.no_grad()
def trained(model: HeliosTransformer, lora: Lora = SMALL) -> HeliosTransformer:
    """Adapted, with every trainable weight moved as training would."""
    add_lora(model, ROLE, lora, seed=1)
    draw = rng.generator(0, "trained")
    for weight in trainable(model).values():
        weight += 0.05 * rng.normal(draw, weight.shape).to(weight.dtype)
    return model


def test_targets(ours: HeliosTransformer) -> None:
    expected = {f"blocks.{i}.{layer}" for i in range(2) for layer in BLOCK} | OUTSIDE
    assert set(lora_targets(ours, Lora())) == expected | {"patch_embedding"}
    assert set(lora_targets(ours, Lora(patch_embedding=False))) == expected


def test_the_size_of_the_published_adapter() -> None:
    """40 x 119,808 x rank in the blocks of the 14B model, on no memory at all."""
    with torch.device("meta"):
        model = HeliosTransformer()
        add_lora(model, ROLE, Lora(rank=8, alpha=8), seed=0)
    blocks = [weight for name, weight in trainable(model).items() if name.startswith("blocks.")]
    assert all(weight.is_meta for weight in blocks)
    assert sum(weight.numel() for weight in blocks) == 40 * 119_808 * 8


@pytest.mark.parametrize("patch_embedding", [True, False])
@pytest.mark.parametrize("history_patches", [True, False])
def test_what_trains(ours: HeliosTransformer, patch_embedding: bool, history_patches: bool) -> None:
    add_lora(ours, ROLE, Lora(3, 3, patch_embedding, history_patches), seed=0)
    layers = (
        {f"blocks.{i}.{layer}" for i in range(2) for layer in BLOCK}
        | OUTSIDE
        | ({"patch_embedding"} if patch_embedding else set())
    )
    expected = {f"{layer}.lora_{side}.{ROLE}.weight" for layer in layers for side in "AB"}
    if history_patches:
        expected |= {f"patch_{length}.{kind}" for length in ("short", "mid", "long") for kind in ("weight", "bias")}
    assert trainable(ours).keys() == expected
    assert not any("norm" in name or "scale_shift_table" in name for name in trainable(ours))


def test_full_training(ours: HeliosTransformer) -> None:
    add_lora(ours, ROLE, SMALL, seed=0)
    train_everything(ours)
    assert len(trainable(ours)) == len(list(ours.parameters()))


def test_groups(ours: HeliosTransformer) -> None:
    assert {group_of(name) for name in trainable(ours)} == {"blocks", "embedders", "history patches", "output"}
    add_lora(ours, ROLE, SMALL, seed=0)
    assert {group_of(name) for name in trainable(ours)} == {"LoRA", "history patches"}


@torch.no_grad()
def test_a_fresh_adapter_changes_nothing(ours: HeliosTransformer, inputs: Inputs) -> None:
    before, state = ours.velocity(*inputs), torch.random.get_rng_state()
    add_lora(ours, ROLE, Lora(rank=64, alpha=64), seed=0)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(ours.velocity(*inputs), before)
    A = ours.get_submodule("condition_embedder.time_proj").lora_A[ROLE].weight
    assert abs(A.std().item() * 64 - 1) < 0.1


def test_an_adapter_is_a_function_of_its_seed(ours: HeliosTransformer) -> None:
    models = [copy.deepcopy(ours) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        add_lora(model, ROLE, SMALL, seed)
    first, same, other = (trainable(model)[f"proj_out.lora_A.{ROLE}.weight"] for model in models)
    assert torch.equal(first, same) and not torch.equal(first, other)


@torch.no_grad()
def test_folding_keeps_the_function(ours: HeliosTransformer, inputs: Inputs) -> None:
    keys, before, merged = list(ours.state_dict()), ours.velocity(*inputs), copy.deepcopy(ours)
    model = trained(ours)
    adapted, plain = model.velocity(*inputs), folded(model)
    assert sorted(plain) == sorted(keys)
    merged.load_state_dict(plain)
    distance = (merged.velocity(*inputs) - adapted).norm() / adapted.norm()
    assert distance <= 1e-5 and (adapted - before).norm() > 0.1 * adapted.norm()


@torch.no_grad()
def test_each_layer_folds(ours: HeliosTransformer) -> None:
    """Linear and Conv3d alone, against the layer's own forward."""
    model, draw = trained(ours), rng.generator(0, "x")
    plain = folded(model)
    for name, shape in {"blocks.0.ffn.net.0.proj": (5, 24), "patch_embedding": (2, 16, 3, 4, 6)}.items():
        x, layer = rng.normal(draw, shape), model.get_submodule(name)
        weight, bias = plain[f"{name}.weight"], plain[f"{name}.bias"]
        out = (
            torch.nn.functional.linear(x, weight, bias)
            if x.ndim == 2
            else torch.nn.functional.conv3d(x, weight, bias, stride=(1, 2, 2))
        )
        torch.testing.assert_close(out, layer(x), rtol=1e-5, atol=1e-5)
        assert (weight - layer.base_layer.weight).norm() > 0


@torch.no_grad()
def test_bf16_stores_the_rounding_of_the_fp32_fold(ours: HeliosTransformer) -> None:
    cast(ours, torch.bfloat16)
    model = trained(ours)
    masters = {
        name: weight.float() + 1e-4 * rng.normal(rng.generator(0, name), weight.shape)
        for name, weight in trainable(model).items()
    }
    own = dict(model.named_parameters())
    plain = folded(model, masters)
    assert len(plain) == len([name for name in own if ".lora_" not in name])
    for name, stored in plain.items():
        layer, _, kind = name.rpartition(".")
        exact = masters.get(name, own.get(name, own.get(f"{layer}.base_layer.{kind}"))).float()
        if f"{layer}.lora_A.{ROLE}.weight" in own and kind == "weight":
            A, B = (masters[f"{layer}.lora_{side}.{ROLE}.weight"].flatten(1) for side in "AB")
            exact = exact + 2.0 * (B @ A).view_as(exact)  # alpha / rank = 2
        assert torch.equal(stored, exact.to(stored.dtype)), name
    assert plain["proj_out.weight"].dtype == torch.bfloat16
    assert plain["condition_embedder.time_embedder.linear_1.weight"].dtype == torch.float32


def test_adapters_have_their_layers_dtype(ours: HeliosTransformer, inputs: Inputs) -> None:
    cast(ours, torch.bfloat16)
    add_lora(ours, ROLE, SMALL, seed=0)
    dtypes = {name: weight.dtype for name, weight in ours.named_parameters() if ".lora_" in name}
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == {
        name for name in dtypes if "time_embedder" in name
    }
    ours.velocity(*inputs).sum().backward()


def test_the_link_is_what_trained(ours: HeliosTransformer) -> None:
    model = trained(ours)
    state = link_state(model, ROLE)
    assert len(state) == len(trainable(model)) and {value.dtype for value in state.values()} == {torch.float32}
    kinds = {re.sub(r"^transformer\..*\.(lora_[AB]\.weight)$", r"\1", name) for name in state}
    assert {kind for kind in kinds if not kind.startswith("patch_")} == {"lora_A.weight", "lora_B.weight"}
    assert torch.equal(state["transformer.proj_out.lora_A.weight"], trainable(model)[f"proj_out.lora_A.{ROLE}.weight"])
    assert torch.equal(state["transformer.proj_out.lora_B.weight"], 2 * trainable(model)[f"proj_out.lora_B.{ROLE}.weight"])
    override = {f"proj_out.lora_B.{ROLE}.weight": torch.ones(64, 3)}
    assert torch.equal(link_state(model, ROLE, override)["transformer.proj_out.lora_B.weight"], torch.full((64, 3), 2.0))
