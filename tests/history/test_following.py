"""What precedes the next section, sample by sample."""

from __future__ import annotations

from collections.abc import Callable

import torch

from helios_train import rng
from helios_train.history import FRAMES, SECTION, History


def test_the_newest_frames_and_the_first_anchor_there_is(
    make_history: Callable[..., History], agrees: Callable[[History], None]
) -> None:
    history = make_history([0, 1, 12, 19, 0], [False, True, False, True, True])
    latents = rng.normal(rng.generator(0, "latents"), (5, 3, SECTION, 4, 6))
    grown = history.followed_by(latents)
    agrees(grown)
    assert grown.counts == (9, 10, 19, 19, 9) and grown.anchored == (True,) * 5
    assert torch.equal(grown.frames, torch.cat([history.frames, latents], dim=2)[:, :, -FRAMES:])
    for sample, had in enumerate(history.anchored):
        assert torch.equal(grown.anchor[sample], history.anchor[sample] if had else latents[sample, :, :1])


def test_gradient_passes_to_the_frames_and_to_an_anchor_that_was_made(make_history: Callable[..., History]) -> None:
    latents = torch.ones(2, 3, SECTION, 4, 6, requires_grad=True)
    grown = make_history([0, 3]).followed_by(latents)
    assert grown.frames.requires_grad and grown.anchor.requires_grad
    grown.anchor.sum().backward()
    assert latents.grad is not None
    assert latents.grad[0, :, 0].eq(1).all() and not latents.grad[0, :, 1:].any() and not latents.grad[1].any()
    assert not make_history([1, 3]).followed_by(latents).anchor.requires_grad


def test_nothing_is_empty(agrees: Callable[[History], None]) -> None:
    nothing = History.none(2, 3, 4, 6)
    agrees(nothing)
    assert nothing.empty == (True, True) and nothing.frames.dtype == torch.float32
