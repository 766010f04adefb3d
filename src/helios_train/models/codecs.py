"""Video codecs: pixels to the latents the transformer works in, one 33-frame section at a time, and back.

Axis letters: B batch, C latent channels, F pixel frames, T latent frames, H W rows and columns (of pixels for video, of latents
for latents). A section of 33 frames gives 9 latent frames: its first frame alone, then fours.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, IdentityDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput

from helios_train.errors import InputError
from helios_train.models import pretrained

SECTION_FRAMES = 33
TIME, SIDE = 4, 8  # pixel frames, rows and columns to one latent position

# Luma and two chromas, orthonormal rows over (red, green, blue).
OPPONENT = (
    (1 / math.sqrt(3), 1 / math.sqrt(3), 1 / math.sqrt(3)),
    (1 / math.sqrt(2), 0.0, -1 / math.sqrt(2)),
    (1 / math.sqrt(6), -2 / math.sqrt(6), 1 / math.sqrt(6)),
)
LUMA, CHROMA, CHROMA2 = range(3)

# The 16 kept coefficients as (colour, (t, y, x) frequency). The first three, flat over their block, carry most of a picture;
# the last four change within a group of four frames, which a single frame cannot.
CHANNELS: tuple[tuple[int, tuple[int, int, int]], ...] = (
    *((colour, (0, 0, 0)) for colour in (LUMA, CHROMA, CHROMA2)),
    *((colour, (0, 0, 1)) for colour in (LUMA, CHROMA, CHROMA2)),
    *((colour, (0, 1, 0)) for colour in (LUMA, CHROMA, CHROMA2)),
    (LUMA, (0, 1, 1)),
    (LUMA, (0, 0, 2)),
    (LUMA, (0, 2, 0)),
    (LUMA, (1, 0, 0)),
    (LUMA, (1, 0, 1)),
    (LUMA, (1, 1, 0)),
    (CHROMA, (1, 0, 0)),
)
TEMPORAL = tuple(number for number, (_, (t, _, _)) in enumerate(CHANNELS) if t)

# Measured once over the default toy videos by benchmarks/dct_constants.py: the flat channels come to mean 0 and std 1, the other
# 13 to std 0.4 (whitened to 1 they would take 13/16 of the loss for the edges) and keep mean 0, as mirrored pictures have it.
LATENTS_MEAN = (-1.511, -4.266, 2.098, *(0.0,) * 13)
LATENTS_STD = (18.573, 8.027, 4.182, 3.381, 2.739, 1.924, 3.397, 2.707, 1.9, 1.479, 1.258, 1.261, 1.021, 0.623, 0.619, 0.852)


WAVES = tuple(sorted({(y, x) for _, (_, y, x) in CHANNELS}))  # the six (y, x) frequencies among them


def _cosine(frequency: int, length: int) -> torch.Tensor:
    """A type-II cosine of unit norm, fp64 [length]."""
    place = torch.arange(length, dtype=torch.float64) + 0.5
    wave = torch.cos(math.pi * frequency * place / length) * math.sqrt(2 / length)
    return wave * math.sqrt(0.5) if frequency == 0 else wave


def _planes() -> torch.Tensor:
    """What one frame of one colour is measured with: fp64 [6, 8, 8], orthonormal."""
    return torch.stack([torch.outer(_cosine(y, SIDE), _cosine(x, SIDE)) for y, x in WAVES])


def _mix() -> torch.Tensor:
    """How the six measures of three colours of four frames make the channels: fp64 [16, 3, 4, 6], orthonormal."""
    opponent = torch.tensor(OPPONENT, dtype=torch.float64)
    mix = torch.zeros(len(CHANNELS), 3, TIME, len(WAVES), dtype=torch.float64)
    for channel, (colour, (t, y, x)) in enumerate(CHANNELS):
        mix[channel, :, :, WAVES.index((y, x))] = torch.outer(opponent[colour], _cosine(t, TIME))
    return mix


class DctVae(ModelMixin, ConfigMixin):
    """Sixteen cosine coefficients of every 4x8x8 block, with the calling interface and geometry of diffusers' AutoencoderKLWan.

    No weights and no randomness: the filters are orthonormal, so decoding is the transpose of encoding. The first frame is
    repeated four times to fill its block, and decoded as the mean of the four.
    """

    @register_to_config
    def __init__(
        self,
        z_dim: int = 16,
        latents_mean: tuple[float, ...] | list[float] = LATENTS_MEAN,
        latents_std: tuple[float, ...] | list[float] = LATENTS_STD,
        scale_factor_temporal: int = TIME,
        scale_factor_spatial: int = SIDE,
    ):
        super().__init__()
        if (z_dim, scale_factor_temporal, scale_factor_spatial) != (len(CHANNELS), TIME, SIDE):
            raise InputError(f"the dct codec has {len(CHANNELS)} channels of {TIME}x{SIDE}x{SIDE} blocks and no others")
        planes, mix = _planes(), _mix()
        self.planes: torch.Tensor
        self.mix: torch.Tensor
        self.basis: torch.Tensor
        self.register_buffer("planes", planes.unsqueeze(1).float())
        self.register_buffer("mix", mix.flatten(1).float())
        self.register_buffer("basis", torch.einsum("kctn,nyx->kctyx", mix, planes).flatten(1).float())

    def encode(self, x: torch.Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[IdentityDistribution]:
        """Video [B, 3, 1 + 4k, H, W] in [-1, 1] to latents [B, 16, 1 + k, H/8, W/8], not normalised, as a distribution
        without spread. InputError for another number of frames, or sides that 8 does not divide."""
        if x.dim() != 5 or x.shape[1] != 3 or (x.shape[2] - 1) % TIME or x.shape[3] % SIDE or x.shape[4] % SIDE:
            raise InputError(f"video {list(x.shape)}: the dct codec takes [B, 3, 1 + 4k, H, W] with H and W multiples of {SIDE}")
        padded = torch.cat([x[:, :, :1].expand(-1, -1, TIME - 1, -1, -1), x], dim=2)
        batch, _, frames, height, width = padded.shape
        # Sums of 64, then of 72: one convolution over all 768 loses a digit, and is hardly faster.
        flat = padded.to(self.basis.dtype).reshape(-1, 1, height, width)
        measures = F.conv2d(flat, self.planes, stride=SIDE).view(batch, 3, frames // TIME, TIME, len(WAVES), height // SIDE, -1)
        latents = (measures.permute(0, 2, 5, 6, 1, 3, 4).flatten(4) @ self.mix.T).permute(0, 4, 1, 2, 3).contiguous()
        # Four equal frames have no change in time; the filters leave a rounding error there.
        latents[:, list(TEMPORAL), 0] = 0
        spread_free = IdentityDistribution(latents)
        return AutoencoderKLOutput(latent_dist=spread_free) if return_dict else (spread_free,)

    def decode(self, z: torch.Tensor, return_dict: bool = True) -> DecoderOutput | tuple[torch.Tensor]:
        """Latents [B, 16, 1 + k, h, w], not normalised, to video [B, 3, 1 + 4k, 8h, 8w], about [-1, 1] and not clamped."""
        if z.dim() != 5 or z.shape[1] != len(CHANNELS):
            raise InputError(f"latents {list(z.shape)}: the dct codec takes [B, {len(CHANNELS)}, T, h, w]")
        batch, _, steps, rows, columns = z.shape
        # One matrix product, then the blocks laid in place: eight times faster on a CPU than a transposed convolution.
        blocks = z.to(self.basis.dtype).permute(0, 2, 3, 4, 1).reshape(-1, len(CHANNELS)) @ self.basis
        blocks = blocks.view(batch, steps, rows, columns, 3, TIME, SIDE, SIDE).permute(0, 4, 1, 5, 2, 6, 3, 7)
        video = blocks.reshape(batch, 3, steps * TIME, rows * SIDE, columns * SIDE)
        video = torch.cat([video[:, :, :TIME].mean(dim=2, keepdim=True), video[:, :, TIME:]], dim=2)
        return DecoderOutput(sample=video) if return_dict else (video,)


class Codec:
    """A vae-like (`encode(x).latent_dist`, `decode(z)`, `config.latents_mean` and `latents_std`) behind normalised latents.

    `name` is what configs call it; `vae` is what diffusers' pipelines take. What is given may lie on any device: the work is
    done where the vae is, and the result comes back to where the input was.
    """

    def __init__(self, name: str, vae: Any):
        self.name, self.vae = name, vae
        self.channels = int(vae.config.z_dim)
        self.latents_mean = [float(value) for value in vae.config.latents_mean]
        self.latents_std = [float(value) for value in vae.config.latents_std]

    @torch.no_grad()
    def encode(self, video: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None = None) -> torch.Tensor:
        """Sections [B, 3, 33, H, W] in [-1, 1] to normalised fp32 latents [B, 16, 9, H/8, W/8], each on its own.

        With a generator (or one a section, whose latents then depend on nothing else in the batch) the posterior is sampled,
        without one its mode is taken. Generators on the CPU draw the same for a vae on any device. InputError when a section
        has not 33 frames.
        """
        if video.dim() != 5 or video.shape[2] != SECTION_FRAMES:
            raise InputError(f"video {list(video.shape)}: a codec encodes sections [B, 3, {SECTION_FRAMES}, H, W]")
        posterior = self.vae.encode(video.to(self.vae.device, self.vae.dtype)).latent_dist
        latents = posterior.mode() if generator is None else posterior.sample(generator=generator)
        mean, std = self._constants(latents)
        return ((latents.float() - mean) / std).to(video.device)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Normalised latents [B, 16, 9, h, w] of sections to fp32 video [B, 3, 33, 8h, 8w] around [-1, 1], not clamped here."""
        mean, std = self._constants(latents)
        raw = (latents.float() * std + mean).to(self.vae.device, self.vae.dtype)
        return self.vae.decode(raw, return_dict=False)[0].float().to(latents.device)

    def _constants(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, std = (torch.tensor(values, device=like.device) for values in (self.latents_mean, self.latents_std))
        return mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)

    def fingerprint(self) -> str:
        """What latents depend on: the name, the config and every weight, not library versions or paths (sha256, hex)."""
        config = {key: value for key, value in dict(self.vae.config).items() if not key.startswith("_")}
        digest = hashlib.sha256(json.dumps([self.name, config], sort_keys=True, default=list).encode())
        for name, weight in sorted(self.vae.state_dict().items()):
            digest.update(f"{name}:{weight.dtype}:{list(weight.shape)}".encode())
            digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()


