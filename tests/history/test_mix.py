"""The history mix: true shares, and what each mode leaves of a history."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch

from helios_train.history import FRAMES, History
from helios_train.history.mix import MODES, Mix, MixDraw, apply

MakeHistory = Callable[..., History]
Check = Callable[[History], None]
Fit = Callable[..., float]
COUNTS = (0, 9, 18, 19)
EVERY = [MixDraw(mode, oldest) for mode in MODES for oldest in (1, 10, 19)]


@pytest.mark.parametrize("shares", [(0.4, 0.1, 0.2, 0.3), (0.4, 0.0, 0.24, 0.36), (0.0, 0.0, 0.0, 1.0), (0.0, 1.0, 0.0, 0.0)])
def test_shares_are_true_shares(shares: tuple[float, float, float, float], chi_square: Fit) -> None:
    draws = [draw for iteration in range(100) for draw in Mix(*shares).draw(3, iteration, range(60))]
    counts = Counter(draw.mode for draw in draws)
    assert chi_square([counts[mode] for mode in MODES], shares) > 0.001


def test_v2v_drops_1_10_or_19_with_equal_odds(chi_square: Fit) -> None:
    oldest = Counter(draw.oldest for iteration in range(100) for draw in Mix(0, 0, 1, 0).draw(4, iteration, range(60)))
    assert set(oldest) == {1, 10, 19}
    assert chi_square([oldest[n] for n in (1, 10, 19)], [1 / 3] * 3) > 0.001


def test_how_much_is_dropped_does_not_depend_on_the_mode(chi_square: Fit) -> None:
    draws = [draw for iteration in range(100) for draw in Mix(0.5, 0, 0.5, 0).draw(5, iteration, range(60))]
    for mode in ("t2v", "v2v"):
        oldest = Counter(draw.oldest for draw in draws if draw.mode == mode)
        assert chi_square([oldest[n] for n in (1, 10, 19)], [1 / 3] * 3) > 0.001


@pytest.mark.parametrize("shares", [(0.5, 0.5, 0.5, -0.5), (0.4, 0.1, 0.2, 0.2)])
def test_shares_that_are_none(shares: tuple[float, float, float, float]) -> None:
    with pytest.raises(ValueError, match="sum to 1"):
        Mix(*shares)


def test_a_draw_belongs_to_its_place() -> None:
    mix = Mix(0.25, 0.25, 0.25, 0.25)
    whole = mix.draw(1, 7, range(64))
    assert whole == mix.draw(1, 7, range(40)) + mix.draw(1, 7, range(40, 64))
    assert whole[::-1] == mix.draw(1, 7, range(63, -1, -1))
    assert whole != mix.draw(1, 8, range(64)) and whole != mix.draw(2, 7, range(64))


def test_a_group_shares_its_draw(chi_square: Fit) -> None:
    mix = Mix(0.25, 0.25, 0.25, 0.25, group=4)
    draws = mix.draw(1, 0, range(4000))
    groups = [draws[at : at + 4] for at in range(0, 4000, 4)]
    assert all(draw == group[0] for group in groups for draw in group)
    assert mix.draw(1, 0, range(6, 10)) == draws[6:10]  # a group is a place, wherever the ranks' borders lie
    counts = Counter(group[0].mode for group in groups)
    assert chi_square([counts[mode] for mode in MODES], mix.shares) > 0.001


@pytest.mark.parametrize(
    ("draw", "kept", "anchored"),
    [
        (MixDraw("t2v", 1), 0, False),
        (MixDraw("i2v", 1), 1, True),
        (MixDraw("v2v", 1), 18, True),
        (MixDraw("v2v", 10), 9, True),
        (MixDraw("v2v", 19), 0, True),
        (MixDraw("full", 19), 19, True),
    ],
)
def test_what_each_mode_leaves(draw: MixDraw, kept: int, anchored: bool, make_history: MakeHistory, agrees: Check) -> None:
    before = make_history(COUNTS)
    after = apply(before, [draw] * len(COUNTS))
    agrees(after)
    assert after.counts == tuple(min(count, kept) for count in COUNTS)
    assert after.anchored == tuple(anchored and count > 0 for count in COUNTS)
    for b, count in enumerate(after.counts):
        assert torch.equal(after.frames[b, :, FRAMES - count :], before.frames[b, :, FRAMES - count :])
        assert torch.equal(after.anchor[b], before.anchor[b] if after.anchored[b] else torch.zeros_like(before.anchor[b]))
    assert after.empty == tuple(count == 0 or not anchored for count in COUNTS)


@pytest.mark.parametrize("draw", EVERY)
def test_section_0_has_no_anchor_in_any_mode(draw: MixDraw, make_history: MakeHistory, agrees: Check) -> None:
    after = apply(make_history([0]), [draw])
    agrees(after)
    assert after.counts == (0,) and after.anchored == (False,) and after.empty == (True,)
    assert not after.frames.any() and not after.anchor.any()


def test_samples_of_a_batch_are_mixed_each_by_its_own_draw(make_history: MakeHistory, agrees: Check) -> None:
    before = make_history([count for count in COUNTS for _ in EVERY])
    after = apply(before, EVERY * len(COUNTS))
    agrees(after)
    agrees(before)  # the history handed in is left as it was
    for b, draw in enumerate(EVERY * len(COUNTS)):
        own = slice(b, b + 1)
        alone = apply(History(before.frames[own], before.anchor[own], before.counts[own], before.anchored[own]), [draw])
        assert torch.equal(after.frames[b], alone.frames[0]) and torch.equal(after.anchor[b], alone.anchor[0])
        assert (after.counts[b], after.anchored[b]) == (alone.counts[0], alone.anchored[0])


def test_dropped_and_present(make_history: MakeHistory, agrees: Check) -> None:
    history = make_history(COUNTS)
    assert torch.equal(history.present() * torch.ones_like(history.frames), (history.frames != 0).float())
    assert history.present().shape == (4, 1, 19, 1, 1)
    agrees(history.dropped())
    assert history.dropped().empty == (True,) * 4 and history.empty == (True, False, False, False)
