"""The transformer: diffusers' numbers, names and files, and a folder that does not fit is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import HeliosTransformer3DModel, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from helios_train import rng
from helios_train.errors import InputError
from helios_train.history import History
from helios_train.models.loading import WEIGHTS, load_transformer, random_transformer, read_shape
from helios_train.models.transformer import HeliosTransformer

Inputs = tuple[Tensor, Tensor, Tensor, History]
Tiny = Callable[..., HeliosTransformer3DModel]
SHAPE: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "text_dim": 32,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_dim": (4, 4, 4),
}


def diffusers_velocity(model: HeliosTransformer3DModel, x_t: Tensor, t: Tensor, text: Tensor, history: History) -> Tensor:
    """The network call of diffusers' HeliosPipeline: the anchor goes before the short history."""
    frames = torch.arange(29)[None].expand(len(x_t), -1)
    first, long, mid, short, target = frames.split([1, 16, 2, 1, 9], dim=1)
    return model(
        hidden_states=x_t,
        timestep=t,
        encoder_hidden_states=text,
        indices_hidden_states=target,
        indices_latents_history_short=torch.cat([first, short], dim=1),
        indices_latents_history_mid=mid,
        indices_latents_history_long=long,
        latents_history_short=torch.cat([history.anchor, history.frames[:, :, 18:]], dim=2),
        latents_history_mid=history.frames[:, :, 16:18],
        latents_history_long=history.frames[:, :, :16],
        return_dict=False,
    )[0]


@pytest.mark.parametrize("dropped", [False, True])
@torch.no_grad()
def test_velocity_is_diffusers(ours: HeliosTransformer, tiny_transformer: Tiny, inputs: Inputs, dropped: bool) -> None:
    x_t, t, text, history = inputs
    history = history.dropped() if dropped else history
    expected = diffusers_velocity(tiny_transformer(), x_t, t, text, history)
    velocity = ours.velocity(x_t, t, text, history)
    assert velocity.dtype == torch.float32 and velocity.shape == x_t.shape
    assert (velocity - expected).norm() <= 1e-5 * expected.norm()
    assert (
        ours.velocity(x_t, t, text, inputs[3].dropped()) - ours.velocity(x_t, t, text, inputs[3])
    ).norm() > 1e-3 * expected.norm()


@torch.no_grad()
def test_bf16_is_as_near_to_fp32_as_diffusers(tmp_path: Path, tiny_transformer: Tiny, inputs: Inputs) -> None:
    exact, x_t = tiny_transformer(), inputs[0]
    exact.save_pretrained(tmp_path)
    theirs = HeliosTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    velocity = load_transformer(tmp_path, torch.bfloat16).velocity(*inputs)
    expected = diffusers_velocity(exact, *inputs)
    low = History(inputs[3].frames.bfloat16(), inputs[3].anchor.bfloat16(), inputs[3].counts, inputs[3].anchored)
    rounded = diffusers_velocity(theirs, x_t.bfloat16(), inputs[1], inputs[2].bfloat16(), low).float()
    assert velocity.dtype == torch.float32
    assert (velocity - expected).norm() <= 1.1 * (rounded - expected).norm()


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("spare_last", [False, True])
def test_checkpointed_blocks_have_the_same_gradients(
    ours: HeliosTransformer, inputs: Inputs, spare_last: bool, samples: int
) -> None:
    """Several samples go one by one, and the last block is spared for one alone."""
    x_t, t, text, whole = (inputs[0][:samples], inputs[1][:samples], inputs[2][:samples], inputs[3])
    history = History(whole.frames[:samples], whole.anchor[:samples], whole.counts[:samples], whole.anchored[:samples])

    def gradients() -> dict[str, Tensor]:
        ours.zero_grad()
        ours.velocity(x_t, t, text, history).square().mean().backward()
        return {name: weight.grad.clone() for name, weight in ours.named_parameters() if weight.grad is not None}

    kept = gradients()
    calls = []
    ours.train()
    ours.checkpoint_blocks(lambda: calls.append(1) or torch.enable_grad, spare_last=spare_last)
    recomputed = gradients()
    assert len(calls) == (2 * 2 if samples == 2 else 2 - spare_last)
    assert kept.keys() == recomputed.keys() and len(kept) == len(dict(ours.named_parameters()))
    for name, gradient in kept.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-6, atol=1e-8, msg=name)


def test_names_are_diffusers(tiny_transformer: Tiny) -> None:
    shapes = [
        {name: value.shape for name, value in model.state_dict().items()}
        for model in (HeliosTransformer(**SHAPE), tiny_transformer())
    ]
    assert shapes[0] == shapes[1] and list(shapes[0]) == list(shapes[1])


@torch.no_grad()
def test_a_random_model() -> None:
    state = torch.random.get_rng_state()
    model, same, other = (random_transformer(SHAPE, torch.float32, seed) for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), state)
    weights, again = model.state_dict(), same.state_dict()
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert not torch.equal(model.blocks[0].attn1.to_q.weight, other.blocks[0].attn1.to_q.weight)
    assert not model.proj_out.weight.any() and not model.proj_out.bias.any()


