"""Every alarm just past its limit and just below it, from figures and from videos that are wrong in one way."""

from __future__ import annotations

import math

import numpy as np
import pytest

from helios_train.conf.compose import compose
from helios_train.conf.watched import Alarms
from helios_train.evaluation.alarms import FROZEN, RULES, SOLID, judge
from helios_train.evaluation.drift import measure

ALARMS = compose().watch.alarms
LIMITS = {name: getattr(ALARMS, name) for name in RULES}


def healthy(sections: int = 4) -> np.ndarray:
    """A bar that moves a pixel every frame over a plain picture."""
    video = np.full((33 * sections, 16, 64, 3), 60, dtype=np.uint8)
    for frame, picture in enumerate(video):
        picture[:, np.arange(frame, frame + 12) % 64] = (200, 120, 90)
    return video


def fired(video: np.ndarray) -> set[str]:
    return {name for name, finding in judge(measure(video).figures, LIMITS).items() if finding}


def test_every_rule_has_a_limit_in_the_config() -> None:
    assert set(Alarms.__dataclass_fields__) == {"enabled", "start", *RULES} and all(LIMITS.values())


@pytest.mark.parametrize("name", RULES)
def test_a_figure_past_its_limit_and_one_just_below(name: str) -> None:
    rule, limit = RULES[name], LIMITS[name]
    for figure in rule.figures:
        well = dict.fromkeys(rule.figures, 0.0)
        for sign in (1, -1) if figure.endswith("slope") else (1,):
            past, below = (limit * share * sign for share in ((0.999, 1.001) if rule.least else (1.001, 0.999)))
            if rule.least:
                past, below = limit * 0.999, limit * 1.001
            finding = judge({**well, figure: past}, {name: limit})[name]
            assert finding and (finding.figure, finding.value, finding.limit) == (figure, past, limit)
            assert f"{limit:g}" in finding.seen and finding.look_at == rule.look_at
            assert judge({**well, figure: below}, {name: limit}) == {name: None}


def test_a_healthy_video_raises_nothing_and_all_is_judged() -> None:
    judged = judge(measure(healthy()).figures, LIMITS)
    assert judged == dict.fromkeys(RULES)


@pytest.mark.parametrize("share", [0.9, 1.1])
@pytest.mark.parametrize(
    ("alarm", "direction", "measured"),
    [("luma", (-1, -1, -1), 1.0), ("colour", (0, 0, -1), 1.0), ("saturation", (1, 0, 0), 1.0)],
)
def test_a_bias_that_grows_by_section(alarm: str, direction: tuple[int, ...], measured: float, share: float) -> None:
    """Over a grey picture the measure changes by the bias; it fires a tenth past its limit and not a tenth below."""
    video = np.full((132, 16, 64, 3), 250 if min(direction) < 0 else 5, dtype=float)
    video[:, :, :32] -= 5 if min(direction) < 0 else -5
    section = (np.arange(132) // 33)[:, None, None, None]
    video += section * np.array(direction) * share * LIMITS[alarm] * 255
    judged = judge(measure(np.round(video).clip(0, 255).astype(np.uint8)).figures, LIMITS)
    assert (judged[alarm] is not None) == (share > 1)


@pytest.mark.parametrize("share", [0.9, 1.1])
def test_a_picture_of_one_colour(share: float) -> None:
    """Half of each of its pixels is a level above the mean and half below, in one section of three."""
    video = healthy(3)
    level = LIMITS[SOLID] * 255 / share
    video[33:66] = 100
    video[33:66, :, ::2] = round(100 + 2 * level)
    exact = round(2 * level) / 2 / 255
    assert (SOLID in fired(video)) == (exact < LIMITS[SOLID])
    assert FROZEN not in fired(video) or exact >= LIMITS[SOLID]  # one colour explains that nothing moves


@pytest.mark.parametrize("still", [True, False])
def test_a_section_that_stands_still(still: bool) -> None:
    """One pixel that changes by 255 / 33 levels each frame is motion enough in a small picture, or is not there."""
    video = healthy(3)
    video[33:66] = video[33]
    if not still:
        moved = math.ceil(1.1 * LIMITS[FROZEN] * 255 * 16 * 64)  # levels a frame, over all pixels
        video[34:66:2, 0, :4] = 60 + math.ceil(moved / 4)
        video[33:66:2, 0, :4] = 60
    assert (FROZEN in fired(video)) == still


def test_what_cannot_be_judged_is_left_out() -> None:
    judged = judge(measure(healthy(1)).figures, LIMITS)
    assert judged == {SOLID: None, FROZEN: None}  # one section has no slope and no border
    assert judge(measure(healthy()).figures, {**LIMITS, "luma": None}).keys() == RULES.keys() - {"luma"}
    assert judge({**measure(healthy()).figures, "drift/latent_nonfinite": 0.1}, LIMITS) == {}
    with pytest.raises(KeyError):
        judge({}, {"other": 1.0})


def test_the_sentence_has_figure_interval_and_limit() -> None:
    figures = {"drift/saturation_slope": 0.5, "drift/saturation_slope_low": 0.4, "drift/saturation_slope_high": 0.6}
    finding = judge(figures, {"saturation": 0.25})["saturation"]
    assert finding is not None
    assert finding.seen == (
        "saturation changes by +0.5000 a section (95 % interval +0.4000 to +0.6000); it may be at most 0.25 either way"
    )
    assert "Frame-Aware Corrupt" in finding.look_at and "Anchor" in finding.look_at
