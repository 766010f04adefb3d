"""The adversary: published losses, signs, R1 against its closed form, who shares a crop, and when it begins."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from helios_train import rng
from helios_train.errors import InputError
from helios_train.history import History
from helios_train.objectives.gan import Adversary, Crop, cosine, crop_size
from helios_train.objectives.renoise import Renoise, RenoiseDraw

SHAPE = (16, 9, 8, 12)
GOLDEN = json.loads((Path(__file__).parents[1] / "parity" / "golden" / "gan_loss.json").read_text())
TEXT, HISTORY = torch.zeros(1, 4, 8), History.none(1, 16, 8, 12)
NOW = Adversary(start=0)


def numbers(name: str, *shape: int) -> Tensor:
    return rng.normal(rng.generator(0, name), shape)


X, REAL = numbers("fake", 1, *SHAPE), numbers("real", 1, *SHAPE)
LOOK = Renoise().draw(0, "a test", 0, [0], SHAPE)
QUIET = RenoiseDraw(np.zeros(1), np.zeros(1), torch.zeros(1, *SHAPE))  # sigma 0


class Linear:
    """Logits [B, 2] that are linear in the mean over a crop's frames and places, and in where the crop lies."""

    def __init__(self) -> None:
        self.weight = numbers("weight", 16, 2).requires_grad_()
        self.seen: list[tuple[Tensor, tuple[int, int] | None]] = []

    def __call__(self, x_t: Tensor, t: Tensor, text: Tensor, history: History, offset: tuple[int, int] | None) -> Tensor:
        self.seen.append((x_t, offset))
        return x_t.mean(dim=(2, 3, 4)) @ self.weight


def losses(
    adversary: Adversary, look: RenoiseDraw = LOOK, fake: Tensor = X, iteration: int = 0
) -> tuple[Linear, dict[str, Tensor]]:
    logits, figures = Linear(), {}
    draw = adversary.draw_critic(0, iteration, 1, SHAPE)
    assert draw is not None
    for surrogate, said in adversary.critic_losses(logits, X, REAL, look, draw, TEXT, HISTORY):
        surrogate.backward()
        figures |= said
    return logits, figures


def test_softplus_as_published() -> None:
    logits = torch.tensor(GOLDEN["logits"])
    assert softplus(-logits).mean().item() == pytest.approx(GOLDEN["softplus_fake"], rel=1e-5)
    assert softplus(logits).mean().item() == pytest.approx(GOLDEN["softplus_real"], rel=1e-5)


@pytest.mark.parametrize(("which", "golden"), [("fake", "softplus_fake"), ("real", "softplus_real")])
def test_the_heads_losses_have_the_published_signs(which: str, golden: str) -> None:
    """Heads that say the published logits of one of the two, and of the other what costs nothing."""
    adversary = replace(NOW, r1=0.0, critic=1.0)
    draw = adversary.draw_critic(0, 0, 0, SHAPE)
    given = {"fake": torch.full((2, 5), 1e3), "real": torch.full((2, 5), -1e3)} | {which: torch.tensor(GOLDEN["logits"])}
    answers = [given["fake"], given["real"]] * 2
    said = list(adversary.critic_losses(lambda *_: answers.pop(0), X, REAL, LOOK, draw, TEXT, HISTORY))
    assert said[-1][1]["loss"].item() == pytest.approx(GOLDEN[golden], rel=1e-5)


