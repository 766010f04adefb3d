"""ODE regression on the ways of teachers that are known in closed form."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from helios_train import rng
from helios_train.data.pairs import Trajectory, Walk
from helios_train.diffusion.pyramid import Pyramid
from helios_train.diffusion.rollout import Rollout
from helios_train.history import History
from helios_train.objectives.flow import Loss
from helios_train.objectives.ode import OdeDraw, OdeObjective

SHAPE = (3, 9, 16, 32)
PYRAMID = Pyramid()
OBJECTIVE = OdeObjective(PYRAMID)
THETA = 0.7  # of the teacher dx/dsigma = theta x
TEXT = rng.normal(rng.generator(0, "text"), (1, 5, 7))


def walked(section: int, level: int, kind: str = "table", pyramid: Pyramid = PYRAMID, rows: int = 16) -> Walk:
    """The linear teacher's way from noise, x(sigma) = end exp(theta sigma), at the student's steps."""
    rollout = Rollout(pyramid, (2,) * pyramid.count, sigmas=kind)  # type: ignore[arg-type]
    steps = rollout.schedule((9, rows, 2 * rows), empty=section == 0)[level]
    side = pyramid.sizes(rows, 2 * rows)[level]
    end = rng.normal(rng.generator(0, "end", section, level), (1, 3, 9, *side))
    states = [end * math.exp(THETA * step.sigma) for step in steps]
    return Walk(torch.cat([*states, end]), np.array([step.time for step in steps], dtype=np.float32))


def trajectory(sections: int = 5, kind: str = "table", pyramid: Pyramid = PYRAMID) -> Trajectory:
    walks = tuple(tuple(walked(section, level, kind, pyramid) for level in range(pyramid.count)) for section in range(sections))
    return Trajectory(walks, TEXT)


class Exact:
    """`(x - end) / sigma` of the linear teacher: `x (1 - exp(-theta sigma)) / sigma`; level and sigma are those of the time."""

    def __init__(self, kind: str = "table", whole: bool = False, pyramid: Pyramid = PYRAMID):
        self.sigmas = {}
        for empty, timesteps in product((True, False), ("int",) if whole else ("float",)):
            cut = Rollout(pyramid, (2,) * pyramid.count, sigmas=kind, timesteps=timesteps)  # type: ignore[arg-type]
            for steps in cut.schedule(SHAPE, empty):
                self.sigmas |= {float(np.float32(step.time)): step.sigma for step in steps}
        self.weight = torch.tensor(1.0, requires_grad=True)
        self.seen: list[tuple[Tensor, Tensor, History]] = []

    def __call__(self, x_t: Tensor, t: Tensor, text: Tensor, history: History) -> Tensor:
        self.seen.append((x_t, t, history))
        sigma = self.sigmas[t.item()]
        return self.weight * x_t * ((1 - math.exp(-THETA * sigma)) / sigma)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("kind", ["table", "exact"])
@pytest.mark.parametrize("timesteps", ["float", "int"])
def test_the_teachers_own_solution_costs_nothing(count: int, kind: str, timesteps: str) -> None:
    pyramid = Pyramid(count)
    objective = OdeObjective(pyramid, sections=2, sigmas=kind, timesteps=timesteps)  # type: ignore[arg-type]
    given, network = trajectory(2, kind, pyramid), Exact(kind, timesteps == "int", pyramid)
    for steps in product(range(2), repeat=count):
        draw = OdeDraw((0, 1), (tuple(2 * step + 1 for step in steps), steps))
        losses = list(objective.losses(network, given, draw))
        assert len(losses) == 2 * count
        for loss in losses:
            assert loss.total.item() < 1e-9 * 80 and loss.total.requires_grad


def test_terms_add_up_and_are_differentiated_one_by_one() -> None:
    """Half the squared error of the end point, weight 80, over 9 terms; a term's gradient is the whole's share."""
    given, draw = trajectory(), OBJECTIVE.draw(0, 1, 2, trajectory())
    network = Exact()
    network.weight = torch.tensor(0.9, requires_grad=True)
    wanted: list[Tensor] = []
    for section, steps in zip(draw.sections, draw.steps, strict=True):
        for level, step in enumerate(steps):
            walk = given.sections[section][level]
            x, sigma = walk.latents[step], network.sigmas[float(walk.times[step])]
            end_hat = x - sigma * 0.9 * x * ((1 - math.exp(-THETA * sigma)) / sigma)
            wanted.append(80 * 0.5 * (end_hat - walk.latents[-1]).square().mean())
    losses: list[Loss] = []
    for loss in OBJECTIVE.losses(network, given, draw):
        loss.total.backward()
        losses.append(loss)
    assert [9 * loss.total.item() for loss in losses] == pytest.approx([value.item() for value in wanted], rel=1e-4)
    sums = torch.stack([loss.sums for loss in losses]).sum(dim=0)
    assert OBJECTIVE.log_names() == ["loss/level_0", "loss/level_1", "loss/level_2", "loss"]
    assert sums[1].tolist() == [3, 3, 3, 9] and not sums.requires_grad
    assert (sums[0, -1] / 9).item() == pytest.approx(sum(loss.total.item() for loss in losses), rel=1e-5)
    assert (sums[0, 1] / 3).item() == pytest.approx(sum(value.item() for value in wanted[1::3]) / 3, rel=1e-4)
    apart = network.weight.grad
    (whole,) = torch.autograd.grad(
        torch.stack([loss.total for loss in OBJECTIVE.losses(network, given, draw)]).sum(), network.weight
    )
    assert apart is not None and apart.item() == pytest.approx(whole.item(), rel=1e-5) and whole.item() != 0


def test_history_is_the_teachers() -> None:
    """Its own earlier sections, the newest 19 frames, anchored by its first; nothing before the first section."""
    given = trajectory()
    network = Exact()
    draw = OdeDraw((0, 2, 4), ((3, 2, 1), (0, 1, 0), (1, 1, 1)))
    assert len(list(OBJECTIVE.losses(network, given, draw))) == 9
    finals = [given.sections[section][-1].latents[-1:] for section in range(5)]
    assert len({id(history) for _, _, history in network.seen}) == 3
    first, second, third = (network.seen[at][2] for at in (0, 3, 6))
    assert first.empty == (True,) and not first.frames.any()
    assert second.counts == (18,) and torch.equal(second.frames[:, :, 1:], torch.cat(finals[:2], dim=2))
    assert third.counts == (19,) and torch.equal(third.frames, torch.cat(finals[1:4], dim=2)[:, :, -19:])
    assert torch.equal(third.anchor, finals[0][:, :, :1]) and torch.equal(second.anchor, third.anchor)
    for at, (section, level) in enumerate(product((0, 2, 4), range(3))):
        walk, step = given.sections[section][level], draw.steps[at // 3][level]
        assert torch.equal(network.seen[at][0][0], walk.latents[step])
        assert network.seen[at][1].tolist() == [walk.times[step]]


def test_whole_timesteps_are_cut_and_leave_sigma() -> None:
    whole = OdeObjective(PYRAMID, timesteps="int")
    for level, factor in enumerate(PYRAMID.factors("linear", *SHAPE[1:])):
        for time in (990.7, 500.4, 20.9):
            assert whole._at(level, time, factor)[0] == OBJECTIVE._at(level, time, factor)[0]
            assert whole._at(level, time, factor)[1] == int(time) and OBJECTIVE._at(level, time, factor)[1] == time


def test_sigma_is_the_tables_at_the_stored_times() -> None:
    """The stored times of the published teacher at 384 x 640, whose sigmas are the shifted table's own."""
    stored = [(998.5342, 902.1383, 834.0803, 783.1105), (742.8216, 639.9061, 547.0159, 463.0754)]
    stored.append((385.4137, 328.5603, 253.8176, 151.6525))
    exact = OdeObjective(PYRAMID, sigmas="exact")
    for level, factor in enumerate(PYRAMID.factors("linear", 9, 48, 80)):
        for time in stored[level]:
            sigma = OBJECTIVE._at(level, time, factor)[0]
            assert sigma in PYRAMID.table(level, factor)[0]
            assert exact._at(level, time, factor)[0] == pytest.approx(sigma, abs=1e-6)  # times have four decimals


