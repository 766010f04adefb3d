"""The Mid objective with networks whose loss is known in closed form."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers import HeliosScheduler
from torch import Tensor, nn

from helios_train import rng
from helios_train.diffusion.pyramid import Level, Pyramid, block_noise, doubled, noise_pyramid, pyramid
from helios_train.diffusion.schedule import STEPS, dynamic_mu, shift
from helios_train.errors import InputError
from helios_train.history import History
from helios_train.objectives.flow import BINS
from helios_train.objectives.pyramid_flow import PyramidDraw, PyramidFlowObjective

SHAPE = (3, 9, 16, 32)
PLAIN = PyramidFlowObjective(Pyramid())
INIT = PyramidFlowObjective(Pyramid(), ratios=(1, 2, 1))  # as the first published phase
KINDS = [
    {},
    {"dynamic": "linear"},
    {"dynamic": "exponential", "cap": 7.0},
    {"sigmas": "exact"},
    {"timesteps": "int", "dynamic": "linear"},
    {"stratified": True},
]


def batch(size: int, shape: tuple[int, ...] = SHAPE) -> tuple[Tensor, Tensor, History]:
    """Target, text, history."""
    draw = rng.generator(0, "a batch of the tests")
    channels, _, rows, columns = shape
    frames, anchor = rng.normal(draw, (size, channels, 19, rows, columns)), rng.normal(draw, (size, channels, 1, rows, columns))
    return rng.normal(draw, (size, *shape)), rng.normal(draw, (size, 5, 7)), History(frames, anchor, (19,) * size, (True,) * size)


class Exact:
    """Answers pass after pass with the true velocity, plus `off[pass]` ([B] or a number)."""

    def __init__(self, objective: PyramidFlowObjective, target: Tensor, draw: PyramidDraw, off: list[Tensor] | None = None):
        points = objective.pyramid.points(target, draw.noise.to(target))
        self.answers = [points[one.level][0] - points[one.level][1] for one in draw.passes]
        if off is not None:
            self.answers = [answer + by[:, None, None, None, None] for answer, by in zip(self.answers, off, strict=True)]
        self.queue = iter(self.answers)

    def __call__(self, x_t: Tensor, t: Tensor, text: Tensor, history: History) -> Tensor:
        return next(self.queue)


class Knowing:
    """A network that knows the clean latents: it finds its level by t, the noise in x_t, and answers start - end."""

    def __init__(self, chosen: Pyramid, clean: Tensor, kind: str = "none"):
        self.chosen, self.clean = chosen, pyramid(clean, chosen.count)
        self.shifted = kind != "none"

    def sigma(self, level: Level, t: Tensor) -> Tensor:
        """The local sigma whose time is t."""
        if self.chosen.count == 1:  # as Pyramid.steps walks a single level
            return t / STEPS
        if self.shifted:
            return (t - level.last) / (level.first - level.last)
        return 0.999 * (1 - (STEPS - 1) / STEPS * (t - level.first) / (level.last - level.first))

    def __call__(self, x_t: Tensor, t: Tensor, text: Tensor | None, history: History | None) -> Tensor:
        number = next(n for n, clean in enumerate(self.clean) if clean.shape == x_t.shape)
        level, clean = self.chosen.levels[number], self.clean[number]
        sigma = self.sigma(level, t)[:, None, None, None, None]
        below = doubled(self.clean[number - 1]) if number else torch.zeros_like(clean)
        start = level.start if number else 1.0  # the first level starts from noise alone
        given = sigma * (1 - start) * below + (1 - sigma) * (1 - level.end) * clean
        noise = (x_t - given) / (sigma * start + (1 - sigma) * level.end)
        return (start - level.end) * noise + (1 - start) * below - (1 - level.end) * clean


class Small(nn.Module):
    """A network that hears everything it is handed and works at every level."""

    def __init__(self, channels: int = 3):
        super().__init__()
        with rng.forked(0, "a network of the tests"):
            self.first, self.second = nn.Conv3d(channels, 8, 3, padding=1), nn.Conv3d(8, channels, 3, padding=1)
            self.time, self.text, self.past = nn.Linear(1, 8), nn.Linear(7, 8), nn.Linear(channels, 8)

    def forward(self, x_t: Tensor, t: Tensor, text: Tensor, history: History) -> Tensor:
        past = self.past(history.frames.mean(dim=(2, 3, 4)) + history.anchor.mean(dim=(2, 3, 4)))
        told = self.time(t[:, None] / STEPS) + self.text(text.mean(dim=1)) + past
        return self.second(torch.tanh(self.first(x_t) + told[:, :, None, None, None]))


@pytest.mark.parametrize("keys", KINDS)
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_the_exact_velocity_costs_nothing(count: int, keys: dict[str, object]) -> None:
    objective = PyramidFlowObjective(Pyramid(count), ratios=(2,) * count, **keys)  # type: ignore[arg-type]
    target, text, history = batch(2)
    draw = objective.draw(0, 0, [0, 1], SHAPE, 2)
    losses = list(objective.losses(Exact(objective, target, draw), target, text, history, draw))
    assert len(losses) == 2 * count
    for loss in losses:
        assert loss.total.item() == 0 and not loss.sums[0].any()


@pytest.mark.parametrize("keys", KINDS[:4])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_a_network_that_knows_the_clean_latents_finds_the_velocity(count: int, keys: dict[str, object]) -> None:
    """So x_t and t are what they are said to be: t alone tells the level's sigma."""
    objective = PyramidFlowObjective(Pyramid(count), ratios=(3,) * count, **keys)  # type: ignore[arg-type]
    target, text, history = batch(2)
    target = target.double()
    draw = objective.draw(0, 0, [0, 1], SHAPE, 2)
    network = Knowing(objective.pyramid, target, str(keys.get("dynamic", "none")))
    assert objective.errors(network, target, text, history, draw).max() < 1e-12


