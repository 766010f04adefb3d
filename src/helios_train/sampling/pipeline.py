"""Videos section by section: each one is one call of a diffusers pipeline, told what precedes it.

Axes: B videos, C latent channels, F pixel frames, T latent frames, H W rows and columns. A section is 33 pixel frames, 9 latent
frames.

A pipeline's own run over many sections keeps every frame, decoded in fp32, until the end, cuts the video to 4n + 1 frames
(132 -> 129) and knows one prompt. Here it denoises one section at a time, so memory does not grow with the video, and the text
may change between sections; the latents are those of its own run, bit for bit. Pixels come from the codec.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

import torch
from diffusers import HeliosDMDScheduler, HeliosPipeline, HeliosPyramidPipeline, HeliosScheduler, HeliosTransformer3DModel
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from helios_train.diffusion.pyramid import Pyramid, block_noise
from helios_train.errors import InputError
from helios_train.history import SECTION, History
from helios_train.models.codecs import SECTION_FRAMES, SIDE, Codec


@dataclass(frozen=True)
class SamplerSettings:
    """How a model is sampled; the exporter writes the same scheduler and pipeline into the folder.

    dynamic_shift: the shift of the noise levels by the number of tokens. solver: UniPC of order 2, or Euler. levels, edges,
    gamma, shift: of the pyramid the model was trained on, see `diffusion.pyramid`; a Base model has one level. zero_star:
    guidance as CFG-Zero* (Fan et al., 2025) does it, with no move in the first two steps of the first level (pyramids alone).
    few_steps: of a distilled student, the steps of each level it was trained for; it is sampled without solver and guidance.
    amplify: it takes twice as many where nothing precedes a section. anchor: whether the model was trained with one.
    """

    dynamic_shift: Literal["none", "exponential", "linear"] = "exponential"
    solver: Literal["unipc", "euler"] = "unipc"
    levels: int = 1
    edges: tuple[float, ...] | None = None
    gamma: float = 1 / 3
    shift: float = 1.0
    zero_star: bool = True
    few_steps: tuple[int, ...] | None = None
    amplify: bool = True
    anchor: bool = True

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> SamplerSettings:
        """What a manifest says; TypeError for an unknown key."""
        lists = {name: tuple(stored[name]) for name in ("edges", "few_steps") if stored.get(name)}
        return cls(**{**stored, **lists})

    @property
    def distilled(self) -> bool:
        """Whether the model is a few-step student."""
        return self.few_steps is not None

    def scheduler(self) -> HeliosScheduler | HeliosDMDScheduler:
        """The scheduler; the dynamic shift is said outright, for the class's default is none."""
        shifted = self.dynamic_shift != "none"
        kind, extra = (HeliosDMDScheduler, {}) if self.distilled else (HeliosScheduler, {"scheduler_type": self.solver})
        return kind(
            shift=self.shift,
            stages=self.levels,
            stage_range=list(self.edges or (level / self.levels for level in range(self.levels + 1))),
            gamma=self.gamma,
            use_dynamic_shifting=shifted,
            time_shift_type=self.dynamic_shift if shifted else "exponential",
            **extra,
        )

    def pipeline_index(self) -> dict[str, Any]:
        """The pipeline's class and switches, as model_index.json has them."""
        if self.levels == 1 and not self.distilled:
            return {"_class_name": "HeliosPipeline"}
        return {"_class_name": "HeliosPyramidPipeline", **self.switches()}

    def switches(self) -> dict[str, bool]:
        """Of HeliosPyramidPipeline."""
        return {"is_cfg_zero_star": self.zero_star and not self.distilled, "is_distilled": self.distilled}

    def steps(self, wanted: int | tuple[int, ...] | None) -> tuple[int, ...]:
        """Steps of each level: those wanted, one number for all levels, or (None) a student's own, the published 50, 20 a level.

        InputError for another number of levels, or none.
        """
        if wanted is None:
            wanted = self.few_steps or (50 if self.levels == 1 else 20)
        steps = (wanted,) * self.levels if isinstance(wanted, int) else tuple(wanted)
        if len(steps) != self.levels or min(steps) < 1:
            raise InputError(f"a sample in {list(steps)} steps: the model has {self.levels} levels, each takes at least one")
        return steps


class Denoiser(Protocol):
    """Makes one section out of noise: text [B, rows, dim] and what precedes it to normalised fp32 latents [B, 16, 9, h, w]."""

    def __call__(self, section: int, text: Tensor, history: History) -> Tensor: ...


