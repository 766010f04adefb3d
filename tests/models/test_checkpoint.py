"""Checkpoints: whole or not at all, and nothing in them runs."""

from __future__ import annotations

import os
import pickle
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from helios_train.errors import InputError
from helios_train.models.checkpoint import AtomicCheckpointIO, audit, read

IO = AtomicCheckpointIO()


def content(fill: float, size: int = 8) -> dict[str, Any]:
    return {"state_dict": {"a": torch.full((size,), fill)}, "counters": {"skipped": 1}, "names": ["x", None, 2.5]}


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "1.ckpt"
    IO.save_checkpoint(content(1.0), path)
    for back in (read(path), IO.load_checkpoint(path, weights_only=True)):
        assert torch.equal(back["state_dict"]["a"], torch.ones(8))
        assert back["counters"] == {"skipped": 1} and back["names"] == ["x", None, 2.5]
    assert os.listdir(path.parent) == ["1.ckpt"]


def test_a_failing_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "1.ckpt"
    IO.save_checkpoint(content(1.0), path)

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"1\.ckpt: .*No space left.*earlier ones are kept"):
        IO.save_checkpoint(content(2.0), path)
    assert torch.equal(read(path)["state_dict"]["a"], torch.ones(8)) and os.listdir(tmp_path) == ["1.ckpt"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("may not mount")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk(small_disk: Path) -> None:
    path = small_disk / "1.ckpt"
    IO.save_checkpoint(content(1.0), path)
    with pytest.raises(InputError, match="could not be written"):
        IO.save_checkpoint(content(2.0, size=100_000), path)
    assert torch.equal(read(path)["state_dict"]["a"], torch.ones(8)) and os.listdir(small_disk) == ["1.ckpt"]


class Evil:
    """Unpickling it would create a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


def test_code_is_not_run(tmp_path: Path) -> None:
    for number, write in enumerate((torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2)))):
        path, mark = tmp_path / f"{number}.ckpt", tmp_path / "mark"
        write({"state_dict": {}, "evil": Evil(mark)}, path)
        with pytest.raises(InputError, match="is not a checkpoint of helios_train or is damaged"):
            read(path)
        assert not mark.exists()


def test_damaged_and_missing_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "1.ckpt"
    IO.save_checkpoint(content(1.0, size=5000), path)
    whole = path.read_bytes()
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 10):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"1\.ckpt: is not a checkpoint .*damaged") as caught:
            read(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"2\.ckpt: no such checkpoint"):
        read(tmp_path / "2.ckpt")
    for other in ({"weights": {}}, [1]):
        torch.save(other, path)
        with pytest.raises(InputError, match="is not a checkpoint of helios_train; give"):
            read(path)


def test_the_audit_names_keys() -> None:
    expected = {f"k{i}": (i, 2) for i in range(6)}
    found = {name: torch.zeros(shape) for name, shape in expected.items()}
    audit(expected, found, "here")
    found["k5"] = torch.zeros(1)
    found["stray"] = torch.zeros(1)
    for name in ("k0", "k1", "k2", "k3"):
        del found[name]
    said = r"here: .*: missing k0, k1, k2 and 1 more; unexpected stray; misshapen k5 is \(1,\), not \(5, 2\)$"
    with pytest.raises(InputError, match=said):
        audit(expected, found, "here")
