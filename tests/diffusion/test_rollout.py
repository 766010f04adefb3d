"""The rollout with networks whose every call is seen: what builds a graph, what gradient reaches, what is drawn."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from helios_train.diffusion.pyramid import Pyramid, block_noise
from helios_train.diffusion.rollout import Rollout, RolloutDraw
from helios_train.errors import InputError
from helios_train.memory.live import LiveCounter
from helios_train.rng import generator, normal

SHAPE = (2, 3, 16, 32)
ROLLOUT = Rollout(Pyramid())
EXITS = list(product(range(2), repeat=3))


class Calls:
    """A network with a weight for each step of each level of `rollout`, told apart by t, that notes which calls have a graph."""

    def __init__(self, rollout: Rollout, empty: bool = False):
        schedule = rollout.schedule(SHAPE, empty)
        self.places = {
            np.float32(step.time): (level, at) for level, steps in enumerate(schedule) for at, step in enumerate(steps)
        }
        self.weights = {place: torch.tensor(0.5, requires_grad=True) for place in self.places.values()}
        self.graphs: dict[tuple[int, int], bool] = {}

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        assert t.dtype == torch.float32 and t.shape == (len(x),)
        place = self.places[np.float32(t[0].item())]
        assert place not in self.graphs
        v = self.weights[place] * x + 0.1
        self.graphs[place] = v.requires_grad
        return v


def drawn(exits: tuple[int, ...] | None, rollout: Rollout = ROLLOUT) -> RolloutDraw:
    draw = rollout.draw(0, "student", (1, 2), SHAPE, empty=False)
    return RolloutDraw(draw.start, draw.blocks, exits)


@pytest.mark.parametrize("exits", EXITS)
def test_gradient_reaches_what_the_exits_say_and_nothing_else_has_a_graph(exits: tuple[int, ...]) -> None:
    """A level's exit counts if all later levels are left at their first step."""
    network = Calls(ROLLOUT)
    ROLLOUT(network, drawn(exits), empty=False).output.square().sum().backward()
    reached = {(level, stop) for level, stop in enumerate(exits) if not any(exits[level + 1 :])}
    assert {place for place, weight in network.weights.items() if weight.grad is not None} == reached
    assert all(network.weights[place].grad.abs() > 0 for place in reached)  # type: ignore[union-attr]
    assert network.graphs == {(level, at): (level, at) in reached for level, stop in enumerate(exits) for at in range(stop + 1)}


@pytest.mark.parametrize("exits", EXITS)
def test_the_gradient_is_that_of_the_exit_calls_alone(exits: tuple[int, ...]) -> None:
    """By central differences: earlier steps of a level are held at what they were."""
    draw, network, step = drawn(exits), Calls(ROLLOUT), 1e-3
    draw = RolloutDraw(draw.start.double(), tuple(noise.double() for noise in draw.blocks), exits)
    ROLLOUT(network, draw, empty=False).output.sum().backward()
    for place, weight in network.weights.items():
        if weight.grad is None:
            continue
        found = []
        for sign in (1, -1):
            moved = Calls(ROLLOUT)
            moved.weights = {key: torch.tensor(0.5 + sign * step * (key == place), dtype=torch.float64) for key in moved.weights}
            found.append(ROLLOUT(moved, draw, empty=False).output.sum().item())
        assert weight.grad.item() == pytest.approx((found[0] - found[1]) / (2 * step), rel=1e-4)


