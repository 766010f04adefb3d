"""What a user can ask for, one verb a file."""

from __future__ import annotations

from typing import Any

from helios_train.conf.schema import Config
from helios_train.tasks import chain, evaluate, merge, pairs, plan, prepare, sample, train

TASKS = {
    "train": train.run,
    "prepare": prepare.run,
    "pairs": pairs.run,
    "merge": merge.run,
    "sample": sample.run,
    "evaluate": evaluate.run,
    "chain": chain.run,
    "plan": plan.run,
}


def run_task(config: Config, raw: dict[str, Any]) -> None:
    """Does what `task=` names; `raw` is the same config as plain dicts, for the run folder."""
    TASKS[config.task.name](config, raw)
