"""Images and videos a sampled video begins from, in the sizes, modes and states that people's files have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helios_train.data.toy import ToySpec, render
from helios_train.data.video import centre_crop_resize, write_mp4
from helios_train.errors import InputError
from helios_train.sampling.inputs import load_image, load_video

SIZE = (64, 96)
EXIF_ORIENTATION = 0x0112


def picture(height: int = 80, width: int = 120) -> Image.Image:
    """Red grows to the right, green downwards, blue is 40."""
    red, green = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([red, green, np.full_like(red, 40)], axis=-1).astype(np.uint8))


def grey(height: int = 80, width: int = 120) -> np.ndarray:
    return np.asarray(picture(height, width))[..., 0]


def saved(folder: Path, image: Image.Image, name: str = "image.png", **options: object) -> Path:
    image.save(folder / name, **options)
    return folder / name


def expected(pixels: np.ndarray) -> torch.Tensor:
    """uint8 [h, w, 3] or [h, w] as the sampler takes it."""
    rgb = pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2)
    return centre_crop_resize(torch.from_numpy(rgb.copy())[None], SIZE)[:, 0]


@pytest.mark.parametrize("size", [(64, 96), (80, 120), (500, 70), (17, 700), (33, 47), (1, 1)])
def test_any_size(tmp_path: Path, size: tuple[int, int]) -> None:
    path = saved(tmp_path, picture(*size))
    if min(size) < 16:
        with pytest.raises(InputError, match=r"image.png: 1x1 pixels, .* uses 1 on its shorter side; give one with 16 or more"):
            load_image(path, SIZE)
        return
    found = load_image(path, SIZE)
    assert found.image.shape == (3, *SIZE) and found.image.dtype == torch.float32 and found.image.abs().max() <= 1
    assert torch.equal(found.image, expected(np.asarray(picture(*size))))
    resized = f"{size[0]}x{size[1]} cropped and resized to 64x96"
    assert found.notes == (() if size == SIZE else (resized,))


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "CMYK", "YCbCr", "LA", "RGBA"])
def test_any_mode(tmp_path: Path, mode: str) -> None:
    """Opaque, each looks like the RGB that Pillow makes of it, and nothing is said of transparency."""
    path = saved(tmp_path, picture().convert(mode), "image.tiff" if mode in ("CMYK", "YCbCr") else "image.png")
    with Image.open(path) as again:
        assert again.mode == mode
        reference = np.asarray(again.convert("RGB"))
    found = load_image(path, SIZE)
    torch.testing.assert_close(found.image, expected(reference), atol=1e-6, rtol=0)
    assert found.notes == ("80x120 cropped and resized to 64x96",)


def test_sixteen_bits_keep_their_greys(tmp_path: Path) -> None:
    """Pillow's own conversion to RGB clips everything above 255 to white."""
    path = saved(tmp_path, Image.fromarray(grey().astype(np.uint16) * 257))
    with Image.open(path) as image:
        assert image.mode.startswith("I")
    found = load_image(path, SIZE)
    assert torch.equal(found.image, expected(grey())) and "16 bits a pixel brought to 8" in found.notes
    wide = saved(tmp_path, Image.fromarray(grey().astype(np.int32) * 100_000), "wide.tiff")
    with pytest.raises(InputError, match="beyond 16 bits"):
        load_image(wide, SIZE)


def test_floating_point_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"float.tiff: .*floating point.*save it as PNG"):
        load_image(saved(tmp_path, Image.fromarray(grey().astype(np.float32)), "float.tiff"), SIZE)


def test_transparent_parts_are_shown_over_white(tmp_path: Path) -> None:
    image = picture().convert("RGBA")
    alpha = np.full((80, 120), 255, dtype=np.uint8)
    alpha[:, :60], alpha[:, 60:80] = 0, 51
    image.putalpha(Image.fromarray(alpha))
    found = load_image(saved(tmp_path, image), SIZE)
    share = alpha[..., None] / 255
    blended = np.round(np.asarray(picture()) * share + 255 * (1 - share)).astype(np.uint8)
    torch.testing.assert_close(found.image, expected(blended), atol=2.5 / 255, rtol=0)  # Pillow rounds on its way
    torch.testing.assert_close(found.image[:, :, :40], torch.ones(3, 64, 40))
    assert found.notes[0] == "transparent parts shown over white"


