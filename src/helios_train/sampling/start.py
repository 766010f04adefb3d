"""What precedes the first section of a video: nothing, an image, or a video.

Axes: B videos, F pixel frames, T latent frames, H W rows and columns. Pixels are fp32 in [-1, 1].

An encoded image or video is noised a little, as history is in training. One generator gives everything, in this order: samples
of the encoder's posterior (anchor first), then a level and noise for each part, then (elsewhere) the noise of the sections.
Levels, order and arithmetic are those of diffusers' HeliosPipeline.
"""

from __future__ import annotations

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from helios_train.errors import InputError
from helios_train.history import FRAMES, SECTION, History
from helios_train.models.codecs import SECTION_FRAMES, SIDE, Codec

SIGMA = (0.111, 0.135)  # range of the noise level of encoded images and videos
WINDOWS = -(-FRAMES // SECTION)  # sections that the newest 19 latent frames lie in


def from_nothing(batch: int, channels: int, size: tuple[int, int]) -> History:
    """Text to video, `size` = (H, W) in pixels: zeros; the first latent frame that is made becomes the anchor."""
    return History.none(batch, channels, size[0] // SIDE, size[1] // SIDE)


def from_image(codec: Codec, image: Tensor, generator: torch.Generator) -> History:
    """Image to video: `image` [B, 3, H, W] is the anchor, and stands at the end of the history as a video at rest would.

    The image itself is no frame of the video. One noise level for the anchor, one for the history's frame.
    """
    image = image.unsqueeze(2)
    anchor = _encode(codec, image, generator)[0]
    at_rest = _encode(codec, image.expand(-1, -1, SECTION_FRAMES, -1, -1), generator)[0][:, :, -1:]
    anchor = _noised(anchor, generator)
    return _history(_noised(at_rest, generator), anchor)


def from_video(codec: Codec, first: Tensor, trailing: Tensor, skipped: int, generator: torch.Generator) -> History:
    """Video to video: the frame `first` [B, 3, 1, H, W] is the anchor; `trailing` [B, 3, F, H, W], the video's last whole
    windows of 33 frames, is the history, each of its latent frames at a noise level of its own.

    `skipped`: whole windows before `trailing` that are left out because the history does not reach them. Their random numbers
    are drawn all the same, so the video comes out as if they were there. InputError unless F is a multiple of 33.
    """
    if not trailing.shape[2] or trailing.shape[2] % SECTION_FRAMES:
        raise InputError(f"{trailing.shape[2]} frames of video: its windows are of {SECTION_FRAMES} frames each")
    anchor, spread = _encode(codec, first, generator)
    shape = (anchor.shape[0], anchor.shape[1], SECTION, *anchor.shape[3:])
    for _ in range(skipped if spread else 0):
        randn_tensor(shape, generator=generator, device=generator.device)
    windows = [_encode(codec, part, generator)[0] for part in trailing.split(SECTION_FRAMES, dim=2)]
    anchor = _noised(anchor, generator)
    for _ in range(skipped):
        torch.rand(SECTION, generator=generator, device=generator.device)
        randn_tensor(shape, generator=generator, device=generator.device)
    return _history(torch.cat([_noised(part, generator, SECTION) for part in windows], dim=2), anchor)


@torch.no_grad()
def _encode(codec: Codec, video: Tensor, generator: torch.Generator) -> tuple[Tensor, bool]:
    """A sample of the posterior of [B, 3, 1 or 33, H, W], normalised, and whether it has a spread (and so took noise)."""
    posterior = codec.vae.encode(video.to(codec.vae.device, codec.vae.dtype)).latent_dist
    latents = posterior.sample(generator=generator).float()
    mean, std = (torch.tensor(values).to(latents).view(1, -1, 1, 1, 1) for values in (codec.latents_mean, codec.latents_std))
    return (latents - mean) / std, isinstance(posterior, DiagonalGaussianDistribution)


def _noised(latents: Tensor, generator: torch.Generator, levels: int = 1) -> Tensor:
    """sigma * noise + (1 - sigma) * latents, with one sigma for all frames, or one each (`levels` of them)."""
    drawn = torch.rand(levels, generator=generator, device=generator.device)
    sigma = (drawn * (SIGMA[1] - SIGMA[0]) + SIGMA[0]).to(latents.device).view(1, 1, levels, 1, 1)
    noise = randn_tensor(latents.shape, generator=generator, device=latents.device)
    return sigma * noise + (1 - sigma) * latents


def _history(latents: Tensor, anchor: Tensor) -> History:
    """The newest 19 of `latents` [B, 16, T, h, w], zeros before them where there are fewer."""
    batch, channels, have, rows, columns = latents.shape
    missing = max(0, FRAMES - have)
    frames = torch.cat([latents.new_zeros(batch, channels, missing, rows, columns), latents], dim=2)[:, :, -FRAMES:]
    return History(frames, anchor, (FRAMES - missing,) * batch, (True,) * batch)
