"""Masters: fp32 where it counts, whatever the module computes in."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from helios_train.errors import InputError
from helios_train.history import History
from helios_train.models.adapters import Lora, add_lora, trainable
from helios_train.models.precision import Masters, cast
from helios_train.models.transformer import HeliosTransformer

Inputs = tuple[Tensor, Tensor, Tensor, History]


def layer(dtype: torch.dtype) -> nn.Linear:
    made = nn.Linear(2, 1, bias=False).to(dtype)
    nn.init.ones_(made.weight)
    return made


def test_an_fp32_weight_is_its_own_master() -> None:
    module = layer(torch.float32)
    masters = Masters(trainable(module))
    assert next(iter(masters)) is module.weight
    module(torch.ones(1, 2)).sum().backward()
    assert torch.equal(module.weight.grad, torch.ones(1, 2))
    masters.clear()
    assert module.weight.grad is None


def test_gradients_add_up_in_fp32() -> None:
    """1 and then 256 times 2^-9: every one of them is lost when the sum is kept in bf16."""
    module = layer(torch.bfloat16)
    masters = Masters(trainable(module))
    for scale in (1.0, *[2.0**-9] * 256):
        (scale * module(torch.ones(1, 2, dtype=torch.bfloat16))).sum().backward()
        assert module.weight.grad is None  # freed at once
    (gradient,) = masters.fill()
    assert gradient.dtype == torch.float32 and torch.equal(gradient, torch.full((1, 2), 1.5))
    lost = torch.tensor(1.0, dtype=torch.bfloat16)
    for _ in range(256):
        lost = lost + 2.0**-9
    assert lost == 1.0


def test_small_steps_add_up_in_the_master() -> None:
    module = layer(torch.bfloat16)
    masters = Masters(trainable(module))
    (master,) = masters
    for _ in range(64):
        with torch.no_grad():
            master -= 2.0**-12
        masters.publish()
        assert torch.equal(module.weight, master.bfloat16())
    assert torch.equal(master, torch.full((1, 2), 1 - 2.0**-6)) and module.weight[0, 0] == 1 - 2.0**-6


def test_a_missing_gradient_is_zero() -> None:
    module = nn.ModuleList([layer(torch.bfloat16), layer(torch.float32)])
    masters = Masters(trainable(module))
    module[0](torch.ones(1, 2, dtype=torch.bfloat16)).sum().backward()
    used, unused = masters.fill()
    assert used.any() and not unused.any() and unused.shape == (1, 2)


def test_state_and_its_audit() -> None:
    module = layer(torch.bfloat16)
    masters = Masters(trainable(module))
    state = {"weight": torch.tensor([[1 + 2.0**-12, 3.0]])}
    masters.load_state_dict(state, "here")
    assert torch.equal(masters.state_dict()["weight"], state["weight"])
    assert torch.equal(module.weight, state["weight"].bfloat16())
    for wrong, said in (
        ({}, "here: .*missing weight"),
        (state | {"stray": torch.zeros(1)}, "unexpected stray"),
        ({"weight": torch.zeros(2)}, r"weight is \(2,\), not \(1, 2\)"),
    ):
        with pytest.raises(InputError, match=said):
            masters.load_state_dict(wrong, "here")
    assert torch.equal(masters.state_dict()["weight"], state["weight"])


def test_a_whole_model(ours: HeliosTransformer, inputs: Inputs) -> None:
    """bf16 with adapters: each trainable weight has an fp32 master with a gradient; nothing frozen has either."""
    cast(ours, torch.bfloat16)
    add_lora(ours, "student", Lora(rank=2, alpha=2), seed=0)
    masters = Masters(trainable(ours))
    ours.velocity(*inputs).square().mean().backward()
    assert masters.masters.keys() == trainable(ours).keys()
    for name, master in masters.masters.items():
        assert master.dtype == torch.float32 and master.grad is not None, name
        own = trainable(ours)[name]
        assert own is master if own.dtype == torch.float32 else own.grad is None
    assert all(weight.grad is None for weight in ours.parameters() if not weight.requires_grad)
