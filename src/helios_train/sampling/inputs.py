"""The image or video a sampled video begins from, as a person's file has it.

Axes: F frames, H W pixel rows and columns. What is done to a file (a turn, a background, a crop) is said in `notes`.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from helios_train.data.decode import Decoder
from helios_train.data.video import centre_crop_resize
from helios_train.errors import InputError
from helios_train.history import History
from helios_train.models.codecs import SECTION_FRAMES, Codec
from helios_train.sampling.start import WINDOWS, from_image, from_video

SMALLEST = 16  # pixels: a shorter side of less holds no picture
BACKGROUND = "white"  # what shows through a transparent image
ORIENTATION = 0x0112  # EXIF tag; 1 is upright
BAD_FILE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)  # what Pillow raises


@dataclass(frozen=True)
class ImageStart:
    """A video that begins from an image: fp32 [3, H, W] in [-1, 1]."""

    path: Path
    image: Tensor
    notes: tuple[str, ...]

    def history(self, codec: Codec, generator: torch.Generator) -> History:
        """What precedes the first section."""
        return from_image(codec, self.image[None], generator)


@dataclass(frozen=True)
class VideoStart:
    """A video that goes on from another: its first frame, fp32 [3, 1, H, W] in [-1, 1], and the last whole windows of 33 frames
    that history reaches, [3, F, H, W], after `skipped` others."""

    path: Path
    first: Tensor
    trailing: Tensor
    skipped: int
    notes: tuple[str, ...]

    def history(self, codec: Codec, generator: torch.Generator) -> History:
        """What precedes the first section."""
        return from_video(codec, self.first[None], self.trailing[None], self.skipped, generator)


def load_image(path: Path, size: tuple[int, int]) -> ImageStart:
    """An image file of any size and mode, `size` = (H, W) afterwards: turned as its EXIF says, transparent parts over white,
    16 bits to 8, the first frame of several, cropped in the centre and resized.

    InputError where the file is missing, damaged, no image, of floating point, or smaller than 16 pixels after the crop.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such image file")
    notes: list[str] = []
    try:
        with Image.open(path) as image:
            image.verify()  # reads the checksums of a PNG, which decoding does not; the image must be opened again
        with Image.open(path) as image:
            frames = getattr(image, "n_frames", 1)
            if frames > 1:
                notes.append(f"first of {frames} frames")
            pixels = _rgb(image, notes)
    except BAD_FILE as error:
        reason = str(error).replace(f" {str(path)!r}", "").replace("\n", " ")
        raise InputError(f"{path}: not a readable image ({reason}); repair it, or save it as PNG or JPEG") from error
    return ImageStart(path, _fitted(path, torch.from_numpy(pixels)[None], size, notes)[:, 0], tuple(notes))


def load_video(path: Path, size: tuple[int, int]) -> VideoStart:
    """A video file, `size` = (H, W) afterwards, cropped in the centre and resized. Of its T frames, the trailing
    floor(T / 33) * 33 count in windows of 33, and no more of them are read than history reaches back to.

    InputError where it is missing, damaged, shorter than 33 frames, or smaller than 16 pixels after the crop.
    """
    with Decoder() as decoder:
        info = decoder.probe(path)
        windows = info.frames // SECTION_FRAMES
        if not windows:
            raise InputError(
                f"{path}: has {info.frames} frames, and a video to go on from needs at least {SECTION_FRAMES}; "
                "give a longer one, or one of its frames as sample.image"
            )
        notes = list(info.notes)
        first = _fitted(path, decoder.read(path, [0]), size, notes)
        kept = min(windows, WINDOWS)
        starts = [info.frames - SECTION_FRAMES * left for left in range(kept, 0, -1)]
        # Window by window: 99 frames of a large video are gigabytes before they are resized.
        parts = [_fitted(path, decoder.read(path, range(start, start + SECTION_FRAMES)), size, []) for start in starts]
    if info.frames > SECTION_FRAMES * kept:
        notes.append(f"history from frames {starts[0]} to {info.frames - 1}, anchor from frame 0")
    return VideoStart(path, first, torch.cat(parts, dim=1), windows - kept, tuple(notes))


def _rgb(image: Image.Image, notes: list[str]) -> NDArray[np.uint8]:
    """Upright uint8 [H, W, 3] of an open image."""
    upright = ImageOps.exif_transpose(image)
    if image.getexif().get(ORIENTATION, 1) != 1:
        notes.append("turned as its EXIF says")
    if upright.mode == "F":
        raise ValueError("its pixels are floating point numbers, whose white is unknown")
    if upright.mode.startswith("I"):
        deep = np.asarray(upright).astype(np.int64)
        if deep.min() < 0 or deep.max() > 65535:
            raise ValueError("its pixels go beyond 16 bits")
        notes.append("16 bits a pixel brought to 8")
        grey = np.round(deep / 257).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if upright.has_transparency_data:
        seen = upright.convert("RGBA")
        if np.asarray(seen.getchannel("A")).min() < 255:
            notes.append(f"transparent parts shown over {BACKGROUND}")
        upright = Image.alpha_composite(Image.new("RGBA", seen.size, BACKGROUND), seen)
    return np.array(upright.convert("RGB"))


def _fitted(path: Path, frames: Tensor, size: tuple[int, int], notes: list[str]) -> Tensor:
    """uint8 [F, h, w, 3] to fp32 [3, F, H, W] in [-1, 1]."""
    rows, columns = frames.shape[1:3]
    scale = max(size[0] / rows, size[1] / columns)
    if min(size) < SMALLEST * scale:
        raise InputError(
            f"{path}: {rows}x{columns} pixels, of which a picture of {size[0]}x{size[1]} uses {min(size) / scale:.0f} on its "
            f"shorter side; give one with {SMALLEST} or more"
        )
    if (rows, columns) != size:
        notes.append(f"{rows}x{columns} cropped and resized to {size[0]}x{size[1]}")
    return centre_crop_resize(frames, size)