def test_three_sections_of_five_and_steps_are_uniform() -> None:
    given = Trajectory(
        tuple(tuple(Walk(torch.zeros(5 - 2 * (s > 0), 1), np.zeros(4 - 2 * (s > 0))) for _ in range(3)) for s in range(5)), TEXT
    )
    draws = [OBJECTIVE.draw(0, 0, position, given) for position in range(3000)]
    assert all(len(set(draw.sections)) == 3 and list(draw.sections) == sorted(draw.sections) for draw in draws)
    chosen = np.bincount([section for draw in draws for section in draw.sections], minlength=5) / len(draws)
    assert np.abs(chosen - 0.6).max() < 4.5 * (0.24 / 3000) ** 0.5
    for section, count in ((0, 4), (3, 2)):
        steps = [row for draw in draws for number, row in zip(draw.sections, draw.steps, strict=True) if number == section]
        for level in range(3):
            shares = np.bincount([row[level] for row in steps], minlength=count) / len(steps)
            assert len(shares) == count and np.abs(shares - 1 / count).max() < 4.5 * (0.25 / len(steps)) ** 0.5
    assert OBJECTIVE.draw(0, 0, 7, given) == draws[7] != OBJECTIVE.draw(0, 1, 7, given)


def test_fewer_sections_than_asked_for_are_all_taken() -> None:
    assert OBJECTIVE.draw(0, 0, 0, trajectory(2)).sections == (0, 1)


def test_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="one more state than times"):
        Walk(torch.zeros(2, 1), np.zeros(2))
    with pytest.raises(ValueError, match="of \\[2\\] levels, of a pyramid of 3"):
        OBJECTIVE.draw(0, 0, 0, trajectory(1, pyramid=Pyramid(2)))
    for keys in ({"sections": 0}, {"sigmas": "nearest"}, {"timesteps": "round"}):
        with pytest.raises(ValueError):
            OdeObjective(PYRAMID, **keys)  # type: ignore[arg-type]


def test_a_trajectory_moves_as_a_whole() -> None:
    half = Trajectory(
        tuple(tuple(Walk(w.latents.bfloat16(), w.times) for w in s) for s in trajectory(2).sections), TEXT.bfloat16()
    )
    moved = half.to("cpu")
    assert moved.text.dtype == moved.final(1).dtype == torch.float32
    assert torch.equal(moved.final(1), half.final(1).float()) and len(moved.sections) == 2
