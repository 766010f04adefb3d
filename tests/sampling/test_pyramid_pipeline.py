"""Coarse to fine through diffusers' pipeline, section by section: its own run, at every size and from every start."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import HeliosPyramidPipeline, HeliosTransformer3DModel
from torch import Tensor

from helios_train import rng
from helios_train.diffusion.pyramid import Pyramid, block_noise
from helios_train.errors import InputError
from helios_train.history import FRAMES, History
from helios_train.models.codecs import dct_codec
from helios_train.models.transformer import HeliosTransformer
from helios_train.rng import torch_generator
from helios_train.sampling.pipeline import PyramidPipeline, SamplerSettings, Sections, build_pipeline, grown
from helios_train.sampling.start import from_nothing

SIZE = (64, 128)
STEPS = (3, 2, 2)
SETTINGS = SamplerSettings("linear", levels=3)
Tiny = Callable[..., HeliosTransformer3DModel]


def ours(tiny_transformer: Tiny) -> HeliosTransformer:
    """With random numbers where a new model has zeros, so that every part of its input matters."""
    plain = tiny_transformer()
    with torch.no_grad():
        for number, parameter in enumerate(plain.parameters()):
            parameter.add_(0.1 * rng.normal(rng.generator(0, "parameter", number), parameter.shape))
    model = HeliosTransformer(**{name: value for name, value in plain.config.items() if not name.startswith("_")})
    model.load_state_dict(plain.state_dict())
    return model


def sections(pipeline: PyramidPipeline, text: Tensor, guidance: float, history: History | None = None) -> list[Tensor]:
    denoise = Sections(pipeline, STEPS, guidance, torch_generator(0, "sample"))
    return list(grown(denoise, [text] * 2, history or from_nothing(1, 16, SIZE)))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("start", ["nothing", "image"])
def test_sections_are_those_of_its_own_run(
    tiny_transformer: Tiny, monkeypatch: pytest.MonkeyPatch, start: str, guidance: float
) -> None:
    """diffusers' class, all sections in one call, with our block noise in place of what fails."""
    transformer = ours(tiny_transformer)
    text = rng.normal(rng.generator(0, "text"), (1, 16, 32))
    pipeline = build_pipeline(transformer, dct_codec(), SETTINGS)
    anchor, frame = (rng.normal(rng.generator(0, name), (1, 16, 1, 8, 16)) for name in ("anchor", "frame"))
    nothing = from_nothing(1, 16, SIZE)
    image = History(torch.cat([nothing.frames[:, :, 1:], frame], dim=2), anchor, (1,), (True,))
    found = sections(pipeline, text, guidance, image if start == "image" else None)
    theirs = HeliosPyramidPipeline(**pipeline.components, is_cfg_zero_star=True)
    theirs.set_progress_bar_config(disable=True)
    monkeypatch.setattr(HeliosPyramidPipeline, "sample_block_noise", PyramidPipeline.sample_block_noise)
    given = {"image_latents": anchor, "fake_image_latents": frame, "add_noise_to_image_latents": False}
    with torch.no_grad():
        expected = theirs(
            prompt_embeds=text,
            negative_prompt_embeds=torch.zeros_like(text),
            height=SIZE[0],
            width=SIZE[1],
            num_frames=66,
            guidance_scale=guidance,
            pyramid_num_inference_steps_list=list(STEPS),
            generator=torch_generator(0, "sample"),
            output_type="latent",
            **(given if start == "image" else {}),
        ).frames[:, :, -18:]
    assert expected.std() > 0.1
    torch.testing.assert_close(torch.cat(found, dim=2), expected, rtol=0, atol=1e-4)


def test_block_noise_is_the_schedulers_and_of_each_generator(tiny_transformer: Tiny) -> None:
    pipeline = build_pipeline(ours(tiny_transformer), dct_codec(), SamplerSettings(levels=2, gamma=0.2))
    assert isinstance(pipeline, PyramidPipeline)
    several = [torch_generator(0, "one"), torch_generator(0, "two")]
    noise = pipeline.sample_block_noise(2, 3, 4, 6, 8, generator=several)
    for sample, name in enumerate(("one", "two")):
        white = torch.randn(1, 3, 4, 6, 8, generator=torch_generator(0, name))
        torch.testing.assert_close(noise[sample : sample + 1], block_noise(white, 0.2))


@pytest.mark.parametrize("levels", [2, 4])
def test_any_number_of_levels_and_the_smallest_size(tiny_transformer: Tiny, levels: int) -> None:
    """At one token a frame diffusers views its guidance as a flat tensor."""
    side = 16 * 2 ** (levels - 1)
    pipeline = build_pipeline(ours(tiny_transformer), dct_codec(), SamplerSettings("linear", levels=levels))
    text = rng.normal(rng.generator(0, "text"), (1, 16, 32))
    denoise = Sections(pipeline, (1,) * levels, 3.0, torch_generator(0, "sample"))
    (latents,) = grown(denoise, [text], from_nothing(1, 16, (side, side)))
    assert latents.shape == (1, 16, 9, side // 8, side // 8) and latents.isfinite().all()
    with pytest.raises(InputError, match=f"multiples of {side} pixels"):
        next(grown(denoise, [text], from_nothing(1, 16, (side + side // 2, side))))


def test_the_network_sees_the_times_and_sizes_of_training(tiny_transformer: Tiny) -> None:
    transformer = ours(tiny_transformer)
    seen: list[tuple[Tensor, tuple[int, ...]]] = []

    def note(module: HeliosTransformer, args: object, given: dict[str, Tensor]) -> None:
        seen.append((given["timestep"].clone(), tuple(given["hidden_states"].shape)))
        assert given["latents_history_long"].shape[2:] == (16, 8, 16)  # history at full resolution
        assert given["latents_history_short"].shape[2] == 2 and FRAMES == 19

    transformer.register_forward_pre_hook(note, with_kwargs=True)
    sections(build_pipeline(transformer, dct_codec(), SETTINGS), rng.normal(rng.generator(0, "text"), (1, 16, 32)), 1.0)
    pyramid = Pyramid(3)
    factors = pyramid.factors("linear", 9, 8, 16)
    expected = [t for level, factor in enumerate(factors) for t in pyramid.steps(level, STEPS[level], factor)[1]]
    assert [int(time) for time, _ in seen] == [int(t) for t in expected] * 2
    assert [shape[-2:] for _, shape in seen[:7]] == [(2, 4)] * 3 + [(4, 8)] * 2 + [(8, 16)] * 2


def test_steps_of_levels() -> None:
    assert SamplerSettings().steps(None) == (50,) and SETTINGS.steps(None) == (20, 20, 20)
    assert SETTINGS.steps(4) == (4, 4, 4) and SETTINGS.steps((1, 2, 3)) == (1, 2, 3)
    for wrong in (0, (1, 2), (1, 0, 1)):
        with pytest.raises(InputError, match="the model has 3 levels, each takes at least one"):
            SETTINGS.steps(wrong)
