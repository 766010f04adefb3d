"""Does an adversary take a few-step student nearer to a known density than distribution matching alone?

The plane of dmd_2d.py: the same density, networks, student and critic, the same draws. With rollouts left at a random step, as
published, and with rollouts run to their last. The arms of each are one run up to the adversary's start, a third of the way; then
one goes on alone, the others with heads on the critic's last hidden layer, one logit a point: with the published weights, and so
that the heads' loss and the student's are as large as matching. Points of the density are the real sections. Energy distances of
the student's running mean from points of the density: made in its few steps, and left at a step as training leaves it, which is
the student that critic and heads are shown. Whether heads can learn at all is told by a few turns more, in which they begin
with the student, as far off as it then is.

Writes results/gan_2d.json, seed by seed and arm by arm; what is there is not run again.
Usage: python benchmarks/gan_2d.py [--updates 1200] [--seeds 0 1 2] [--arms "random exits, published" ...]
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from dmd_2d import BATCH, LOOKS, POINTS, RATIO, ROLLOUT, SHAPE, TOLD, Mixture, Network, few_step_points, fitted, rollouts
from timing import machine
from torch import Tensor, nn

from helios_train import rng
from helios_train.evaluation.energy import energy_between
from helios_train.history import History
from helios_train.objectives.dmd import Cast, CriticDraw, CriticObjective, StudentDraw, StudentObjective
from helios_train.objectives.gan import Adversary, CriticJudged, StudentJudged
from helios_train.run import write

RESULT = Path(__file__).parent / "results" / "gan_2d.json"
RATE = 1e-3
MEASURED = 9_600  # points of each set
ALONE = "matching"
WEIGHTS = {ALONE: None, "published": Adversary(), "as large as matching": Adversary(student=1.0, critic=1.0, r1=1.0)}
EXITS = {"random exits": True, "last exits": False}
BEGUN, FEW = "begun with the student", 80  # student updates of that short run
ARMS = {f"{where}, {what}": (early, adversary) for where, early in EXITS.items() for what, adversary in WEIGHTS.items()}


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


def distil(
    mixture: Mixture, network: Network, updates: int, seed: int, early: bool, adversary: Adversary | None
) -> tuple[Network, list[Any]]:
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
            objective(cast, TOLD, StudentDraw(rollouts(seed, "student", turn, early), look, judged=shown)).total.backward()
            optimizers[0].step()
            done = turn // RATIO + 1
            with torch.no_grad():
                for kept, new in zip(mean.parameters(), student.parameters(), strict=True):
                    kept.lerp_(new, 1 - min(0.99, (1 + done) / (10 + done)))
        look = LOOKS.draw(seed, "critic renoise", turn, range(BATCH), SHAPE)
        real = mixture.draw(rng.generator(seed, "real", turn), BATCH * POINTS).view(BATCH, 1, 8, 8, 2).movedim(-1, 1)
        draw, told = CriticDraw(rollouts(seed, "critic", turn, early), look, learned), replace(TOLD, real=real)
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


def measure(student: Network, early: bool, reference: Tensor) -> dict[str, float]:
    """Energy distances: of the few steps, and of what critic and heads are shown."""
    found = {"energy_distance": energy_between(few_step_points(student, MEASURED), reference)}
    if early:
        left = [few_step_points(student, MEASURED, (step,)) for step in range(ROLLOUT.counts(True)[0])]
        found |= {f"left at step {number}": energy_between(points, reference) for number, points in enumerate(left)}
        shown = torch.cat([points[number :: len(left)] for number, points in enumerate(left)])
        found["as shown"] = energy_between(shown, reference)
    return found


def main() -> None:
    """All arms, seed by seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=1200, help="of the student")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    given, mixture = parser.parse_args(), Mixture()
    settings = {"updates": given.updates, "points": MEASURED, "machine": machine(torch.device("cpu"))}
    known: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    seeds: dict[str, Any] = known.get("seeds", {}) if known.get("updates") == given.updates else {}
    reference = mixture.draw(rng.generator(0, "points"), MEASURED)
    for seed in given.seeds:
        found, network = seeds.setdefault(str(seed), {}), fitted(mixture, 2000, seed)
        for name in given.arms:
            if name in found:
                continue
            (early, adversary), begin = ARMS[name], time.perf_counter()
            if adversary:
                adversary = replace(adversary, start=given.updates * RATIO // 3)
            student, way = distil(mixture, network, given.updates, seed, early, adversary)
            found[name] = {**measure(student, early, reference), "heads": way, "seconds": round(time.perf_counter() - begin)}
            alone = found.get(f"{name.partition(',')[0]}, {ALONE}")
            if alone:
                found[name]["falls_by"] = 1 - found[name]["energy_distance"] / alone["energy_distance"]
            print(seed, name, {key: value for key, value in found[name].items() if key != "heads"}, flush=True)
            write(RESULT, json.dumps(settings | {"seeds": seeds}, indent=1) + "\n")
        if BEGUN not in found:
            given_heads = {what: replace(one, start=0) for what, one in WEIGHTS.items() if one}
            found[BEGUN] = {what: distil(mixture, network, FEW, seed, False, one)[1] for what, one in given_heads.items()}
            print(seed, BEGUN, {what: heads[1] for what, heads in found[BEGUN].items()}, flush=True)
            write(RESULT, json.dumps(settings | {"seeds": seeds}, indent=1) + "\n")


if __name__ == "__main__":
    main()
