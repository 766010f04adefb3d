"""The dct codec: orthonormal, exact where a section can be, and a `vae` for diffusers' pipeline."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, HeliosPipeline, HeliosScheduler, HeliosTransformer3DModel
from scipy.fft import dctn

from helios_train import rng
from helios_train.data.toy import ToySpec, render
from helios_train.data.video import centre_crop_resize
from helios_train.errors import InputError
from helios_train.models.codecs import CHANNELS, OPPONENT, TEMPORAL, Codec, DctVae, dct_codec


def noise(*shape: int) -> torch.Tensor:
    return rng.normal(rng.generator(0, "codec test"), shape)


def toy(index: int, size: tuple[int, int] = (64, 128)) -> torch.Tensor:
    """The sections [S, 3, 33, H, W] of a toy clip."""
    frames, _ = render(0, index, ToySpec(size=size, sections=2))
    return centre_crop_resize(torch.from_numpy(frames), size).unflatten(1, (2, 33)).transpose(0, 1)


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return 10 * math.log10(4 / float((a - b).square().mean()))


def test_kept_coefficients_are_scipys() -> None:
    video = noise(1, 3, 33, 16, 24)
    latents = DctVae().encode(video).latent_dist.mode()[0]
    assert latents.shape == (16, 9, 2, 3)
    colours = torch.einsum("kc,cfhw->kfhw", torch.tensor(OPPONENT), video[0])
    block = dctn(colours[:, 13:17, 8:, 16:].numpy(), axes=(1, 2, 3), norm="ortho")  # latent frame 4, row 1, column 2
    assert torch.allclose(latents[:, 4, 1, 2], torch.tensor([block[c, t, y, x] for c, (t, y, x) in CHANNELS]), atol=1e-4)
    first = dctn(colours[:, :1, :8, :8].repeat(1, 4, 1, 1).numpy(), axes=(1, 2, 3), norm="ortho")
    assert torch.allclose(latents[:, 0, 0, 0], torch.tensor([first[c, t, y, x] for c, (t, y, x) in CHANNELS]), atol=1e-4)


def test_the_kept_channels() -> None:
    basis = DctVae().basis.double()
    assert torch.allclose(basis @ basis.T, torch.eye(16, dtype=torch.float64), atol=1e-6)
    assert len(set(CHANNELS)) == 16 and [CHANNELS[i] for i in TEMPORAL] == [
        (0, (1, 0, 0)),
        (0, (1, 0, 1)),
        (0, (1, 1, 0)),
        (1, (1, 0, 0)),
    ]


@pytest.mark.parametrize("size", [(8, 8), (16, 24)])
def test_encode_undoes_decode(size: tuple[int, int]) -> None:
    codec, latents = dct_codec(), noise(2, 16, 9, *size)
    latents[:, list(TEMPORAL), 0] = 0
    video = codec.decode(latents)
    assert video.shape == (2, 3, 33, 8 * size[0], 8 * size[1]) and video.dtype == torch.float32
    assert (codec.encode(video) - latents).abs().max() < 1e-5


def test_a_first_frame_cannot_carry_change_in_time() -> None:
    codec, latents = dct_codec(), noise(1, 16, 9, 2, 2)
    back = codec.encode(codec.decode(latents))
    assert (back[:, list(TEMPORAL), 0] == 0).all()
    still = [channel for channel in range(16) if channel not in TEMPORAL]
    assert torch.allclose(back[:, still], latents[:, still], atol=1e-5) and torch.allclose(
        back[:, :, 1:], latents[:, :, 1:], atol=1e-5
    )


def test_sections_and_single_frames_are_encoded_alone() -> None:
    codec, video = dct_codec(), toy(0)
    both = codec.encode(video)
    assert all(torch.allclose(codec.encode(part[None])[0], latents, atol=1e-5) for part, latents in zip(video, both, strict=True))
    frame = codec.vae.encode(video[:1, :, :1]).latent_dist.sample()
    assert frame.shape == (1, 16, 1, 8, 16)
    assert torch.allclose(frame, codec.vae.encode(video[:1]).latent_dist.sample()[:, :, :1], atol=1e-5)
    assert codec.vae.decode(frame).sample.shape == (1, 3, 1, 64, 128)


def test_toy_latents_have_the_promised_scale_and_quality() -> None:
    codec = dct_codec()
    videos = [toy(index) for index in range(24)]
    latents = torch.cat([codec.encode(video) for video in videos]).transpose(0, 1).flatten(1)
    flat, edges = latents[:3], latents[3:]
    assert flat.mean(1).abs().max() < 0.35 and ((flat.std(1) > 0.7) & (flat.std(1) < 1.3)).all()
    assert ((edges.std(1) > 0.28) & (edges.std(1) < 0.52)).all() and edges.mean(1).abs().max() < 0.1
    quality = [psnr(codec.decode(codec.encode(video)).clamp(-1, 1), video) for video in videos]
    assert min(quality) > 25 and sum(quality) / len(quality) > 29


@pytest.mark.parametrize("shape", [(1, 3, 32, 16, 16), (1, 3, 33, 12, 16), (3, 33, 16, 16), (1, 1, 33, 16, 16)])
def test_wrong_videos_are_refused(shape: tuple[int, ...]) -> None:
    for encode in (DctVae().encode, dct_codec().encode):
        with pytest.raises(InputError, match="video"):
            encode(torch.zeros(shape))


def test_a_codec_takes_sections_only() -> None:
    with pytest.raises(InputError, match="33"):
        dct_codec().encode(torch.zeros(1, 3, 37, 16, 16))
    with pytest.raises(InputError, match="latents"):
        DctVae().decode(torch.zeros(1, 8, 9, 2, 2))


def test_saved_and_loaded_as_diffusers_does(tmp_path: Path) -> None:
    codec = dct_codec()
    codec.vae.save_pretrained(tmp_path)
    loaded = Codec("dct", DctVae.from_pretrained(tmp_path))
    assert loaded.fingerprint() == codec.fingerprint() and len(codec.fingerprint()) == 64
    video = toy(1)
    assert torch.equal(loaded.encode(video), codec.encode(video))


def test_fingerprint_follows_constants_weights_and_name() -> None:
    vae = DctVae()
    prints = {
        Codec("dct", vae).fingerprint(),
        Codec("other", vae).fingerprint(),
        Codec("dct", DctVae(latents_std=[1.0] * 16)).fingerprint(),
    }
    vae.basis[0, 0] += 1e-3
    assert len(prints | {Codec("dct", vae).fingerprint()}) == 4


def test_interface_and_config_are_those_of_the_wan_vae() -> None:
    with rng.forked(0, "wan"):
        wan = AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    vae = DctVae()
    for key in ("z_dim", "latents_mean", "latents_std", "scale_factor_temporal", "scale_factor_spatial"):
        ours, theirs = vae.config[key], wan.config[key]
        assert len(ours) == len(theirs) == 16 if "latents" in key else ours == theirs
    assert vae.dtype == torch.float32
    video = noise(1, 3, 5, 16, 16)
    assert vae.encode(video).latent_dist.mode().shape == wan.encode(video).latent_dist.mode().shape
    assert (
        vae.decode(noise(1, 16, 2, 2, 2), return_dict=False)[0].shape
        == wan.decode(noise(1, 16, 2, 2, 2), return_dict=False)[0].shape
    )


def test_a_posterior_is_sampled_by_the_given_generators() -> None:
    """The same class around a VAE that samples: normalised with its constants, one generator a section."""
    with rng.forked(0, "wan"):
        codec = Codec("wan", AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1))
    video = noise(2, 3, 33, 16, 16).clamp(-1, 1)
    draws = [[rng.torch_generator(0, "posterior", 0, section) for section in (0, 1)] for _ in range(2)]
    once, again, mode = codec.encode(video, draws[0]), codec.encode(video, draws[1]), codec.encode(video)
    assert once.shape == (2, 16, 9, 2, 2) and torch.equal(once, again) and not torch.allclose(once, mode)
    raw = codec.vae.encode(video).latent_dist.mode()
    mean, std = (torch.tensor(values).view(1, 16, 1, 1, 1) for values in (codec.latents_mean, codec.latents_std))
    assert torch.allclose(mode, (raw - mean) / std, atol=1e-5) and codec.decode(mode).shape == video.shape


def test_diffusers_pipeline_takes_it(tiny_transformer: Callable[..., HeliosTransformer3DModel]) -> None:
    """One section generated, decoded by this codec exactly; a video given as history goes through its encoder."""
    codec = dct_codec()
    pipe = HeliosPipeline(None, None, codec.vae, HeliosScheduler(stages=1, stage_range=[0, 1]), tiny_transformer())
    pipe.set_progress_bar_config(disable=True)
    text, given = noise(1, 4, 32), (toy(0)[:1].transpose(1, 2)[0] + 1) / 2
    seen: list[torch.Tensor] = []

    def run(kind: str, **more: object) -> torch.Tensor:
        draw = torch.Generator().manual_seed(0)
        common = {"height": 64, "width": 128, "num_frames": 33, "num_inference_steps": 2, "guidance_scale": 1.0}
        return pipe(prompt_embeds=text, generator=draw, output_type=kind, **common, **more).frames

    latents, frames = run("latent"), run("pt")
    assert latents.shape == (1, 16, 9, 8, 16) and frames.shape == (1, 33, 3, 64, 128)
    expected = (codec.decode(latents).clamp(-1, 1).transpose(1, 2) + 1) / 2
    assert torch.allclose(frames, expected, atol=1e-5)
    encode = codec.vae.encode
    codec.vae.encode = lambda x: seen.append(x) or encode(x)  # type: ignore[method-assign]
    run("latent", video=given)
    assert [tuple(x.shape) for x in seen] == [(1, 3, 1, 64, 128), (1, 3, 33, 64, 128)]
    assert torch.allclose(seen[1], toy(0)[:1], atol=1e-5)
