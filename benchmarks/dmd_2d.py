"""Does distribution matching drive a few-step student to a density that is known? python benchmarks/dmd_2d.py [--updates 4000]

Points of a plane stand in for sections: latents [B, 2, 1, 8, 8] are 64 points a sample. The teacher is the exact velocity of a
mixture of normals. Student and critic are small networks, both first fitted to the teacher's velocity: distillation starts from
trained weights. Then the student's and the critic's own objectives train them, the student every 5th turn, once with rollouts run
to their last step and once left at a random one, as published. Measured is the energy
distance of points made in the student's few steps from points of the density, beside that of the teacher's own samples.
Writes results/dmd_2d.json and results/dmd_2d.png.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from rich.console import Console
from timing import machine
from torch import Tensor, nn

from helios_train import rng
from helios_train.diffusion.pyramid import Pyramid
from helios_train.diffusion.rollout import Rollout, RolloutDraw
from helios_train.evaluation.energy import energy_between
from helios_train.history import History
from helios_train.objectives.dmd import Cast, CriticDraw, CriticObjective, StudentDraw, StudentObjective, Told
from helios_train.objectives.renoise import Renoise

SHAPE = (2, 1, 8, 8)
POINTS = 64  # a sample
BATCH = 16
RATIO = 5  # turns of the critic to one of the student, as published
ROLLOUT = Rollout(Pyramid(1), (2,), amplify=False, dynamic="none", sigmas="exact")
LOOKS = Renoise(dynamic="none", sigmas="exact", anneal=0)
TEXT = torch.zeros(1, 1, 1)
NOTHING = History.none(BATCH, *SHAPE[:1], *SHAPE[2:])
TOLD = Told(TEXT, TEXT, NOTHING)


@dataclass(frozen=True)
class Mixture:
    """Normals of one spread in the plane, with shares that differ, and the velocity of the flow from noise to them."""

    means: Tensor = field(default_factory=lambda: torch.tensor([[1.3, 0.3], [-0.2, 1.2], [-1.2, -0.2], [0.3, -1.1]]))
    shares: Tensor = field(default_factory=lambda: torch.tensor([0.4, 0.3, 0.2, 0.1]))
    spread: float = 0.4

    def draw(self, draw: np.random.Generator, count: int) -> Tensor:
        """Points [count, 2]."""
        which = torch.from_numpy(
            draw.choice(len(self.shares), count, p=self.shares.double().numpy() / self.shares.double().sum().item())
        )
        return self.means[which] + self.spread * rng.normal(draw, (count, 2))

    def velocity(self, x_t: Tensor, t: Tensor, text: Tensor, history: History) -> Tensor:
        """`(x_t - E[x0 | x_t]) / sigma`, exact; x_t [B, 2, T, H, W], t = 1000 sigma."""
        points = x_t.movedim(1, -1)[..., None, :]  # [B, T, H, W, 1, 2]
        sigma = (t / 1000).view(-1, *[1] * (points.dim() - 1))
        variance = (1 - sigma) ** 2 * self.spread**2 + sigma**2
        off = points - (1 - sigma) * self.means
        weights = (self.shares.log() - off.square().sum(-1) / (2 * variance[..., 0])).softmax(dim=-1)[..., None]
        clean = (weights * (self.means + (1 - sigma) * self.spread**2 / variance * off)).sum(dim=-2)
        return ((points[..., 0, :] - clean) / sigma[..., 0]).movedim(-1, 1)


class Network(nn.Module):
    """A velocity of points, each alone."""

    def __init__(self, width: int = 128):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2 + 8, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.last = nn.Linear(width, 2)

    def forward(self, x_t: Tensor, t: Tensor, text: Tensor, history: History) -> Tensor:
        """As every `velocity`."""
        return self.last(self.hidden(x_t, t)).movedim(-1, 1)

    def hidden(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The last hidden layer. [B, T, H, W, width]"""
        points = x_t.movedim(1, -1)
        angles = math.pi * (t / 1000)[:, None] * 2.0 ** torch.arange(-1, 3)
        told = torch.cat([angles.sin(), angles.cos()], dim=1)[:, None, None, None].expand(*points.shape[:-1], 8)
        return self.layers(torch.cat([points, told], dim=-1))


