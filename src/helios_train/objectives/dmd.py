"""Distribution matching: the student's sections are moved to where the teacher finds them likelier than the critic does.

The critic learns by flow matching what the student makes. At a noised section `x_t` the two scores' estimates of the clean one,
`f` of the critic and `r` of the guided teacher, tell the student where to go: `g = (f - r) / mean|x - r|`, and `x` gets the
gradient `g / numel` (DMD, Yin et al., 2024; its improved form DMD2; the published system is PKU-YuanGroup/Helios). Scores run
without gradient; their arithmetic is fp32.

Axis letters: B batch, C latent channels, T latent frames, H W latent rows and columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from helios_train.diffusion.rollout import BoundVelocity, Rollout, RolloutDraw
from helios_train.diffusion.schedule import STEPS
from helios_train.history import History
from helios_train.objectives.flow import Loss, Velocity, names_by_sigma, sums_by_sigma
from helios_train.objectives.gan import Adversary, CriticJudged, Logits, StudentJudged, cosine
from helios_train.objectives.regularise import MeanVariance, alignment, saturation
from helios_train.objectives.renoise import Renoise, RenoiseDraw
from helios_train.objectives.student import Section, Views, as_it_is, bound, draw_sections, roll

LEAST = 1e-8  # of the normaliser


@dataclass(frozen=True)
class Cast:
    """The networks of a step, each as `velocity(x_t, t, text, history)`, and the critic's heads, if there is an adversary."""

    student: Velocity
    teacher: Velocity
    critic: Velocity
    logits: Logits | None = None


@dataclass(frozen=True)
class Told:
    """What a step is told: the prompt and the text guidance leads away from [B, rows, dim], history, and what is seen of it.

    real: the clip's own section after that history, shaped like the student's.
    """

    text: Tensor
    negative: Tensor
    history: History
    views: Views = as_it_is
    real: Tensor | None = None


@dataclass(frozen=True)
class Scores:
    """What is asked of teacher and critic about one section: `(x_t, t) -> v`. negative: the teacher, told the negative text."""

    critic: BoundVelocity
    teacher: BoundVelocity
    negative: BoundVelocity


@torch.no_grad()
def matching(scores: Scores, x: Tensor, draw: RenoiseDraw, guidance: float) -> Tensor:
    """The gradient g of distribution matching at x [B, C, T, H, W], shaped like it; `r = c + guidance (c - u)`."""
    x_t = draw.noised(x)
    critic, teacher = draw.denoised(scores.critic, x_t), draw.denoised(scores.teacher, x_t)
    if guidance:
        teacher = teacher + guidance * (teacher - draw.denoised(scores.negative, x_t))
    return (critic - teacher) / _distance(x, teacher)


@torch.no_grad()
def augmentation(scores: Scores, x: Tensor, draw: RenoiseDraw, guidance: float) -> Tensor:
    """The share of the gradient that is the teacher's guidance alone: `-guidance (c - u) / mean|x - c|`."""
    x_t = draw.noised(x)
    teacher = draw.denoised(scores.teacher, x_t)
    return guidance * (draw.denoised(scores.negative, x_t) - teacher) / _distance(x, teacher)


def pulled(x: Tensor, gradient: Tensor) -> Tensor:
    """`0.5 mean((x - sg[x - g])^2)`: its gradient by x is g / numel. In fp64, where x - g keeps all digits of g."""
    x, gradient = x.double(), gradient.double()
    return 0.5 * (x - (x - gradient).detach()).square().mean()


def _distance(x: Tensor, clean: Tensor) -> Tensor:
    return (x - clean).abs().mean(dim=(1, 2, 3, 4), keepdim=True).clamp_min(LEAST)


@dataclass(frozen=True)
class Decoupled:
    """Distribution matching without guidance, and guidance as a pull of its own at its own noise level (Liu et al., 2025).

    Guidance looks from at most time 1000 before iteration `start`, from at most `middle` before `end`, then from at most the time
    at which the student left its last level.
    """

    start: int
    end: int
    middle: int = 565

    def top(self, iteration: int, exit_time: float) -> float:
        """The highest time, before the shift."""
        if iteration < self.start:
            return STEPS
        return self.middle if iteration < self.end else exit_time