def test_transparency_of_a_palette_and_of_a_colour(tmp_path: Path) -> None:
    two = Image.new("P", (96, 64), 0)
    two.putpalette([255, 0, 0, 0, 0, 255])
    two.paste(1, (0, 0, 48, 64))
    found = load_image(saved(tmp_path, two, "p.png", transparency=0), SIZE)
    assert found.image[:, 0, 0].tolist() == [-1, -1, 1] and found.image[:, 0, -1].tolist() == [1, 1, 1]
    rgb = Image.new("RGB", (96, 64), (255, 0, 0))
    assert (load_image(saved(tmp_path, rgb, "rgb.png", transparency=(255, 0, 0)), SIZE).image == 1).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_as_the_exif_says(tmp_path: Path, orientation: int) -> None:
    """The file holds the picture turned the other way; what comes out is upright."""
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = picture().transpose(undo[orientation]) if orientation in undo else picture()
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    found = load_image(saved(tmp_path, stored, exif=exif), SIZE)
    assert torch.equal(found.image, expected(np.asarray(picture())))
    assert ("turned as its EXIF says" in found.notes) == (orientation != 1)


def test_the_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (96, 64), colour) for colour in ((255, 0, 0), (0, 0, 255), (0, 255, 0))]
    path = saved(tmp_path, frames[0], "moving.gif", save_all=True, append_images=frames[1:])
    found = load_image(path, SIZE)
    assert found.image[:, 0, 0].tolist() == [1, -1, -1] and found.notes == ("first of 3 frames",)


def test_files_that_are_no_image(tmp_path: Path) -> None:
    whole = saved(tmp_path, picture(), "whole.png").read_bytes()
    jpeg = saved(tmp_path, picture(), "whole.jpg").read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    for name, content in {
        "empty.png": b"",
        "text.png": b"not an image at all",
        "cut.png": whole[: len(whole) // 2],
        "cut.jpg": jpeg[: len(jpeg) // 2],
        "flipped.png": bytes(flipped),
        "header.png": whole[:20],
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=rf"{name}: not a readable image \(.+\); repair it"):
            load_image(tmp_path / name, SIZE)
    for missing in (tmp_path / "nowhere.png", tmp_path):
        with pytest.raises(InputError, match="no such image file"):
            load_image(missing, SIZE)


def clip(path: Path, frames: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """A toy video; returns the frames that were written."""
    pixels = render(3, 0, ToySpec(size=size, sections=-(-frames // 33), motion_in_caption=False))[0][:frames]
    write_mp4(path, pixels, 25)
    return pixels


def compare(found: torch.Tensor, pixels: np.ndarray) -> None:
    """Found in the file what was written, but for the loss of the encoding."""
    reference = centre_crop_resize(torch.from_numpy(pixels.copy()), SIZE)
    assert found.shape == reference.shape and (found - reference).abs().mean() < 0.03


@pytest.mark.parametrize(("frames", "skipped", "start"), [(33, 0, 0), (40, 0, 7), (98, 0, 32), (99, 0, 0), (170, 2, 71)])
def test_the_trailing_windows_of_a_video_and_its_first_frame(tmp_path: Path, frames: int, skipped: int, start: int) -> None:
    pixels = clip(tmp_path / "video.mp4", frames)
    found = load_video(tmp_path / "video.mp4", SIZE)
    assert found.skipped == skipped
    compare(found.first, pixels[:1])
    compare(found.trailing, pixels[start:])


def test_a_long_video_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from helios_train.sampling import inputs

    clip(tmp_path / "video.mp4", 400)
    wanted: list[int] = []
    read = inputs.Decoder.read

    def recorded(self, path: Path, indices: object) -> torch.Tensor:
        wanted.append(len(list(indices)))
        return read(self, path, indices)

    monkeypatch.setattr(inputs.Decoder, "read", recorded)
    found = load_video(tmp_path / "video.mp4", SIZE)
    assert max(wanted) == 33 and sum(wanted) == 100 and found.skipped == 9
    assert "history from frames 301 to 399, anchor from frame 0" in found.notes


def test_a_video_of_another_shape_is_cropped(tmp_path: Path) -> None:
    pixels = clip(tmp_path / "video.mp4", 33, (128, 96))
    found = load_video(tmp_path / "video.mp4", SIZE)
    compare(found.trailing, pixels)
    assert found.notes == ("128x96 cropped and resized to 64x96",)


def test_videos_that_cannot_be_gone_on_from(tmp_path: Path) -> None:
    clip(tmp_path / "short.mp4", 32)
    with pytest.raises(InputError, match=r"short.mp4: has 32 frames.*at least 33.*sample.image"):
        load_video(tmp_path / "short.mp4", SIZE)
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(InputError, match="text.mp4"):
        load_video(tmp_path / "text.mp4", SIZE)
    with pytest.raises(InputError, match="nowhere.mp4"):
        load_video(tmp_path / "nowhere.mp4", SIZE)
