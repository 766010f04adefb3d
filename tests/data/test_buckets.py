"""Shapes and lengths: the published examples."""

from __future__ import annotations

import pytest

from helios_train.data.buckets import LENGTHS, RESOLUTIONS, nearest, whole_sections


@pytest.mark.parametrize(
    ("video", "bucket"),
    [
        ((720, 1280), (384, 640)),
        ((1080, 1920), (384, 640)),
        ((480, 832), (384, 640)),
        ((480, 854), (384, 640)),
        ((480, 640), (448, 576)),
        ((500, 500), (512, 512)),
        ((272, 640), (320, 768)),
        ((1280, 720), (640, 384)),
    ],
)
def test_published_examples(video: tuple[int, int], bucket: tuple[int, int]) -> None:
    assert nearest(*video, RESOLUTIONS) == bucket


def test_the_last_of_equals_is_taken() -> None:
    assert nearest(100, 100, ((64, 32), (32, 64))) == (32, 64) and nearest(100, 100, ((32, 64), (64, 32))) == (64, 32)
    # The distance is weighted by area, not by ratio: of two shapes as far off, the smaller one wins.
    assert nearest(300, 100, ((512, 512), (256, 256))) == (256, 256)


def test_every_shape_fits_the_model() -> None:
    assert len(RESOLUTIONS) == len(set(RESOLUTIONS)) == 11
    assert all(side % 16 == 0 for shape in RESOLUTIONS for side in shape)


@pytest.mark.parametrize(
    ("frames", "kept"), [(120, 0), (121, 99), (140, 99), (161, 132), (199, 165), (220, 165), (221, 198), (501, 495), (9999, 495)]
)
def test_published_lengths(frames: int, kept: int) -> None:
    assert whole_sections(frames, LENGTHS) == kept


@pytest.mark.parametrize(("frames", "kept"), [(0, 0), (32, 0), (33, 33), (65, 33), (132, 132), (9999, 9999)])
def test_any_length(frames: int, kept: int) -> None:
    assert whole_sections(frames) == kept
    assert whole_sections(frames, (20,)) == 0  # a length that holds no section
