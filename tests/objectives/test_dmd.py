"""Distribution matching with networks whose scores are known in closed form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from helios_train import rng
from helios_train.diffusion.pyramid import Pyramid
from helios_train.diffusion.rollout import Rollout
from helios_train.diffusion.schedule import dynamic_mu, shift
from helios_train.history import History
from helios_train.objectives.dmd import (
    Cast,
    CriticObjective,
    Decoupled,
    Scores,
    StudentDraw,
    StudentObjective,
    Told,
    augmentation,
    matching,
    pulled,
)
from helios_train.objectives.flow import Velocity
from helios_train.objectives.gan import Adversary, cosine
from helios_train.objectives.regularise import MeanVariance
from helios_train.objectives.renoise import Renoise, RenoiseDraw

SHAPE = (3, 9, 16, 32)
ROLLOUT = Rollout(Pyramid())
STUDENT = StudentObjective(ROLLOUT, Renoise("beta"))
CRITIC = CriticObjective(ROLLOUT, Renoise())
TEXT, NEGATIVE = (rng.normal(rng.generator(0, name), (1, 5, 7)) for name in ("text", "negative"))
FRAMES = rng.normal(rng.generator(0, "history"), (1, 3, 19, 16, 32))
HISTORY = History(FRAMES, FRAMES[:, :, :1], (19,), (True,))
TOLD = Told(TEXT, NEGATIVE, HISTORY)
X = rng.normal(rng.generator(0, "x"), (2, *SHAPE))


class Network:
    """`weight x + shift`, the shift where it is told TEXT; keeps what it was told and whether gradient was on."""

    def __init__(self, weight: float, shift: float = 0.3):
        self.weight = torch.tensor(weight, requires_grad=True)
        self.shift = shift
        self.calls: list[tuple[Tensor, Tensor, Tensor, History, bool]] = []

    def __call__(self, x_t: Tensor, t: Tensor, text: Tensor, history: History) -> Tensor:
        self.calls.append((x_t, t, text, history, torch.is_grad_enabled()))
        return self.weight * x_t + self.shift * (text is TEXT)

    def bound(self, text: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x_t, t: self(x_t, t, text, HISTORY)


def cast(teacher: float = 0.4, critic: float = 0.6) -> Cast:
    return Cast(Network(0.5), Network(teacher), Network(critic))


def look(seed: int = 0) -> RenoiseDraw:
    return Renoise().draw(seed, "a test", 0, range(2), SHAPE)


def with_exits(draw: StudentDraw, exits: tuple[int, ...]) -> StudentDraw:
    return replace(draw, rollouts=(*draw.rollouts[:-1], replace(draw.rollouts[-1], exits=exits)))


def drawn(objective: StudentObjective = STUDENT, exits: tuple[int, ...] = (0, 1, 1)) -> StudentDraw:
    return with_exits(objective.draw(0, 3, 4, SHAPE, empty=False), exits)


def scores(teacher: float = 0.4, critic: float = 0.6) -> Scores:
    return Scores(Network(critic).bound(TEXT), Network(teacher).bound(TEXT), Network(teacher).bound(NEGATIVE))


@pytest.mark.parametrize("guidance", [0.0, 3.0])
def test_the_gradient_in_closed_form(guidance: float) -> None:
    """f - r = sigma ((teacher - critic) x_t + guidance shift), over each sample's own distance from r."""
    draw = look()
    sigma = torch.from_numpy(draw.sigma).float()[:, None, None, None, None]
    x_t = (1 - sigma) * X + sigma * draw.noise
    clean = x_t - sigma * (0.4 * x_t + 0.3) - guidance * sigma * 0.3
    distance = torch.stack([(X[b] - clean[b]).abs().mean() for b in range(2)])[:, None, None, None, None]
    wanted = sigma * (-0.2 * x_t + guidance * 0.3) / distance
    torch.testing.assert_close(matching(scores(), X, draw, guidance), wanted, rtol=1e-4, atol=1e-5)


