"""What may be added to the student's loss, against sums done by hand."""

from __future__ import annotations

import pytest
import torch

from helios_train import rng
from helios_train.objectives.regularise import MeanVariance, alignment, divergence


def test_alignment_pulls_exits_to_earlier_estimates_and_nothing_the_other_way() -> None:
    draw = rng.generator(0, "estimates")
    levels = [
        [rng.normal(draw, (1, 2, 3, 2 << level, 2)).requires_grad_() for _ in range(count)]
        for level, count in ((0, 3), (1, 1), (2, 2))
    ]
    loss = alignment(levels)
    assert loss is not None
    (a, b, left), _, (c, last) = levels
    coarse = ((left - a).square().mean() + (left - b).square().mean()) / 4
    assert loss.item() == pytest.approx(((coarse + (last - c).square().mean() / 2) / 2).item(), rel=1e-6)
    loss.backward()
    for exit_, others, factor in ((left, [a, b], 0.5), (last, [c], 1.0)):
        wanted = sum(exit_ - other for other in others) * factor / exit_.numel() / 2
        torch.testing.assert_close(exit_.grad, wanted.detach())
    assert all(estimate.grad is None for estimate in (a, b, c, levels[1][0]))


def test_levels_left_at_their_first_step_have_nothing_to_align_with() -> None:
    assert alignment([[torch.zeros(1)], [torch.zeros(1)]]) is None and alignment([]) is None


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.5, 1.3), (-2.0, 0.2)])
def test_divergence_is_that_of_two_normals(mean: float, std: float) -> None:
    """Against torch's closed form."""
    x = rng.normal(rng.generator(0, "x"), (2, 3, 9, 8, 8)).double()
    x = torch.stack([(one - one.mean()) / one.var(correction=0).sqrt() for one in x]) * std + mean
    normal = torch.distributions.Normal
    wanted = torch.distributions.kl_divergence(normal(mean, std), normal(0.00657, 0.85127**0.5)).item()
    assert divergence(x, 0.00657, 0.85127).tolist() == pytest.approx([wanted] * 2, rel=1e-5)  # torch works in fp32
    assert divergence(torch.full((1, 2, 2, 2, 2), mean), mean, 1.0).isfinite()


def test_mean_and_variance_of_the_whole_and_of_the_first_frame() -> None:
    x = rng.normal(rng.generator(0, "x"), (2, 3, 9, 4, 4)).requires_grad_()
    found = MeanVariance()(x)
    whole, first = divergence(x, 0.00657, 0.85127), divergence(x[:, :, :1], -0.01618, 0.27996)
    assert found.item() == pytest.approx((0.7 * whole + 0.3 * first).mean().item(), rel=1e-6)
    for _ in range(300):  # descent ends where the sample has the moments asked for
        (gradient,) = torch.autograd.grad(MeanVariance(share=0.0)(x), x)
        x = (x - 30 * gradient).detach().requires_grad_()
    assert x.flatten(1).mean(1).tolist() == pytest.approx([0.00657] * 2, abs=1e-3)
    assert x.flatten(1).var(1, correction=0).tolist() == pytest.approx([0.85127] * 2, rel=1e-3)


def test_moments_that_are_none() -> None:
    for keys in ({"variance": 0.0}, {"first_variance": -1.0}, {"share": 1.5}):
        with pytest.raises(ValueError, match="must be above 0, the share within 0 to 1"):
            MeanVariance(**keys)
