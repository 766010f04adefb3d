"""Dynamic shift of the noise levels against the published systems."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import HeliosScheduler

from helios_train.diffusion.schedule import STEPS, dynamic_factor, dynamic_mu, shift, token_count

GOLDEN = json.loads((Path(__file__).parent / "golden" / "schedules.json").read_text())["dynamic_shift"]
PUBLISHED_CAP = 7.0


def split(name: str) -> tuple[int, str]:
    """Tokens and kind of an entry `TxHxW/kind`."""
    size, kind = name.split("/")
    return token_count(*map(int, size.split("x"))), kind


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_shift_of_the_published_training_code(name: str) -> None:
    """Source: the training code of PKU-YuanGroup/Helios, run as it stands; its exponential factor ends at 7."""
    tokens, kind = split(name)
    factor = dynamic_factor(kind, tokens, cap=PUBLISHED_CAP if kind == "exponential" else None)
    assert factor == pytest.approx(GOLDEN[name]["mu"], rel=1e-5)
    shifted = shift(np.array(GOLDEN[name]["sigmas_in"]), factor)
    np.testing.assert_allclose(shifted, GOLDEN[name]["sigmas_out"], rtol=1e-5, atol=0)


def test_the_cap_is_reached_by_a_published_size_and_only_there() -> None:
    capped = [name for name in GOLDEN if split(name)[1] == "exponential" and dynamic_factor(*split(name)[::-1]) > PUBLISHED_CAP]
    assert capped == ["9x60x104/exponential"]
    tokens, _ = split(capped[0])
    assert dynamic_factor("exponential", tokens) == pytest.approx(np.exp(dynamic_mu(tokens))) and np.exp(dynamic_mu(tokens)) > 16


@pytest.mark.parametrize("kind", ["linear", "exponential"])
@pytest.mark.parametrize("name", sorted({name.split("/")[0] for name in GOLDEN}))
def test_shift_of_diffusers_without_a_cap(name: str, kind: str) -> None:
    """Source: `HeliosScheduler.time_shift` of diffusers, at every level of the table."""
    tokens, _ = split(f"{name}/{kind}")
    sigma = 1 - np.arange(STEPS) / STEPS
    scheduler = HeliosScheduler(stages=1, use_dynamic_shifting=True, time_shift_type=kind)
    wanted = scheduler.time_shift(dynamic_mu(tokens), 1.0, torch.from_numpy(sigma)).numpy()
    np.testing.assert_allclose(shift(sigma, dynamic_factor(kind, tokens)), wanted, rtol=1e-12, atol=0)
