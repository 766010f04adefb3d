"""Loading a base: what it takes beside what it loads, and what is found wrong from headers alone."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import HeliosTransformer3DModel
from safetensors.torch import load_file, save_file

from helios_train.errors import InputError
from helios_train.memory import host
from helios_train.memory.live import LiveCounter
from helios_train.memory.places import DEVICE
from helios_train.memory.quantized import FrozenLinear, quantize, storing
from helios_train.models import loading
from helios_train.models.loading import WEIGHTS, load_transformer

Tiny = Callable[..., HeliosTransformer3DModel]
LINEAR = "blocks.1.ffn.net.2"


@pytest.fixture
def folder(tmp_path: Path, tiny_transformer: Tiny) -> Path:
    """The miniature in several shards."""
    tiny_transformer().save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(shards(tmp_path)) > 2
    return tmp_path


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("loading")


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def refused(folder: Path, monkeypatch: pytest.MonkeyPatch, **given: Any) -> str:
    """What loading is refused with; no weight was read and nothing allocated."""
    monkeypatch.setattr(loading, "mapped_weights", lambda *_: pytest.fail("a weight was read"))
    with LiveCounter() as counter, pytest.raises(InputError) as caught:
        load_transformer(folder, torch.float32, **given)
    assert counter.report().peak[DEVICE] < 10_000, "of the model's 560 KB"
    return str(caught.value)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("kind", "width", "shard"),
    [("bf16", 512, "48MB"), ("int8", 512, "48MB"), pytest.param("nf4", 1024, "140MB", marks=pytest.mark.slow)],
)
def test_beside_what_is_loaded_there_is_one_shard(
    tmp_path: Path, benchmark: ModuleType, kind: str, width: int, shard: str
) -> None:
    """Resident memory of a process of its own, mapped files included: with it what a layer takes on its way, of NF4 a few MB
    whatever the shard."""
    benchmark.write(tmp_path, width, 6, shard)
    found = benchmark.measured(tmp_path, kind)
    assert len(shards(tmp_path)) > 2 and found["kept"] > 30
    assert found["shards_above"] < 1.2


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantized_on_the_way_as_afterwards(folder: Path, kind: Any) -> None:
    plain, on_the_way = (load_transformer(folder, torch.bfloat16, store=store) for store in (None, storing(kind)))
    quantize(plain.requires_grad_(False).blocks, kind)
    (one, other) = (model.get_submodule(LINEAR) for model in (plain, on_the_way))
    assert isinstance(one, FrozenLinear) and isinstance(other, FrozenLinear) and torch.equal(one.weight, other.weight)
    expected, found = (dict([*model.named_parameters(), *model.named_buffers()]) for model in (plain, on_the_way))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    asked: list[int] = []
    load_transformer(folder, torch.bfloat16, store=storing(kind), fits=asked.append)
    assert asked == [sum(tensor.nbytes for tensor in found.values())]


def test_nothing_of_a_file_is_kept(folder: Path) -> None:
    """Weights are copies, also of the file's own dtype: the file may go."""
    model = load_transformer(folder, torch.float32)
    assert not [line for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]
    assert not any(weight.is_meta for weight in model.parameters())


def test_a_missing_shard(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = shards(folder)[1]
    first = next(iter(load_file(gone)))
    gone.unlink()
    said = refused(folder, monkeypatch)
    assert str(gone) in said and "no such file" in said and "copy or export the folder again" in said
    listed = json.loads((folder / f"{WEIGHTS}.safetensors.index.json").read_text())["weight_map"]
    assert listed[first] == gone.name and any(key in said for key, file in listed.items() if file == gone.name)


def test_a_shard_cut_short(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an interrupted download leaves it: the header says more than the file has."""
    cut = shards(folder)[2]
    size = cut.stat().st_size
    cut.write_bytes(cut.read_bytes()[: size - 100])
    said = refused(folder, monkeypatch)
    assert f"{cut}: the weights cannot be read (it has {size - 100:,} of its {size:,} bytes and ends in " in said
    assert any(key in said for key in ("blocks.", "patch_", "proj_out", "condition_embedder", "norm_out"))


def test_a_shard_of_a_wider_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = shards(folder)[1]
    weights = load_file(other)
    name = next(key for key, value in weights.items() if value.ndim > 1)
    save_file({**weights, name: torch.zeros(7, 3)}, other)
    said = refused(folder, monkeypatch)
    assert said.startswith(f"{other}: ") and f"{name} is (7, 3), not" in said and "the folder of this model" in said


def test_a_shard_of_another_export(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two shards changed places: each has what the index has in the other."""
    one, two = shards(folder)[:2]
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    said = refused(folder, monkeypatch)
    assert said.startswith(f"{one}: ") and "it lacks " in said and "which the index has in it" in said


def test_too_little_host_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "available", lambda: 2**18)
    said = refused(folder, monkeypatch, fits=lambda size: host.must_hold(size, f"init={folder}: loading it"))
    assert f"init={folder}: loading it takes" in said and "available; end what else runs here" in said


def test_what_is_available(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's memory, or less where a container has less; what caches files does not count as taken."""
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    4000 kB\n")
    (tmp_path / "cgroup").write_text("0::/own\n")
    monkeypatch.setattr(host, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(host, "GROUP", tmp_path / "cgroup")
    monkeypatch.setattr(host, "GROUPS", tmp_path)
    assert host.available() == 4000 * 1024
    (tmp_path / "own").mkdir()
    group = {"max": "3000000", "current": "2500000", "stat": "anon 7\ninactive_file 400000\nactive_file 9\n"}
    for name, content in group.items():
        (tmp_path / "own" / f"memory.{name}").write_text(content + "\n")
    assert host.available() == 900_009
    (tmp_path / "own" / "memory.max").write_text("max\n")
    assert host.available() == 4000 * 1024
    (tmp_path / "meminfo").unlink()
    assert host.available() is None
    host.must_hold(2**60, "nobody knows")


def test_ctrl_c_leaves_nothing_behind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was loaded is let go of, and the files are closed."""
    read = loading.mapped_weights

    def _stopped(*given: Any) -> Any:
        for number, one in enumerate(read(*given)):
            if number == 20:
                raise KeyboardInterrupt
            yield one

    monkeypatch.setattr(loading, "mapped_weights", _stopped)
    with LiveCounter() as counter:
        before = counter.live()
        try:
            load_transformer(folder, torch.float32)
        except KeyboardInterrupt:
            pass
        assert counter.report().peak[DEVICE] > 100_000 and counter.live() - before < 1000
    assert not [line for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]
