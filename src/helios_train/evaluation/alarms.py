"""When a drift figure says that something is wrong, and what to look at then."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

NAN = "nan"  # the alarm of numbers that are not finite; it has no limit
SOLID, FROZEN = "solid", "frozen"


class Rule(NamedTuple):
    """Figures of which the one farthest from 0 may not be above the limit; `least`: the one figure may not be below it."""

    figures: tuple[str, ...]
    least: bool
    seen: str  # what to say of {value}, a figure as such
    look_at: str


RULES = {
    "saturation": Rule(
        ("drift/saturation_slope",),
        False,
        "saturation changes by {value:+.4f} a section",
        "the model goes on from its own errors: Frame-Aware Corrupt (stage.corrupt: more noise, saturation_on_top), the "
        "First-Frame Anchor, and whether guidance is too strong (watch.sample_guidance)",
    ),
    "luma": Rule(
        ("drift/luma_slope",),
        False,
        "luma changes by {value:+.4f} a section",
        "the model goes on from its own errors: Frame-Aware Corrupt (stage.corrupt), the First-Frame Anchor; a first frame that "
        "differs from the rest: the codec's latents_mean and latents_std",
    ),
    "colour": Rule(
        ("drift/yellow_blue_slope", "drift/red_green_slope"),
        False,
        "the mean colour moves by {value:+.4f} a section",
        "a tint that grows: Frame-Aware Corrupt (stage.corrupt), the First-Frame Anchor; in distill the teacher's own videos, "
        "stage.guidance and how far the critic has followed (critic/loss)",
    ),
    "border": Rule(
        ("drift/border_ratio",),
        False,
        "frames differ {value:.2f} times as much across section borders as inside sections",
        "sections do not go on from one another: is the history used (held_out/dropped must be above held_out/full), the share "
        "stage.mix.full, in mid stage.pyramid.positions=matched; Frame-Aware Corrupt that leaves nothing to see",
    ),
    SOLID: Rule(
        ("drift/spread_least",),
        True,
        "a section is nearly one colour: its spread over the picture is {value:.5f}",
        "the codec and its scaling: latents_mean and latents_std, whether shards and sampling have the same codec; a model that "
        "has collapsed: go back to an earlier checkpoint",
    ),
    FROZEN: Rule(
        ("drift/motion_least",),
        True,
        "a section hardly moves: its mean difference from frame to frame is {value:.6f}",
        "a model that copies its history: more Frame-Aware Corrupt noise (stage.corrupt), a smaller share stage.mix.i2v; footage "
        "that stands still; too few steps (watch.sample_steps)",
    ),
}
LOOK_AT_NAN = (
    "optimizer.lr and optimizer.clip, the samples of that iteration (a damaged or mis-scaled clip), model.dtype; an earlier "
    "checkpoint is sound where this one is not"
)


class Finding(NamedTuple):
    """What was seen: the figure, its value, the limit it passed, a sentence, and what to look at."""

    figure: str
    value: float
    limit: float
    seen: str
    look_at: str


def judge(figures: Mapping[str, float], limits: Mapping[str, float | None]) -> dict[str, Finding | None]:
    """What the `drift/` figures of a video say of each of RULES that has a limit: a finding where it is passed, None where not.

    A rule is left out whose figures are not there or not finite; all are where the video's latents are not finite, and `frozen`
    where the picture is one colour, which explains it. KeyError for limits of unknown rules.
    """
    if figures.get("drift/latent_nonfinite", 0.0) > 0:
        return {}
    found: dict[str, Finding | None] = {}
    for name, limit in limits.items():
        rule = RULES[name]
        there = {key: figures[key] for key in rule.figures if math.isfinite(figures.get(key, math.nan))}
        if limit is None or not there:
            continue
        key = max(there, key=lambda own: abs(there[own]))
        wrong = there[key] < limit if rule.least else abs(there[key]) > limit
        found[name] = Finding(key, there[key], limit, _seen(rule, key, figures, limit), rule.look_at) if wrong else None
    if found.get(SOLID):
        found.pop(FROZEN, None)
    return found


def _seen(rule: Rule, key: str, figures: Mapping[str, float], limit: float) -> str:
    low, high = (figures.get(f"{key}_{end}", math.nan) for end in ("low", "high"))
    interval = f" (95 % interval {low:+.4f} to {high:+.4f})" if math.isfinite(low) else ""
    bound = f"must be at least {limit:g}" if rule.least else f"may be at most {limit:g}"
    either = " either way" if key.endswith("_slope") else ""
    return f"{rule.seen.format(value=figures[key])}{interval}; it {bound}{either}"
