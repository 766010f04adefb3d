"""The benchmarks of the transformer, its kernels and distillation, at a size that takes seconds: they measure what they say."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from helios_train import rng
from helios_train.conf.compose import compose
from helios_train.evaluation.alarms import RULES

SCRIPTS = Path(__file__).parent.parent / "benchmarks"
CPU = torch.device("cpu")


@pytest.fixture
def dmd_2d(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("dmd_2d")


@pytest.fixture
def transformer_step(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("transformer_step")


@pytest.mark.parametrize("trains", ["all", *(pytest.param(which, marks=pytest.mark.slow) for which in ("frozen", "lora"))])
def test_all_variants_compute_the_same(transformer_step: ModuleType, trains: str) -> None:
    shape = {"num_attention_heads": 1, "num_layers": 3, "ffn_dim": 64, "text_dim": 32}
    size = transformer_step.Size("tiny", shape, 2, (8, 12), (4, 6), torch.float32)
    names = ["diffusers", "ours"]
    modules = transformer_step.modules(size, names, trains, CPU)
    theirs, ours = modules.values()
    shared = ours.blocks[0].ffn.net[0].proj, theirs.blocks[0].ffn.net[0].proj
    assert len({getattr(layer, "base_layer", layer).weight.data_ptr() for layer in shared}) == 1
    given = [transformer_step.inputs(size, transformer_step.VARIANTS[name], CPU) for name in names]
    given[1] |= {name: value for name, value in given[0].items() if "indices" not in name}
    outputs = [module(**each, return_dict=False)[0] for module, each in zip(modules.values(), given, strict=True)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-6)
    tokens = 2 * (9 * 2 * 3 + 2 * 4 * 6 + 2 * 3 + 4 * 1 * 2)
    seen: list[int] = []
    ours.blocks[0].register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[0] * given[0].shape[1]))
    measured = transformer_step.measure(size, names, trains, 1, CPU)
    ours(**given[1], return_dict=False)
    assert sum(seen) == tokens and measured["tokens"] == tokens
    for kind, found in measured["work"].items():
        assert found.keys() == set(names)
        for figures in found.values():
            assert figures["ms"] > 0 and figures["planned_GiB"] > 0 and 0 < figures["mfu"] <= figures["hfu"] * 1.001, kind
    assert measured["work"]["forward_backward"]["ours"]["mfu"] < measured["work"]["forward_backward"]["ours"]["hfu"]


def test_the_committed_results_are_of_the_scripts() -> None:
    """A figure that is cited has a file that says where it was taken."""
    for name in ("transformer_step", "kernel_speed"):
        result = json.loads((SCRIPTS / "results" / f"{name}.json").read_text())
        assert result["machine"] and result["torch"] and result["turns"] >= 5
        for sizes in result["sizes"].values():
            assert sizes


def test_the_teacher_of_the_plane_is_exact_and_matching_approaches_it(dmd_2d: ModuleType) -> None:
    """Its velocity is the one that no other beats on noised points; a student nears the density within 60 updates."""
    mixture = dmd_2d.Mixture()
    draw = rng.generator(0, "points")
    clean = mixture.draw(draw, 40_000).view(10_000, 1, 2, 2, 2).movedim(-1, 1)
    noise, sigma = rng.normal(draw, clean.shape), torch.full((10_000,), 0.5)
    found = mixture.velocity(0.5 * noise + 0.5 * clean, 1000 * sigma, dmd_2d.TEXT, dmd_2d.NOTHING)
    residual = noise - clean - found  # of a conditional mean: uncorrelated with any function of what was given
    for function in (found, 0.5 * noise + 0.5 * clean, (noise + clean).sin(), torch.ones_like(clean)):
        assert abs((residual * function).mean().item()) < 5 * (residual * function).std().item() / residual.numel() ** 0.5
    network = dmd_2d.fitted(mixture, 300, 0)
    _, way = dmd_2d.distil(mixture, network, 60, 0, early=True)
    assert way[-1][1] < way[0][1] / 2


def test_the_committed_student_reaches_the_density() -> None:
    """Ten times nearer than it began, and within twice the distance of its teacher's samples, in 20 steps or 50."""
    distance = json.loads((SCRIPTS / "results" / "dmd_2d.json").read_text())["energy_distance"]
    assert distance["student_2_steps"] < distance["start_2_steps"] / 10
    assert distance["student_2_steps"] < 2 * min(distance["teacher_20_steps"], distance["teacher_50_steps"])
    # Left at random steps the critic learns all exits' sections as one density: the last step's alone stay off it.
    assert distance["student_2_steps"] < distance["random_exits_2_steps"] < distance["start_2_steps"] / 10


def test_the_alarms_limits_are_those_that_healthy_videos_were_held_against() -> None:
    """The worst healthy video takes at most half of each limit."""
    result = json.loads((SCRIPTS / "results" / "healthy_drift.json").read_text())
    alarms = compose().watch.alarms
    assert result["limits"] == {name: getattr(alarms, name) for name in RULES}
    assert result["videos_that_raise_an_alarm"] == 0 and max(result["share_of_the_limit"].values()) <= 0.5
    assert {"base", "mid", "few_steps", "real"} < result["worst"].keys()


def test_the_committed_evaluation_stays_in_memory() -> None:
    """240 videos of all lengths, some of them at full size, under 2 GiB with the decoder."""
    result = json.loads((SCRIPTS / "results" / "evaluate_memory.json").read_text())
    assert result["videos"] == sum(row["videos"] for row in result["mix"]) == 240 and result["machine"]
    assert {"size": [384, 640], "frames": 1440, "videos": 1} in result["mix"]
    assert all(entry["videos"] == 240 for entry in result["metrics"].values()) and "motion_amplitude" in result["metrics"]
    assert result["peak_GiB"]["sum"] < 2