@torch.no_grad()
def test_history_patches_start_as_the_targets() -> None:
    """A block that repeats one target patch in time, rows and columns gives the token of that patch."""
    model = random_transformer(SHAPE, torch.float32, 0)
    patch = rng.normal(rng.generator(0, "patch"), (1, 16, 1, 2, 2))
    token = model.patch_embedding(patch).flatten()
    for name, times in {"patch_short": 1, "patch_mid": 2, "patch_long": 4}.items():
        layer = getattr(model, name)
        assert layer.kernel_size == (times, 2 * times, 2 * times)
        torch.testing.assert_close(layer(patch.repeat(1, 1, times, times, times)).flatten(), token, rtol=1e-5, atol=1e-6)
    assert torch.equal(model.patch_short.weight, model.patch_embedding.weight)
    assert torch.equal(model.patch_mid.weight[:, :, 1, 2:, :2], model.patch_embedding.weight[:, :, 0] / 8)
    assert torch.equal(model.patch_long.weight[:, :, 3, 6:, 2:4], model.patch_embedding.weight[:, :, 0] / 64)


def same_weights(model: HeliosTransformer, expected: dict[str, Tensor]) -> None:
    weights = model.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("shard", ["1GB", "100KB"])
@torch.no_grad()
def test_a_diffusers_folder_loads(tmp_path: Path, tiny_transformer: Tiny, inputs: Inputs, shard: str) -> None:
    plain = tiny_transformer(rope_theta=77.0)
    plain.save_pretrained(tmp_path / "transformer", max_shard_size=shard)
    assert (len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1) == (shard == "100KB")
    for folder in (tmp_path, tmp_path / "transformer"):
        model = load_transformer(folder, torch.float32)
        same_weights(model, plain.state_dict())
        torch.testing.assert_close(model.velocity(*inputs), diffusers_velocity(plain, *inputs), rtol=1e-5, atol=1e-6)


def saved(folder: Path, model: Any, change: Callable[[dict[str, Tensor]], Any] = lambda weights: None, **config: Any) -> Path:
    """The folder of a model, its weights and config changed after saving."""
    model.save_pretrained(folder)
    file, settings = folder / f"{WEIGHTS}.safetensors", folder / "config.json"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})
    settings.write_text(json.dumps(json.loads(settings.read_text()) | config))
    return folder


def test_an_older_name_is_understood(tmp_path: Path, tiny_transformer: Tiny) -> None:
    def rename(weights: dict[str, Tensor]) -> None:
        weights["scale_shift_table"] = weights.pop("norm_out.scale_shift_table")

    plain = tiny_transformer()
    same_weights(load_transformer(saved(tmp_path, plain, rename), torch.float32), plain.state_dict())


def wan(**changes: Any) -> WanTransformer3DModel:
    shape = {"num_attention_heads": 2, "attention_head_dim": 16, "text_dim": 32, "freq_dim": 32, "ffn_dim": 32, "num_layers": 2}
    with rng.forked(0, "wan"):
        return WanTransformer3DModel(**(shape | changes))


@torch.no_grad()
def test_a_wan_folder_is_a_start(tmp_path: Path, inputs: Inputs) -> None:
    """Its weights keep their meaning: without history, ours computes what Wan computes at the same frame indices."""
    plain = wan()
    plain.save_pretrained(tmp_path)
    model = load_transformer(tmp_path, torch.float32)
    weights = model.state_dict()
    for name, value in plain.state_dict().items():
        assert torch.equal(weights.pop("norm_out.scale_shift_table" if name == "scale_shift_table" else name), value), name
    assert {name.split(".")[0] for name in weights} == {"patch_short", "patch_mid", "patch_long"}
    assert torch.equal(model.patch_long.weight[:, :, :1, :2, :2], model.patch_embedding.weight / 64)
    x_t, t, text, _ = inputs
    expected = plain(x_t, t, text, return_dict=False)[0]
    alone = model(x_t, t, text, indices_hidden_states=torch.arange(9).expand(2, -1), return_dict=False)[0]
    torch.testing.assert_close(alone, expected, rtol=1e-4, atol=1e-5)


def test_the_wan_split_of_the_head_is_wans(tmp_path: Path) -> None:
    for width in (16, 128):
        model = wan(attention_head_dim=width, num_layers=1)
        (tmp_path / "config.json").write_text(json.dumps({"_class_name": "WanTransformer3DModel", **model.config}, default=list))
        assert read_shape(tmp_path)["rope_dim"] == [model.rope.t_dim, model.rope.h_dim, model.rope.w_dim]


@pytest.mark.parametrize("changes", [{"image_dim": 8}, {"in_channels": 36}])
def test_an_image_to_video_wan_is_refused(tmp_path: Path, changes: dict[str, int]) -> None:
    wan(**changes).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="image-to-video"):
        load_transformer(tmp_path, torch.float32)


