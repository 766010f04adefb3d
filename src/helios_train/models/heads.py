"""Discriminator heads: one logit each, from the critic's tokens after chosen blocks, and from its velocity.

Six convolutions, each with a group norm and SiLU, then the mean over what is left of time and space, and one linear layer. The
published ones (PKU-YuanGroup/Helios) are 768 wide: four of 219 M parameters on the tokens after blocks 5, 15, 25, 35 and one of
113 M on the velocity. `light` ones begin with a projection to their width in place of the first convolution, and are narrower:
at most a tenth of the parameters.

Axis letters: B batch, L tokens, D width, C channels, T latent frames, H W rows and columns, N heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from helios_train import rng
from helios_train.models.precision import cast

GROUPS = 32  # of a group norm
SMALL = 4  # an axis of fewer entries is not halved any more; published sizes never meet it in space
LIGHTER = 7 / 24  # width of a light head by that of a published one, in whole groups: 224 of 768


class Head(nn.Module):
    """One head for inputs [B, C, T, H, W] of `channels` and a grid (H, W): `head3d` has the published names and order."""

    def __init__(self, channels: int, grid: tuple[int, int], width: int = 768, light: bool = False):
        super().__init__()
        if light:
            width = max(GROUPS, round(LIGHTER * width / GROUPS) * GROUPS)
        layers = [nn.Conv3d(channels, width, 1) if light else nn.Conv3d(channels, width, 3, padding=1)]
        sides = list(grid)
        for _ in range(2):
            halved = [side >= SMALL for side in sides]
            kernel, stride = (4, *(4 if half else 3 for half in halved)), (2, *(2 if half else 1 for half in halved))
            layers.append(nn.Conv3d(width, width, kernel, stride, padding=1))  # type: ignore[arg-type]
            sides = [side // 2 if half else side for side, half in zip(sides, halved, strict=True)]
        layers += [nn.Conv3d(width, width, 3, (2, 1, 1), padding=1) for _ in range(2)]
        layers.append(nn.Conv3d(width, width, (1, 3, 3), padding=(0, 1, 1)))
        parts: list[nn.Module] = []
        for layer in layers:
            parts += [layer, nn.GroupNorm(gcd(GROUPS, width), width), nn.SiLU()]
        self.head3d = nn.Sequential(*parts, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(width, 1))

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        """The logit. [B, 1]"""
        return self.head3d(x_BCTHW)  # type: ignore[no-any-return]


class Heads(nn.Module):
    """A head on the velocity and one on the tokens after each of `blocks` (rising), for crops of `size` = (rows, columns)
    latents.

    `channels`: of the latents. `width`: of the tokens. `head_width`, `kind`: of the heads. Weights are drawn by `seed`, apart
    from the global generators. ValueError for no blocks, or blocks that do not rise.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        channels: int,
        width: int,
        size: tuple[int, int],
        *,
        head_width: int = 768,
        kind: Literal["published", "light"] = "published",
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        if not blocks or list(blocks) != sorted(set(blocks)):
            raise ValueError(f"heads on blocks {list(blocks)}: at least one, rising")
        self.blocks, self.size = tuple(blocks), size
        tokens, light = (size[0] // 2, size[1] // 2), kind == "light"
        with rng.forked(seed, "heads"):
            self.velocity = Head(channels, size, head_width, light)
            self.tokens = nn.ModuleList(Head(width, tokens, head_width, light) for _ in blocks)
        cast(self, dtype)

    def forward(self, velocity_BCTHW: Tensor, tokens_BLD: Sequence[Tensor]) -> Tensor:
        """The logits, fp32 [B, N], that of the velocity first; a head's activations are computed again in backward."""
        frames, (rows, columns) = velocity_BCTHW.shape[2], self.size
        grid = (frames, rows // 2, columns // 2)
        dtype = next(self.parameters()).dtype
        logits = [self._logit(self.velocity, velocity_BCTHW.to(dtype))]
        for head, tokens in zip(self.tokens, tokens_BLD, strict=True):
            logits.append(self._logit(head, tokens.transpose(1, 2).unflatten(2, grid).to(dtype)))
        return torch.cat(logits, dim=1).float()

    def _logit(self, head: nn.Module, x_BCTHW: Tensor) -> Tensor:
        return checkpoint(head, x_BCTHW, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]
