"""The rollout, run to the end, is diffusers' distilled pipeline: section by section, with the same noise."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import HeliosPyramidPipeline, HeliosTransformer3DModel
from diffusers.schedulers.scheduling_helios_dmd import HeliosDMDScheduler
from torch import Tensor

from helios_train import rng
from helios_train.diffusion.pyramid import Pyramid, block_noise
from helios_train.diffusion.rollout import Rollout, RolloutDraw
from helios_train.history import History
from helios_train.models.codecs import dct_codec
from helios_train.models.transformer import HeliosTransformer
from helios_train.objectives.student import bound
from helios_train.rng import torch_generator
from helios_train.sampling.pipeline import PyramidPipeline, SamplerSettings, build_pipeline
from helios_train.sampling.start import from_nothing

SIZE = (64, 128)
STEPS = (2, 1, 3)
SECTIONS = 2
SHAPE = (1, 16, 9, 8, 16)
ROLLOUT = Rollout(Pyramid(), STEPS, timesteps="int", sigmas="exact", behind=True)


def transformer(tiny_transformer: Callable[..., HeliosTransformer3DModel]) -> HeliosTransformer:
    """With random numbers where a new model has zeros, so that every part of its input matters."""
    plain = tiny_transformer()
    with torch.no_grad():
        for number, parameter in enumerate(plain.parameters()):
            parameter.add_(0.1 * rng.normal(rng.generator(0, "parameter", number), parameter.shape))
    model = HeliosTransformer(**{name: value for name, value in plain.config.items() if not name.startswith("_")})
    model.load_state_dict(plain.state_dict())
    return model.eval()


def drawn(generator: torch.Generator) -> RolloutDraw:
    """What the pipeline draws for a section, in its order."""
    start = torch.randn(SHAPE, generator=generator)
    whites = [torch.randn(*SHAPE[:3], SHAPE[3] >> by, SHAPE[4] >> by, generator=generator) for by in (1, 0)]
    return RolloutDraw(start, tuple(block_noise(white) for white in whites), None)


@pytest.mark.parametrize("start", ["nothing", "image"])
def test_two_sections_of_the_distilled_pipeline(
    tiny_transformer: Callable[..., HeliosTransformer3DModel], monkeypatch: pytest.MonkeyPatch, start: str
) -> None:
    model = transformer(tiny_transformer)
    text = rng.normal(rng.generator(0, "text"), (1, 16, 32))
    anchor, frame = (rng.normal(rng.generator(0, name), (1, 16, 1, 8, 16)) for name in ("anchor", "frame"))
    history = from_nothing(1, 16, SIZE)
    if start == "image":
        history = History(torch.cat([history.frames[:, :, 1:], frame], dim=2), anchor, (1,), (True,))
    found: list[Tensor] = []
    generator = torch_generator(0, "sample")
    with torch.no_grad():
        for _ in range(SECTIONS):
            found.append(ROLLOUT(bound(model.velocity, text, history), drawn(generator), history.empty[0]).output)
            history = history.followed_by(found[-1])
        components = build_pipeline(model, dct_codec(), SamplerSettings("linear", levels=3)).components
        scheduler = HeliosDMDScheduler(use_dynamic_shifting=True, time_shift_type="linear")
        theirs = HeliosPyramidPipeline(**components | {"scheduler": scheduler}, is_distilled=True)
        theirs.set_progress_bar_config(disable=True)
        monkeypatch.setattr(HeliosPyramidPipeline, "sample_block_noise", PyramidPipeline.sample_block_noise)
        given = {"image_latents": anchor, "fake_image_latents": frame, "add_noise_to_image_latents": False}
        expected = theirs(
            prompt_embeds=text,
            height=SIZE[0],
            width=SIZE[1],
            num_frames=33 * SECTIONS,
            guidance_scale=1.0,
            pyramid_num_inference_steps_list=list(STEPS),
            is_amplify_first_chunk=start == "nothing",  # it would amplify after an image too; training does not
            generator=torch_generator(0, "sample"),
            output_type="latent",
            **(given if start == "image" else {}),
        ).frames[:, :, -9 * SECTIONS :]
    assert expected.std() > 0.1
    torch.testing.assert_close(torch.cat(found, dim=2), expected, rtol=0, atol=1e-4)
