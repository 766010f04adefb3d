"""Randomness as a function of (seed, purpose, place)."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from helios_train import rng

PLACES: list[tuple[int, str, tuple[int, ...]]] = [
    (0, "noise", ()),
    (1, "noise", ()),
    (0, "sigma", ()),
    (0, "noise", (0,)),
    (0, "noise", (1,)),
    (0, "noise", (0, 1)),
    (0, "noise", (1, 0)),
    (0, "noise", (1, 1)),
    (0, "noise", (11,)),
    (0, "noise", (-1,)),
    (1, "noise", (1,)),
    (11, "noise", (1,)),
    (2**40, "noise", (1,)),
    (0, "noise ", (1,)),
]


def test_same_place_same_numbers() -> None:
    for seed, purpose, where in PLACES:
        first = rng.generator(seed, purpose, *where).random(8)
        rng.generator(7, "something else").random(100)
        assert np.array_equal(first, rng.generator(seed, purpose, *where).random(8))


def test_another_place_other_numbers() -> None:
    drawn = [rng.generator(seed, purpose, *where).random(4).tobytes() for seed, purpose, where in PLACES]
    assert len(set(drawn)) == len(PLACES)
    seeds = [rng.torch_generator(seed, purpose, *where).initial_seed() for seed, purpose, where in PLACES]
    assert len(set(seeds)) == len(PLACES)


def test_numpy_integers_name_the_same_place() -> None:
    wanted = rng.generator(3, "noise", 4, 5).random()
    assert rng.generator(int(np.int64(3)), "noise", np.int32(4), np.uint8(5)).random() == wanted


def test_neighbouring_places_are_independent() -> None:
    draws = torch.stack([rng.normal(rng.generator(0, "noise", 0, place), (4000,)) for place in range(12)])
    assert (draws.mean(dim=1).abs() < 4 / 4000**0.5).all() and ((draws.std(dim=1) - 1).abs() < 4 / 8000**0.5).all()
    assert torch.corrcoef(draws)[~torch.eye(12, dtype=torch.bool)].abs().max() < 4.5 / 4000**0.5


def test_known_values() -> None:
    """Written down from the first version: whoever changes them changes every run that is resumed."""
    assert rng.generator(0, "noise", 3, 7).random(3).tolist() == [0.5398645994202886, 0.10043825689946184, 0.6205908005963457]
    normals = rng.normal(rng.generator(17, "noise", 3, 7), (4,)).tolist()
    assert normals == pytest.approx([0.4762645661830902, -0.8439055681228638, -0.9361457228660583, -1.3593007326126099], rel=1e-6)
    assert rng.generator(0, "order", 1).permutation(8).tolist() == [1, 0, 4, 6, 5, 3, 2, 7]
    assert rng.torch_generator(0, "sample", 2).initial_seed() == 6766275082197646975


def test_normal_is_fp32_of_its_shape() -> None:
    drawn = rng.normal(rng.generator(0, "noise"), (2, 3, 4))
    assert drawn.shape == (2, 3, 4) and drawn.dtype == torch.float32 and drawn.device.type == "cpu"


def test_nothing_touches_the_global_generators() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    rng.normal(rng.generator(0, "noise"), (3,))
    torch.rand(3, generator=rng.torch_generator(0, "noise"))
    with rng.forked(0, "weights"):
        torch.nn.Linear(3, 3)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1]) and random.getstate() == before[2]


def test_forked_draws_by_purpose_and_gives_the_global_generator_back() -> None:
    def weights(seed: int, purpose: str) -> torch.Tensor:
        with rng.forked(seed, purpose):
            return torch.nn.Linear(3, 3).weight.detach()

    first = weights(0, "weights")
    torch.rand(5)
    assert torch.equal(weights(0, "weights"), first)
    assert not torch.equal(weights(1, "weights"), first) and not torch.equal(weights(0, "adapter"), first)
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="inside"), rng.forked(0, "weights"):
        torch.rand(5)
        raise RuntimeError("inside")
    assert torch.equal(torch.get_rng_state(), state)


def test_forked_leaves_the_devices_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    with rng.forked(0, "weights"):
        torch.rand(1)
    assert not seeded