def grown(
    denoise: Denoiser, texts: Iterable[Tensor], history: History, look: Callable[[Tensor, History], History] | None = None
) -> Iterator[Tensor]:
    """The latents [B, 16, 9, h, w] of one section after the other: one for each of `texts` [B, rows, dim], after `history`.

    look: given a section and the history with it, what the next section is to see of that.
    """
    seen = history
    for number, text in enumerate(texts):
        latents = denoise(number, text, seen)
        yield latents
        history = history.followed_by(latents)
        seen = look(latents, history) if look else history


Pipeline: TypeAlias = HeliosPipeline | HeliosPyramidPipeline


class PyramidPipeline(HeliosPyramidPipeline):
    """diffusers' pipeline with block noise in closed form: its Cholesky factor does not exist at gamma = 1/3 (on a CPU it fails).

    A list of generators, one a video, gives each video its own noise, as everywhere else.
    """

    def sample_block_noise(
        self,
        batch_size: int,
        channel: int,
        num_frames: int,
        height: int,
        width: int,
        patch_size: tuple[int, ...] = (1, 2, 2),
        device: torch.device | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> Tensor:
        """Noise [B, C, T, H, W] with variance 1 and correlation -gamma inside each 2x2 block."""
        shape = (batch_size, channel, num_frames, height, width)
        return block_noise(randn_tensor(shape, generator=generator, device=device), self.scheduler.config.gamma)


def build_pipeline(transformer: HeliosTransformer3DModel, codec: Codec, settings: SamplerSettings) -> Pipeline:
    """The pipeline around a live transformer and the codec's vae, without text encoder and without progress bars."""
    parts = {
        "tokenizer": None,
        "text_encoder": None,
        "vae": codec.vae,
        "scheduler": settings.scheduler(),
        "transformer": transformer,
    }
    plain = settings.levels == 1 and not settings.distilled
    pipeline = HeliosPipeline(**parts) if plain else PyramidPipeline(**parts, **settings.switches())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@dataclass(frozen=True)
class Sections:
    """Sections by a pipeline: in `steps` steps of each level, one at full resolution or several, coarse to fine.

    Null text is all zeros, as in training; with `guidance` <= 1 it is not run, nor for a distilled student, whatever is asked.
    `amplify`: a student takes twice the steps where nothing precedes a section. `anchor`: without, the history's is not shown.
    Noise comes from `generator`; one a video makes a video's noise independent of what else is in the batch. The transformer
    samples in eval mode and gets its mode back.
    """

    pipeline: Pipeline
    steps: tuple[int, ...]
    guidance: float
    generator: torch.Generator | list[torch.Generator]
    amplify: bool = False
    anchor: bool = True

    def __call__(self, section: int, text: Tensor, history: History) -> Tensor:
        """One section. InputError for sides that do not divide (16 pixels a level 0, twice that a level more) or other text."""
        device = self.pipeline.transformer.device
        text, history = text.to(device), history.to(device)
        self._check(text, history)
        if not self.anchor:
            history = history.keep(history.counts, (False,) * len(history.anchored))
        with _sampling(self.pipeline.transformer), _no_pixels(self.pipeline):
            # History and anchor go in as an encoded video and image, as they are; absent ones are zeros, as in the pipeline.
            latents: Tensor = self.pipeline(
                prompt_embeds=text,
                negative_prompt_embeds=torch.zeros_like(text),
                height=SIDE * history.frames.shape[-2],
                width=SIDE * history.frames.shape[-1],
                num_frames=SECTION_FRAMES,
                **self._steps(history),
                generator=self.generator,
                image_latents=history.anchor,
                add_noise_to_image_latents=False,
                video_latents=history.frames,
                add_noise_to_video_latents=False,
                output_type="latent",
            ).frames
        return latents[:, :, -SECTION:].contiguous()

    def _steps(self, history: History) -> dict[str, Any]:
        if not isinstance(self.pipeline, HeliosPyramidPipeline):
            return {"num_inference_steps": self.steps[0], "guidance_scale": self.guidance}
        steps = {"pyramid_num_inference_steps_list": list(self.steps)}
        if not self.pipeline.config.is_distilled:
            return {**steps, "guidance_scale": self.guidance}
        # Each call is a first section to the pipeline; the student was trained for more steps where nothing precedes one.
        return {**steps, "guidance_scale": 1.0, "is_amplify_first_chunk": self.amplify and all(history.empty)}

    def _check(self, text: Tensor, history: History) -> None:
        Pyramid(len(self.steps)).sizes(*history.frames.shape[-2:])
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
def _no_pixels(pipeline: Pipeline) -> Iterator[None]:
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
