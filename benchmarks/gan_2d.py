"""Does an adversary take a few-step student nearer to a known density than distribution matching alone?

The plane of dmd_2d.py: the same density, networks, student and critic, rollouts left at a random step as published, the same
draws. Both arms are one run up to the adversary's start, a third of the way; then one goes on alone, the other with heads on the
critic's last hidden layer, one logit a point, and with the published weights. Points of the density are the real sections. Energy
distances of the student's running mean, made in its few steps, from points of the density.

Writes results/gan_2d.json. Usage: python benchmarks/gan_2d.py [--updates 1200] [--seeds 0 1 2]
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dmd_2d import BATCH, LOOKS, POINTS, RATIO, ROLLOUT, SHAPE, TOLD, Mixture, Network, few_step_points, fitted, rollouts
from timing import machine
from torch import Tensor, nn

from helios_train import rng
from helios_train.evaluation.energy import energy_between
from helios_train.history import History
from helios_train.objectives.dmd import Cast, CriticDraw, CriticObjective, StudentDraw, StudentObjective
from helios_train.objectives.gan import Adversary, CriticJudged, StudentJudged

RESULT = Path(__file__).parent / "results" / "gan_2d.json"
RATE = 1e-3
MEASURED = 9_600  # points of each set


class Judge(nn.Module):
    """Logits [B, points] of the points of a crop: a small head on the critic's last hidden layer."""

    def __init__(self, critic: Network, width: int = 128):
        super().__init__()
        self.critic, self.head = [critic], nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))

    def forward(self, x_t: Tensor, t: Tensor, text: Tensor, history: History, offset: tuple[int, int] | None) -> Tensor:
        """As every `logits`."""
        return self.head(self.critic[0].hidden(x_t, t)).flatten(1)


def judged(adversary: Adversary, seed: int, turn: int) -> tuple[StudentJudged | None, CriticJudged | None]:
    """The adversary's draws for a batch: its own for one sample, the noise for all."""
    one, two = adversary.draw_student(seed, turn, 0, SHAPE), adversary.draw_critic(seed, turn, 0, SHAPE)
    if one is None or two is None:
        return None, None
    noise, change = (rng.normal(rng.generator(seed, what, turn), (BATCH, *SHAPE)) for what in ("judged", "disturbed"))
    return (
        StudentJudged(noise, one.crop, one.share),
        CriticJudged(two.crops, (adversary.r1_sigma * change,), two.share),
    )


def distil(mixture: Mixture, network: Network, updates: int, seed: int, adversary: Adversary | None) -> tuple[Network, list[Any]]:
    """The student's running mean, and [turn, margin, r1] of the heads on the way."""
    student, critic, mean = copy.deepcopy(network), copy.deepcopy(network), copy.deepcopy(network)
    with rng.forked(seed, "judge"):
        judge = Judge(critic)
    objective = StudentObjective(ROLLOUT, LOOKS, guidance=0.0, adversary=adversary)
    learns = CriticObjective(ROLLOUT, LOOKS, adversary)
    learners = student.parameters(), [*critic.parameters(), *judge.parameters()]
    optimizers = [torch.optim.AdamW(each, lr=RATE, betas=(0.0, 0.999), weight_decay=0.0) for each in learners]
    cast, way = Cast(student, mixture.velocity, critic, judge), []
    for turn in range(updates * RATIO):
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = RATE * (1 - turn / (updates * RATIO))
        shown, learned = judged(adversary, seed, turn) if adversary else (None, None)
        if turn % RATIO == 0:
            look = LOOKS.draw(seed, "student renoise", turn, range(BATCH), SHAPE)
            optimizers[0].zero_grad()
            objective(cast, TOLD, StudentDraw(rollouts(seed, "student", turn, True), look, judged=shown)).total.backward()
            optimizers[0].step()
            done = turn // RATIO + 1
            with torch.no_grad():
                for kept, new in zip(mean.parameters(), student.parameters(), strict=True):
                    kept.lerp_(new, 1 - min(0.99, (1 + done) / (10 + done)))
        look = LOOKS.draw(seed, "critic renoise", turn, range(BATCH), SHAPE)
        real = mixture.draw(rng.generator(seed, "real", turn), BATCH * POINTS).view(BATCH, 1, 8, 8, 2).movedim(-1, 1)
        draw, told = CriticDraw(rollouts(seed, "critic", turn, True), look, learned), replace(TOLD, real=real)
        optimizers[1].zero_grad()
        section = learns.made(student, told, draw)
        learns.denoising(critic, told, section, draw).total.backward()
        for loss in learns.judging(judge, told, section, draw):
            loss.total.backward()
        optimizers[1].step()
        if learned and turn % (updates * RATIO // 20) == 0:
            names = learns.log_names()
            way.append([turn, *(loss.sums[0, names.index(f"gan/{name}")].item() for name in ("margin", "r1"))])
    return mean, way


def main() -> None:
    """Both arms, seed by seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=1200, help="of the student")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given, mixture = parser.parse_args(), Mixture()
    result: dict[str, Any] = {"updates": given.updates, "points": MEASURED, "machine": machine(torch.device("cpu")), "seeds": {}}
    reference = mixture.draw(rng.generator(0, "points"), MEASURED)
    arms = {"matching": None, "with adversary": Adversary(start=given.updates * RATIO // 3)}
    for seed in given.seeds:
        begin, found = time.perf_counter(), {}
        network = fitted(mixture, 2000, seed)
        for name, adversary in arms.items():
            student, way = distil(mixture, network, given.updates, seed, adversary)
            found[name] = {"energy_distance": energy_between(few_step_points(student, MEASURED), reference), "heads": way}
        one, other = (found[name]["energy_distance"] for name in arms)
        found["falls_by"] = 1 - other / one
        result["seeds"][seed] = found | {"seconds": round(time.perf_counter() - begin)}
        print(seed, {name: found[name]["energy_distance"] for name in arms}, found["falls_by"], flush=True)
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print("mean", np.mean([found["falls_by"] for found in result["seeds"].values()]))


if __name__ == "__main__":
    main()
