"""The counter against CUDA's allocator."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from helios_train.history import FRAMES, SECTION, History
from helios_train.memory.live import LiveCounter
from helios_train.memory.places import DEVICE, HOST, Places, materialise
from helios_train.models.loading import fill_buffers
from helios_train.models.precision import cast
from helios_train.models.transformer import HeliosTransformer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(autouse=True)
def empty() -> Iterator[None]:
    torch.zeros(8, 8, device="cuda") @ torch.zeros(8, 8, device="cuda")  # cuBLAS' workspace is there from now on
    torch.cuda.synchronize()
    yield
    torch.cuda.empty_cache()


def measured(counter: LiveCounter, given: int, step: Callable[[], None]) -> tuple[int, int]:
    """(bytes counted, bytes the allocator says) at the peak of `step`, above what else is allocated."""
    other = torch.cuda.memory_allocated() - given
    torch.cuda.reset_peak_memory_stats()
    with counter:
        step()
    torch.cuda.synchronize()
    return counter.report().peak[DEVICE], torch.cuda.max_memory_allocated() - other


@pytest.mark.parametrize("checkpointed", [False, True])
def test_an_mlp(checkpointed: bool) -> None:
    layers = nn.Sequential(*(nn.Sequential(nn.Linear(1024, 4096), nn.GELU(), nn.Linear(4096, 1024)) for _ in range(6))).cuda()
    x, counter = torch.randn(2048, 1024, device="cuda"), LiveCounter("cuda", granularity=512)

    def step() -> None:
        y = x
        for layer in layers:
            y = checkpoint(layer, y, use_reentrant=False) if checkpointed else layer(y)
        y.sum().backward()

    counted, allocated = measured(counter, counter.claim([layers, x], "given"), step)
    assert counted == pytest.approx(allocated, rel=0.05)


def test_the_transformer_real_and_fake() -> None:
    """Full width and size, a few blocks: CUDA's allocator, the count on the GPU, and the plan on fake CPU tensors."""

    def build() -> nn.Module:
        transformer = HeliosTransformer(num_layers=4)
        cast(transformer, torch.bfloat16)
        transformer.requires_grad_(False).train()
        transformer.checkpoint_blocks()
        return transformer

    def step() -> None:
        history = History(frames, anchor, (FRAMES,), (True,))
        transformer.velocity(target, time, text, history).sum().backward()

    peaks = []
    for device in ("cuda", "cpu"):
        with FakeTensorMode(allow_non_fake_inputs=True) if device == "cpu" else torch.device("cuda"):
            transformer = materialise(build, device == "cpu", fill_buffers, device)
            assert isinstance(transformer, HeliosTransformer)
            for weight in transformer.parameters():
                nn.init.normal_(weight, std=0.02)
            frames, anchor = torch.zeros(1, 16, FRAMES, 48, 80), torch.zeros(1, 16, 1, 48, 80)
            target, time, text = torch.zeros(1, 16, SECTION, 48, 80), torch.full((1,), 500.0), torch.zeros(1, 512, 4096)
            target.requires_grad_()
            counter = LiveCounter(device, granularity=512)
            given = counter.claim([transformer, frames, anchor, target, time, text], "given")
            if device == "cuda":
                peaks += [peak - given for peak in measured(counter, given, step)]
            else:
                with counter:
                    step()
                peaks.append(counter.report().peak[DEVICE] - given)
            assert counter.report().owners()["given"] == given
    counted, allocated, planned = peaks
    print(
        f"above the weights, GiB: counted {counted / 2**30:.3f}, allocated {allocated / 2**30:.3f}, planned {planned / 2**30:.3f}"
    )
    assert counted == pytest.approx(allocated, rel=0.05)
    assert planned == pytest.approx(allocated, rel=0.05)


def test_host_memory_is_pinned_and_counted_there() -> None:
    places, counter = Places("cuda"), LiveCounter("cuda")
    layer = nn.Linear(512, 512).cuda()
    values, weight = layer.weight.detach().clone(), layer.weight
    with counter:
        counter.claim([layer, values], "layer")
        places.put(layer, HOST)
        assert layer.weight is weight and weight.is_pinned() and places.place_of(weight) == HOST
        assert counter.live() == values.nbytes and counter.live(HOST) == values.nbytes + 2048
        back = places.fetch(weight)
        torch.cuda.synchronize()
        assert torch.equal(back, values) and places.place_of(back) == DEVICE
        slot = places.empty_like(values, DEVICE)
        assert places.fetch(weight, out=slot) is slot and torch.equal(slot, values)
        host = places.stow(slot)
        torch.cuda.synchronize()
        assert host.is_pinned() and torch.equal(host, values.cpu())
