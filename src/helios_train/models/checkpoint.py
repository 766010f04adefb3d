"""Checkpoints: written whole or not at all, read without executing anything, audited key by key."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from helios_train.errors import InputError

SHOWN = 3  # names a message spells out


class Shaped(Protocol):
    """A tensor, or what stands for one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sides."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Streams to a temporary name, fsyncs, renames; reads tensors and plain Python only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Writes `checkpoint`; a killed process leaves the old file or none, never half of one. InputError on a full disk."""
        final = Path(path)
        unfinished = final.with_name(final.name + ".tmp")
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            with unfinished.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(final)
            folder = os.open(final.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except (OSError, RuntimeError) as error:
            _remove(unfinished)
            raise InputError(
                f"{final}: the checkpoint could not be written ({_reason(error)}); earlier ones are kept: make room or make the "
                f"folder writable, then go on with resume={final.parent.parent}"
            ) from error

    def load_checkpoint(self, path: Any, map_location: Any | None = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads a checkpoint to the host."""
        return read(Path(path))


def read(path: Path) -> dict[str, Any]:
    """A checkpoint's content, on the host; InputError where it is missing or no checkpoint."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such checkpoint") from None
    except Exception as error:  # torch.load raises what its unpickler raises
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"{path}: is not a checkpoint of helios_train or is damaged ({reason}); take an earlier one: to resume from the one "
            "before, remove this file"
        ) from error
    if not isinstance(content, dict) or "state_dict" not in content:
        raise InputError(f"{path}: is not a checkpoint of helios_train; give checkpoints/<iteration>.ckpt of a run")
    return content


def _reason(error: BaseException) -> str:
    """The disk's own words: torch.save turns a full disk into a RuntimeError, raised while the OSError is handled."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__context__
    return str(error).partition("\n")[0]


def _remove(unfinished: Path) -> None:
    with suppress(OSError):  # of a read-only folder: the first error says more
        unfinished.unlink(missing_ok=True)


def audit(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, Shaped], where: str, remedy: str = "") -> None:
    """InputError unless `found` has exactly the expected keys and shapes; names what is missing, extra or misshapen."""
    missing = sorted(expected.keys() - found.keys())
    extra = sorted(found.keys() - expected.keys())
    shapes = [
        f"{name} is {tuple(found[name].shape)}, not {shape}"
        for name, shape in expected.items()
        if name in found and tuple(found[name].shape) != shape
    ]
    faults = [
        f"{kind} {_some(names)}" for kind, names in (("missing", missing), ("unexpected", extra), ("misshapen", shapes)) if names
    ]
    if faults:
        raise InputError(f"{where}: the weights are not this model's: {'; '.join(faults)}{remedy and f'; {remedy}'}")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