def test_the_losss_gradient_is_g_over_numel() -> None:
    """To the last bits, also where g is a millionth of x."""
    for size in (1.0, 1e-6):
        x, gradient = X.clone().requires_grad_(), size * rng.normal(rng.generator(0, "g"), X.shape)
        loss = pulled(x, gradient)
        loss.backward()
        torch.testing.assert_close(x.grad, gradient / X.numel(), rtol=1e-6, atol=1e-9 * size / X.numel())
        assert loss.item() == pytest.approx(0.5 * gradient.square().mean().item(), rel=1e-5)


def test_the_students_gradient_is_what_the_scores_say_of_its_section() -> None:
    """A student that adds parameters to its last answer: theirs is -sigma g / numel at its last level's exit."""
    added = torch.zeros(1, *SHAPE, requires_grad=True)

    def student(x_t: Tensor, t: Tensor, text: Tensor, history: History) -> Tensor:
        return 0.5 * x_t + (added if x_t.shape == added.shape else 0)

    draw, made = drawn(), cast()
    loss = STUDENT(replace(made, student=student), TOLD, draw)
    loss.total.backward()
    x = ROLLOUT(lambda x_t, t: student(x_t, t, TEXT, HISTORY), draw.rollouts[0], empty=False).output.detach()
    gradient = matching(scores(), x, draw.renoise, 3.0)
    sigma = ROLLOUT.schedule(SHAPE, False)[-1][1].sigma
    torch.testing.assert_close(added.grad, -sigma * gradient / x.numel(), rtol=1e-5, atol=1e-12)
    assert loss.total.item() == pytest.approx(0.5 * gradient.square().mean().item(), rel=1e-5)
    spread = (x - x.mean(dim=1, keepdim=True)).square().mean().sqrt().item()
    assert loss.sums.tolist() == [pytest.approx([loss.total.item(), spread, 0, loss.total.item()]), [1, 1, 0, 1]]
    assert STUDENT.log_names() == ["loss/dmd", "saturation", "saturation_real", "loss"]
    real = STUDENT(replace(made, student=student), replace(TOLD, real=2 * x), draw).sums  # the same noise, so the same section
    assert real[:, 2].tolist() == pytest.approx([2 * spread, 1])


@pytest.mark.parametrize("guidance", [0.0, 3.0])
def test_nothing_where_critic_and_teacher_agree(guidance: float) -> None:
    objective, made = replace(STUDENT, guidance=guidance), cast(0.4, 0.4)
    told = replace(TOLD, negative=TEXT)  # guidance that leads nowhere
    loss = objective(made, told, drawn(objective))
    loss.total.backward()
    assert isinstance(made.student, Network) and made.student.weight.grad is not None
    assert loss.total.item() == 0 and made.student.weight.grad.item() == 0


def test_scores_run_without_gradient_and_are_told_what_they_should_be() -> None:
    made = cast()
    shared = HISTORY.keep((5,), (True,))

    def views(section: int, history: History) -> tuple[History, History]:
        return shared, HISTORY.keep((2,), (True,))

    draw = drawn()
    STUDENT(made, replace(TOLD, views=views), draw).total.backward()
    student, teacher, critic = made.student, made.teacher, made.critic
    assert isinstance(student, Network) and isinstance(teacher, Network) and isinstance(critic, Network)
    assert student.weight.grad is not None and teacher.weight.grad is None and critic.weight.grad is None
    assert all(history.counts == (2,) and text is TEXT for _, _, text, history, _ in student.calls)
    assert [text for _, _, text, _, _ in teacher.calls] == [TEXT, NEGATIVE] and [call[2] for call in critic.calls] == [TEXT]
    for x_t, t, _, history, graph in (*teacher.calls, *critic.calls):
        assert history is shared and not graph and not x_t.requires_grad
        assert torch.equal(x_t, teacher.calls[0][0]) and t.tolist() == draw.renoise.time.tolist() and t.dtype == torch.float32
    without = cast()
    replace(STUDENT, guidance=0.0)(without, TOLD, drawn())
    assert isinstance(without.teacher, Network) and len(without.teacher.calls) == 1