@pytest.mark.parametrize("scheduler", ["euler", "unipc"])
@pytest.mark.parametrize("kind", ["none", "linear", "exponential"])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_rollout_with_the_true_velocity_recovers_the_clean_latents(count: int, kind: str, scheduler: str) -> None:
    """Coarse noise, each level walked by diffusers' solver over our sigmas and times, doubled and renoised in between."""
    chosen = Pyramid(count)
    clean = batch(1)[0].double()
    network = Knowing(chosen, clean, kind)
    draw = rng.generator(0, "a rollout of the tests")
    x = noise_pyramid(rng.normal(draw, clean.shape).double(), count)[0]
    solver = HeliosScheduler(
        stages=count,
        stage_range=[level / count for level in range(count + 1)],
        scheduler_type=scheduler,
        use_dynamic_shifting=kind != "none",
        time_shift_type="linear" if kind == "none" else kind,
    )
    factors, tokens = chosen.factors(kind, *SHAPE[1:]), chosen.tokens(*SHAPE[1:])
    for level in range(count):
        if level:
            noise = rng.normal(draw, (*x.shape[:-2], 2 * x.shape[-2], 2 * x.shape[-1])).double()
            x = chosen.renoise(level, x, block_noise(noise, chosen.gamma))
        sigmas, times = chosen.steps(level, 5, factors[level])
        solver.set_timesteps(5, level, mu=dynamic_mu(tokens[level]))
        solver.sigmas = torch.from_numpy(sigmas).double()
        for time in torch.from_numpy(times).double():
            velocity = network(x, time[None], None, None)
            x = solver.step(velocity, time, x.float() if scheduler == "euler" else x, return_dict=False)[0].double()
    torch.testing.assert_close(x, clean, rtol=0, atol=1e-5)


def test_what_the_network_is_handed() -> None:
    """x_t of each level, fp32 times on the target's device, the text and the history as they came: at full resolution."""
    target, text, history = batch(2)
    draw = INIT.draw(0, 0, [0, 1], SHAPE, 2)
    seen: list[tuple[Tensor, Tensor]] = []

    def velocity(x_t: Tensor, t: Tensor, given: Tensor, past: History) -> Tensor:
        assert given is text and past is history and t.dtype == x_t.dtype == torch.float32
        seen.append((x_t, t))
        return torch.zeros_like(x_t)

    INIT.errors(velocity, target, text, history, draw)
    points = INIT.pyramid.points(target, draw.noise)
    assert [one.level for one in draw.passes] == [0, 1, 1, 2]
    for (x_t, t), one in zip(seen, draw.passes, strict=True):
        start, end = points[one.level]
        np.testing.assert_allclose(t, one.time, rtol=1e-6)
        for b, sigma in enumerate(one.sigma.tolist()):
            torch.testing.assert_close(x_t[b], sigma * start[b] + (1 - sigma) * end[b])


