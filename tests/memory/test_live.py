"""The counter of live storages against sums done by hand, to the byte. One unit is a [64, 64] fp32 tensor, 16 KiB."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from helios_train.memory.live import LiveCounter
from helios_train.memory.places import DEVICE, HOST

SIDE = 64
UNIT = 4 * SIDE * SIDE


@pytest.fixture(params=["real", "fake"], autouse=True)
def kind(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every case holds for real tensors and for fake ones."""
    with FakeTensorMode(allow_non_fake_inputs=True) if request.param == "fake" else nullcontext():
        yield request.param


def unit() -> Tensor:
    return torch.zeros(SIDE, SIDE)


def test_a_chain_of_products() -> None:
    x, weights, counter = unit(), [unit() for _ in range(5)], LiveCounter()
    assert counter.claim([x, weights], "given") == 6 * UNIT
    with counter:
        for weight in weights:
            x = x @ weight  # the old x is alive while the new one is computed
    report = counter.report()
    assert report.peak == {DEVICE: 7 * UNIT, HOST: 0}
    assert report.live[DEVICE] == 6 * UNIT


def test_what_dies_leaves_the_sum() -> None:
    counter = LiveCounter()
    with counter:
        a, b = unit(), unit()
        c = a + b
        assert counter.live() == 3 * UNIT
        del b
        assert counter.live() == 2 * UNIT
        d = c * 2
        assert counter.live() == 3 * UNIT
    assert counter.report().peak[DEVICE] == 3 * UNIT
    del a, c, d
    assert counter.live() == 0


def test_views_and_in_place_operators_make_nothing() -> None:
    with LiveCounter() as counter:
        a = unit()
        views = [a.t(), a[3], a.view(-1), a.detach(), nn.Parameter(a), *a.chunk(4), a.as_strided((2, 2), (1, 1))]
        a.add_(1).t_()
        a[:8].fill_(2)
        torch.mul(a, 2, out=a)
        a.data.zero_()
        assert counter.live() == UNIT
        del a
        assert counter.live() == UNIT  # the views hold it
        del views
        assert counter.live() == 0
    assert counter.report().peak[DEVICE] == UNIT


def test_a_storage_that_is_resized() -> None:
    with LiveCounter() as counter:
        out = torch.empty(0)
        assert counter.live() == 0
        torch.add(unit(), 1, out=out.resize_(0))
        assert counter.live() == UNIT
        out.resize_(2 * SIDE, SIDE)
        assert counter.live() == 2 * UNIT
        out.untyped_storage().resize_(0)  # no operator: seen when the tensor is next used, or claimed
        counter.claim(out, "emptied")
        assert counter.live() == 0
    assert counter.report().peak[DEVICE] == 2 * UNIT  # the unit that is added, and the sum


def test_factories_containers_and_results_that_are_no_tensors() -> None:
    with LiveCounter() as counter:
        made = [unit(), torch.ones(SIDE, SIDE), torch.full((SIDE, SIDE), 2.0), torch.eye(SIDE), torch.rand(SIDE, SIDE)]
        made += [unit().clone(), torch.zeros_like(made[0]), made[0].new_empty(SIDE, SIDE), torch.cat(made[:1])]
        assert counter.live() == len(made) * UNIT
        values, indices = made[0].max(dim=0)  # a tuple; indices are int64
        assert counter.live() == len(made) * UNIT + SIDE * (4 + 8)
        counter.claim({"a": (values, [indices]), "b": None, "c": 3}, "pair")
        made = torch._foreach_add(made[:2], 1.0)  # a list
        assert counter.live() == 2 * UNIT + SIDE * (4 + 8)
        if type(made[0]) is Tensor:
            assert torch.equal(made[0], made[0]) and made[0].sum().item() == SIDE * SIDE  # not what a fake tensor can say
        assert counter.live() == 2 * UNIT + SIDE * (4 + 8)
    assert counter.report().live[DEVICE] == counter.live()


def test_a_constant_counts_once() -> None:
    with LiveCounter() as counter:
        kept = torch.tensor([1.0] * SIDE)  # real for a moment, also where it is to be fake
        assert counter.report().peak == {DEVICE: kept.nbytes, HOST: 0}