def test_score_arithmetic_is_fp32_whatever_the_networks_answer_in() -> None:
    """What a network rounds stays rounded, and nothing is rounded after it."""

    def halved(x_t: Tensor, t: Tensor) -> Tensor:
        return (0.4 * x_t).to(torch.bfloat16)

    def higher(x_t: Tensor, t: Tensor) -> Tensor:
        return halved(x_t, t) + torch.tensor(0.125, dtype=torch.bfloat16)

    found = matching(Scores(higher, halved, halved), X, look(), 3.0)
    exact = matching(
        Scores(lambda x, t: higher(x, t).float(), lambda x, t: halved(x, t).float(), lambda x, t: halved(x, t).float()),
        X,
        look(),
        3.0,
    )
    assert found.dtype == torch.float32 and torch.equal(found, exact)


def test_no_distance_is_no_division_by_zero() -> None:
    """A teacher that finds the section as it is."""
    draw, x = look(), X[:2]
    answer = lambda x_t, t: draw.noise - x  # noqa: E731
    gradient = matching(Scores(answer, answer, answer), x, draw, 3.0)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("role", ["student", "teacher", "critic"])
def test_a_network_that_fails_shows_in_what_is_differentiated_and_logged(role: str) -> None:
    made = replace(cast(), **{role: Network(float("nan"))})
    loss = STUDENT(made, TOLD, drawn())
    assert not loss.total.isfinite() and not loss.sums[0, -1].isfinite()


def gradient_of(objective: StudentObjective, draw: StudentDraw) -> tuple[float, list[list[float]], list[str]]:
    made = cast()
    loss = objective(made, TOLD, draw)
    loss.total.backward()
    assert isinstance(made.student, Network) and made.student.weight.grad is not None
    return made.student.weight.grad.item(), loss.sums.tolist(), objective.log_names()


def test_alignment_acts_where_a_level_was_left_late() -> None:
    aligned = replace(STUDENT, align=0.25)
    plain, (values, _), _ = gradient_of(STUDENT, drawn())
    found, (both, counts), names = gradient_of(aligned, drawn())
    assert names == ["loss/dmd", "loss/align", "saturation", "saturation_real", "loss"] and counts == [1, 1, 1, 0, 1]
    assert found != pytest.approx(plain, rel=1e-3) and both[0] == pytest.approx(values[0])
    assert both[1] > 0 and both[4] == pytest.approx(both[0] + 0.25 * both[1])
    early = drawn(exits=(0, 0, 0))
    assert gradient_of(aligned, early)[0] == gradient_of(STUDENT, early)[0]
    assert gradient_of(aligned, early)[1][1] == [1, 0, 1, 0, 1]  # not counted


def test_the_mean_variance_regulariser_acts() -> None:
    regular = replace(STUDENT, mean_variance=MeanVariance(weight=2.0))
    plain, (values, _), _ = gradient_of(STUDENT, drawn())
    found, (both, _), names = gradient_of(regular, drawn())
    assert names == ["loss/dmd", "loss/mean_variance", "saturation", "saturation_real", "loss"]
    assert found != pytest.approx(plain, rel=1e-3) and both[0] == pytest.approx(values[0])
    assert both[1] > 0 and both[4] == pytest.approx(both[0] + 2 * both[1])