def test_the_loss_is_the_mean_over_passes_and_its_sums_tell_levels_and_sigmas_apart() -> None:
    target, text, history = batch(4)
    draw = INIT.draw(3, 1, range(4), SHAPE, 4)
    off = [torch.arange(1.0, 5.0) + 10 * number for number in range(4)]
    losses = list(INIT.losses(Exact(INIT, target, draw, off), target, text, history, draw))
    squares = torch.stack(off).square()
    for loss, own in zip(losses, squares, strict=True):
        assert loss.total.item() == pytest.approx(own.mean().item() / 4, rel=1e-5)
    total, sums = torch.stack([loss.total for loss in losses]).sum(), torch.stack([loss.sums for loss in losses]).sum(0)
    assert total.item() == pytest.approx(squares.mean().item(), rel=1e-5)
    wanted = {name: torch.zeros(2) for name in INIT.log_names()}
    for one, own in zip(draw.passes, squares, strict=True):
        for sigma, square in zip(one.sigma, own, strict=True):
            low = int(sigma * 5) / 5
            for name in (f"loss/level_{one.level}/sigma_{low:.1f}-{low + 0.2:.1f}", f"loss/level_{one.level}", "loss"):
                wanted[name] += torch.stack([square, torch.tensor(1.0)])
    assert sums.shape == (2, 3 * (BINS + 1) + 1)
    for column, name in enumerate(INIT.log_names()):
        torch.testing.assert_close(sums[:, column], wanted[name], rtol=1e-5, atol=1e-4)
    assert (sums[0, -1] / sums[1, -1]).item() == pytest.approx(total.item(), rel=1e-5)
    assert INIT.log_names()[:7:5] + INIT.log_names()[-2:] == [
        "loss/level_0/sigma_0.0-0.2",
        "loss/level_0",
        "loss/level_2",
        "loss",
    ]


def gradients(network: nn.Module) -> list[Tensor]:
    found = [parameter.grad for parameter in network.parameters()]
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in found)
    network.zero_grad()
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_level_gradients_add_up_to_those_of_one_graph(count: int) -> None:
    objective = PyramidFlowObjective(Pyramid(count), ratios=tuple(range(1, count + 1)), timesteps="int")
    target, text, history = batch(2)
    draw, network = objective.draw(1, 2, [0, 1], SHAPE, 2), Small()
    for loss in objective.losses(network, target, text, history, draw):
        assert not loss.sums.requires_grad
        loss.total.backward()
    apart = gradients(network)
    objective.errors(network, target, text, history, draw).mean().backward()
    for one, whole in zip(apart, gradients(network), strict=True):
        torch.testing.assert_close(one, whole, rtol=1e-5, atol=1e-5 * whole.abs().max().item())


def test_one_passes_graph_is_alive_at_a_time() -> None:
    """When a pass begins, nothing of those before it that was differentiated is left."""
    target, text, history = batch(1)
    draw, network = INIT.draw(0, 0, [0], SHAPE, 1), Small()
    earlier: list[weakref.ref[Tensor]] = []

    def velocity(x_t: Tensor, t: Tensor, given: Tensor, past: History) -> Tensor:
        assert all(one() is None for one in earlier)
        earlier.append(weakref.ref(x_t))
        return network(x_t, t, given, past)

    for loss in INIT.losses(velocity, target, text, history, draw):
        loss.total.backward()
    assert len(earlier) == 4