@pytest.mark.parametrize("exits", EXITS)
def test_with_alignment_every_exit_with_an_earlier_estimate_keeps_its_graph(exits: tuple[int, ...]) -> None:
    network = Calls(ROLLOUT)
    rolled = ROLLOUT(network, drawn(exits), empty=False, align=True)
    assert torch.equal(rolled.output, ROLLOUT(Calls(ROLLOUT), drawn(exits), empty=False).output)
    assert [len(found) for found in rolled.estimates] == [stop + 1 for stop in exits]
    for level, (found, stop) in enumerate(zip(rolled.estimates, exits, strict=True)):
        assert found[-1].requires_grad == (stop > 0 or not any(exits[level + 1 :]))
        assert not any(estimate.requires_grad for estimate in found[:-1])
        if stop:
            found[-1].sum().backward(retain_graph=True)
            assert [place for place, weight in network.weights.items() if weight.grad is not None] == [(level, stop)]
            network.weights[level, stop].grad = None
    assert rolled.output is rolled.estimates[-1][-1]


def layers(width: int = 64) -> tuple[Callable[[Tensor, Tensor], Tensor], int]:
    """A network that keeps many activations, and how many bytes of them a call at full resolution keeps at least."""
    weight = torch.full((width, SHAPE[0]), 0.1, requires_grad=True)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return torch.einsum("dc,bdthw->bcthw", weight, torch.tanh(torch.einsum("dc,bcthw->bdthw", weight, x)))

    return velocity, 4 * width * int(np.prod(SHAPE[1:]))


@pytest.mark.parametrize("exits", EXITS)
def test_what_stays_alive_is_what_gradient_needs(exits: tuple[int, ...]) -> None:
    """Activations of a level are a quarter of the next one's; those of calls that lead nowhere are gone at the end."""
    network, full = layers()
    draw = drawn(exits)
    with LiveCounter() as counter:
        before = counter.claim([draw.start, draw.blocks], "given")
        rolled = ROLLOUT(network, draw, empty=False)
        kept = counter.live() - before
        needed = sum(full / 4 ** (2 - level) for level in range(3) if not any(exits[level + 1 :]))
        assert needed <= kept < needed + full / 10
        with torch.no_grad():
            output = ROLLOUT(network, draw, empty=False).output
            assert counter.live() - before - kept == output.nbytes
    assert rolled.output.requires_grad and not output.requires_grad


def test_grad_mode_is_left_as_it_was() -> None:
    for mode in (True, False):
        with torch.set_grad_enabled(mode):
            output = ROLLOUT(Calls(ROLLOUT), drawn((1, 0, 1)), empty=False).output
            assert torch.is_grad_enabled() == mode and output.requires_grad == mode

    def broken(x: Tensor, t: Tensor) -> Tensor:
        raise RuntimeError("a network that fails")

    with pytest.raises(RuntimeError, match="that fails"):
        ROLLOUT(broken, drawn((1, 1, 1)), empty=False)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("exits", EXITS)
def test_without_exits_every_step_is_run(exits: tuple[int, ...]) -> None:
    """That is the sampler; a batch of samples takes the same way as each alone."""
    network = Calls(ROLLOUT)
    output = ROLLOUT(network, drawn(None), empty=False).output
    assert len(network.graphs) == 6
    assert torch.equal(output, ROLLOUT(Calls(ROLLOUT), drawn((1, 1, 1)), empty=False).output)
    two = [ROLLOUT.draw(0, "sample", (0, number), SHAPE, False, early=False) for number in range(2)]
    blocks = tuple(torch.cat([one.blocks[level] for one in two]) for level in range(2))
    both = RolloutDraw(torch.cat([one.start for one in two]), blocks, exits)
    whole = ROLLOUT(Calls(ROLLOUT), both, empty=False).output
    alone = [ROLLOUT(Calls(ROLLOUT), RolloutDraw(one.start, one.blocks, exits), empty=False).output for one in two]
    torch.testing.assert_close(whole, torch.cat(alone))