def test_the_adversary_acts_from_its_start_on() -> None:
    """Heads that want the section smaller: their gradient joins that of matching, weighted; before the start all is as
    without."""
    objective = replace(STUDENT, adversary=Adversary(start=3, student=0.05))  # draws are of iteration 3
    made = replace(cast(), logits=lambda x, t, text, history, offset: x.mean(dim=(1, 2, 3, 4))[:, None])
    draw = drawn(objective)
    assert draw.judged is not None and replace(objective, adversary=Adversary(start=4)).draw(0, 3, 4, SHAPE, False).judged is None
    loss = objective(made, TOLD, draw)
    loss.total.backward()
    assert isinstance(made.student, Network) and made.student.weight.grad is not None
    plain, (values, _), _ = gradient_of(STUDENT, drawn())
    both, names = loss.sums[0].tolist(), objective.log_names()
    assert names == ["loss/dmd", "loss/gan", "gan/cosine", "saturation", "saturation_real", "loss"]
    assert both[0] == pytest.approx(values[0]) and both[5] == pytest.approx(both[0] + 0.05 * both[1]) and -1 <= both[2] <= 1
    assert made.student.weight.grad.item() != pytest.approx(plain, rel=1e-3)
    x = ROLLOUT(Network(0.5).bound(TEXT), draw.rollouts[0], empty=False).output.detach().requires_grad_()
    seen = replace(draw.renoise, noise=draw.judged.noise).noised(x)
    direct = torch.nn.functional.softplus(draw.judged.crop.of(seen).mean(dim=(1, 2, 3, 4))).mean()
    assert both[1] == pytest.approx(direct.item(), rel=1e-5)
    direct.backward()
    assert both[2] == pytest.approx(cosine(matching(scores(), x, draw.renoise, 3.0), x.grad).item(), rel=1e-4)


def test_decoupled_matching_and_guidance_are_two_pulls() -> None:
    objective = replace(STUDENT, decoupled=Decoupled(start=100, end=200))
    draw = drawn(objective)
    assert draw.guidance is not None and not torch.equal(draw.guidance.noise, draw.renoise.noise)
    found, (values, _), names = gradient_of(objective, draw)
    assert names == ["loss/dmd", "loss/guidance", "saturation", "saturation_real", "loss"]
    assert values[4] == pytest.approx(values[0] + values[1])
    x = ROLLOUT(Network(0.5).bound(TEXT), draw.rollouts[0], empty=False).output.detach()
    pulls = matching(scores(), x, draw.renoise, 0.0), augmentation(scores(), x, draw.guidance, 3.0)
    assert values[:2] == pytest.approx([0.5 * pull.square().mean().item() for pull in pulls], rel=1e-5)
    assert found != pytest.approx(gradient_of(STUDENT, drawn())[0], rel=1e-3)


def test_together_the_two_pulls_are_guided_matching() -> None:
    """At one look, with each pull's own normaliser taken out."""
    draw = look()
    x_t = draw.noised(X)
    told = scores()
    clean = draw.denoised(told.teacher, x_t).detach()
    guided = clean + 3 * (clean - draw.denoised(told.negative, x_t).detach())
    unit = (X - clean).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    whole = matching(told, X, draw, 3.0) * (X - guided).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    parts = (matching(told, X, draw, 0.0) + augmentation(told, X, draw, 3.0)) * unit
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)


