"""Keys of task=evaluate as types; values, meanings and units stand in task/evaluate.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from helios_train.conf.kinds import Above0, Positive

MetricName = Literal[
    "aesthetic",
    "motion_amplitude",
    "motion_smoothness",
    "semantic",
    "naturalness",
    "drifting_aesthetic",
    "drifting_motion_smoothness",
    "drifting_semantic",
    "drifting_naturalness",
]


@dataclass(frozen=True)
class AestheticNets:
    """What the aesthetic score is computed with."""

    clip: str
    head: str | None


@dataclass(frozen=True)
class SemanticNets:
    """What semantic consistency is computed with."""

    video_encoder: str | None
    text_encoder: str | None


@dataclass(frozen=True)
class Judge:
    """Who judges naturalness."""

    url: str
    model: str | None
    attempts: Positive
    timeout: Above0


@dataclass(frozen=True)
class Evaluate:
    """Keys of task=evaluate."""

    videos: str | None
    prompts: str | None
    sample: str
    output: str
    metrics: tuple[MetricName, ...] | None
    length: Literal["long", "short"]
    amplitude: Literal["helios_compat", "magnitude"]
    strict: bool
    bad: Literal["worst", "skip", "stop"]
    part: str
    timeout: Above0
    compare: tuple[str, ...]
    aesthetic: AestheticNets
    interpolator: str | None
    semantic: SemanticNets
    judge: Judge