def test_owners_nest() -> None:
    with LiveCounter() as counter:
        with counter.owner("student"):
            with counter.owner("teacher"):
                a = unit()
            b = unit()
        c = unit()
    assert counter.report().owners() == dict.fromkeys(("teacher", "student", "nobody"), UNIT) and len({a, b, c}) == 3


def test_meta_tensors_have_no_bytes() -> None:
    with LiveCounter() as counter:
        kept = torch.empty(SIDE, SIDE, device="meta") + 1
        assert counter.live() == counter.live(HOST) == 0 and kept.device.type == "meta"


def test_rounding_as_the_allocator_does() -> None:
    with LiveCounter(granularity=512) as counter:
        kept = [torch.empty(1), torch.empty(128), torch.empty(129), torch.empty(0)]
        assert counter.live() == 512 + 512 + 1024
        kept[0].resize_(200)
        assert counter.live() == 1024 + 512 + 1024


def test_what_the_graph_holds_is_alive_until_backward_frees_it() -> None:
    counter, x = LiveCounter(), unit().requires_grad_()
    counter.claim(x, "x")
    with counter:
        loss = x.exp().sin().sum()  # exp saves its result, sin its input: one storage; sum saves nothing
        assert counter.live() == 2 * UNIT + 4
        loss.backward()
        assert counter.live() == 2 * UNIT + 4  # x, its gradient, the loss
        x.grad = None
        assert counter.live() == UNIT + 4


def test_a_storage_freed_by_another_thread() -> None:
    with LiveCounter() as counter:
        held = [unit()]
        thread = threading.Thread(target=held.clear)
        thread.start()
        thread.join()
        assert counter.live() == 0