@pytest.mark.parametrize("keys", KINDS)
def test_draws_do_not_depend_on_the_split(keys: dict[str, object]) -> None:
    objective = PyramidFlowObjective(Pyramid(), ratios=(1, 2, 1), **keys)  # type: ignore[arg-type]
    whole = objective.draw(1, 2, range(8), SHAPE, 8)
    for size in (1, 2, 4):
        parts = [objective.draw(1, 2, range(at, at + size), SHAPE, 8) for at in range(0, 8, size)]
        assert torch.equal(torch.cat([part.noise for part in parts]), whole.noise)
        for number, one in enumerate(whole.passes):
            np.testing.assert_array_equal(np.concatenate([part.passes[number].sigma for part in parts]), one.sigma)
            np.testing.assert_array_equal(np.concatenate([part.passes[number].time for part in parts]), one.time)
    for seed, iteration in ((1, 3), (2, 2)):
        other = objective.draw(seed, iteration, range(8), SHAPE, 8)
        assert not torch.equal(other.noise, whole.noise)
        assert all((left.sigma != right.sigma).any() for left, right in zip(other.passes, whole.passes, strict=True))


def test_accumulated_micro_batches_equal_the_whole_batch() -> None:
    target, text, history = batch(4)
    network = Small()

    def total(positions: range, rows: slice) -> float:
        own = History(history.frames[rows], history.anchor[rows], history.counts[rows], history.anchored[rows])
        draw = INIT.draw(1, 2, positions, SHAPE, 4)
        with torch.no_grad():
            return sum(loss.total.item() for loss in INIT.losses(network, target[rows], text[rows], own, draw))

    parts = [total(range(at, at + 2), slice(at, at + 2)) for at in (0, 2)]
    assert sum(parts) / 2 == pytest.approx(total(range(4), slice(0, 4)), rel=1e-6)


def drawn_sigmas(objective: PyramidFlowObjective, count: int = 2000) -> list[np.ndarray]:
    return [one.sigma for one in objective.draw(0, 0, range(count), (1, 1, 8, 8), count).passes]


@pytest.mark.parametrize("sigmas", ["table", "exact"])
def test_levels_are_uniform_and_passes_independent(sigmas: str) -> None:
    found = drawn_sigmas(PyramidFlowObjective(Pyramid(), ratios=(1, 2, 1), sigmas=sigmas))  # type: ignore[arg-type]
    for sigma in found:
        places = 1000 * (1 - sigma / 0.999)
        off_table = np.abs(places - np.round(places)).max()
        assert places.min() > -1e-9 and places.max() < 999.5 + 0.5 * (sigmas == "exact")
        assert off_table < 1e-9 if sigmas == "table" else off_table > 0.4
        steps = np.arange(2001) / 2000
        uniform = np.sort(places) / 1000
        assert max(np.abs(uniform - steps[1:]).max(), np.abs(uniform - steps[:-1]).max()) * 2000**0.5 < 1.95
    correlation = np.corrcoef(found)[~np.eye(4, dtype=bool)]
    assert np.abs(correlation).max() < 4.5 / 2000**0.5


def test_the_table_is_entered_at_the_place_below() -> None:
    """At floor(1000 u), as published."""
    exact = drawn_sigmas(PyramidFlowObjective(Pyramid(), sigmas="exact"), 200)
    for one, other in zip(drawn_sigmas(PLAIN, 200), exact, strict=True):
        np.testing.assert_allclose(1000 * (1 - one / 0.999), np.floor(1000 * (1 - other / 0.999)), rtol=0, atol=1e-9)


def test_strata_spread_a_global_batch_in_every_pass() -> None:
    for sigma in drawn_sigmas(PyramidFlowObjective(Pyramid(), ratios=(1, 2, 1), stratified=True, sigmas="exact"), 50):
        assert sorted(np.floor(50 * (1 - sigma / 0.999))) == list(range(50))


@pytest.mark.parametrize("kind", ["linear", "exponential"])
def test_the_shift_counts_each_levels_own_tokens(kind: str) -> None:
    shape = (16, 9, 48, 80)
    objective = PyramidFlowObjective(Pyramid(), dynamic=kind)  # type: ignore[arg-type]
    plain, shifted = PLAIN.draw(0, 0, range(3), shape, 3), objective.draw(0, 0, range(3), shape, 3)
    for one, other, level, tokens in zip(plain.passes, shifted.passes, objective.pyramid.levels, (540, 2160, 8640), strict=True):
        factor = dynamic_mu(tokens) if kind == "linear" else np.exp(dynamic_mu(tokens))
        np.testing.assert_allclose(other.sigma, shift(one.sigma, factor), rtol=1e-12)
        np.testing.assert_allclose(other.time, level.last + other.sigma * (level.first - level.last), rtol=1e-12)
    assert torch.equal(plain.noise, shifted.noise)