def test_a_model_without_history_patches_gets_them(tmp_path: Path, tiny_transformer: Tiny) -> None:
    tiny_transformer(has_multi_term_memory_patch=False).save_pretrained(tmp_path)
    model = load_transformer(tmp_path, torch.float32)
    assert torch.equal(model.patch_short.weight, model.patch_embedding.weight)
    assert model.config.has_multi_term_memory_patch


def drop(*names: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda weights: [weights.pop(name) for name in names] and None


FAULTS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "missing": (drop("blocks.1.ffn.net.2.bias"), "missing blocks.1.ffn.net.2.bias"),
    "extra": (lambda weights: weights.update(stray=torch.zeros(1)), "unexpected stray"),
    "misshapen": (lambda weights: weights.update({"proj_out.bias": torch.zeros(3)}), r"proj_out.bias is \(3,\), not \(64,\)"),
    "one patch gone": (drop("patch_mid.weight", "patch_mid.bias"), "missing patch_mid.bias, patch_mid.weight"),
    "half a patch gone": (drop("patch_long.bias"), "missing patch_long.bias"),
    "half of every patch gone": (drop("patch_short.bias", "patch_mid.bias", "patch_long.bias"), "missing patch_long.bias"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_key_is_refused_by_name(tmp_path: Path, tiny_transformer: Tiny, fault: str) -> None:
    change, said = FAULTS[fault]
    saved(tmp_path, tiny_transformer(), change)
    with pytest.raises(InputError, match=said) as caught:
        load_transformer(tmp_path, torch.float32)
    assert str(tmp_path) in str(caught.value)


def test_other_folders_are_refused(tmp_path: Path, tiny_transformer: Tiny) -> None:
    folder = saved(tmp_path / "other", tiny_transformer(), _class_name="UNet2DModel")
    with pytest.raises(InputError, match="holds a UNet2DModel"):
        load_transformer(folder, torch.float32)
    with pytest.raises(InputError, match="config.json: cannot be read"):
        load_transformer(tmp_path / "none", torch.float32)
    folder = saved(tmp_path / "cut", tiny_transformer())
    file = folder / f"{WEIGHTS}.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match="the weights cannot be read"):
        load_transformer(folder, torch.float32)
    file.unlink()
    with pytest.raises(InputError, match="the weights cannot be read"):
        load_transformer(folder, torch.float32)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[]", "config.json: is no JSON object"),
        (b'"text"', "config.json: is no JSON object"),
        (b"{", "config.json: cannot be read"),
        (b"\xff\xfe", "config.json: cannot be read"),
        (b"{}", "config.json: holds a None"),
        (b'{"_class_name": "HeliosTransformer3DModel", "num_layers": "two"}', "config.json: makes no model"),
        (b'{"_class_name": "HeliosTransformer3DModel", "num_attention_heads": -2}', "config.json: makes no model"),
        (b'{"_class_name": "HeliosTransformer3DModel", "patch_size": 2}', "config.json: makes no model"),
        (b'{"_class_name": "WanTransformer3DModel"}', "attention_head_dim is None, no whole number"),
        (b'{"_class_name": "WanTransformer3DModel", "attention_head_dim": "x"}', "attention_head_dim is x, no whole number"),
    ],
)
def test_a_damaged_config(tmp_path: Path, tiny_transformer: Tiny, content: bytes, said: str) -> None:
    folder = saved(tmp_path, tiny_transformer())
    (folder / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=said) as caught:
        load_transformer(tmp_path, torch.float32)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("keep", [0, 7, 500, -1])
def test_weights_cut_short(tmp_path: Path, tiny_transformer: Tiny, keep: int) -> None:
    file = saved(tmp_path, tiny_transformer()) / f"{WEIGHTS}.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(InputError, match="the weights cannot be read .*copy or export the folder again"):
        load_transformer(tmp_path, torch.float32)


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": 1}', '{"weight_map": {"a": "none.safetensors"}}'])
def test_a_damaged_index(tmp_path: Path, tiny_transformer: Tiny, index: str) -> None:
    (saved(tmp_path, tiny_transformer()) / f"{WEIGHTS}.safetensors.index.json").write_text(index)
    with pytest.raises(InputError, match="the weights cannot be read"):
        load_transformer(tmp_path, torch.float32)


def test_bf16_keeps_what_diffusers_keeps(tmp_path: Path, tiny_transformer: Tiny) -> None:
    tiny_transformer().save_pretrained(tmp_path)
    theirs = HeliosTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16).state_dict()
    for model in (load_transformer(tmp_path, torch.bfloat16), random_transformer(SHAPE, torch.bfloat16, 0)):
        assert {name: value.dtype for name, value in model.state_dict().items()} == {
            name: value.dtype for name, value in theirs.items()
        }
        assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}
    assert {value.dtype for value in theirs.values()} == {torch.float32, torch.bfloat16}
    same_weights(load_transformer(tmp_path, torch.bfloat16), theirs)