def test_the_student_is_pulled_to_where_logits_are_low() -> None:
    adversary, logits, x = NOW, Linear(), X.clone().requires_grad_()
    draw = adversary.draw_student(0, 0, 1, SHAPE)
    assert draw is not None
    value, gradient = adversary.student_loss(logits, x, LOOK, draw, TEXT, HISTORY)
    (0.5 * value).backward()
    (seen, offset), sigma = logits.seen[0], float(LOOK.sigma[0])
    crop = draw.crop
    assert offset == crop.offset == (crop.top // 2, crop.left // 2)
    noised = crop.of((1 - sigma) * X + sigma * draw.noise)
    torch.testing.assert_close(seen, noised.requires_grad_())
    direct = softplus(Linear()(noised, None, TEXT, HISTORY, None)).mean()
    direct.backward()
    wanted = torch.zeros_like(X)
    crop.of(wanted).copy_((1 - sigma) * noised.grad)
    torch.testing.assert_close(x.grad, 0.5 * wanted, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-9)
    assert logits.weight.grad is None
    assert cosine(gradient, -2 * gradient).item() == pytest.approx(-1)


def test_r1_of_linear_heads_in_closed_form() -> None:
    """`mean over heads of (w . mean(disturbance in the crop))^2`; its gradient by w beside the softplus terms'."""
    logits, figures = losses(NOW)
    draw = NOW.draw_critic(0, 0, 1, SHAPE)
    change = draw.crops[2].of(draw.disturbances[0]).mean(dim=(2, 3, 4))
    assert figures["r1"].item() == pytest.approx((change @ logits.weight).square().mean().item(), rel=1e-3)
    fake, real = (crop.of(LOOK.noised(x)).mean(dim=(2, 3, 4)) for crop, x in zip(draw.crops[:2], (X, REAL), strict=True))
    weight = logits.weight.detach().clone().requires_grad_()
    pull = 0.01 * (softplus(-(fake @ weight)).mean() + softplus(real @ weight).mean())
    total = pull + 100 * (change @ weight).square().mean()
    total.backward()
    torch.testing.assert_close(logits.weight.grad, weight.grad, rtol=1e-4, atol=1e-7)
    assert figures["loss"].item() == pytest.approx(total.item(), rel=1e-4)
    assert figures["margin"].item() == pytest.approx(((fake - real) @ weight).mean().item(), rel=1e-4)


def test_r1_is_zero_where_nothing_disturbs_and_not_where_crops_differ() -> None:
    """A section and its copy share a crop; with crops of their own, as published, R1 compares different places."""
    still = replace(NOW, r1_sigma=0.0)
    assert losses(still)[1]["r1"].item() == 0
    assert losses(replace(still, one_crop=False))[1]["r1"].item() > 1e-6
    for iteration in range(20):
        shared, own = (replace(NOW, one_crop=one).draw_critic(0, iteration, 0, SHAPE).crops for one in (True, False))
        assert shared[1] == shared[2]
    assert own[1] != own[2] or own[0] != own[1]


def test_r2_disturbs_what_the_student_made() -> None:
    adversary = replace(NOW, r2=1.0, r2_sigma=0.2)
    draw = adversary.draw_critic(0, 0, 1, SHAPE)
    assert [crop == draw.crops[0] for crop in draw.crops] == [True, False, False, True] or draw.crops[0] == draw.crops[1]
    logits, figures = losses(adversary, QUIET)
    shown = [x for x, _ in logits.seen[:4]]
    torch.testing.assert_close(shown[3], draw.crops[0].of(X + draw.disturbances[1]))
    torch.testing.assert_close(shown[2], draw.crops[1].of(REAL + draw.disturbances[0]))
    assert adversary.figure_names() == ["margin", "r1", "r2", "loss"] and set(figures) == set(adversary.figure_names())
    assert draw.disturbances[1].std().item() == pytest.approx(0.2, rel=0.05)


def test_where_crops_lie() -> None:
    """Every place is drawn, whole tokens; the network is told, or, as published, is not, and crops begin at any latent."""
    assert crop_size(48, 80) == (24, 40) and crop_size(60, 104) == (30, 52) and crop_size(10, 14) == (4, 6)
    with pytest.raises(InputError, match="2x8 latents has no crop of half its size"):
        crop_size(2, 8)
    seen, published = set(), set()
    for iteration in range(200):
        seen.add(NOW.draw_student(0, iteration, 0, SHAPE).crop)
        published.add(replace(NOW, one_crop=False, offsets=False).draw_student(0, iteration, 0, SHAPE).crop)
    assert {(crop.top, crop.left) for crop in seen} == {(top, left) for top in (0, 2, 4) for left in (0, 2, 4, 6)}
    assert {crop.top for crop in published} == set(range(5)) and all((crop.rows, crop.columns) == (4, 6) for crop in seen)
    logits, _ = losses(replace(NOW, offsets=False))
    assert {offset for _, offset in logits.seen} == {(0, 0)}
    assert Crop(2, 4, 4, 6).offset == (1, 2)


def test_it_begins_at_its_start_and_rises() -> None:
    late = Adversary(start=10, ramp=4)
    assert late.draw_student(0, 9, 0, SHAPE) is None and late.draw_critic(0, 9, 0, SHAPE) is None
    assert [late.share(iteration) for iteration in (9, 10, 11, 13, 50)] == [0, 0.25, 0.5, 1, 1]
    first, whole = (losses(late, iteration=iteration)[1] for iteration in (10, 50))
    assert first["loss"].item() / (0.01 * 2 + 1) < whole["loss"].item()
    assert late.draw_student(0, 10, 0, SHAPE).share == 0.25