@pytest.mark.parametrize("sigmas", ["table", "exact"])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_whole_timesteps_are_cut_not_rounded_and_leave_sigma(count: int, sigmas: str) -> None:
    kinds = [Rollout(Pyramid(count), (3,) * count, timesteps=kind, sigmas=sigmas) for kind in ("float", "int")]  # type: ignore[arg-type]
    cut = 0.0
    for floats, whole in zip(*(kind.schedule(SHAPE, empty=True) for kind in kinds), strict=True):
        assert [step.sigma for step in floats] == [step.sigma for step in whole]
        assert [int(step.time) for step in floats] == [step.time for step in whole] and len(whole) == 6
        cut = max(cut, *(step.time % 1 for step in floats))
    assert cut > 0.5


def test_empty_history_doubles_the_steps_unless_it_is_off() -> None:
    rollout = Rollout(Pyramid(), (1, 2, 3))
    assert rollout.counts(False) == (1, 2, 3) and rollout.counts(True) == (2, 4, 6)
    plain = Rollout(Pyramid(), (1, 2, 3), amplify=False)
    assert plain.counts(True) == (1, 2, 3) and plain.schedule(SHAPE, True) == rollout.schedule(SHAPE, False)


def test_exits_are_uniform_and_independent() -> None:
    rollout = Rollout(Pyramid(), (1, 2, 4), amplify=True)
    for empty, counts in ((False, (1, 2, 4)), (True, (2, 4, 8))):
        found = np.array([rollout.exits(0, "student", (0, position), empty) for position in range(4000)])
        for level, count in enumerate(counts):
            shares = np.bincount(found[:, level], minlength=count) / len(found)
            assert len(shares) == count and np.abs(shares - 1 / count).max() < 4.5 * (0.25 / len(found)) ** 0.5
        assert abs(np.corrcoef(found[:, 1], found[:, 2])[0, 1]) < 4.5 / len(found) ** 0.5


def test_draws_belong_to_their_purpose_and_place() -> None:
    """As elsewhere: (seed, purpose, iteration, position) and nothing else; the levels' noises are independent."""
    draw = ROLLOUT.draw(3, "student", (5, 7), SHAPE, empty=True)
    assert torch.equal(draw.start, normal(generator(3, "student start noise", 5, 7), (1, *SHAPE)))
    for level, noise in enumerate(draw.blocks, start=1):
        size = (1, *SHAPE[:2], SHAPE[2] >> (2 - level), SHAPE[3] >> (2 - level))
        assert torch.equal(noise, block_noise(normal(generator(3, "student level noise", 5, 7, level), size)))
    assert draw.exits == ROLLOUT.exits(3, "student", (5, 7), True)
    for seed, who, where in ((4, "student", (5, 7)), (3, "critic", (5, 7)), (3, "student", (6, 7)), (3, "student", (5, 8))):
        other = ROLLOUT.draw(seed, who, where, SHAPE, True)
        assert not torch.equal(other.start, draw.start) and not torch.equal(other.blocks[1], draw.blocks[1])
    assert ROLLOUT.draw(3, "student", (5, 7), SHAPE, empty=True, early=False).exits is None


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"steps": (2, 2)}, "3 levels need as many numbers of steps"),
        ({"steps": (2, 0, 2)}, "at least 1"),
        ({"timesteps": "round"}, "float or int"),
        ({"sigmas": "nearest"}, "table or exact"),
    ],
)
def test_settings_that_mean_nothing(keys: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Rollout(Pyramid(), **keys)  # type: ignore[arg-type]


def test_draws_that_do_not_fit() -> None:
    for exits in ((2, 0, 0), (0, 0), (0, -1, 0)):
        with pytest.raises(ValueError, match="of levels of \\[2, 2, 2\\] steps"):
            ROLLOUT(Calls(ROLLOUT), drawn(exits), empty=False)
    with pytest.raises(ValueError, match="all but the first"):
        ROLLOUT(Calls(ROLLOUT), RolloutDraw(drawn(None).start, (), None), empty=False)
    with pytest.raises(InputError, match="does not go through 3 levels"):
        ROLLOUT.draw(0, "student", (0, 0), (2, 3, 12, 16), empty=False)
