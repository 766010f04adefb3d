"""Attention backends: tried at the start where they are to run, chosen for one model alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName
from torch import Tensor

from helios_train.errors import InputError
from helios_train.models.attention import BACKENDS, check_attention
from helios_train.models.transformer import HeliosTransformer

CPU = torch.device("cpu")
REGISTRY = attention_dispatch._AttentionBackendRegistry


def tried(name: str, backward: bool = True) -> None:
    check_attention(name, 2, 16, torch.float32, CPU, backward)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Tensor]], None]:
    """Puts a function in the place of flash-attn."""

    def put(function: Callable[..., Tensor]) -> None:
        monkeypatch.setattr(attention_dispatch, "_CAN_USE_FLASH_ATTN", True)
        monkeypatch.setitem(REGISTRY._backends, AttentionBackendName.FLASH, function)
        monkeypatch.setitem(REGISTRY._constraints, AttentionBackendName.FLASH, [])

    return put


def plain(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None, **_: Any) -> Tensor:
    """The formula, [B, L, N, K]."""
    q, k, v = (part.transpose(1, 2) for part in (query, key, value))
    return (torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("name", ["flash", "flash3", "sage"])
def test_a_missing_package_is_named(name: str) -> None:
    with pytest.raises(InputError, match=rf"model.attention={name}: nothing trains with it here .*install"):
        tried(name)


def test_a_backend_that_does_not_run_here() -> None:
    with pytest.raises(InputError, match="model.attention=cudnn: nothing runs with it here"):
        tried("cudnn", backward=False)


def test_what_works_passes(installed: Callable[[Callable[..., Tensor]], None]) -> None:
    tried("sdpa")
    installed(plain)
    tried("flash")


def test_a_backend_without_gradients_samples_and_does_not_train(installed: Callable[[Callable[..., Tensor]], None]) -> None:
    installed(torch.no_grad()(plain))
    tried("flash", backward=False)
    with pytest.raises(InputError, match="model.attention=flash: nothing trains with it here"):
        tried("flash")


@pytest.mark.parametrize("wrong", ["output", "gradient", "nan"])
def test_a_backend_that_computes_something_else(installed: Callable[[Callable[..., Tensor]], None], wrong: str) -> None:
    def other(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
        out = plain(query, key, value)
        if wrong == "nan":
            return out * torch.nan
        if wrong == "output":
            return 1.2 * out
        return out + 0.2 * (out - out.detach())  # the same output, 1.2 times the gradient

    installed(other)
    with pytest.raises(InputError, match="model.attention=flash: differs from sdpa by (20|nan)%"):
        tried("flash")


def test_a_model_has_a_backend_of_its_own(ours: HeliosTransformer, inputs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers' own switch would change every model's."""
    expected, calls = ours.velocity(*inputs), []
    monkeypatch.setitem(REGISTRY._backends, AttentionBackendName.FLASH, lambda *a, **k: calls.append(1) or plain(*a, **k))
    ours.compute_with(attention="flash")
    torch.testing.assert_close(ours.velocity(*inputs), expected, rtol=1e-5, atol=1e-6)
    assert len(calls) == 4  # two a block
    assert REGISTRY.get_active_backend()[0] == BACKENDS["sdpa"]


@pytest.mark.parametrize("kernels", ["auto", "compile"])
def test_compiled_blocks_are_one_graph_and_the_same(ours: HeliosTransformer, inputs: Any, kernels: str) -> None:
    def outcome() -> list[Tensor]:
        ours.zero_grad()
        velocity = ours.velocity(*inputs)
        velocity.square().mean().backward()
        return [velocity.detach(), *(weight.grad.clone() for weight in ours.parameters() if weight.grad is not None)]

    eager = outcome()
    torch._dynamo.reset()
    ours.compute_with(kernels)
    ours.checkpoint_blocks()
    ours.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    for found, expected in zip(outcome(), eager, strict=True):
        assert (found - expected).norm() <= 1e-5 * max(expected.norm(), 1e-3)


@pytest.mark.slow
def test_the_compiler_itself(ours: HeliosTransformer, inputs: Any) -> None:
    expected = ours.velocity(*inputs)
    torch._dynamo.reset()
    ours.compute_with("compile", compiled=True)
    torch.testing.assert_close(ours.velocity(*inputs), expected, rtol=1e-4, atol=1e-5)
