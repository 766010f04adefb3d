"""The transformer's own forward: diffusers' output and every gradient, from the same parameters, in every variant."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from diffusers import HeliosTransformer3DModel
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor

from helios_train import rng
from helios_train.history import History
from helios_train.memory.live import LiveCounter
from helios_train.memory.places import DEVICE
from helios_train.models import block, manifest
from helios_train.models.lora import Adapted
from helios_train.models.transformer import HeliosTransformer

Inputs = tuple[Tensor, Tensor, Tensor, History]
Tiny = Callable[..., HeliosTransformer3DModel]
VARIANTS: dict[str, dict[str, Any]] = {
    "as released": {},
    "amplified, a head": {"is_amplify_history": True},
    "amplified, once": {"is_amplify_history": True, "history_scale_mode": "scalar"},
    "history reads the text": {"guidance_cross_attn": False},
    "history at time t": {"zero_history_timestep": False},
    "no norm before the text": {"cross_attn_norm": False},
    "neither": {"cross_attn_norm": False, "guidance_cross_attn": False},
}


def pair(tiny_transformer: Tiny, **changes: Any) -> tuple[HeliosTransformer3DModel, HeliosTransformer]:
    """diffusers' model, every parameter random, and ours with the same weights."""
    theirs = tiny_transformer(**changes)
    with torch.no_grad():
        for number, parameter in enumerate(theirs.parameters()):
            parameter.add_(0.1 * rng.normal(rng.generator(0, "parameter", number), parameter.shape))
    ours = HeliosTransformer(**{name: value for name, value in theirs.config.items() if not name.startswith("_")})
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def arguments(inputs: Inputs, with_history: bool = True) -> dict[str, Any]:
    """Of diffusers' forward, as its pipeline gives them."""
    x_t, t, text, history = inputs
    first, long, mid, short, target = torch.arange(29)[None].split([1, 16, 2, 1, 9], dim=1)
    given: dict[str, Any] = {"hidden_states": x_t, "timestep": t, "encoder_hidden_states": text, "indices_hidden_states": target}
    if with_history:
        given |= {
            "indices_latents_history_short": torch.cat([first, short], dim=1),
            "indices_latents_history_mid": mid,
            "indices_latents_history_long": long,
            "latents_history_short": torch.cat([history.anchor, history.short], dim=2),
            "latents_history_mid": history.mid,
            "latents_history_long": history.long,
        }
    return given