def mlp(x: Tensor, weights: list[Tensor], checkpointed: bool) -> Tensor:
    def block(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return nn.functional.gelu(x @ up) @ down

    for up, down in zip(weights[::2], weights[1::2], strict=True):
        x = checkpoint(block, x, up, down, use_reentrant=False, preserve_rng_state=False) if checkpointed else block(x, up, down)
    return x


@pytest.mark.parametrize("blocks", [1, 2, 5])
def test_an_mlp_with_and_without_checkpointing(blocks: int) -> None:
    """Frozen weights, the input wants a gradient: a block saves what goes into its gelu (h), nothing else."""

    def peaks(checkpointed: bool) -> dict[str, int]:
        x, seed, weights = unit().requires_grad_(), unit(), [unit() for _ in range(2 * blocks)]
        counter = LiveCounter()
        assert counter.claim(weights, "weights") == 2 * blocks * UNIT
        counter.claim([x, seed], "given")
        with counter:
            with counter.moment("forward"):
                y = mlp(x, weights, checkpointed)
            with counter.moment("backward"):
                y.backward(seed)
        moments = counter.report().moments()
        return {
            moment: peak // UNIT - 2 * blocks - 2 for moment, peak in moments.items() if peak % UNIT == 0
        }  # above what is given

    more = blocks > 1  # the first block's input is x itself
    # Forward: every h, the last block's input, gelu's result, the output. Backward of the last block: the output, every h, the
    # gradients on both sides of gelu.
    assert peaks(checkpointed=False) == {"forward": more + blocks + 2, "backward": blocks + 3}
    # Forward: the inputs of the blocks after the first, and h, gelu's result or that and the output. Backward of the last block:
    # those inputs, the output, h computed again, the gradients on both sides of gelu.
    assert peaks(checkpointed=True) == {"forward": (blocks - 1) + 2, "backward": (blocks - 1) + 1 + 3}


def test_labels_add_up_to_the_peak_and_moments_nest() -> None:
    counter, weights = LiveCounter(), nn.Linear(SIDE, SIDE, bias=False)
    counter.claim(weights, "weights")
    with counter, counter.owner("student"):
        with counter.moment("iteration"):
            x = unit()
            with counter.moment("forward"), counter.owner("teacher"):
                y = weights(x)
                z = y + y + y
            with counter.moment("quiet"):
                del z
            kept = unit()
    report = counter.report()
    assert report.peak[DEVICE] == sum(report.cells().values()) == 5 * UNIT  # weights, x, y, y + y, y + y + y
    assert report.cells() == {
        ("weights", "before"): UNIT,
        ("student", "iteration"): UNIT,
        ("teacher", "forward"): 3 * UNIT,
    }
    assert report.owners() == {"teacher": 3 * UNIT, "weights": UNIT, "student": UNIT}
    assert report.made_in() == {"forward": 3 * UNIT, "before": UNIT, "iteration": UNIT}
    assert report.moments() == {"iteration": 5 * UNIT, "forward": 5 * UNIT, "quiet": 4 * UNIT}
    assert [stretch.moment for stretch in report.timeline] == ["iteration", "forward", "quiet"]
    for stretch in report.timeline:
        assert sum(stretch.owners().values()) == stretch.peak[DEVICE]
    assert report.summit() == "forward" and report.live[DEVICE] == 4 * UNIT
    assert report.table().splitlines()[0].split() == ["GiB", "forward", "before", "iteration", "sum"]
    assert kept is not None and y is not None


def test_the_summit_may_come_after_an_inner_moment() -> None:
    with LiveCounter() as counter, counter.moment("outer"):
        with counter.moment("inner"):
            a = unit()
        b = unit() if a is not None else None
        assert counter.report().summit() == "outer"  # asked for while it is open
        with counter.moment("inner"):
            c = [unit(), b]
    report = counter.report()
    assert report.moments() == {"outer": 3 * UNIT, "inner": 3 * UNIT}
    assert [stretch.peak[DEVICE] // UNIT for stretch in report.timeline] == [3, 1, 3]
    assert report.cells() == {("nobody", "inner"): 2 * UNIT, ("nobody", "outer"): UNIT} and len(c) == 2


def test_a_claim_relabels_and_what_nobody_claimed_shows() -> None:
    weight, unclaimed, counter = unit(), unit(), LiveCounter()
    with counter:
        made = weight + unclaimed
        assert counter.claim([weight, weight.t(), weight[0]], "weights") == UNIT
        counter.claim(made, "sum")
    assert counter.report().cells() == {("weights", "before"): UNIT, ("nobody", "before"): UNIT, ("sum", "outside"): UNIT}


def test_gradients_have_an_owner_as_they_come() -> None:
    layers = nn.Sequential(*(nn.Linear(SIDE, SIDE, bias=False) for _ in range(3)))
    counter, x = LiveCounter(), unit()
    counter.claim([layers, x], "weights")
    with counter, counter.gradients(layers.parameters(), "gradients"):
        layers(x).sum().backward()
    with counter.moment("after"):
        assert counter.live() == 7 * UNIT
    assert counter.report().timeline[0].owners() == {"weights": 4 * UNIT, "gradients": 3 * UNIT}
    layers.zero_grad()
    assert counter.claim(layers, "weights") == 3 * UNIT  # a module's gradients are not its own
    layers(x).sum().backward()
    assert counter.live() == 4 * UNIT  # the hooks are gone


def test_a_leak_shows() -> None:
    kept: list[Tensor] = []
    counter, x = LiveCounter(), unit()
    counter.claim(x, "x")

    def step(leak: bool) -> int:
        with counter, counter.moment("step"):
            y = (x.requires_grad_() * 2).exp()
            if leak:
                kept.append(y)  # and its graph
            y.sum().backward()
        x.grad = None
        del y
        return counter.live()

    assert [step(leak=False) for _ in range(3)] == [UNIT] * 3
    assert [step(leak=True) for _ in range(3)] == [2 * UNIT, 3 * UNIT, 4 * UNIT]


def test_a_cycle_is_alive_until_it_is_collected() -> None:
    with LiveCounter() as counter:
        gc.collect()
        cycle: list[object] = [unit()]
        cycle.append(cycle)
        del cycle
        assert counter.live() == UNIT
        gc.collect()
        assert counter.live() == 0


def test_a_wrapper_subclass_counts_as_what_it_wraps() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    with LiveCounter() as counter:
        pair = TwoTensor(unit(), unit())
        double = pair + pair
        assert counter.live() == 4 * UNIT and isinstance(double, TwoTensor)


def test_counting_costs_less_than_what_it_counts(kind: str) -> None:
    """Tracing a step is then as slow as fake tensors are. The ratio, since the machine may be busy."""

    def seconds() -> float:
        x, start = a, time.process_time()
        for _ in range(500):
            x = x + a
        return time.process_time() - start

    a, plain, counted = torch.zeros(8), [], []
    for _ in range(5):
        plain.append(seconds())
        with LiveCounter():
            counted.append(seconds())
    if kind == "fake":
        assert min(counted) < 2 * min(plain)
