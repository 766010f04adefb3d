"""The student's rollout against the published training code (golden numbers) and diffusers' few-step scheduler."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_helios_dmd import HeliosDMDScheduler
from safetensors.torch import load_file
from torch import Tensor

from helios_train.diffusion.pyramid import Pyramid, noise_pyramid
from helios_train.diffusion.rollout import Rollout, RolloutDraw
from helios_train.diffusion.schedule import dynamic_mu

GOLDEN = load_file(Path(__file__).parent / "golden" / "rollout.safetensors")
CASES = ["a", "b", "c", "d", "amplified"]
# Level, steps; sigma of the step, its time, sigma of the table entry nearest to it: the published figures at 384 x 640.
VECTORS = {
    (0, 2): [(0.998177, 998.5342, 0.998177), (0.354035, 833.9636, 0.353578)],
    (0, 4): [
        (0.998177, 998.5342, 0.998177),
        (0.621189, 902.2183, 0.620876),
        (0.354035, 833.9636, 0.353578),
        (0.154818, 783.0660, 0.154993),
    ],
    (1, 2): [(0.998784, 742.8216, 0.998784), (0.451240, 547.1926, 0.450745)],
    (1, 4): [
        (0.998784, 742.8216, 0.998784),
        (0.711008, 640.0038, 0.710735),
        (0.451240, 547.1926, 0.450745),
        (0.215580, 462.9951, 0.215805),
    ],
    (2, 2): [(0.999479, 385.4137, 0.999479), (0.657436, 253.9905, 0.657886)],
    (2, 4): [
        (0.999479, 385.4137, 0.999479),
        (0.851680, 328.6249, 0.851512),
        (0.657436, 253.9905, 0.657886),
        (0.390774, 151.5308, 0.391091),
    ],
}


@pytest.mark.parametrize(("level", "count"), VECTORS)
def test_steps_of_the_published_training_code(level: int, count: int) -> None:
    for column, sigmas in ((0, "exact"), (2, "table")):
        steps = Rollout(Pyramid(), sigmas=sigmas).schedule((9, 48, 80), empty=count == 4)[level]  # type: ignore[arg-type]
        assert [step.sigma for step in steps] == pytest.approx([row[column] for row in VECTORS[level, count]], abs=6e-7)
        assert [step.time for step in steps] == pytest.approx([row[1] for row in VECTORS[level, count]], abs=6e-5)


def rolled(case: str, sigmas: str) -> tuple[Tensor, float]:
    """Output, and the derivative by theta, of the golden network on the golden noise."""
    given = {key.partition(".")[2]: value for key, value in GOLDEN.items() if key.startswith(case + ".")}
    theta = torch.tensor(0.8, requires_grad=True)
    draw = RolloutDraw(given["start_noise"], (given["block_noise1"], given["block_noise2"]), tuple(given["exits"].tolist()))
    rollout = Rollout(Pyramid(), (2, 2, 2), sigmas=sigmas)  # type: ignore[arg-type]
    output = rollout(lambda x, t: theta * x + 0.2 * torch.sin(2 * x) - 5e-4 * t, draw, case == "amplified").output
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    assert theta.grad is not None
    return output.detach(), theta.grad.item()


@pytest.mark.parametrize("case", CASES)
def test_output_and_gradient_of_the_published_training_code(case: str) -> None:
    """Source: `rollout.safetensors`, float timesteps and table sigmas."""
    output, gradient = rolled(case, "table")
    torch.testing.assert_close(output, GOLDEN[f"{case}.output"], rtol=1e-4, atol=1e-4)
    assert gradient == pytest.approx(GOLDEN[f"{case}.dtheta"].item(), rel=1e-2)


@pytest.mark.parametrize("case", CASES)
def test_exact_sigmas_stay_near_the_published_ones(case: str) -> None:
    output, _ = rolled(case, "exact")
    torch.testing.assert_close(output, GOLDEN[f"{case}.output"], rtol=0, atol=5e-3)
    assert torch.equal(output, rolled(case, "table")[0]) == (case == "a")  # which leaves every level at its first step


@pytest.mark.parametrize("kind", ["none", "linear", "exponential"])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("empty", [False, True])
def test_a_walk_of_diffusers_scheduler(count: int, kind: str, empty: bool) -> None:
    """Source: `HeliosDMDScheduler`, which takes each step at the step's own sigma and is told the time cut to an integer."""
    theirs = HeliosDMDScheduler(
        stages=count,
        stage_range=[level / count for level in range(count + 1)],
        use_dynamic_shifting=kind != "none",
        time_shift_type="linear" if kind == "none" else kind,
    )
    pyramid, shape = Pyramid(count), (1, 2, 3, 16, 32)
    steps = tuple(range(1, count + 1))
    rollout = Rollout(pyramid, steps, dynamic=kind, timesteps="int", sigmas="exact")  # type: ignore[arg-type]
    draw = rollout.draw(0, "a rollout of the tests", (0, 0), shape[1:], empty, early=False)
    network = lambda x, t: 0.8 * x + 0.2 * torch.sin(2 * x) - 5e-4 * t.view(-1, 1, 1, 1, 1)  # noqa: E731
    x = noise_pyramid(draw.start, count)[0]
    for level, tokens in enumerate(pyramid.tokens(*shape[2:])):
        theirs.set_timesteps(steps[level], level, mu=dynamic_mu(tokens), is_amplify_first_chunk=empty)
        if level:
            x = pyramid.renoise(level, x, draw.blocks[level - 1])
        start = x
        for number, time in enumerate(theirs.timesteps):
            x = theirs.step(
                network(x, time.to(torch.int64).float()[None]),
                time,
                x,
                cur_sampling_step=number,
                dmd_noisy_tensor=start,
                dmd_sigmas=theirs.sigmas,
                dmd_timesteps=theirs.timesteps,
                all_timesteps=theirs.timesteps,
                return_dict=False,
            )[0]
    found = rollout(network, draw, empty).output
    torch.testing.assert_close(found, x.to(found), rtol=0, atol=1e-5)
    np.testing.assert_array_equal([len(level) for level in rollout.schedule(shape, empty)], rollout.counts(empty))
