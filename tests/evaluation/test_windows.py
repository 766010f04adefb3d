"""Which frames metrics look at: those of the published scripts, for 81 frames and for odd lengths."""

from __future__ import annotations

import pytest

from helios_train.evaluation.windows import beginnings, ends, middles, semantic_ends, smoothness_ends, strided


def test_the_published_indices_of_81_frames() -> None:
    assert middles(81) == [4, 14, 24, 34, 44, 54, 64, 75]
    start, end = semantic_ends(81)
    assert (start, end) == (range(0, 12), range(68, 81))
    assert [start.start + place for place in beginnings(len(start))] == [0, 1, 3, 4, 6, 7, 9, 10]
    assert ends(81) == (range(12), range(69, 81)) and smoothness_ends(81) == ends(81)
    assert strided(81) == list(range(0, 76, 5))


def test_long_videos_and_their_windows() -> None:
    assert ends(1440) == (range(216), range(1224, 1440))
    assert semantic_ends(1440) == (range(216), range(1224, 1440))
    assert strided(216) == list(range(0, 13 * 16, 13)) and len(strided(1440)) == 16
    assert middles(1440)[0] == 89 and middles(1440)[-1] == 1349


@pytest.mark.parametrize("frames", range(1, 40))
def test_short_videos_stay_inside(frames: int) -> None:
    for indices in (middles(frames), beginnings(frames), strided(frames)):
        assert indices == sorted(indices) and 0 <= indices[0] and indices[-1] < frames
    assert len(middles(frames)) == len(beginnings(frames)) == 8
    for rule, least in ((ends, 1), (semantic_ends, min(8, frames)), (smoothness_ends, 4)):
        windows = rule(frames)
        if windows is None:
            assert rule is smoothness_ends and frames < 4
            continue
        start, end = windows
        assert start.start == 0 and end.stop == frames and min(len(start), len(end)) >= least
        assert start.stop <= frames and end.start >= 0