@dataclass(frozen=True)
class StudentDraw:
    """What is random in one sample's step: the rollout, the look at its last section, guidance's own look if decoupled, and what
    the adversary sees, once it has started."""

    rollouts: tuple[RolloutDraw, ...]
    renoise: RenoiseDraw
    guidance: RenoiseDraw | None = None
    judged: StudentJudged | None = None


@dataclass(frozen=True)
class StudentObjective:
    """The student's loss on one sample: distribution matching on its own section, and what is added to it.

    guidance: of the teacher; 3 is the usual classifier-free guidance of 4. align: weight of `alignment` (published: .25 where
    used). mean_variance, decoupled, adversary: off without. exits and sizes as of `rollout`.
    """

    rollout: Rollout
    renoise: Renoise
    guidance: float = 3.0
    align: float = 0.0
    mean_variance: MeanVariance | None = None
    decoupled: Decoupled | None = None
    adversary: Adversary | None = None

    def draw(self, seed: int, iteration: int, position: int, shape: Sequence[int], empty: bool, sections: int = 1) -> StudentDraw:
        """Draws for one position of the global batch; the rest as of `draw_sections`."""
        rollouts = draw_sections(self.rollout, seed, "student", (iteration, position), shape, empty, sections)
        where = iteration, [position], shape
        looked = self.renoise.draw(seed, "student renoise", *where)
        judged = self.adversary.draw_student(seed, iteration, position, shape) if self.adversary else None
        if self.decoupled is None:
            return StudentDraw(rollouts, looked, judged=judged)
        exits = rollouts[-1].exits or (-1,)
        left = self.rollout.schedule(shape, empty and sections == 1)[-1][exits[-1]]
        top = self.decoupled.top(iteration, left.time)
        return StudentDraw(rollouts, looked, self.renoise.draw(seed, "student guidance", *where, top), judged)

    def __call__(self, cast: Cast, told: Told, draw: StudentDraw) -> Loss:
        """The loss of one sample; gradient reaches the student alone. ValueError as of `roll`."""
        section = roll(self.rollout, cast.student, told.text, told.history, draw.rollouts, told.views, align=self.align > 0)
        scores = Scores(
            critic=bound(cast.critic, told.text, section.history),
            teacher=bound(cast.teacher, told.text, section.history),
            negative=bound(cast.teacher, told.negative, section.history),
        )
        gradients = self._gradients(scores, section.latents, draw)
        terms = {name: (1.0, pulled(section.latents, gradient)) for name, gradient in gradients.items()}
        terms |= self._added(section)
        values = {"saturation": saturation(section.latents.detach()).mean()}
        if told.real is not None:
            values["saturation_real"] = saturation(told.real).mean()
        if self.adversary and draw.judged:
            assert cast.logits is not None
            judged = draw.renoise, draw.judged, told.text, section.history
            value, gradient = self.adversary.student_loss(cast.logits, section.latents, *judged)
            terms["gan"] = (self.adversary.student * draw.judged.share, value.double())
            values["gan/cosine"] = cosine(sum(gradients.values()), gradient)  # type: ignore[arg-type]
        total = torch.stack([weight * term for weight, term in terms.values()]).sum()
        values |= {f"loss/{name}": term for name, (_, term) in terms.items()}
        return Loss(total, self._sums(values | {"loss": total}))

    def _gradients(self, scores: Scores, x: Tensor, draw: StudentDraw) -> dict[str, Tensor]:
        """What comes from the scores: gradients g at x, of which `pulled` makes terms."""
        if self.decoupled is None:
            return {"dmd": matching(scores, x, draw.renoise, self.guidance)}
        assert draw.guidance is not None
        return {
            "dmd": matching(scores, x, draw.renoise, 0.0),
            "guidance": augmentation(scores, x, draw.guidance, self.guidance),
        }

    def _added(self, section: Section) -> dict[str, tuple[float, Tensor]]:
        """Weight and value of the other terms; of `align` nothing where every level was left at its first step."""
        terms = {}
        if self.align and (aligned := alignment(section.estimates)) is not None:
            terms["align"] = (self.align, aligned.double())
        if self.mean_variance is not None:
            terms["mean_variance"] = (self.mean_variance.weight, self.mean_variance(section.latents).double())
        return terms

    def log_names(self) -> list[str]:
        """Names of the columns of `Loss.sums`: the terms that are on, unweighted, saturation, the whole.

        The section's saturation rises above the real one's where guidance is too strong. `gan/cosine`: between the gradients of
        matching and adversary at the section.
        """
        on = {
            "dmd": True,
            "guidance": self.decoupled is not None,
            "align": self.align > 0,
            "mean_variance": self.mean_variance is not None,
            "gan": self.adversary is not None,
        }
        judged = ["gan/cosine"] if self.adversary else []
        return [*(f"loss/{name}" for name, used in on.items() if used), *judged, "saturation", "saturation_real", "loss"]

    def _sums(self, values: Mapping[str, Tensor]) -> Tensor:
        names = self.log_names()
        sums = values["loss"].new_zeros(2, len(names), dtype=torch.float32)
        for name, value in values.items():
            sums[0, names.index(name)] = value.detach()
            sums[1, names.index(name)] = 1
        return sums


