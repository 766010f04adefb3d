"""The wan codec: diffusers' VAE with its constants, each section alone, and clear words about a folder that is none."""

from __future__ import annotations

import inspect
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file

from helios_train import rng
from helios_train.errors import InputError
from helios_train.models.codecs import Codec, wan_codec

WEIGHTS = "diffusion_pytorch_model.safetensors"
MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508)
MEAN += (0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743)
STD += (3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)


@pytest.fixture(scope="module")
def codec(tiny_encoders: Path) -> Codec:
    return wan_codec(str(tiny_encoders))


def video(sections: int) -> torch.Tensor:
    return rng.normal(rng.generator(0, "wan test"), (sections, 3, 33, 16, 24)).clamp(-1, 1)


def test_the_constants_are_those_of_wan_2_1(codec: Codec) -> None:
    published = inspect.signature(AutoencoderKLWan.__init__).parameters
    for name, values, ours in (("latents_mean", MEAN, codec.latents_mean), ("latents_std", STD, codec.latents_std)):
        assert tuple(published[name].default) == values == tuple(ours)


def test_latents_are_diffusers_encode_of_the_same_windows(tiny_encoders: Path, codec: Codec) -> None:
    """Sampled from the posterior with one generator a section, normalised as the pipeline does it, window by window."""
    theirs = AutoencoderKLWan.from_pretrained(tiny_encoders, subfolder="vae", torch_dtype=torch.float32)
    mean, std = (torch.tensor(values).view(1, 16, 1, 1, 1) for values in (MEAN, STD))
    sections, draws = video(3), [rng.torch_generator(0, "posterior", 5, section) for section in range(3)]
    expected = []
    for section in range(3):
        posterior = theirs.encode(sections[section : section + 1]).latent_dist
        sample = posterior.sample(generator=rng.torch_generator(0, "posterior", 5, section))
        expected.append((sample - mean) * (1 / std))
    got = codec.encode(sections, draws)
    assert got.shape == (3, 16, 9, 2, 3) and got.dtype == torch.float32 and not got.requires_grad
    assert (got - torch.cat(expected)).abs().max() < 1e-5
    assert (got - codec.encode(sections)).abs().max() > 0.1  # the mode


def test_a_section_does_not_depend_on_its_batch(codec: Codec) -> None:
    def draw(section: int) -> torch.Generator:
        return rng.torch_generator(1, "posterior", 0, section)

    sections = video(3)
    together = codec.encode(sections, [draw(section) for section in range(3)])
    for section in range(3):
        alone = codec.encode(sections[section : section + 1], [draw(section)])
        assert (together[section] - alone[0]).abs().max() < 1e-5


def test_decode_is_the_vae_s(codec: Codec) -> None:
    latents = codec.encode(video(2))
    mean, std = (torch.tensor(values).view(1, 16, 1, 1, 1) for values in (MEAN, STD))
    expected = codec.vae.decode(latents * std + mean).sample
    assert torch.allclose(codec.decode(latents), expected, atol=1e-5) and expected.shape == (2, 3, 33, 16, 24)


def test_loaded_frozen_in_fp32_without_touching_the_global_generator(tiny_encoders: Path) -> None:
    before = torch.get_rng_state()
    codec = wan_codec(str(tiny_encoders / "vae"))
    assert torch.equal(before, torch.get_rng_state())
    assert codec.name == "wan" and codec.channels == 16 and not codec.vae.training
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in codec.vae.parameters())


def test_fingerprint_is_of_the_content_not_of_the_place(tiny_encoders: Path, tmp_path: Path, codec: Codec) -> None:
    shutil.copytree(tiny_encoders / "vae", tmp_path / "elsewhere")
    assert wan_codec(str(tmp_path / "elsewhere")).fingerprint() == codec.fingerprint()
    change_config(tmp_path / "elsewhere", latents_mean=[0.0] * 16)
    other_constants = wan_codec(str(tmp_path / "elsewhere"))
    assert other_constants.latents_mean == [0.0] * 16 and other_constants.fingerprint() != codec.fingerprint()
    shutil.copy(tiny_encoders / "vae" / "config.json", tmp_path / "elsewhere" / "config.json")
    change_weights(tmp_path / "elsewhere", lambda weights: weights["encoder.conv_in.weight"].view(-1)[:1].add_(1e-3))
    assert wan_codec(str(tmp_path / "elsewhere")).fingerprint() != codec.fingerprint()


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut short": (lambda at: os.truncate(at / WEIGHTS, (at / WEIGHTS).stat().st_size // 2), "cannot be loaded .*copy the folder"),
    "no weights": (lambda at: (at / WEIGHTS).unlink(), "cannot be loaded .*no file named"),
    "a weight missing": (
        lambda at: change_weights(at, lambda weights: weights.pop("quant_conv.weight")),
        "1 weights of AutoencoderKLWan are missing .* quant_conv.weight",
    ),
    "a weight misshapen": (
        lambda at: change_weights(at, lambda weights: weights.update({"quant_conv.bias": torch.zeros(3)})),
        "quant_conv.bias",
    ),
    "no config": (lambda at: (at / "config.json").unlink(), "config.json: cannot be read"),
    "half a config": (lambda at: (at / "config.json").write_text("{"), "config.json: cannot be read"),
    "a list": (lambda at: (at / "config.json").write_text("[1]"), "config.json: is no JSON object"),
    "not text": (lambda at: (at / "config.json").write_bytes(b"\xff\xfe\x00"), "config.json: cannot be read"),
    "another model": (
        lambda at: change_config(at, _class_name="AutoencoderKL"),
        "holds a AutoencoderKL; codec.weights names the",
    ),
    "no class": (lambda at: change_config(at, _class_name=...), "holds a None"),
    "Wan 2.2": (lambda at: change_config(at, z_dim=48, scale_factor_spatial=16), "48 channels .* take the VAE of Wan 2.1"),
    "no mean": (lambda at: change_config(at, latents_mean=...), "latents_mean is not a list of 16 numbers"),
    "15 deviations": (lambda at: change_config(at, latents_std=[1.0] * 15), "latents_std is not a list of 16 numbers"),
    "a deviation of 0": (lambda at: change_config(at, latents_std=[0.0] * 16), "latents_std is not a list of 16"),
    "a wrong type": (lambda at: change_config(at, base_dim="three"), "cannot be loaded"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_that_cannot_be_used(tiny_encoders: Path, tmp_path: Path, fault: str) -> None:
    folder = shutil.copytree(tiny_encoders / "vae", tmp_path / "model" / "vae")
    spoil, said = FAULTS[fault]
    spoil(folder)
    with pytest.raises(InputError, match=said) as caught:
        wan_codec(str(tmp_path / "model"))
    assert str(folder) in str(caught.value)


def test_nan_in_a_weight_reaches_the_latents_and_not_the_shards(tiny_encoders: Path, tmp_path: Path) -> None:
    """What cannot be seen in a file is seen in what it computes; the writer refuses such latents."""
    folder = shutil.copytree(tiny_encoders / "vae", tmp_path / "vae")
    change_weights(folder, lambda weights: weights["quant_conv.bias"].fill_(float("nan")))
    assert not wan_codec(str(folder)).encode(video(1)).isfinite().any()
