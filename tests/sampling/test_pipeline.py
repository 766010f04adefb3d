"""Sampling through diffusers' HeliosPipeline with a tiny random transformer and the dct codec."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import HeliosPipeline, HeliosTransformer3DModel
from torch import Tensor

from helios_train.errors import InputError
from helios_train.models.codecs import dct_codec
from helios_train.rng import torch_generator
from helios_train.sampling.pipeline import SampledVideo, SamplerSettings, build_pipeline, sample_t2v

SIZE = (64, 96)


@pytest.fixture
def text() -> Tensor:
    prompts = torch.randn(2, 16, 32, generator=torch_generator(0, "text"))
    prompts[:, 5:] = 0
    return prompts


@pytest.fixture
def pipeline(tiny_transformer) -> HeliosPipeline:
    return build_pipeline(tiny_transformer(), dct_codec(), SamplerSettings())


def sample(pipeline: HeliosPipeline, text: Tensor, sections: int = 2, guidance: float = 3.0, seed: int = 0) -> SampledVideo:
    generators = [torch_generator(seed, "sample", row) for row in range(len(text))]
    return sample_t2v(pipeline, text, SIZE, sections, 3, guidance, generators)


@pytest.mark.parametrize("solver", ["unipc", "euler"])
@pytest.mark.parametrize("shift", ["none", "exponential", "linear"])
def test_shapes_and_settings(tiny_transformer, text: Tensor, solver: str, shift: str) -> None:
    pipeline = build_pipeline(tiny_transformer(), dct_codec(), SamplerSettings(shift, solver))
    config = pipeline.scheduler.config
    assert (config.scheduler_type, config.use_dynamic_shifting) == (solver, shift != "none")
    if shift != "none":
        assert config.time_shift_type == shift
    video = sample(pipeline, text)
    assert video.frames.shape == (2, 66, *SIZE, 3) and video.frames.dtype == torch.uint8
    assert video.latents.shape == (2, 16, 18, 8, 12) and video.latents.dtype == torch.float32
    assert video.latents.isfinite().all() and video.latents[:, :, 9:].std() > 0.5


def test_the_same_seed_gives_the_same_bits_and_touches_no_global_state(pipeline: HeliosPipeline, text: Tensor) -> None:
    before = torch.get_rng_state()
    first, again, other = sample(pipeline, text), sample(pipeline, text), sample(pipeline, text, seed=1)
    assert torch.equal(first.latents, again.latents) and torch.equal(first.frames, again.frames)
    assert not torch.equal(first.latents, other.latents)
    assert torch.equal(before, torch.get_rng_state())


def test_modes_and_vae_come_back(pipeline: HeliosPipeline, text: Tensor) -> None:
    vae, modes = pipeline.vae, []
    pipeline.transformer.train()
    pipeline.transformer.blocks[0].eval()
    pipeline.transformer.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    video = sample(pipeline, text)
    assert modes and not any(modes)
    blocks = pipeline.transformer.blocks
    assert pipeline.transformer.training and not blocks[0].training and blocks[1].training
    assert pipeline.vae is vae and not video.latents.requires_grad
    assert all(weight.grad is None and weight.requires_grad for weight in pipeline.transformer.parameters())


def test_frames_are_the_pipeline_s_own(pipeline: HeliosPipeline, text: Tensor) -> None:
    """Up to where diffusers cuts: 66 frames to 65."""
    own = pipeline(
        prompt_embeds=text,
        negative_prompt_embeds=torch.zeros_like(text),
        height=SIZE[0],
        width=SIZE[1],
        num_frames=66,
        num_inference_steps=3,
        guidance_scale=3.0,
        generator=[torch_generator(0, "sample", row) for row in range(2)],
    ).frames
    assert own.shape == (2, 65, *SIZE, 3)
    ours = sample(pipeline, text).frames[:, :65]
    assert (torch.from_numpy(own * 255).round().int() - ours.int()).abs().max() <= 1


def test_guidance(pipeline: HeliosPipeline, text: Tensor) -> None:
    calls: list[Tensor] = []
    pipeline.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(kwargs["encoder_hidden_states"]), with_kwargs=True
    )
    unguided = sample(pipeline, text, sections=1, guidance=1.0)
    assert len(calls) == 3 and all(torch.equal(call, text) for call in calls)
    calls.clear()
    guided = sample(pipeline, text, sections=1, guidance=3.0)
    assert len(calls) == 6 and not any(call.any() for call in calls[1::2])  # null text is zeros
    assert not torch.equal(guided.latents, unguided.latents)


def test_sections_follow_their_history(tiny_transformer, text: Tensor) -> None:
    """Section 0 sees zeros; section 1 sees section 0's nine frames at the end of the 19, and its first frame as anchor."""
    transformer: HeliosTransformer3DModel = tiny_transformer()
    seen: list[dict[str, Tensor]] = []
    transformer.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    latents = sample(build_pipeline(transformer, dct_codec(), SamplerSettings()), text, guidance=1.0).latents
    names = ("latents_history_long", "latents_history_mid", "latents_history_short")
    assert not any(seen[0][name].any() for name in names)
    long, mid, short = (seen[3][name] for name in names)
    assert torch.equal(short[:, :, :1], latents[:, :, :1])
    assert torch.equal(torch.cat([long, mid, short[:, :, 1:]], dim=2)[:, :, -9:], latents[:, :, :9])
    assert not long[:, :, :10].any()


def test_levels_are_shifted_floats(pipeline: HeliosPipeline, text: Tensor) -> None:
    """t = 1000 f / (f + 1/s - 1), f = e^mu, s = linspace(.999, 0) without its end; mu by tokens, as diffusers' line has it."""
    times: list[Tensor] = []
    pipeline.transformer.register_forward_pre_hook(lambda _, args, kwargs: times.append(kwargs["timestep"]), with_kwargs=True)
    sample(pipeline, text, sections=1, guidance=1.0)
    factor = math.exp(0.5 + (9 * 8 * 12 // 4 - 256) * 0.65 / 3840)
    expected = [1000 * factor / (factor + 1 / level - 1) for level in (0.999, 0.666, 0.333)]
    assert [float(time[0]) for time in times] == pytest.approx(expected, rel=1e-5)
    assert times[0].is_floating_point()


def test_a_bf16_transformer_and_one_step(tiny_transformer, text: Tensor) -> None:
    pipeline = build_pipeline(tiny_transformer().to(torch.bfloat16), dct_codec(), SamplerSettings())
    video = sample_t2v(pipeline, text[:1], SIZE, 1, 1, 1.0, torch_generator(0, "sample"))
    assert video.latents.dtype == torch.float32 and video.frames.shape == (1, 33, *SIZE, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": (64, 72)}, "multiples of 16"),
        ({"sections": 0}, "at least 1"),
        ({"steps": 0}, "at least 1"),
        ({"text": torch.zeros(1, 16, 31)}, "32"),
        ({"text": torch.zeros(16, 32)}, "32"),
    ],
)
def test_refusals(pipeline: HeliosPipeline, changes: dict[str, object], message: str) -> None:
    given = {"text": torch.zeros(1, 16, 32), "size": SIZE, "sections": 1, "steps": 1} | changes
    with pytest.raises(InputError, match=message):
        sample_t2v(pipeline, guidance=1.0, generator=torch_generator(0, "sample"), **given)