@dataclass(frozen=True)
class CriticDraw:
    """What is random in one sample's step of the critic: the student's rollout, the look at its last section, and what the heads
    see, once the adversary has started."""

    rollouts: tuple[RolloutDraw, ...]
    renoise: RenoiseDraw
    judged: CriticJudged | None = None


@dataclass(frozen=True)
class CriticObjective:
    """The critic's losses on one sample: flow matching, `(v - (noise - x))^2`, on a section the student made without gradient,
    and with an adversary what its heads learn from that section and the real one."""

    rollout: Rollout
    renoise: Renoise
    adversary: Adversary | None = None

    def draw(self, seed: int, iteration: int, position: int, shape: Sequence[int], empty: bool, sections: int = 1) -> CriticDraw:
        """Draws for one position of the global batch, none of them the student's; the rest as of `draw_sections`."""
        rollouts = draw_sections(self.rollout, seed, "critic", (iteration, position), shape, empty, sections)
        looked = self.renoise.draw(seed, "critic renoise", iteration, [position], shape)
        judged = self.adversary.draw_critic(seed, iteration, position, shape) if self.adversary else None
        return CriticDraw(rollouts, looked, judged)

    def __call__(self, student: Velocity, critic: Velocity, told: Told, draw: CriticDraw) -> Loss:
        """Flow matching on what the student makes now; gradient reaches the critic alone. ValueError as of `roll`."""
        return self.denoising(critic, told, self.made(student, told, draw), draw)

    @torch.no_grad()
    def made(self, student: Velocity, told: Told, draw: CriticDraw) -> Section:
        """The student's section, without gradient. ValueError as of `roll`."""
        return roll(self.rollout, student, told.text, told.history, draw.rollouts, told.views)

    def denoising(self, critic: Velocity, told: Told, section: Section, draw: CriticDraw) -> Loss:
        """Flow matching on a section the student made."""
        x, look = section.latents, draw.renoise
        predicted = look.velocity(bound(critic, told.text, section.history), look.noised(x))
        errors = (predicted - (look.noise.to(x) - x)).square().flatten(1).mean(dim=1)
        sums = sums_by_sigma(errors.detach(), look.sigma)
        if self.adversary:
            sums = torch.cat([sums, sums.new_zeros(2, len(self.adversary.figure_names())), sums[:, -1:]], dim=1)
        return Loss(errors.mean(), sums)

    def judging(self, logits: Logits, told: Told, section: Section, draw: CriticDraw) -> Iterator[Loss]:
        """What the heads and the critic learn of telling that section from the real one, noised alike: parts to be differentiated
        one after the other. Nothing before the adversary's start. ValueError where no real section was told."""
        if self.adversary is None or draw.judged is None:
            return
        if told.real is None:
            raise ValueError("an adversary tells the student's sections from real ones, and was told none")
        given = section.latents, told.real, draw.renoise, draw.judged, told.text, section.history
        names = self.log_names()
        for surrogate, figures in self.adversary.critic_losses(logits, *given):
            sums = surrogate.new_zeros(2, len(names), dtype=torch.float32)
            for name, value in figures.items():
                column = names.index(f"gan/{name}")
                sums[0, column], sums[1, column] = value, 1
                if name == "loss":
                    sums[0, -1] = value  # counted with the sample's flow matching
            yield Loss(surrogate, sums)

    def log_names(self) -> list[str]:
        """Names of the columns of `Loss.sums`: flow matching by bins of sigma and in all, the adversary's figures, the whole."""
        judged = [*(f"gan/{name}" for name in self.adversary.figure_names()), "loss"] if self.adversary else []
        return [*names_by_sigma("loss/critic"), *judged]
