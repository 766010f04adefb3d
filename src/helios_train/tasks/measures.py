"""Which metrics task=evaluate measures, built from the config. One table: a further measure is one more entry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from helios_train.conf.schema import Evaluate
from helios_train.errors import ConfigError, InputError
from helios_train.evaluation.aesthetic import AestheticScore
from helios_train.evaluation.amplitude import MotionAmplitude
from helios_train.evaluation.drifting import Drift
from helios_train.evaluation.encoders import ClipImages, imported, linear_head
from helios_train.evaluation.judge import HttpJudge
from helios_train.evaluation.metric import VideoMetric
from helios_train.evaluation.naturalness import Naturalness
from helios_train.evaluation.ratings import RULES
from helios_train.evaluation.semantic import SemanticConsistency
from helios_train.evaluation.smoothness import MotionSmoothness
from helios_train.evaluation.windows import beginnings, ends, semantic_ends, smoothness_ends

VERSION = 1  # of what is computed: scores of other versions are not taken from records


@dataclass(frozen=True)
class Measure:
    """A metric by its name; `settings`: plain values that its scores depend on; `reads_text`: they depend on the caption too."""

    name: str
    metric: VideoMetric
    settings: dict[str, Any]
    reads_text: bool


@dataclass(frozen=True)
class _Kind:
    """How a metric comes from the config: what it lacks there ("": nothing), how it is built, what its scores depend on."""

    lacks: Callable[[Evaluate], str]
    build: Callable[[Evaluate, bool], VideoMetric]  # the second argument: for windows of a drift
    settings: Callable[[Evaluate], dict[str, Any]]
    reads_text: bool = False


def _aesthetic(keys: Evaluate, window: bool) -> VideoMetric:
    assert keys.aesthetic.head is not None
    head = linear_head(keys.aesthetic.head)
    return AestheticScore(ClipImages(keys.aesthetic.clip), head)


def _smoothness(keys: Evaluate, window: bool) -> VideoMetric:
    assert keys.interpolator is not None
    return MotionSmoothness(imported(keys.interpolator, "evaluate.interpolator"))


def _semantic(keys: Evaluate, window: bool) -> VideoMetric:
    assert keys.semantic.video_encoder is not None and keys.semantic.text_encoder is not None
    video = imported(keys.semantic.video_encoder, "evaluate.semantic.video_encoder")
    text = imported(keys.semantic.text_encoder, "evaluate.semantic.text_encoder")
    return SemanticConsistency(video, text, beginnings) if window else SemanticConsistency(video, text)


def _judge(keys: Evaluate) -> HttpJudge:
    assert keys.judge.model is not None
    return HttpJudge(keys.judge.url, keys.judge.model, keys.judge.attempts, keys.judge.timeout)


def _naturalness(keys: Evaluate, window: bool) -> VideoMetric:
    judge = _judge(keys)
    return Naturalness(judge, judge.id, Path(keys.output) / "judge")


KINDS: dict[str, _Kind] = {
    "aesthetic": _Kind(
        lambda keys: "" if keys.aesthetic.head else "evaluate.aesthetic.head",
        _aesthetic,
        lambda keys: {"clip": keys.aesthetic.clip, "head": keys.aesthetic.head},
    ),
    "motion_amplitude": _Kind(
        lambda keys: "",
        lambda keys, window: MotionAmplitude(mode=keys.amplitude),
        lambda keys: {"mode": keys.amplitude},
    ),
    "motion_smoothness": _Kind(
        lambda keys: "" if keys.interpolator else "evaluate.interpolator",
        _smoothness,
        lambda keys: {"interpolator": keys.interpolator},
    ),
    "semantic": _Kind(
        lambda keys: " and ".join(
            f"evaluate.semantic.{part}" for part in ("video_encoder", "text_encoder") if not getattr(keys.semantic, part)
        ),
        _semantic,
        lambda keys: {"video": keys.semantic.video_encoder, "text": keys.semantic.text_encoder},
        reads_text=True,
    ),
    "naturalness": _Kind(
        lambda keys: "" if keys.judge.model else "evaluate.judge.model",
        _naturalness,
        lambda keys: {"judge": _judge(keys).id},
    ),
}
DRIFTS = {
    "drifting_aesthetic": ends,
    "drifting_motion_smoothness": smoothness_ends,
    "drifting_semantic": semantic_ends,
    "drifting_naturalness": ends,
}


def chosen(keys: Evaluate, captions: bool, device: torch.device) -> tuple[list[Measure], dict[str, str]]:
    """What is measured, and of what is not the reason. `captions`: whether any video has one.

    ConfigError where a metric is asked for by name and lacks a part; InputError where a part cannot be loaded.
    """
    measures: list[Measure] = []
    left_out: dict[str, str] = {}
    built: dict[str, VideoMetric] = {}
    for name in keys.metrics or RULES:
        kind, base = KINDS[name.removeprefix("drifting_")], name.removeprefix("drifting_")
        lacks = kind.lacks(keys)
        reason = f"needs {lacks}" if lacks else "" if captions or not kind.reads_text else "needs captions"
        if reason and keys.metrics:
            raise ConfigError(f"evaluate.metrics: {name} {reason}")
        if reason:
            left_out[name] = reason
            continue
        drift = name in DRIFTS
        part = f"{base} of windows" if drift and base == "semantic" else base  # the others share their networks
        if part not in built:
            built[part] = kind.build(keys, drift)
        metric = Drift(built[part], DRIFTS[name]) if drift else built[part]
        settings = {"version": VERSION, "metric": name, "length": keys.length, **kind.settings(keys)}
        measures.append(Measure(name, metric.to(device), settings, kind.reads_text))
    if not measures:
        raise InputError("nothing can be measured: " + "; ".join(f"{name} {reason}" for name, reason in left_out.items()))
    return measures, left_out