def few_step_points(student: nn.Module, count: int, exits: tuple[int, ...] | None = None) -> Tensor:
    """Points [count, 2] made as the sampler makes them, or left at a step, from 0, as in training."""
    noise = rng.normal(rng.generator(0, "held out"), (count // POINTS, *SHAPE))
    with torch.no_grad():
        latents = ROLLOUT(lambda x, t: student(x, t, TEXT, NOTHING), RolloutDraw(noise, (), exits), empty=True).output
    return latents.movedim(1, -1).reshape(-1, 2)


def teacher_points(mixture: Mixture, count: int, steps: int) -> Tensor:
    """Points [count, 2] of the teacher's own many-step way, Euler's, on the grid of one level."""
    sigmas, times = Pyramid(1).steps(0, steps)
    x = rng.normal(rng.generator(0, "teacher"), (count // POINTS, *SHAPE))
    for number, time_ in enumerate(times):
        v = mixture.velocity(x, torch.full((len(x),), float(time_)), TEXT, NOTHING)
        x = x + float(sigmas[number + 1] - sigmas[number]) * v
    return x.movedim(1, -1).reshape(-1, 2)


def fitted(mixture: Mixture, updates: int, seed: int) -> Network:
    """A network with the teacher's velocity, by flow matching on points of the density."""
    with rng.forked(seed, "network"):
        network = Network()
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    for update in range(updates):
        draw = rng.generator(seed, "fit", update)
        clean = mixture.draw(draw, BATCH * POINTS).view(BATCH, 1, 8, 8, 2).movedim(-1, 1)
        noise, sigma = rng.normal(draw, clean.shape), torch.from_numpy(draw.uniform(0.001, 1, BATCH)).float()
        level = sigma[:, None, None, None, None]
        predicted = network(level * noise + (1 - level) * clean, 1000 * sigma, TEXT, NOTHING)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - update / updates)
        optimizer.zero_grad()
        (predicted - (noise - clean)).square().mean().backward()
        optimizer.step()
    return network


def rollouts(seed: int, who: str, turn: int, early: bool) -> tuple[RolloutDraw, ...]:
    """What one turn's rollout draws; left early, at a random step, or at the last."""
    start = rng.normal(rng.generator(seed, f"{who} start noise", turn), (BATCH, *SHAPE))
    return (RolloutDraw(start, (), ROLLOUT.exits(seed, who, (turn,), empty=True) if early else None),)


def distil(
    mixture: Mixture, network: Network, updates: int, seed: int, early: bool, rate: float = 1e-3
) -> tuple[Network, list[list[float]]]:
    """The student's running mean after that many updates, and its energy distance on the way: [[updates, distance], ...]."""
    student, critic, mean = copy.deepcopy(network), copy.deepcopy(network), copy.deepcopy(network)
    objective, learns = StudentObjective(ROLLOUT, LOOKS, guidance=0.0), CriticObjective(ROLLOUT, LOOKS)
    optimizers = [
        torch.optim.AdamW(each.parameters(), lr=rate, betas=(0.0, 0.999), weight_decay=0.0) for each in (student, critic)
    ]
    reference = mixture.draw(rng.generator(0, "reference"), 4096)
    way = [[0, energy_between(few_step_points(mean, 4096), reference)]]
    for turn in range(updates * RATIO):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * (1 - turn / (updates * RATIO))
        if turn % RATIO == 0:
            look = LOOKS.draw(seed, "student renoise", turn, range(BATCH), SHAPE)
            loss = objective(
                Cast(student, mixture.velocity, critic), TOLD, StudentDraw(rollouts(seed, "student", turn, early), look)
            )
            _step(optimizers[0], loss.total)
            done = turn // RATIO + 1
            with torch.no_grad():
                for kept, new in zip(mean.parameters(), student.parameters(), strict=True):
                    kept.lerp_(new, 1 - min(0.99, (1 + done) / (10 + done)))
            if done % max(1, updates // 10) == 0:
                way.append([done, energy_between(few_step_points(mean, 4096), reference)])
        look = LOOKS.draw(seed, "critic renoise", turn, range(BATCH), SHAPE)
        _step(optimizers[1], learns(student, critic, TOLD, CriticDraw(rollouts(seed, "critic", turn, early), look)).total)
    return mean, way


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def main() -> None:
    """Fit, distil, measure, plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=4000, help="of the student")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--points", type=int, default=9_600, help="of each set that is measured")
    given, mixture, begin = parser.parse_args(), Mixture(), time.perf_counter()
    network = fitted(mixture, 2000, given.seed)
    start = few_step_points(network, given.points)
    random, way = distil(mixture, network, given.updates, given.seed, early=True)
    last, way_last = distil(mixture, network, given.updates, given.seed, early=False)
    sets = {
        "density": mixture.draw(rng.generator(0, "other points"), given.points),
        "teacher_20_steps": teacher_points(mixture, given.points, 20),
        "teacher_50_steps": teacher_points(mixture, given.points, 50),
        "start_2_steps": start,
        "student_2_steps": few_step_points(last, given.points),
        "random_exits_2_steps": few_step_points(random, given.points),
    }
    reference = mixture.draw(rng.generator(0, "points"), given.points)
    distances = {name: energy_between(points, reference) for name, points in sets.items()}
    Console().print(distances, f"{time.perf_counter() - begin:.0f} s")
    folder = Path(__file__).parent / "results"
    result = {
        "energy_distance": distances,
        "start_over_student": distances["start_2_steps"] / distances["student_2_steps"],
        "student_over_teacher": distances["student_2_steps"] / distances["teacher_20_steps"],
        "way": way_last,
        "way_random_exits": way,
        "updates": given.updates,
        "points": given.points,
        "seed": given.seed,
        "seconds": round(time.perf_counter() - begin),
        "machine": machine(torch.device("cpu")),
        "torch": torch.__version__,
    }
    (folder / "dmd_2d.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(sets, way_last, distances).save(folder / "dmd_2d.png", optimize=True)


def plot(sets: dict[str, Tensor], way: list[list[float]], distances: dict[str, float]) -> Image.Image:
    """The sets as densities side by side, the energy distance on the way (logarithmic) below."""
    side, reach = 240, 2.4
    figure = Image.new("RGB", (len(sets) * side, side + 200), "white")
    pen = ImageDraw.Draw(figure)
    for column, (name, points) in enumerate(sets.items()):
        counts, _, _ = np.histogram2d(-points[:, 1].numpy(), points[:, 0].numpy(), bins=side // 2, range=[[-reach, reach]] * 2)
        ink = 255 - (255 * np.sqrt(np.minimum(counts / (len(points) / 1500), 1))).astype(np.uint8)
        panel = Image.fromarray(np.stack([ink, ink, np.full_like(ink, 255)], axis=2)).resize((side - 4, side - 4))
        figure.paste(panel, (column * side + 2, 2))
        pen.text((column * side + 8, 6), f"{name.replace('_', ' ')}: {distances[name]:.1e}", fill="black")
    left, right, top, bottom = 60, len(sets) * side - 20, side + 20, side + 170
    highest, lowest, last = 0, -5, way[-1][0]

    def place(update: float, distance: float) -> tuple[float, float]:
        level = min(max(math.log10(max(distance, 1e-9)), lowest), highest)
        return left + (right - left) * update / last, top + (bottom - top) * (highest - level) / (highest - lowest)

    for power in range(lowest, highest + 1):
        pen.line([place(0, 10.0**power), place(last, 10.0**power)], fill="lightgrey")
        pen.text((8, place(0, 10.0**power)[1] - 6), f"1e{power}", fill="black")
    pen.line([place(0, distances["teacher_20_steps"]), place(last, distances["teacher_20_steps"])], fill="red")
    pen.line([place(update, distance) for update, distance in way], fill="blue", width=2)
    pen.text(
        (left, bottom + 8),
        f"energy distance of the student (blue), the teacher in 20 steps (red); 0 to {last} updates",
        fill="black",
    )
    return figure


if __name__ == "__main__":
    main()