def gradients(model: HeliosTransformer3DModel, output: Tensor, weight: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (output * weight).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Each to 1e-5 of its norm, or of a thousandth of all of them where it is as small as that.

    The factor of history keys is left to a test of its own: its gradient is one sum of terms that nearly cancel.
    """
    assert ours.keys() == theirs.keys()
    floor = 1e-3 * torch.stack([value.norm() for value in theirs.values()]).norm()
    for name, expected in theirs.items():
        if name.endswith("history_key_scale"):
            continue
        assert (ours[name] - expected).norm() <= 1e-5 * torch.maximum(expected.norm(), floor), name


@pytest.mark.parametrize("checkpointing", [0, 1, 2])
@pytest.mark.parametrize("with_history", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_output_and_every_gradient(
    tiny_transformer: Tiny, inputs: Inputs, variant: str, with_history: bool, checkpointing: int
) -> None:
    theirs, ours = pair(tiny_transformer, **VARIANTS[variant])
    x_t = inputs[0].clone().requires_grad_()
    given = arguments((x_t, *inputs[1:]), with_history)
    weight = rng.normal(rng.generator(0, "weight"), x_t.shape)
    expected = theirs(**given, return_dict=False)[0]
    wanted = gradients(theirs, expected, weight) | {"x_t": x_t.grad.clone()}  # type: ignore[union-attr]
    x_t.grad = None
    if checkpointing:
        ours.train()
        ours.checkpoint_blocks(every=checkpointing, spare_last=False)
    output = ours(**given, return_dict=False)[0]
    assert (output - expected).norm() <= 1e-5 * expected.norm()
    assert_same(gradients(ours, output, weight) | {"x_t": x_t.grad}, wanted)  # type: ignore[dict-item]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("rows", [7, 2048])
def test_a_feed_forward_in_pieces(
    tiny_transformer: Tiny, inputs: Inputs, monkeypatch: pytest.MonkeyPatch, rows: int, frozen: bool
) -> None:
    """The same gradients; the recompute of a frozen block in one piece ends before its last layer."""
    theirs, ours = pair(tiny_transformer)
    x_t = inputs[0].clone().requires_grad_()
    given, weight = arguments((x_t, *inputs[1:])), rng.normal(rng.generator(0, "weight"), x_t.shape)
    found = []
    monkeypatch.setattr(block, "ROWS", rows)
    products: list[int] = []
    for one in ours.blocks:
        one.ffn.net[2].register_forward_pre_hook(lambda *_: products.append(1))
    ours.checkpoint_blocks(spare_last=False)
    for model in (theirs, ours):
        model.requires_grad_(not frozen)
        found.append(gradients(model, model(**given, return_dict=False)[0], weight) | {"x_t": x_t.grad.clone()})  # type: ignore[union-attr]
        x_t.grad = None
    assert_same(found[1], found[0])
    if rows == 2048:  # the last layer runs in the forward, and again only where the gate behind it wants its output
        assert len(products) == len(ours.blocks) * len(x_t) * (1 if frozen else 2)


@pytest.mark.parametrize("adapters", [False, True])
def test_two_hidden_tensors_of_a_piece_are_alive_in_a_feed_forwards_backward(
    tiny_transformer: Tiny, monkeypatch: pytest.MonkeyPatch, adapters: bool
) -> None:
    rows, hidden = 512, 4096
    _, ours = pair(tiny_transformer, num_layers=1, ffn_dim=hidden)
    one = ours.blocks[0].requires_grad_(False)
    if adapters:
        config = LoraConfig(r=2, target_modules=["ffn.net.0.proj", "ffn.net.2"], init_lora_weights=False)
        inject_adapter_in_model(config, one)
        for layer in (one.ffn.net[0].proj, one.ffn.net[2]):
            layer.__class__ = Adapted
    monkeypatch.setattr(block, "ROWS", rows)
    x = rng.normal(rng.generator(0, "x"), (1, 4 * rows, 24)).requires_grad_()
    dy = rng.normal(rng.generator(0, "dy"), x.shape)
    (wanted,) = torch.autograd.grad(one.pieces(x, "reference"), x, dy)
    output = one._feed_forward(x * 1, "reference", nullcontext)
    with LiveCounter() as counter:
        output.backward(dy)
    torch.testing.assert_close(x.grad, wanted)
    piece = 4 * rows * hidden
    assert 2 * piece <= counter.report().peak[DEVICE] < 2.5 * piece


@pytest.mark.parametrize("variant", ["amplified, a head", "amplified, once"])
def test_the_factor_of_history_keys_is_as_near_to_exact_as_diffusers(
    tiny_transformer: Tiny, inputs: Inputs, variant: str
) -> None:
    theirs, ours = pair(tiny_transformer, **VARIANTS[variant])
    _, exact = pair(tiny_transformer, **VARIANTS[variant])
    exact.double()
    wide = {name: value.double() if value.is_floating_point() else value for name, value in arguments(inputs).items()}
    weight = rng.normal(rng.generator(0, "weight"), inputs[0].shape)
    found = []
    for model, given in ((theirs, arguments(inputs)), (ours, arguments(inputs)), (exact, wide)):
        all_of_it = gradients(model, model(**given, return_dict=False)[0], weight.to(given["hidden_states"].dtype))
        found.append(torch.cat([all_of_it[f"blocks.{block}.attn1.history_key_scale"] for block in (0, 1)]))
    far = [float((one - found[2]).norm() / found[2].norm()) for one in found[:2]]
    assert far[1] <= max(3 * far[0], 1e-5), far


@torch.no_grad()
def test_features_are_what_the_blocks_pass_on(tiny_transformer: Tiny, inputs: Inputs) -> None:
    _, ours = pair(tiny_transformer, num_layers=4)
    passed: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda module, given, output: passed.append(output)) for block in ours.blocks]
    ours.velocity(*inputs)
    every = list(passed)
    passed.clear()
    found = ours.features(*inputs, blocks=[0, 2])
    assert len(passed) == 3  # the last block did not run
    for hook in hooks:
        hook.remove()
    tokens = inputs[0][0, 0].numel() // 4
    for feature, number in zip(found, (0, 2), strict=True):
        assert feature.shape == (len(inputs[0]), tokens, 24) and torch.equal(feature, every[number][:, -tokens:])


def test_gradients_of_features(tiny_transformer: Tiny, inputs: Inputs) -> None:
    theirs, ours = pair(tiny_transformer, num_layers=3)
    kept: list[Tensor] = []
    theirs.blocks[1].register_forward_hook(lambda module, given, output: kept.append(output))
    theirs(**arguments(inputs), return_dict=False)
    tokens = inputs[0][0, 0].numel() // 4
    weight = rng.normal(rng.generator(0, "weight"), (len(inputs[0]), tokens, 24))
    wanted = gradients(theirs, kept[0][:, -tokens:], weight)
    assert_same(gradients(ours, ours.features(*inputs, blocks=[1])[0], weight), wanted)


@torch.no_grad()
def test_the_offset_of_a_crop(tiny_transformer: Tiny, inputs: Inputs) -> None:
    """A crop's tokens are where they are in the frame; the history, which is not cropped, stays where it is."""
    _, ours = pair(tiny_transformer)
    x_t, *rest = inputs
    height, width = x_t.shape[-2] // 2, x_t.shape[-1] // 2
    whole, crop = ours.velocity(x_t, *rest), ours.velocity(x_t[..., -4:, -6:], *rest, offset=(height - 2, width - 3))
    assert not torch.allclose(crop, whole[..., -4:, -6:])  # the target's other tokens are not there
    one, other = list(ours._tables.values())
    split = len(other) - 9 * 2 * 3
    assert torch.equal(one[:split], other[:split])
    frame = one[split:].unflatten(0, (9, height, width))
    assert torch.equal(other[split:].unflatten(0, (9, 2, 3)), frame[:, -2:, -3:])


@torch.no_grad()
def test_positions_of_a_small_target(tiny_transformer: Tiny, inputs: Inputs) -> None:
    """Matched, a quarter-size target's tokens are where the long history's pooled ones are; whole and cropped ones never move."""
    _, ours = pair(tiny_transformer)
    _, t, text, history = inputs
    batch, side = len(text), 16  # latent rows and columns: 8 tokens, pooled by 4 to 2
    draw = rng.generator(0, "positions")
    frames, anchor = (rng.normal(draw, (batch, 16, count, side, side)) for count in (19, 1))
    history = History(frames, anchor, (19,) * batch, (True,) * batch)
    whole, small = (rng.normal(draw, (batch, 16, 9, size, size)) for size in (side, side // 4))
    own = [ours.velocity(part, t, text, history) for part in (whole, small)]
    ours.position("matched")
    matched = [ours.velocity(part, t, text, history) for part in (whole, small)]
    assert torch.equal(own[0], matched[0]) and not torch.allclose(own[1], matched[1])
    (table,) = [table for key, table in ours._tables.items() if key[1][-1] == (2, 2)]
    long, target = table[: 4 * 4].unflatten(0, (4, 4)), table[-9 * 4 :].unflatten(0, (9, 4))
    for half in (0, 12):  # cosines and sines; of the 12 channels of a head the first 4 turn with time
        torch.testing.assert_close(long[0, :, half + 4 : half + 12], target[0, :, half + 4 : half + 12])
    crop = whole[..., :4, :4]
    ours.velocity(crop, t, text, history, offset=(0, 0))
    assert [key[2] for key in ours._tables] == [None, None, (0, 0)]
    assert manifest.shape_of(ours)["positions"] == "matched" and "positions" not in manifest.shape_of(pair(tiny_transformer)[1])
    with pytest.raises(ValueError, match="own or matched"):
        ours.position("theirs")


@torch.no_grad()
def test_a_table_is_computed_once_a_shape(tiny_transformer: Tiny, inputs: Inputs) -> None:
    _, ours = pair(tiny_transformer)
    ours.velocity(*inputs)
    ours(**arguments(inputs))  # the pipeline's way to the same positions
    assert len(ours._tables) == 1
    (table,) = ours._tables.values()
    assert table.dtype == torch.float32 and "_tables" not in ours.state_dict()


@torch.no_grad()
@pytest.mark.parametrize("kernels", ["reference", "compile"])
def test_every_implementation_says_the_same(tiny_transformer: Tiny, inputs: Inputs, kernels: str) -> None:
    _, ours = pair(tiny_transformer)
    expected = ours.velocity(*inputs)
    ours.kernels = kernels
    torch.testing.assert_close(ours.velocity(*inputs), expected, rtol=1e-5, atol=1e-6)
