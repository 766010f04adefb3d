"""Runs the command line, and writes down every sample and a digest of every random draw of each iteration, to a file a rank.

Usage: HELIOS_TRAIN_TEST_RECORD=PREFIX driver.py <arguments of python -m helios_train>
Lightning starts it again for further ranks.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from helios_train.models.roles import CRITIC, STUDENT
from helios_train.stages.base import BaseStage
from helios_train.stages.distill import DistillStage

RECORD = "HELIOS_TRAIN_TEST_RECORD"


def digest(value: Any, into: Any) -> None:
    """Feeds every number of a draw, at any depth, to a hash."""
    if isinstance(value, torch.Tensor):
        into.update(value.numpy().tobytes())
    elif isinstance(value, np.ndarray):
        into.update(value.tobytes())
    elif isinstance(value, (list, tuple)):
        for item in value:
            digest(item, into)
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            digest(getattr(value, name), into)
    else:
        into.update(repr(value).encode())


def recording(step: Any) -> Any:
    """The training step, after a line about its draws, a sample a line."""

    def recorded(self: BaseStage, micro_batches: list[Any], batch_idx: int) -> None:
        with Path(f"{os.environ[RECORD]}.{self.global_rank}").open("a") as file:
            for window in micro_batches:
                draws = self.draws(window)
                for number, ref in enumerate(window.refs):
                    own = hashlib.sha256()
                    flow = draws.flow
                    passes = getattr(flow, "passes", [flow])  # one a level in mid
                    levels = [one.sigma[number : number + 1] for one in passes]
                    digest([draws.mix[number], draws.corrupt[number], levels, flow.noise[number]], own)
                    digest([window.target[number], window.text[number], window.history.frames[number]], own)
                    place = [ref.iteration, ref.position, ref.epoch, ref.sample, window.sections[number]]
                    file.write(json.dumps([*place, own.hexdigest()]) + "\n")
        step(self, micro_batches, batch_idx)

    return recorded


def recording_pairs(step: Any) -> Any:
    """The step of the whole cast, after a line about its draws, a sample a line."""

    def recorded(self: DistillStage, micro_batches: list[Any], batch_idx: int) -> None:
        with Path(f"{os.environ[RECORD]}.{self.global_rank}").open("a") as file:
            for pair in micro_batches:
                for first, second in zip(pair.first.samples(), pair.second.samples(), strict=True):
                    own = hashlib.sha256()
                    for who, objective, sample in (
                        (STUDENT, self.recipe.student, first),
                        (CRITIC, self.recipe.critic, second),
                    ):
                        told, sections = self.told(sample, who)
                        seen = told.views(0, told.history)
                        digest([objective.draw(*self.where(sample), told.history.empty[0], sections), told.text, seen], own)
                    ref = first.refs[0]
                    place = [ref.iteration, ref.position, ref.epoch, ref.sample, first.sections[0], second.sections[0]]
                    file.write(json.dumps([*place, own.hexdigest()]) + "\n")
        step(self, micro_batches, batch_idx)

    return recorded


if __name__ == "__main__":
    BaseStage.training_step = recording(BaseStage.training_step)  # type: ignore[method-assign]
    DistillStage.training_step = recording_pairs(DistillStage.training_step)  # type: ignore[method-assign]
    from helios_train.__main__ import main

    main()