@pytest.mark.parametrize("dynamic", ["none", "linear"])
def test_whole_timesteps_are_cut_not_rounded_and_leave_sigma(dynamic: str) -> None:
    floats = PyramidFlowObjective(Pyramid(), dynamic=dynamic).draw(0, 0, range(50), SHAPE, 50)  # type: ignore[arg-type]
    whole = PyramidFlowObjective(Pyramid(), dynamic=dynamic, timesteps="int").draw(0, 0, range(50), SHAPE, 50)  # type: ignore[arg-type]
    for one, other in zip(floats.passes, whole.passes, strict=True):
        np.testing.assert_array_equal(one.sigma, other.sigma)
        np.testing.assert_array_equal(other.time, torch.from_numpy(one.time).to(torch.int64))
        assert (one.time - other.time).max() > 0.5


def test_measuring_at_quantiles_and_at_a_sigma() -> None:
    noise = rng.normal(rng.generator(0, "held out"), (2, *SHAPE))
    draw, higher = INIT.at_quantiles(2, noise)
    assert INIT.parts == ("level_0", "level_1", "level_2")
    assert draw.noise is noise and [one.level for one in draw.passes] == [0, 1, 2]  # one pass a level, whatever the ratios
    for one, level in zip(draw.passes, INIT.pyramid.levels, strict=True):
        np.testing.assert_allclose(one.sigma, [0.24975] * 2, rtol=1e-12)
        np.testing.assert_allclose(one.time, [level.at(np.array(750.0))[1]] * 2, rtol=1e-12)
    assert all((one.sigma > other.sigma).all() for one, other in zip(higher.passes, draw.passes, strict=True))
    for sigma, found in ((0.5, 0.500499), (1.0, 0.999), (0.0, 0.000999)):  # the entry above
        given = INIT.at_sigma(sigma, noise)
        assert given.noise is noise and [one.level for one in given.passes] == [0, 1, 2]
        for one, level in zip(given.passes, INIT.pyramid.levels, strict=True):
            np.testing.assert_allclose(one.sigma, [found] * 2, rtol=1e-9)
            np.testing.assert_allclose(one.time, [level.at(np.array(round(1000 * (1 - found / 0.999))))[1]] * 2, rtol=1e-9)
    shifted = PyramidFlowObjective(Pyramid(), dynamic="linear", sigmas="exact").at_sigma(0.3, noise)
    np.testing.assert_allclose([one.sigma for one in shifted.passes], 0.3)  # as asked for, whatever the shift
    target, text, history = batch(2)
    errors = INIT.errors(Exact(INIT, target, draw, [torch.tensor([1.0, 2.0])] * 3), target, text, history, draw)
    torch.testing.assert_close(errors, torch.tensor([[1.0, 4.0]] * 3), rtol=1e-5, atol=0)


def test_sizes_that_do_not_divide_are_refused_before_anything_is_drawn() -> None:
    with pytest.raises(InputError, match="72x128 pixels .* 64x128, 128x128"):
        PLAIN.draw(0, 0, [0], (3, 9, 9, 16), 1)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"ratios": (1, 2)}, "3 levels need as many ratios"),
        ({"ratios": (1, 0, 1)}, "at least 1"),
        ({"timesteps": "round"}, "float or int"),
        ({"sigmas": "nearest"}, "table or exact"),
    ],
)
def test_settings_that_mean_nothing(keys: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        PyramidFlowObjective(Pyramid(), **keys)  # type: ignore[arg-type]


def test_a_networks_gradient_does_not_reach_the_target() -> None:
    target, text, history = batch(1)
    velocity: Callable[..., Tensor] = lambda x_t, t, text, history: x_t  # noqa: E731
    draw = PLAIN.draw(0, 0, [0], SHAPE, 1)
    assert not any(loss.total.requires_grad for loss in PLAIN.losses(velocity, target, text, history, draw))
