"""Text to video through diffusers' HeliosPipeline: section after section, each from the 19 latent frames before it.

Axes: B videos, F pixel frames, T latent frames, H W rows and columns. A section is 33 pixel frames, 9 latent frames.

The pipeline denoises; pixels come from the codec here. The pipeline's own pixels are cut to 4n + 1 frames (132 -> 129), and it
holds every decoded section in fp32 until the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from diffusers import HeliosPipeline, HeliosScheduler, HeliosTransformer3DModel
from torch import Tensor

from helios_train.errors import InputError
from helios_train.models.codecs import SECTION_FRAMES, Codec


@dataclass(frozen=True)
class SamplerSettings:
    """How a Base model is sampled; the exporter writes the same scheduler into the folder.

    dynamic_shift: the shift of the noise levels by the number of tokens. solver: UniPC of order 2, or Euler.
    """

    dynamic_shift: Literal["none", "exponential", "linear"] = "exponential"
    solver: Literal["unipc", "euler"] = "unipc"

    def scheduler(self) -> HeliosScheduler:
        """The one-level scheduler; the shift is said outright, for the class's default is none."""
        shifted = self.dynamic_shift != "none"
        return HeliosScheduler(
            stages=1,
            stage_range=[0, 1],
            scheduler_type=self.solver,
            use_dynamic_shifting=shifted,
            time_shift_type=self.dynamic_shift if shifted else "exponential",
        )


class SampledVideo(NamedTuple):
    """frames: uint8 [B, 33 * sections, H, W, 3] in RGB; latents: normalised fp32 [B, 16, 9 * sections, H/8, W/8]."""

    frames: Tensor
    latents: Tensor


def build_pipeline(transformer: HeliosTransformer3DModel, codec: Codec, settings: SamplerSettings) -> HeliosPipeline:
    """The pipeline around a live transformer and the codec's vae, without text encoder and without progress bars."""
    pipeline = HeliosPipeline(
        tokenizer=None, text_encoder=None, vae=codec.vae, scheduler=settings.scheduler(), transformer=transformer
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample_t2v(
    pipeline: HeliosPipeline,
    text: Tensor,
    size: tuple[int, int],
    sections: int,
    steps: int,
    guidance: float,
    generator: torch.Generator | list[torch.Generator],
) -> SampledVideo:
    """One video for each row of `text` [B, rows, dim] (rows past a prompt zero), `size` = (H, W) in pixels.

    Null text is all zeros, as in training; with `guidance` <= 1 it is not run. All noise comes from `generator`; one a video
    makes a video's noise independent of what else is in the batch. The transformer samples in eval mode and gets its mode
    back. InputError for sides that 16 does not divide, no sections or steps, or text of another width.
    """
    _check(pipeline, text, size, sections, steps)
    with _sampling(pipeline.transformer), _no_pixels(pipeline):
        latents = pipeline(
            prompt_embeds=text,
            negative_prompt_embeds=torch.zeros_like(text),
            height=size[0],
            width=size[1],
            num_frames=SECTION_FRAMES * sections,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generator,
            output_type="latent",
        ).frames
    codec = Codec("sampled", pipeline.vae)
    frames = [_pixels(codec.decode(part)) for part in latents.chunk(sections, dim=2)]
    return SampledVideo(torch.cat(frames, dim=1), latents)


def _check(pipeline: HeliosPipeline, text: Tensor, size: tuple[int, int], sections: int, steps: int) -> None:
    if any(side < 16 or side % 16 for side in size):
        raise InputError(f"a sample of {size[0]}x{size[1]} pixels: both sides must be multiples of 16")
    if sections < 1 or steps < 1:
        raise InputError(f"a sample of {sections} sections in {steps} steps: both must be at least 1")
    width = pipeline.transformer.config.text_dim
    if text.dim() != 3 or text.shape[-1] != width:
        raise InputError(f"text {list(text.shape)}: the transformer takes [B, rows, {width}]; use the encoder of its training")


def _pixels(video: Tensor) -> Tensor:
    """[B, 3, F, H, W] around [-1, 1] to uint8 [B, F, H, W, 3] on the host."""
    return ((video.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1).cpu()


@contextmanager
def _sampling(transformer: torch.nn.Module) -> Iterator[None]:
    """Eval mode inside, every module's own mode afterwards."""
    modes = {module: module.training for module in transformer.modules()}
    transformer.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def _no_pixels(pipeline: HeliosPipeline) -> Iterator[None]:
    """The pipeline decodes each section even when only latents are asked for; inside, its vae decodes to nothing."""
    vae = pipeline.vae
    pipeline.vae = _LatentsOnly(vae)
    try:
        yield
    finally:
        pipeline.vae = vae


class _LatentsOnly:
    """What the pipeline reads of a vae, and a decoder that gives no frames."""

    def __init__(self, vae: Any):
        self.config, self.dtype = vae.config, vae.dtype

    def decode(self, z: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        return (z[:, :3, :0],)
