"""Videos section by section: each one is one call of a diffusers pipeline, told what precedes it.

Axes: B videos, C latent channels, F pixel frames, T latent frames, H W rows and columns. A section is 33 pixel frames, 9 latent
frames.

A pipeline's own run over many sections keeps every frame, decoded in fp32, until the end, cuts the video to 4n + 1 frames
(132 -> 129) and knows one prompt. Here it denoises one section at a time, so memory does not grow with the video, and the text
may change between sections; the latents are those of its own run, bit for bit. Pixels come from the codec.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from diffusers import HeliosPipeline, HeliosScheduler, HeliosTransformer3DModel
from torch import Tensor

from helios_train.errors import InputError
from helios_train.history import FRAMES, SECTION, History
from helios_train.models.codecs import SECTION_FRAMES, SIDE, Codec


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


class Denoiser(Protocol):
    """Makes one section out of noise: text [B, rows, dim] and what precedes it to normalised fp32 latents [B, 16, 9, h, w]."""

    def __call__(self, section: int, text: Tensor, history: History) -> Tensor: ...


def grown(denoise: Denoiser, texts: Iterable[Tensor], history: History) -> Iterator[Tensor]:
    """The latents [B, 16, 9, h, w] of one section after the other: one for each of `texts` [B, rows, dim], after `history`."""
    for number, text in enumerate(texts):
        latents = denoise(number, text, history)
        yield latents
        history = followed_by(history, latents)


def followed_by(history: History, latents: Tensor) -> History:
    """What precedes the section after `latents` [B, 16, 9, h, w]: the newest 19 frames. The anchor stays; a video that has none
    gets its first latent frame."""
    frames = torch.cat([history.frames.to(latents), latents], dim=2)[:, :, -FRAMES:]
    counts = tuple(min(FRAMES, count + SECTION) for count in history.counts)
    anchor = history.anchor.to(latents) if all(history.anchored) else latents[:, :, :1]
    return History(frames, anchor, counts, (True,) * len(counts))


def build_pipeline(transformer: HeliosTransformer3DModel, codec: Codec, settings: SamplerSettings) -> HeliosPipeline:
    """The pipeline around a live transformer and the codec's vae, without text encoder and without progress bars."""
    pipeline = HeliosPipeline(
        tokenizer=None, text_encoder=None, vae=codec.vae, scheduler=settings.scheduler(), transformer=transformer
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@dataclass(frozen=True)
class OneLevel:
    """Sections by HeliosPipeline, in `steps` steps at full resolution.

    Null text is all zeros, as in training; with `guidance` <= 1 it is not run. Noise comes from `generator`; one a video makes a
    video's noise independent of what else is in the batch. The transformer samples in eval mode and gets its mode back.
    """

    pipeline: HeliosPipeline
    steps: int
    guidance: float
    generator: torch.Generator | list[torch.Generator]

    def __call__(self, section: int, text: Tensor, history: History) -> Tensor:
        """One section. InputError for sides that 16 does not divide, no steps, or text of another width."""
        device = self.pipeline.transformer.device
        text, history = text.to(device), history.to(device)
        self._check(text, history)
        with _sampling(self.pipeline.transformer), _no_pixels(self.pipeline):
            # History and anchor go in as an encoded video and image, as they are; absent ones are zeros, as in the pipeline.
            latents: Tensor = self.pipeline(
                prompt_embeds=text,
                negative_prompt_embeds=torch.zeros_like(text),
                height=SIDE * history.frames.shape[-2],
                width=SIDE * history.frames.shape[-1],
                num_frames=SECTION_FRAMES,
                num_inference_steps=self.steps,
                guidance_scale=self.guidance,
                generator=self.generator,
                image_latents=history.anchor,
                add_noise_to_image_latents=False,
                video_latents=history.frames,
                add_noise_to_video_latents=False,
                output_type="latent",
            ).frames
        return latents[:, :, -SECTION:].contiguous()

    def _check(self, text: Tensor, history: History) -> None:
        height, width = (SIDE * side for side in history.frames.shape[-2:])
        if height % 16 or width % 16:
            raise InputError(f"a sample of {height}x{width} pixels: both sides must be multiples of 16")
        if self.steps < 1:
            raise InputError(f"a sample in {self.steps} steps: at least one is needed")
        wide = self.pipeline.transformer.config.text_dim
        if text.dim() != 3 or text.shape[-1] != wide:
            raise InputError(f"text {list(text.shape)}: the transformer takes [B, rows, {wide}]; use the encoder of its training")


def pixels(codec: Codec, latents: Tensor) -> Tensor:
    """Latents [B, 16, 9, h, w] of a section as uint8 RGB [B, 33, H, W, 3] on the host."""
    video = codec.decode(latents)
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
