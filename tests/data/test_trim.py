"""Copied parts of videos: the same frames, fewer bytes, the same file every time, or nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from helios_train.data.decode import Decoder
from helios_train.data.trim import copy_range


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    with Decoder() as made:
        yield made


def noisy(path: Path, frames: int = 120, keyframes: int = 30, **options: str) -> Path:
    """Noise that no coder can foresee, with B-frames, a keyframe every `keyframes` frames."""
    draw = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        chosen = {"g": str(keyframes), "bf": "3", "sc_threshold": "0", "threads": "1", **options}
        stream = container.add_stream("libx264", rate=25, options=chosen)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(frames):
            pixels = draw.integers(0, 255, (48, 64, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "mov"])
@pytest.mark.parametrize("cut", [(0, 33), (31, 64), (60, 93), (85, 119), (29, 30)])
def test_the_same_frames_in_fewer_bytes(suffix: str, cut: tuple[int, int], decoder: Decoder, tmp_path: Path) -> None:
    video, copy = noisy(tmp_path / f"in.{suffix}"), tmp_path / "copy.tmp"
    first = copy_range(video, copy, *cut)
    assert first == cut[0] % 30 and copy.stat().st_size < 0.75 * video.stat().st_size
    assert torch.equal(decoder.read(copy, range(first, first + cut[1] - cut[0])), decoder.read(video, range(*cut)))
    before = copy.read_bytes()
    assert copy_range(video, copy, *cut) == first and copy.read_bytes() == before


def test_frames_that_lean_on_the_next_keyframe(decoder: Decoder, tmp_path: Path) -> None:
    video, copy = noisy(tmp_path / "open.mp4", **{"x264-params": "open-gop=1:b-adapt=0"}), tmp_path / "copy.tmp"
    for cut in ((28, 61), (33, 66), (58, 91)):  # the copy begins where nothing reaches across, however far back
        first = copy_range(video, copy, *cut)
        assert first is not None
        assert torch.equal(decoder.read(copy, range(first, first + cut[1] - cut[0])), decoder.read(video, range(*cut)))


def test_nothing_is_left_where_it_cannot_be_done(tmp_path: Path) -> None:
    video, copy = noisy(tmp_path / "in.mp4", frames=40), tmp_path / "copy.tmp"
    assert copy_range(video, copy, 20, 41) is None  # fewer frames than the header said
    (tmp_path / "text.mp4").write_text("no video")
    assert copy_range(tmp_path / "text.mp4", copy, 0, 33) is None
    assert copy_range(video.rename(tmp_path / "in.xyz"), copy, 0, 33) is None
    assert not copy.exists()
