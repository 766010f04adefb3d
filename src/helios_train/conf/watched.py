"""The group `watch` as types; values, meanings and units stand in its YAML file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from helios_train.conf.kinds import Above0, AtLeast0, Count, Positive, Sigma


@dataclass(frozen=True)
class Alarms:
    """When what is watched is not well; null: no limit."""

    enabled: bool
    start: Count
    saturation: Above0 | None
    luma: Above0 | None
    colour: Above0 | None
    border: Above0 | None
    solid: Above0 | None
    frozen: Above0 | None


@dataclass(frozen=True)
class Watch:
    """What is looked at while training."""

    name: Literal["default"]
    every: Count
    clips: Positive
    sigmas: tuple[Sigma, ...]
    quantiles: Count
    sample: bool
    sample_every: Count
    sample_steps: Positive | tuple[Positive, ...] | None
    sample_guidance: AtLeast0
    sample_sections: Positive
    alarms: Alarms
