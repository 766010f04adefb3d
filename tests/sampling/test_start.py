"""Image to video and video to video against diffusers' HeliosPipeline, called with image= or video= and the same generator."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from diffusers import AutoencoderKLWan, HeliosPipeline
from torch import Tensor

from helios_train import rng
from helios_train.errors import InputError
from helios_train.history import FRAMES, History
from helios_train.models.codecs import Codec, dct_codec
from helios_train.sampling.pipeline import SamplerSettings, Sections, build_pipeline, grown
from helios_train.sampling.start import SIGMA, WINDOWS, from_image, from_nothing, from_video

SIZE = (32, 48)
SECTIONS, STEPS = 2, 2


def drawn(*shape: int) -> Tensor:
    """Pixels in [-1, 1]."""
    return torch.rand(shape, generator=rng.torch_generator(0, "pixels", *shape)) * 2 - 1


def generator() -> torch.Generator:
    return rng.torch_generator(5, "sample")


@pytest.fixture(scope="module")
def wan() -> Codec:
    """A Wan VAE in miniature, whose posterior has a spread, with constants that are not 0 and 1."""
    with rng.forked(0, "tiny wan"):
        vae = AutoencoderKLWan(
            base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        )
    return Codec("wan", vae.eval())


@pytest.fixture(params=["dct", "wan"])
def codec(request: pytest.FixtureRequest, wan: Codec) -> Codec:
    return wan if request.param == "wan" else dct_codec()


class Seen(NamedTuple):
    latents: Tensor  # [1, 16, 9 * SECTIONS, h, w]
    history: list[Tensor]  # of each call of the transformer, [1, 16, 20, h, w], the anchor at place 18


@pytest.fixture
def pipeline(tiny_transformer, codec: Codec) -> HeliosPipeline:
    return build_pipeline(tiny_transformer(), codec, SamplerSettings())


def watched(pipeline: HeliosPipeline, sample: Any) -> Seen:
    """What `sample()` gives and the transformer is shown."""
    history: list[Tensor] = []
    names = ("latents_history_long", "latents_history_mid", "latents_history_short")
    hook = pipeline.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: history.append(torch.cat([kwargs[name] for name in names], dim=2)), with_kwargs=True
    )
    latents = sample()
    hook.remove()
    return Seen(latents, history)


def own_run(pipeline: HeliosPipeline, **given: Tensor) -> Seen:
    """diffusers' run; the latents it returns begin with what was encoded."""

    def run() -> Tensor:
        return pipeline(
            prompt_embeds=torch.ones(1, 16, 32),
            negative_prompt_embeds=torch.zeros(1, 16, 32),
            height=SIZE[0],
            width=SIZE[1],
            num_frames=33 * SECTIONS,
            num_inference_steps=STEPS,
            guidance_scale=3.0,
            generator=generator(),
            output_type="latent",
            **given,
        ).frames[:, :, -9 * SECTIONS :]

    return watched(pipeline, run)


def our_run(pipeline: HeliosPipeline, history: History, noise: torch.Generator) -> Seen:
    denoise = Sections(pipeline, (STEPS,), 3.0, noise)
    return watched(pipeline, lambda: torch.cat([*grown(denoise, [torch.ones(1, 16, 32)] * SECTIONS, history)], dim=2))


def assert_same(ours: Seen, own: Seen) -> None:
    assert len(ours.history) == len(own.history) == SECTIONS * STEPS * 2
    for a, b in zip(ours.history, own.history, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
    torch.testing.assert_close(ours.latents, own.latents, atol=1e-4, rtol=0)


def test_image_to_video(pipeline: HeliosPipeline, codec: Codec) -> None:
    image, noise = drawn(1, 3, *SIZE), generator()
    ours = our_run(pipeline, from_image(codec, image, noise), noise)
    assert_same(ours, own_run(pipeline, image=(image + 1) / 2))
    assert ours.latents.shape[2] == 9 * SECTIONS  # the image is no frame of the video
    first, last = ours.history[0], ours.history[-1]
    assert not first[:, :, :18].any() and first[:, :, 18:].abs().amin() > 0
    assert torch.equal(first[:, :, 18], last[:, :, 18])  # the anchor stays


@pytest.mark.parametrize("frames", [33, 98, 170])
def test_video_to_video(pipeline: HeliosPipeline, codec: Codec, frames: int) -> None:
    """Frames before the trailing whole windows are left out, the first excepted; windows out of reach only draw their noise."""
    video, noise = drawn(1, 3, frames, *SIZE), generator()
    windows = frames // 33
    kept = min(windows, WINDOWS)
    history = from_video(codec, video[:, :, :1], video[:, :, -33 * kept :], windows - kept, noise)
    assert history.counts == (min(FRAMES, 9 * windows),) and history.anchored == (True,)
    ours = our_run(pipeline, history, noise)
    assert_same(ours, own_run(pipeline, video=(video.transpose(1, 2) + 1) / 2))
    assert not history.frames[:, :, : max(0, 19 - 9 * windows)].any()


def test_without_a_start_history_is_empty() -> None:
    history = from_nothing(2, 16, SIZE)
    assert history.empty == (True, True) and not history.frames.any() and not history.anchor.any()
    assert history.frames.shape == (2, 16, 19, 4, 6)


def sigma_of(noised: Tensor, clean: Tensor, noise: Tensor) -> Tensor:
    """The level of z = sigma * noise + (1 - sigma) * clean, a value each element."""
    return (noised - clean) / (noise - clean)


def test_levels_and_order_of_the_numbers() -> None:
    """By hand, with a codec that draws nothing: level and noise of the anchor, then of the history, a level a frame for a
    video; each level in its range."""
    codec, video = dct_codec(), drawn(1, 3, 66, *SIZE)
    clean = [codec.encode(video[:, :, at : at + 33]) for at in (0, 33)]
    history = from_video(codec, video[:, :, :1], video, 0, generator())
    numbers = generator()
    draw = [(torch.rand(count, generator=numbers), torch.randn(1, 16, count, 4, 6, generator=numbers)) for count in (1, 9, 9)]
    levels = [uniform * (SIGMA[1] - SIGMA[0]) + SIGMA[0] for uniform, _ in draw]
    found = sigma_of(history.frames[:, :, 1:], torch.cat(clean, 2), torch.cat([noise for _, noise in draw[1:]], 2))
    torch.testing.assert_close(found.median(0)[0].median(0)[0].flatten(1).median(1)[0], torch.cat(levels[1:]), atol=1e-4, rtol=0)
    anchor = sigma_of(history.anchor, clean[0][:, :, :1], draw[0][1])
    torch.testing.assert_close(anchor.median(), levels[0][0], atol=1e-4, rtol=0)
    assert len(torch.cat(levels).unique()) == 19 and all(0.111 <= float(level) <= 0.135 for level in torch.cat(levels))


@pytest.mark.parametrize("frames", [0, 32, 34])
def test_only_whole_windows(frames: int) -> None:
    with pytest.raises(InputError, match="33 frames"):
        from_video(dct_codec(), drawn(1, 3, 1, *SIZE), drawn(1, 3, frames, *SIZE), 0, generator())
