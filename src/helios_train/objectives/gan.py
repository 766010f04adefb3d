"""Adversarial training: the critic's network, with heads on it, tells noised real sections from the student's.

Signs are those of the published system: a logit is high for what the heads take for the student's. With `softplus(z) = ln(1 +
e^z)` the heads learn `softplus(-fake) + softplus(real)`, the student `softplus(fake)`: the non-saturating logistic loss with the
logits negated. R1 and R2 are approximated (Lin et al., 2025): the squared change of the logits under a little noise in place of a
gradient. What is judged are crops of half the height and width, noised as the critic's other loss noises them; the history is
whole.

Axis letters: B batch (1), C latent channels, T latent frames, H W latent rows and columns, N heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import mse_loss, softplus

from helios_train import rng
from helios_train.errors import InputError
from helios_train.history import History
from helios_train.memory.cache_grad import cache_grad, in_turn
from helios_train.objectives.renoise import RenoiseDraw

# (x_t, t, text, history, offset) -> [B, N]; offset: row and column, in tokens, at which a crop begins, None: not said
Logits = Callable[[Tensor, Tensor, Tensor, History, tuple[int, int] | None], Tensor]
PATCH = 2  # latents a token, in rows and columns
FAKE, REAL = 0, 1  # the first two samples of the critic's


@dataclass(frozen=True)
class Crop:
    """Half the height and width of a section, from row `top` and column `left`, all in latents."""

    top: int
    left: int
    rows: int
    columns: int

    def of(self, x_BCTHW: Tensor) -> Tensor:
        """The crop of a section."""
        return x_BCTHW[..., self.top : self.top + self.rows, self.left : self.left + self.columns]

    @property
    def offset(self) -> tuple[int, int]:
        """Where it begins, in tokens."""
        return self.top // PATCH, self.left // PATCH


def crop_size(height: int, width: int) -> tuple[int, int]:
    """Rows and columns of a crop of a section of `height` x `width` latents, whole tokens. InputError below four of each."""
    if min(height, width) < 2 * PATCH:
        raise InputError(f"a section of {height}x{width} latents has no crop of half its size; at least 4x4, 32x32 pixels")
    return height // 2 // PATCH * PATCH, width // 2 // PATCH * PATCH


@dataclass(frozen=True)
class StudentJudged:
    """What is random when the student's section is judged: noise of its own, and the crop. share: of the loss's weight."""

    noise: Tensor
    crop: Crop
    share: float


@dataclass(frozen=True)
class CriticJudged:
    """What is random when the heads learn: a crop for each sample (fake, real, and those disturbed), and the disturbances."""

    crops: tuple[Crop, ...]
    disturbances: tuple[Tensor, ...]
    share: float


@dataclass(frozen=True)
class Adversary:
    """Weights of the losses and when they begin.

    start: first iteration. ramp: iterations over which the weights rise from 0. student, critic: weights of the student's and the
    heads' loss. r1, r2: weights, unscaled by `critic`, of the logits' squared change when real sections, or the student's, get
    noise of `r1_sigma`, `r2_sigma`; a weight of 0 costs nothing. offsets: the network is told where a crop lies. one_crop: a
    section and its disturbed copy share their crop; else, as published, every sample has its own, at any latent. replay: as of
    `in_turn`, over the heads' samples.
    """

    start: int = 1000
    ramp: int = 0
    student: float = 0.05
    critic: float = 0.01
    r1: float = 100.0
    r1_sigma: float = 0.1
    r2: float = 0.0
    r2_sigma: float = 0.1
    offsets: bool = True
    one_crop: bool = True
    replay: bool = True

    def share(self, iteration: int) -> float:
        """Of the weights, 0 before the start."""
        if iteration < self.start:
            return 0.0
        return min(1.0, (iteration - self.start + 1) / self.ramp) if self.ramp else 1.0

    def draw_student(self, seed: int, iteration: int, position: int, shape: Sequence[int]) -> StudentJudged | None:
        """Draws for the student's sample at a position of the global batch; `shape` is (C, T, H, W). None before the start."""
        if iteration < self.start:
            return None
        noise = rng.normal(rng.generator(seed, "student judged noise", iteration, position), (1, *shape))
        return StudentJudged(noise, self._crop(seed, "student crop", (iteration, position), shape), self.share(iteration))

    def draw_critic(self, seed: int, iteration: int, position: int, shape: Sequence[int]) -> CriticJudged | None:
        """Draws for the critic's samples, likewise."""
        if iteration < self.start:
            return None
        where = (iteration, position)
        of = [FAKE, REAL] + [REAL] * bool(self.r1) + [FAKE] * bool(self.r2)  # whose section each sample shows
        own = [self._crop(seed, "critic crop", (*where, number), shape) for number in range(len(of))]
        crops = tuple(own[of[number]] if self.one_crop else own[number] for number in range(len(of)))
        sigmas = [self.r1_sigma] * bool(self.r1) + [self.r2_sigma] * bool(self.r2)
        disturbances = tuple(
            sigma * rng.normal(rng.generator(seed, "critic disturbance", *where, number), (1, *shape))
            for number, sigma in enumerate(sigmas)
        )
        return CriticJudged(crops, disturbances, self.share(iteration))

    def _crop(self, seed: int, who: str, where: Sequence[int], shape: Sequence[int]) -> Crop:
        rows, columns = crop_size(*shape[2:])
        step = PATCH if self.one_crop or self.offsets else 1
        draw = rng.generator(seed, who, *where)
        top, left = (
            int(draw.integers((side - size) // step + 1)) * step for side, size in zip(shape[2:], (rows, columns), strict=True)
        )
        return Crop(top, left, rows, columns)

    def student_loss(
        self, logits: Logits, x: Tensor, look: RenoiseDraw, draw: StudentJudged, text: Tensor, history: History
    ) -> tuple[Tensor, Tensor]:
        """`softplus(logits)` of the student's section x [B, C, T, H, W] at the time of `look`, and its gradient by x, detached.

        The networks' graph is gone when this returns; gradient reaches x through the value.
        """
        seen = replace(look, noise=draw.noise.to(x))

        def _judged(x: Tensor) -> Tensor:
            return softplus(self._judge(logits, seen.noised(x), look, draw.crop, text, history)).mean()

        value, (gradient,) = cache_grad(_judged, x)
        return value, gradient

    def critic_losses(
        self, logits: Logits, fake: Tensor, real: Tensor, look: RenoiseDraw, draw: CriticJudged, text: Tensor, history: History
    ) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """The heads' loss, a surrogate a sample, each to be differentiated before the next; figures come with the last.

        fake, real: sections [B, C, T, H, W] without gradient, noised alike by `look`. Figures: the loss, the margin by which the
        heads tell the two apart, `r1` and `r2` unweighted.
        """
        shown = [look.noised(fake), look.noised(real)]
        wanted = [REAL] * bool(self.r1) + [FAKE] * bool(self.r2)
        shown += [shown[which] + noise.to(fake) for which, noise in zip(wanted, draw.disturbances, strict=True)]
        samples = [
            lambda x=x, crop=crop: self._judge(logits, x, look, crop, text, history)
            for x, crop in zip(shown, draw.crops, strict=True)
        ]
        figures: dict[str, Tensor] = {}

        def _loss(all_of_them: Tensor) -> Tensor:
            made, seen = all_of_them[FAKE], all_of_them[REAL]
            figures["margin"] = (made - seen).mean()
            total = self.critic * (softplus(-made).mean() + softplus(seen).mean())
            disturbed = iter(all_of_them[2:])
            for name, weight, plain in (("r1", self.r1, seen), ("r2", self.r2, made)):
                if weight:
                    figures[name] = mse_loss(plain, next(disturbed))
                    total = total + weight * figures[name]
            return draw.share * total

        for number, (surrogate, value) in enumerate(in_turn(samples, _loss, self.replay), start=1):
            last = {name: figure.detach() for name, figure in figures.items()} | {"loss": value}
            yield surrogate, last if number == len(samples) else {}

    def _judge(self, logits: Logits, x_t: Tensor, look: RenoiseDraw, crop: Crop, text: Tensor, history: History) -> Tensor:
        t = torch.from_numpy(look.time).to(x_t)
        return logits(crop.of(x_t), t, text, history, crop.offset if self.offsets else (0, 0))

    def figure_names(self) -> list[str]:
        """Of the critic's figures, the loss last."""
        return ["margin", *(["r1"] if self.r1 else []), *(["r2"] if self.r2 else []), "loss"]


def cosine(one: Tensor, other: Tensor) -> Tensor:
    """Between two gradients of the same section: -1 where they pull apart."""
    one, other = one.double().flatten(), other.double().flatten()
    return (one @ other) / (one.norm() * other.norm()).clamp_min(torch.finfo(torch.float64).tiny)