def test_guidances_own_look_goes_lower_and_lower() -> None:
    """At most 1000, 565, then the time of the exit, each before the shift."""
    objective = replace(STUDENT, renoise=Renoise(low=1, high=1000), decoupled=Decoupled(start=100, end=200))
    shape = (1, 1, 8, 8)
    for iteration, top in ((99, 1000.0), (100, 565.0), (199, 565.0), (200, None)):
        times = []
        for position in range(300):
            draw = objective.draw(0, iteration, position, shape, empty=False)
            assert draw.guidance is not None and draw.rollouts[0].exits is not None
            left = ROLLOUT.schedule(shape, False)[-1][draw.rollouts[0].exits[-1]].time
            highest = 1000 * shift(np.array((left if top is None else top) / 1000), dynamic_mu(8 * 8 // 4))
            times.append(draw.guidance.time[0] / highest)
        assert 0.95 < max(times) < 1.01


def test_the_critic_learns_what_the_student_makes() -> None:
    student = Network(0.5)
    draw = CRITIC.draw(0, 3, 4, SHAPE, empty=False)
    with torch.no_grad():
        x = ROLLOUT(student.bound(TEXT), draw.rollouts[0], empty=False).output
    loss = CRITIC(student, lambda *_: draw.renoise.noise - x, TOLD, draw)
    assert loss.total.item() == 0
    off: Velocity = lambda *_: draw.renoise.noise - x + 0.5  # noqa: E731
    loss = CRITIC(student, off, TOLD, draw)
    assert loss.total.item() == pytest.approx(0.25, rel=1e-5)
    column = min(int(draw.renoise.sigma[0] * 5), 4)
    assert loss.sums[0].tolist() == pytest.approx([0.25 * (bin_ in (column, 5)) for bin_ in range(6)], rel=1e-5)
    assert loss.sums[1].tolist() == [float(bin_ in (column, 5)) for bin_ in range(6)]
    assert CRITIC.log_names()[::5] == ["loss/critic/sigma_0.0-0.2", "loss/critic"]


def test_the_critics_step_reaches_the_critic_alone() -> None:
    student, critic = Network(0.5), Network(0.2)
    draw = CRITIC.draw(0, 3, 4, SHAPE, empty=False)
    shared = HISTORY.keep((5,), (True,))
    loss = CRITIC(student, critic, replace(TOLD, views=lambda section, history: (shared, history)), draw)
    loss.total.backward()
    assert critic.weight.grad is not None and critic.weight.grad.item() != 0 and student.weight.grad is None
    assert not any(call[4] for call in student.calls) and all(call[3] is HISTORY for call in student.calls)
    ((x_t, t, text, history, graph),) = critic.calls
    assert history is shared and text is TEXT and graph and not x_t.requires_grad and t.tolist() == draw.renoise.time.tolist()
    assert not loss.sums.requires_grad


def test_student_and_critic_draw_for_themselves() -> None:
    mine, its = STUDENT.draw(0, 3, 4, SHAPE, empty=False), CRITIC.draw(0, 3, 4, SHAPE, empty=False)
    assert not torch.equal(mine.rollouts[0].start, its.rollouts[0].start)
    assert not torch.equal(mine.renoise.noise, its.renoise.noise)
    again = STUDENT.draw(0, 3, 4, SHAPE, empty=False)
    assert torch.equal(mine.rollouts[0].start, again.rollouts[0].start) and mine.renoise.time == again.renoise.time


def test_several_sections_are_scored_with_the_history_they_had() -> None:
    nothing = History.none(1, 3, 16, 32)
    draw = STUDENT.draw(0, 3, 4, SHAPE, empty=True, sections=2)
    made = cast()
    STUDENT(made, replace(TOLD, history=nothing), draw).total.backward()
    assert isinstance(made.critic, Network) and isinstance(made.student, Network)
    assert made.critic.calls[0][3].counts == (9,) and made.student.weight.grad is not None
    assert [call[4] for call in made.student.calls[:12]] == [False] * 12  # the first section's, amplified


def test_a_step_asks_for_no_tensors_value() -> None:
    """It runs on fake tensors, which have none: it can be planned, and a GPU never waits for the host."""
    made = [objective.draw(0, 3, 4, SHAPE, empty=False) for objective in (STUDENT, CRITIC)]
    objective = replace(STUDENT, align=0.25, mean_variance=MeanVariance(), decoupled=Decoupled(0, 0))
    decoupled = objective.draw(0, 3, 4, SHAPE, empty=False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        weight = torch.ones((), requires_grad=True)
        network: Velocity = lambda x_t, t, text, history: weight * x_t + t[:, None, None, None, None]  # noqa: E731
        for chosen, draw in ((STUDENT, made[0]), (objective, decoupled)):
            chosen(Cast(network, network, network), TOLD, draw).total.backward()
        CRITIC(network, network, TOLD, made[1]).total.backward()
        assert isinstance(weight.grad, FakeTensor)
