"""Video files: what is written is read back, cropped and resized; a file is whole or not there."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from helios_train.data.toy import ToySpec, render
from helios_train.data.video import Mp4Writer, centre_crop_resize, probe, read_frames, write_mp4
from helios_train.errors import InputError


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    frames, _ = render(0, 1, ToySpec(size=(64, 96), sections=2))
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    write_mp4(path, frames, 25)
    return path, frames


def decibels(a: torch.Tensor, b: torch.Tensor) -> float:
    return 10 * math.log10(255**2 / float((a.float() - b.float()).square().mean()))


def test_frames_come_back_in_order(clip: tuple[Path, np.ndarray]) -> None:
    path, frames = clip
    read = read_frames(path, range(66))
    assert read.shape == (66, 64, 96, 3) and read.dtype == torch.uint8
    assert decibels(read, torch.from_numpy(frames)) > 27
    # A frame resembles itself more than its neighbours four frames away.
    for index in (4, 40, 61):
        own = decibels(read[index], torch.from_numpy(frames[index]))
        assert all(own > decibels(read[index], torch.from_numpy(frames[index + step])) for step in (-4, 4))
    assert torch.equal(read_frames(path, [5, 6, 40]), read[[5, 6, 40]])


def test_flat_colours_survive_the_colour_space(tmp_path: Path) -> None:
    colours = torch.tensor([[225, 35, 35], [40, 190, 60], [35, 65, 200], [240, 240, 240], [15, 15, 15]], dtype=torch.uint8)
    frames = colours.view(-1, 1, 1, 3).expand(-1, 32, 32, 3)
    write_mp4(tmp_path / "flat.mp4", frames, 10)
    assert (read_frames(tmp_path / "flat.mp4", range(5)).int() - frames.int()).abs().max() <= 5


def test_widths_that_decord_cannot_read(tmp_path: Path) -> None:
    frames, _ = render(0, 0, ToySpec(size=(32, 48), sections=1))
    write_mp4(tmp_path / "narrow.mp4", frames, 25)
    read = read_frames(tmp_path / "narrow.mp4", range(33))
    assert read.shape == (33, 32, 48, 3) and decibels(read, torch.from_numpy(frames)) > 25


def test_header(clip: tuple[Path, np.ndarray]) -> None:
    assert probe(clip[0]) == (66, 64, 96, 25.0, ())


def test_bytes_are_a_function_of_the_frames(clip: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    path, frames = clip
    write_mp4(tmp_path / "again.mp4", torch.from_numpy(frames), 25)
    assert (tmp_path / "again.mp4").read_bytes() == path.read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == ["again.mp4"]


def test_bytes_do_not_depend_on_what_lies_beside_the_picture(tmp_path: Path) -> None:
    """At widths that the widest kernels of the encoder do not divide, one file in fifty used to differ."""
    frames = np.random.default_rng(0).integers(0, 256, (33, 32, 48, 3), dtype=np.uint8)
    written = set()
    for _ in range(100):
        write_mp4(tmp_path / "clip.mp4", frames, 25)
        written.add((tmp_path / "clip.mp4").read_bytes())
    assert len(written) == 1


def test_frames_may_come_in_parts(clip: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    path, frames = clip
    with Mp4Writer(tmp_path / "parts.mp4", 25) as writer:
        for start, end in ((0, 1), (1, 40), (40, 40), (40, 66)):
            writer.add(frames[start:end])
        assert not (tmp_path / "parts.mp4").exists()
    assert (tmp_path / "parts.mp4").read_bytes() == path.read_bytes()


def test_no_half_file_is_left(clip: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    frames = clip[1]
    with pytest.raises(KeyError), Mp4Writer(tmp_path / "a.mp4", 25) as writer:
        writer.add(frames[:40])
        raise KeyError
    with pytest.raises(InputError, match="a.mp4: frames of 32x96 after .* 64x96"), Mp4Writer(tmp_path / "a.mp4", 25) as writer:
        writer.add(frames[:3])
        writer.add(frames[:3, :32])
    with pytest.raises(InputError, match="a.mp4: no frame"), Mp4Writer(tmp_path / "a.mp4", 25):
        pass
    with pytest.raises(InputError, match="a.mp4: no frame"):
        write_mp4(tmp_path / "a.mp4", frames[:0], 25)
    assert not list(tmp_path.iterdir())


def test_a_failed_rewrite_keeps_the_old_file(clip: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    path, frames = clip
    target = tmp_path / "a.mp4"
    target.write_bytes(path.read_bytes())
    with pytest.raises(KeyError), Mp4Writer(target, 25) as writer:
        writer.add(frames[:9])
        raise KeyError
    assert target.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("count", [2, 66])  # found full at the end, and before
def test_a_full_disk_is_said(count: int, clip: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    (tmp_path / "a.mp4.tmp").symlink_to("/dev/full")
    draw = np.random.default_rng(0)
    with pytest.raises(InputError, match=r"a.mp4: cannot be written \(No space left on device\); free some space"):
        write_mp4(tmp_path / "a.mp4", draw.integers(0, 256, (count, 256, 256, 3), np.uint8), 25)
    assert not list(tmp_path.iterdir())


def test_where_nothing_can_be_written(clip: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder, why in (("gone", "No such file"), ("file", "Not a directory")):
        with pytest.raises(InputError, match=rf"a.mp4: cannot be written \({why}.*another folder"):
            write_mp4(tmp_path / folder / "a.mp4", clip[1][:3], 25)


def test_bad_files_and_frames_are_named(clip: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    path, frames = clip
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"no video" * 99)
    for act in (lambda: probe(bad), lambda: read_frames(bad, [0])):
        with pytest.raises(InputError, match="bad.mp4: not a readable video"):
            act()
    with pytest.raises(InputError, match=r"clip.mp4: frame 66 .* only 66"):
        read_frames(path, [66])
    with pytest.raises(InputError, match="ascending"):
        read_frames(path, [3, 1])
    with pytest.raises(InputError, match="gone.mp4"):
        read_frames(tmp_path / "gone.mp4", [0])
    with pytest.raises(InputError, match="odd side"):
        write_mp4(bad, frames[:, :63], 25)
    with pytest.raises(InputError, match="uint8"):
        write_mp4(bad, frames.astype(np.float32), 25)


@pytest.mark.parametrize(
    ("given", "size"), [((60, 100), (48, 32)), ((90, 40), (32, 64)), ((272, 640), (64, 128)), ((64, 128), (64, 128))]
)
def test_crop_keeps_the_centre(given: tuple[int, int], size: tuple[int, int]) -> None:
    rows, columns = (torch.linspace(0, 255, side) for side in given)
    frames = torch.stack([rows[:, None].expand(given), columns.expand(given), torch.full(given, 51.0)], dim=-1).round().byte()
    out = centre_crop_resize(frames[None].expand(9, -1, -1, -1), size)
    assert out.shape == (3, 9, *size) and out.dtype == torch.float32
    # Ramps stay centred ramps, and equal scales on both axes keep shapes: the step a pixel is the given one times the scale.
    scale = min(given[0] / size[0], given[1] / size[1])
    for channel, side, axis in ((0, given[0], 1), (1, given[1], 2)):
        ramp = out[channel, 0].transpose(0, axis - 1)[:, 0]
        assert abs(float(ramp.mean())) < 0.02
        steps = ramp[2:-2].diff().mean()
        assert float(steps) == pytest.approx(2 / (side - 1) * scale, rel=0.05)
    assert (out[2] - (51 / 127.5 - 1)).abs().max() < 1e-6


def test_pixels_are_fp32_whatever_the_default() -> None:
    """The default is the process's: while one thread loads a text encoder in bf16, another decodes."""
    frames = torch.arange(2 * 4 * 6 * 3, dtype=torch.uint8).view(2, 4, 6, 3)
    before = torch.get_default_dtype()
    wanted = centre_crop_resize(frames, (4, 6))
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = centre_crop_resize(frames, (4, 6))
    finally:
        torch.set_default_dtype(before)
    assert found.dtype == torch.float32 and torch.equal(found, wanted)


def test_resize_is_antialiased() -> None:
    # Shrunk four times, a plain bilinear sample falls between two white columns each time.
    stripes = ((torch.arange(256) + 1) // 2 % 2 * 255).byte().view(1, 1, 256, 1).expand(1, 128, 256, 3)
    out = centre_crop_resize(stripes, (32, 64))
    assert out[..., 4:-4].abs().max() < 0.05


def test_crop_comes_before_the_centre() -> None:
    frames = torch.arange(8 * 20 * 30 * 3).remainder(251).byte().view(8, 20, 30, 3)
    assert torch.equal(centre_crop_resize(frames, (6, 8), crop=(3, 27, 2, 20)), centre_crop_resize(frames[:, 2:20, 3:27], (6, 8)))
    assert torch.equal(centre_crop_resize(frames, (6, 8), crop=(0, 30, 0, 20)), centre_crop_resize(frames, (6, 8)))
    for crop in ((3, 31, 0, 20), (0, 30, 0, 21), (-1, 30, 0, 20), (5, 5, 0, 20), (0, 30, 9, 3)):
        with pytest.raises(InputError, match=r"crop .* not inside frames of 20x30; correct it"):
            centre_crop_resize(frames, (6, 8), crop=crop)
