"""Motion amplitude: optical flow between neighbouring frames, by OpenCV's Farneback unless another flow is given."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from helios_train.errors import InputError
from helios_train.evaluation.frames import Block, Clip
from helios_train.evaluation.metric import Score, Scorer, VideoMetric

Grey = NDArray[np.uint8]
Flow = Callable[[Grey, Grey], NDArray[np.float32]]
SCALE = 15  # bits of the fixed-point weights of ITU-R BT.601 below, as OpenCV's
RED, GREEN, BLUE = 9798, 19235, 3735


def opencv() -> ModuleType:
    """The module cv2. InputError naming the extra where it is not installed."""
    try:
        import cv2
    except ImportError as error:
        raise InputError(
            f"motion_amplitude needs OpenCV ({error}): pip install 'helios-train[evaluate]', or leave it out of evaluate.metrics"
        ) from error
    return cv2


def farneback() -> Flow:
    """[H, W] uint8 twice -> [H, W, 2] pixels: x, y. Settings of HeliosBench."""
    cv2 = opencv()

    def flow(before: Grey, after: Grey) -> NDArray[np.float32]:
        # pyramid scale, levels, window, iterations, neighbourhood of the polynomial, its sigma, flags
        return cv2.calcOpticalFlowFarneback(before, after, None, 0.5, 3, 15, 3, 5, 1.2, 0)

    return flow


def grey(frames_N3HW: Tensor) -> Grey:
    """uint8 [N, H, W], to the bit what OpenCV makes of RGB."""
    red, green, blue = frames_N3HW.numpy().astype(np.int32).swapaxes(0, 1)
    return ((red * RED + green * GREEN + blue * BLUE + (1 << SCALE - 1)) >> SCALE).astype(np.uint8)


class MotionAmplitude(VideoMetric):
    """How much moves, in pixels a frame at 640 columns, over all neighbouring frames; both figures stand in the details.

    `helios_compat`, as published: |mean of u and v over time and picture|. It is a net drift: (a, -a), zooms, rotations and
    motion back and forth cancel. `magnitude`: mean |(u, v)|, a figure of its own that published thresholds do not rate. The
    published maps are first shrunk by area, which leaves their mean as it is.
    """

    def __init__(
        self, flow_fn: Flow | None = None, mode: Literal["helios_compat", "magnitude"] = "helios_compat", **options: Any
    ):
        super().__init__((flow_fn or farneback(),), **options)
        self.mode = mode
        self.variant = "" if mode == "helios_compat" else f"motion_{mode}"

    def begin(self, clip: Clip) -> Scorer:
        """Sums over pairs of frames. InputError for a single frame."""
        if clip.frames < 2:
            raise InputError(f"has {clip.frames} frame, and motion is seen between two")
        return _Flows(self._nets[0], self.mode)


class _Flows:
    def __init__(self, flow: Flow, mode: str):
        self.flow, self.mode = flow, mode
        self.before: Grey | None = None
        self.net, self.length, self.pairs = 0.0, 0.0, 0

    def feed(self, block: Block) -> None:
        """The next frames; the last of those before is kept."""
        for frame in grey(block.boxed):
            if self.before is not None:
                flow = self.flow(self.before, frame)
                self.net += float(flow.mean(dtype=np.float64))
                self.length += float(np.linalg.norm(flow, axis=-1).mean(dtype=np.float64))
                self.pairs += 1
            self.before = frame

    def end(self) -> Score:
        found = {"helios_compat": abs(self.net / self.pairs), "magnitude": self.length / self.pairs}
        return Score(found[self.mode], {f"motion_{name}": value for name, value in found.items()}, self.net / self.pairs)