def dct_codec() -> Codec:
    """The codec of the embedded default: no weights, exact, the Wan VAE's geometry; on the CPU, so that the same videos give
    the same shards on every machine."""
    return Codec("dct", DctVae())


def wan_codec(weights: str, device: torch.device | str = "cpu") -> Codec:
    """The Wan 2.1 VAE of diffusers in fp32 on `device`.

    `weights`: a folder (the vae/ folder itself, or one that holds it) or a model on the hub, of which vae/ is taken. Latents are
    normalised with the constants of its config.json. InputError for a folder that is missing, damaged, or another model's.
    """
    key = "codec.weights"
    root = pretrained.root_of(weights, ("vae",), key)
    folder = root / "vae" if (root / "vae").is_dir() else root
    _check_wan(folder, pretrained.read_config(folder, key))
    return Codec("wan", pretrained.load(AutoencoderKLWan, folder, torch_dtype=torch.float32).to(device))


def _check_wan(folder: Path, config: Mapping[str, Any]) -> None:
    """InputError unless config.json is of a VAE with the geometry of Wan 2.1, and says how its latents are normalised."""
    kind = config.get("_class_name")
    if kind != "AutoencoderKLWan":
        raise InputError(
            f"{folder / 'config.json'}: holds a {kind}; codec.weights names the vae/ folder of a Wan or Helios model"
        )
    sides = config.get("z_dim", 16), config.get("scale_factor_temporal", TIME), config.get("scale_factor_spatial", SIDE)
    if sides != (16, TIME, SIDE) or config.get("patch_size"):
        raise InputError(
            f"{folder / 'config.json'}: {sides[0]} channels of {sides[1]} frames x {sides[2]} pixels a side; Helios models take "
            f"the VAE of Wan 2.1, 16 channels of {TIME} x {SIDE}"
        )
    for name, least in (("latents_mean", -math.inf), ("latents_std", 0.0)):
        values = config.get(name)
        plain = isinstance(values, list) and len(values) == 16 and all(type(value) in (int, float) for value in values)
        if not plain or not all(math.isfinite(value) and value > least for value in values):  # type: ignore[union-attr]
            raise InputError(
                f"{folder / 'config.json'}: {name} is not a list of 16 numbers, so nobody can say how its latents are "
                "normalised; take the config.json that came with the weights"
            )
