"""What of its config may change when a run goes on, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from helios_train.conf.rules import AUTO, ONE_BASE
from helios_train.errors import InputError
from helios_train.run import compare_configs

# What a resumed run may change; anything else is refused by name.
LOOP = tuple(f"trainer.{name}" for name in ("devices", "accelerator", "max_steps", "progress"))
# Where bytes live and what is computed again. On a CPU the same to the bit but for which blocks are computed again, on a GPU
# also but for where the optimizer steps: those are the same to rounding.
PLACES = tuple(
    f"memory.{name}"
    for name in ("name", "stream", "park", "block_inputs", "optimizer", "gan_replay", "checkpointing", "checkpoint_every")
)
CHANGEABLE = (*LOOP, "data.workers", "logger", "watch.alarms", "run_dir", "resume", *PLACES)
# Made from keys that may change, and fixed by the first start all the same: schedules go on as they began.
FIXED_BY_FIRST_START = ("optimizer.total",)
SHOWN = 5  # keys a message spells out


def settled(saved: Mapping[str, Any], raw: Mapping[str, Any]) -> dict[str, Any]:
    """Today's config with the memory choice the run last had where it is memory=auto: going on, that does not choose again."""
    auto = isinstance(raw.get("memory"), Mapping) and raw["memory"].get("name") == AUTO
    return {**raw, "memory": saved["memory"]} if auto and saved.get("memory") else dict(raw)


def changed(saved: Mapping[str, Any], raw: Mapping[str, Any], fixed: Sequence[str] = ()) -> list[str]:
    """Dotted keys in which a composed config differs from a saved one and may not, nor may the `fixed` ones.

    `init` is the same by whatever path; a memory choice may change, but not how many bases `stage.bases=auto` has under it.
    """
    allowed = tuple(key for key in (*CHANGEABLE, *FIXED_BY_FIRST_START) if key not in fixed)
    now = settled(saved, raw)
    keys = compare_configs(_placed(saved), _placed(now), allowed)
    return keys if _auto_is_one(saved) == _auto_is_one(now) else [*keys, "memory.name (one base for all roles, or two)"]


def refuse(keys: Sequence[str], where: Path, record: str) -> None:
    """InputError that names the `keys` which differ from those `where` was begun with, if there are any; `record` holds these."""
    if keys:
        more = f" and {len(keys) - SHOWN} more keys" if len(keys) > SHOWN else ""
        raise InputError(
            f"{where}: cannot resume with another {', '.join(keys[:SHOWN])}{more}; start a new run, or put the old "
            f"values back (they are in {record}, unless that is damaged)"
        )


def _auto_is_one(config: Mapping[str, Any]) -> bool:
    """Whether `stage.bases=auto` stands there and means one base."""
    stage, memory = config.get("stage"), config.get("memory")
    if not isinstance(stage, Mapping) or not isinstance(memory, Mapping):
        return False  # an older run's
    return stage.get("bases") == AUTO and memory.get("name") in ONE_BASE


def place(init: str | None) -> str | None:
    """The one path of a folder or checkpoint that may be written relative, absolute or through a link."""
    return str(Path(init).resolve()) if init else None


def _placed(config: Mapping[str, Any]) -> dict[str, Any]:
    init = config.get("init")
    return {**config, "init": place(init)} if isinstance(init, str) else dict(config)
