"""Device or host as a label: what is made where, what moving a module keeps, and modules that are built on meta."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from helios_train.memory.live import LiveCounter
from helios_train.memory.places import DEVICE, HOST, Places, materialise, placing, tensors_of

SIDE = 64
UNIT = 4 * SIDE * SIDE
PLACES = Places("cpu")


@pytest.fixture(params=["real", "fake"])
def kind(request: pytest.FixtureRequest) -> Iterator[str]:
    with FakeTensorMode(allow_non_fake_inputs=True) if request.param == "fake" else nullcontext():
        yield request.param


def unit() -> Tensor:
    return torch.ones(SIDE, SIDE)


def test_moving_a_tensor_makes_another_on_the_other_side(kind: str) -> None:
    counter, there = LiveCounter(), unit()
    counter.claim(there, "x")
    with counter:
        assert PLACES.place_of(there) == DEVICE and PLACES.put(there, DEVICE) is there
        host = PLACES.stow(there.t())
        assert PLACES.place_of(host) == HOST and host.shape == there.shape and PLACES.put(host, HOST) is host
        back = PLACES.fetch(host)
        assert PLACES.place_of(back) == DEVICE
        assert (counter.live(), counter.live(HOST)) == (2 * UNIT, UNIT)
        assert PLACES.fetch(host, out=there) is there and PLACES.stow(back, out=host) is host
        assert (counter.live(), counter.live(HOST)) == (2 * UNIT, UNIT)
        del back
        assert counter.live() == UNIT
    assert counter.report().peak == {DEVICE: 2 * UNIT, HOST: UNIT}  # never on both sides of a copy


def test_a_buffer_on_the_wrong_side_is_refused() -> None:
    with pytest.raises(ValueError, match="buffer of a copy to the host stands on the device"):
        PLACES.stow(unit(), out=unit())


def test_numbers_and_strides_survive() -> None:
    x = torch.randn(3, 5).t()
    host = PLACES.stow(x)
    assert torch.equal(host, x) and host.stride() == x.stride() and host.data_ptr() != x.data_ptr()
    assert not PLACES.stow(nn.Parameter(x)).requires_grad


def test_what_host_tensors_make_is_on_the_host(kind: str) -> None:
    with LiveCounter() as counter:
        master = PLACES.stow(unit())
        moment = torch.zeros_like(master)
        step = torch.tensor(1.0)  # a scalar follows the others
        moment.lerp_(master, 0.1)
        update = (moment / step).sqrt() + 1
        assert [PLACES.place_of(t) for t in (moment, update, update[0])] == [HOST] * 3
        assert (counter.live(), counter.live(HOST)) == (4, 3 * UNIT)
        mixed = unit() + master  # on a GPU an error; here the device's
        assert PLACES.place_of(mixed) == DEVICE
        with placing(HOST):
            made = unit()
        assert PLACES.place_of(made) == HOST


def test_what_is_real_in_a_fake_step_is_the_hosts() -> None:
    drawn = torch.randn(SIDE, SIDE)
    with FakeTensorMode(allow_non_fake_inputs=True), LiveCounter() as counter:
        x = unit() + drawn
        assert (counter.live(), counter.live(HOST)) == (UNIT, UNIT) and isinstance(x, FakeTensor)


def test_an_optimizer_on_the_host_leaves_the_device_alone(kind: str) -> None:
    layer = nn.Linear(SIDE, SIDE, bias=False)
    masters = [nn.Parameter(PLACES.stow(weight)) for weight in layer.parameters()]
    optimizer = torch.optim.AdamW(masters, foreach=False)
    counter, x = LiveCounter(), unit()
    counter.claim([layer, x], "device")
    counter.claim(masters, "masters")
    with counter:
        layer(x).sum().backward()
        assert counter.live() == 3 * UNIT
        with counter.moment("update"):
            for master, weight in zip(masters, layer.parameters(), strict=True):
                master.grad = PLACES.stow(weight.grad)
                weight.grad = None
            optimizer.step()
            counter.claim(optimizer.state, "moments")
    report = counter.report()
    assert report.timeline[0].peak[DEVICE] <= 3 * UNIT + 8
    assert report.live[DEVICE] <= 2 * UNIT + 8  # the step counter is a scalar
    assert UNIT * 4 <= report.live[HOST] <= UNIT * 4 + 8  # master, gradient, two moments
    assert report.owners(HOST)["masters"] == UNIT


def test_a_module_keeps_its_parameters(kind: str) -> None:
    layers = nn.Sequential(nn.Linear(SIDE, SIDE), nn.BatchNorm1d(SIDE), nn.Linear(SIDE, SIDE))
    layers[2].weight = layers[0].weight  # shared
    layers[2].bias.requires_grad_(False)
    before = {name: (weight, weight.requires_grad) for name, weight in layers.named_parameters()}
    calls: list[int] = []
    layers[0].bias.register_post_accumulate_grad_hook(lambda _: calls.append(1))
    layers(unit()).sum().backward()
    values = {name: value.clone() for name, value in layers.state_dict().items()}
    size = sum(value.nbytes for value in values.values()) - UNIT  # shared ones are one
    gradients = sum(weight.grad.nbytes for weight in layers.parameters() if weight.grad is not None)
    counter = LiveCounter()
    counter.claim(layers, "layers")
    with counter:
        assert PLACES.put(layers, HOST) is layers
        assert {PLACES.place_of(t) for t in tensors_of(layers)} == {HOST}
        assert {PLACES.place_of(w.grad) for w in layers.parameters() if w.grad is not None} == {HOST}
        assert (counter.live(), counter.live(HOST)) == (0, size + gradients)
        PLACES.put(layers, DEVICE)
        assert (counter.live(), counter.live(HOST)) == (size + gradients, 0)
    after = dict(layers.named_parameters())
    assert after.keys() == before.keys() and layers[2].weight is layers[0].weight
    for name, (weight, wants) in before.items():
        assert after[name] is weight and weight.requires_grad == wants and isinstance(weight, nn.Parameter)
    if kind == "real":
        for name, value in layers.state_dict().items():
            assert torch.equal(value, values[name]), name
    layers(unit()).sum().backward()
    assert len(calls) == 2


def test_a_quantised_weight_moves_with_its_scales() -> None:
    layer = bnb.nn.Linear4bit(128, SIDE, bias=False, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(torch.randn(SIDE, 128), requires_grad=False, quant_type="nf4").to("cpu")
    x, counter = torch.randn(2, 128), LiveCounter()
    expected, weight = layer(x), layer.weight
    packed = (
        64 * 128 // 2 + 128 + 4 * (1 + 1 + 256 + 16)
    )  # 4 bits a weight, a byte for 64 of them, scale and mean of these, tables
    assert counter.claim(layer, "base") == packed
    with counter:
        PLACES.put(layer, HOST)
        assert layer.weight is weight and (counter.live(), counter.live(HOST)) == (0, packed)
    assert torch.equal(layer(x), expected)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(SIDE, SIDE)
        self.b = nn.Linear(SIDE, SIDE, dtype=torch.bfloat16)
        self.b.weight = self.a.weight
        self.a.bias.requires_grad_(False)
        self.register_buffer("count", torch.zeros(3))
        self.register_buffer("table", torch.ones(5), persistent=False)


def test_a_module_built_on_meta(kind: str) -> None:
    def rebuild(module: nn.Module) -> None:
        module.table = torch.ones(5)

    net = materialise(Net, fake=kind == "fake", rebuild=rebuild)
    assert {type(t.data) for t in tensors_of(net)} == {FakeTensor if kind == "fake" else Tensor}
    assert {t.device.type for t in tensors_of(net)} == {"cpu"}
    assert net.a.weight is net.b.weight and net.b.bias.dtype == torch.bfloat16
    assert [w.requires_grad for w in net.parameters()] == [True, False, True]
    assert LiveCounter().claim(net, "net") == UNIT + 4 * SIDE + 2 * SIDE + 4 * (3 + 5)
    net.a(unit()).sum().backward()
    assert net.a.weight.grad is not None
    if kind == "real":
        assert torch.equal(net.table, torch.ones(5))
        net.load_state_dict(Net().state_dict())


def test_what_would_be_left_empty_is_named(kind: str) -> None:
    with pytest.raises(ValueError, match="buffers in no state dict: table; give `rebuild`"):
        materialise(Net, fake=kind == "fake")


def test_fake_needs_its_mode(kind: str) -> None:
    fake = kind == "fake"
    with pytest.raises(ValueError, match=f"fake={not fake} {'inside' if fake else 'outside'} a FakeTensorMode"):
        materialise(Net, fake=not fake)
