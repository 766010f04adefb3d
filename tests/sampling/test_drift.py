"""Drift detection: it acts where mean and variance both leave, on the history that is seen, and nowhere else."""

from __future__ import annotations

import torch
from torch import Tensor

from helios_train import rng
from helios_train.history import SECTION, History
from helios_train.sampling.drift import DriftGuard
from helios_train.sampling.pipeline import grown

SHAPE = (2, 4, SECTION, 6, 6)


def section(number: int, mean: float = 0.0, scale: float = 1.0) -> Tensor:
    """The second video as asked for, the first one steady."""
    latents = rng.normal(rng.generator(0, "section", number), SHAPE)
    return torch.stack([latents[0], mean + scale * latents[1]])


def test_a_video_that_drifts_in_both_sees_noise_and_no_other_does() -> None:
    guard, history = DriftGuard(seed=3), History.none(2, 4, 6, 6)
    for number in range(3):
        history = history.followed_by(section(number))
        assert guard(section(number), history) is history
    drifting = section(3, mean=0.5, scale=1.3)
    history = history.followed_by(drifting)
    seen = guard(drifting, history)
    assert guard.drifted == [(False, False)] * 3 + [(False, True)]
    assert torch.equal(seen.frames[0], history.frames[0]) and not torch.equal(seen.frames[1], history.frames[1])
    away = (seen.frames[1] - history.frames[1]).square().mean(dim=(0, 2, 3))
    assert (away > 0).all() and len(set(away.tolist())) == len(away)  # every frame its own level


def test_either_alone_is_no_drift() -> None:
    for mean, scale in ((0.5, 1.0), (0.0, 1.3)):
        guard, history = DriftGuard(seed=3), History.none(2, 4, 6, 6)
        for latents in (section(0), section(1, mean, scale)):
            history = history.followed_by(latents)
            assert guard(latents, history) is history


def test_the_running_averages_follow_slowly() -> None:
    """A new level that stays is drift until the averages are there: .9^n of the way is left after n sections."""
    guard, history = DriftGuard(seed=3), History.none(2, 4, 6, 6)
    guard(section(0), history.followed_by(section(0)))
    for number in range(1, 30):
        guard(section(number, 0.4, 1.2), history.followed_by(section(number)))
    drifted = [both[1] for both in guard.drifted[1:]]
    assert all(drifted[:5]) and not any(drifted[15:])  # .4 x .9^n < .15 from n = 9.3 on


def test_sections_grow_on_what_is_kept_and_see_what_is_guarded() -> None:
    seen: list[History] = []

    def denoise(number: int, text: Tensor, history: History) -> Tensor:
        seen.append(history)
        return section(number, *((0.6, 1.4) if number >= 2 else ()))

    guard = DriftGuard(seed=3)
    sections = list(grown(denoise, [torch.zeros(2, 1, 4)] * 4, History.none(2, 4, 6, 6), guard))
    assert [both[1] for both in guard.drifted] == [False, False, True, True]
    kept = torch.cat(sections[:3], dim=2)[:, :, -19:]
    assert torch.equal(seen[2].frames[1], torch.cat([torch.zeros(2, 4, 1, 6, 6), *sections[:2]], dim=2)[1])
    assert torch.equal(seen[3].frames[0], kept[0]) and not torch.equal(seen[3].frames[1], kept[1])
