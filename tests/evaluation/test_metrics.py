"""The metrics that need no weights, and the others with stand-ins whose answer is known in closed form."""

from __future__ import annotations

import builtins

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helios_train import rng
from helios_train.errors import InputError
from helios_train.evaluation.aesthetic import AestheticScore
from helios_train.evaluation.amplitude import MotionAmplitude, farneback, grey
from helios_train.evaluation.drifting import Drift
from helios_train.evaluation.frames import Block, box_size, clip_input
from helios_train.evaluation.metric import VideoMetric
from helios_train.evaluation.semantic import SemanticConsistency
from helios_train.evaluation.smoothness import MotionSmoothness
from helios_train.evaluation.throughput import Throughput
from helios_train.evaluation.windows import beginnings, ends, semantic_ends, smoothness_ends

BOXED = (16, 640)  # a video that fills the box's width: it is looked at as it is
TALL = (224, 640)  # and one that CLIP only crops


def grey_video(levels: list[float], size: tuple[int, int] = BOXED) -> Tensor:
    """uint8 [T, 3, H, W], each frame of one grey level."""
    return torch.tensor(levels).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, *size)


def noise_video(frames: int, size: tuple[int, int] = BOXED) -> Tensor:
    draw = rng.generator(0, "noise video")
    return torch.from_numpy(np.asarray(rng.normal(draw, (frames, 3, *size)))).mul(60).add(128).clamp(0, 255).to(torch.uint8)


def mean_of_both(before: Tensor, after: Tensor) -> Tensor:
    assert before.shape == after.shape and not any(side % 16 for side in before.shape[2:])
    assert 0 <= float(before.min()) and float(before.max()) <= 1
    return (before + after) / 2


def pan(step: tuple[int, int], frames: int = 4, size: tuple[int, int] = (352, 640)) -> Tensor:
    """A smooth random texture that moves `step` (x, y) pixels a frame."""
    draw = rng.generator(1, "texture")
    coarse = rng.normal(draw, (1, 1, 60, 100))
    texture = F.interpolate(coarse, scale_factor=8, mode="bicubic")[0, 0]
    texture = ((texture - texture.min()) / (texture.max() - texture.min()) * 255).to(torch.uint8)
    moved = []
    for t in range(frames):
        top, left = 32 - t * step[1], 32 - t * step[0]
        moved.append(texture[top : top + size[0], left : left + size[1]])
    return torch.stack(moved)[:, None].expand(-1, 3, -1, -1)


class Brightness(nn.Module):
    """An encoder whose first feature is the mean brightness, the second 1."""

    def forward(self, frames: Tensor) -> Tensor:
        level = frames.flatten(1).mean(1, keepdim=True)
        return torch.cat([level, torch.ones_like(level)], dim=1)


def head() -> nn.Linear:
    linear = nn.Linear(2, 1)
    linear.load_state_dict({"weight": torch.tensor([[3.0, 1.0]]), "bias": torch.tensor([4.0])})
    return linear.requires_grad_(False)


@pytest.mark.parametrize(
    ("levels", "score"),
    [
        ([77] * 9, 1.0),
        ([2 * t for t in range(101)], 1.0),
        ([255 * (t % 2) for t in range(9)], 0.0),
        ([t * t for t in range(16)], 254 / 255),
        ([0, 10, 20, 255], 1.0),  # a frame left over at the end counts for nothing
    ],
)
def test_smoothness_of_grey_levels(levels: list[float], score: float) -> None:
    assert MotionSmoothness(mean_of_both).score(grey_video(levels)).value == pytest.approx(score, abs=1e-9)


def test_smoothness_of_noise_is_that_of_a_numpy_prototype() -> None:
    video = noise_video(35, (20, 640))
    levels = video.numpy().astype(np.float64)
    made = np.floor((levels[0:-2:2] + levels[2::2]) / 2)
    wanted = 1 - np.abs(levels[1:-1:2] - made).mean() / 255
    assert MotionSmoothness(mean_of_both).score(video).value == pytest.approx(wanted, abs=1e-9)
    uniform = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (33, 3, *BOXED), dtype=np.uint8))
    assert MotionSmoothness(mean_of_both).score(uniform).value == pytest.approx(0.707, abs=2e-3)
    with pytest.raises(InputError, match="2 frames"):
        MotionSmoothness(mean_of_both).score(video[:2])


def test_smoothness_cuts_off_what_the_interpolator_gives() -> None:
    metric = MotionSmoothness(lambda before, after: before + 0.9 / 255)
    assert metric.score(grey_video([10, 10, 10])).value == 1.0
    assert MotionSmoothness(lambda before, after: before + 3.0).score(grey_video([10, 255, 10])).value == 1.0  # kept at white


@pytest.mark.parametrize(("step", "score"), [((2, 0), 1.0), ((0, 2), 1.0), ((2, 1), 1.5), ((2, -2), 0.0), ((0, 0), 0.0)])
def test_amplitude_of_a_pan(step: tuple[int, int], score: float) -> None:
    found = MotionAmplitude().score(pan(step))
    assert found.value == pytest.approx(score, abs=0.1) == found.details["motion_helios_compat"]
    assert MotionAmplitude(mode="magnitude").score(pan(step)).value == found.details["motion_magnitude"]
    assert found.details["motion_magnitude"] == pytest.approx(float(np.hypot(*step)), abs=0.15)


def test_amplitude_is_that_of_maps_shrunk_by_area() -> None:
    video = pan((3, 1))
    greys, flow = grey(video), farneback()
    maps = np.stack(
        [cv2.resize(flow(a, b), (16, 8), interpolation=cv2.INTER_AREA) for a, b in zip(greys, greys[1:], strict=False)]
    )
    assert MotionAmplitude().score(video).value == pytest.approx(abs(maps.mean(0).mean()), abs=1e-5)


def test_grey_is_opencvs() -> None:
    frames = noise_video(3)
    assert (grey(frames) == np.stack([cv2.cvtColor(f, cv2.COLOR_RGB2GRAY) for f in frames.permute(0, 2, 3, 1).numpy()])).all()


def test_amplitude_needs_two_frames_and_opencv(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="1 frame"):
        MotionAmplitude().score(grey_video([1]))
    real = builtins.__import__

    def absent(name: str, *rest: object, **more: object) -> object:
        if name == "cv2":
            raise ImportError("No module named 'cv2'")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(InputError, match=r"helios-train\[evaluate\]"):
        MotionAmplitude()
    MotionAmplitude(lambda before, after: np.zeros((*before.shape, 2), np.float32)).score(grey_video([1, 2]))


def test_aesthetic_is_linear_algebra_and_blind_to_order() -> None:
    levels = [0, 40, 90, 200, 255] * 2  # more than a batch
    metric = AestheticScore(Brightness(), head(), frame_batch=4)
    features = Brightness()(clip_input(grey_video(levels, TALL).float()))
    wanted = (F.normalize(features, dim=-1) @ torch.tensor([3.0, 1.0]) + 4).mean() / 10
    assert metric.score(grey_video(levels, TALL)).value == pytest.approx(float(wanted), abs=1e-6)
    assert metric.score(grey_video(levels[::-1], TALL)).value == pytest.approx(float(wanted), abs=1e-6)


def test_semantic_sees_eight_frames_and_the_caption() -> None:
    seen: list[Tensor] = []

    def video_encoder(frames: Tensor) -> Tensor:
        assert frames.shape == (1, 8, 3, 224, 224)
        seen.append(frames)
        return torch.tensor([[3.0, 4.0]])

    def text_encoder(captions: list[str]) -> Tensor:
        return torch.tensor([[1.0, 0.0] if caption == "a fox" else [0.0, 1.0] for caption in captions])

    metric = SemanticConsistency(video_encoder, text_encoder)
    levels = list(range(0, 243, 3))
    assert metric.score(grey_video(levels, TALL), "a fox").value == pytest.approx(0.6)
    assert metric.score(grey_video(levels, TALL), "a cow").value == pytest.approx(0.8)
    wanted = clip_input(grey_video([levels[i] for i in (4, 14, 24, 34, 44, 54, 64, 75)], TALL))
    assert torch.equal(seen[0][0], wanted)
    with pytest.raises(InputError, match="no caption"):
        metric.score(grey_video(levels, TALL))
    short = SemanticConsistency(lambda frames: frames.mean((2, 3, 4)), lambda captions: torch.ones(1, 8))
    assert short.score(grey_video([200], TALL), "a fox").value == pytest.approx(1.0)  # one frame, eight times


def semantic_by_brightness() -> SemanticConsistency:
    def video_encoder(frames: Tensor) -> Tensor:
        return frames.mean((2, 3, 4)) + 3

    return SemanticConsistency(video_encoder, lambda captions: torch.arange(8.0)[None], beginnings)


@pytest.mark.parametrize(
    ("base", "windows"),
    [
        (AestheticScore(Brightness(), head()), ends),
        (MotionSmoothness(mean_of_both), smoothness_ends),
        (
            SemanticConsistency(lambda frames: frames.mean(1).flatten(1), lambda captions: torch.ones(1, 3 * 224 * 224)),
            semantic_ends,
        ),
    ],
)
def test_a_palindrome_does_not_drift(base: VideoMetric, windows: object) -> None:
    # No two frames of a window are alike, and windows are so short that the semantic score sees all eight: they are mirrored.
    half = [7, 30, 9, 110, 60, 200, 31, 150, *range(210, 250, 5)]
    video = grey_video([*half, *[1, 255, 3], *half[::-1]], TALL)
    metric = Drift(base, windows)
    metric.update([video], text=["a fox"])
    assert float(metric.compute()) == pytest.approx(0.0, abs=1e-6)
    assert not metric.higher_is_better


def test_semantic_drift_sees_the_published_frames_in_their_order() -> None:
    first, last = (0, 1, 3, 4, 6, 7, 9, 10), (68, 69, 71, 72, 74, 76, 77, 79)  # of 81
    levels = [200 + t % 50 for t in range(81)]
    for level, start, end in zip((7, 30, 9, 110, 60, 90, 31, 150), first, last, strict=True):
        levels[start] = levels[end] = level
    found = Drift(semantic_by_brightness(), semantic_ends).score(grey_video(levels, TALL), "a fox")
    assert found.value == pytest.approx(0.0, abs=1e-6) and found.details["start"] > 0.5
    for frame in (*first, *last):
        changed = [*levels]
        changed[frame] = 255
        assert Drift(semantic_by_brightness(), semantic_ends).score(grey_video(changed, TALL), "a fox").value > 1e-4, frame


def test_drift_compares_the_published_windows() -> None:
    levels = [20] * 12 + [100] * 57 + [200] * 12
    metric, base = Drift(AestheticScore(Brightness(), head()), ends), AestheticScore(Brightness(), head())
    start, end = (base.score(grey_video([level], TALL)).value for level in (20, 200))
    found = metric.score(grey_video(levels, TALL))
    assert found.value == pytest.approx(abs(start - end), abs=1e-6) and found.value > 0.01
    assert found.details == {"start": pytest.approx(start), "end": pytest.approx(end)}
    metric.update([grey_video(levels, TALL), grey_video(levels[::-1], TALL)])
    assert float(metric.compute()) == pytest.approx(found.value) and float(metric.signed()) == pytest.approx(0, abs=1e-6)
    moved = grey_video([19] * 11 + [100] * 2 + [20] * 55 + [50] * 13, TALL)
    semantic = Drift(semantic_by_brightness(), semantic_ends).score(moved, "a fox")
    by_hand = [semantic_by_brightness().score(moved[window], "a fox").value for window in (slice(0, 12), slice(68, 81))]
    assert semantic.details == {"start": pytest.approx(by_hand[0]), "end": pytest.approx(by_hand[1])}
    assert Drift(MotionSmoothness(mean_of_both), smoothness_ends).score(grey_video([0, 200, 3])).value == 0.0


def test_boxes_and_clips_pixels() -> None:
    assert [box_size(*size) for size in ((480, 832), (384, 640), (832, 480), (64, 64), (2, 900))] == [
        (368, 640),
        (384, 640),
        (640, 368),
        (640, 640),
        (2, 640),
    ]
    frames = noise_video(2, (480, 832))
    block = Block(0, frames.permute(0, 2, 3, 1))
    theirs = np.stack([cv2.resize(frame, (640, 368)) for frame in block.pixels.numpy()]).astype(int)
    assert np.abs(block.boxed.permute(0, 2, 3, 1).numpy().astype(int) - theirs).max() <= 1
    edge = torch.zeros(1, 3, 448, 448)
    edge[..., 224:] = 255
    assert float(clip_input(edge).max()) > float(clip_input(edge.to(torch.uint8)).max())  # bicubic overshoot is kept of floats
    assert clip_input(frames).shape == (2, 3, 224, 224)


def test_blocks_do_not_change_a_score(monkeypatch: pytest.MonkeyPatch) -> None:
    video = torch.cat([pan((1, 1), 9)[:, :, :224], noise_video(14, TALL)])
    metrics = [MotionAmplitude(), MotionSmoothness(mean_of_both), AestheticScore(Brightness(), head()), semantic_by_brightness()]
    metrics += [Drift(metrics[1], smoothness_ends), Drift(metrics[2], ends), Drift(metrics[3], semantic_ends)]
    scores = []
    for size in (5, 23):
        monkeypatch.setattr("helios_train.evaluation.metric.BLOCK", size)
        scores.append([metric.score(video, "a fox").value for metric in metrics])
    for other in scores[1:]:
        assert other == pytest.approx(scores[0], abs=1e-7)


def test_updates_lengths_and_ids() -> None:
    metric = AestheticScore(Brightness(), head())
    video = torch.stack([grey_video([10, 10, 250], TALL), grey_video([60, 60, 60], TALL)])
    one, other = metric.score(video[0, :2]).value, metric.score(video[1]).value
    metric.update(video, lengths=[2, 3])
    assert metric.compute().dtype == torch.float64 and float(metric.compute()) == pytest.approx((one + other) / 2)
    metric.reset()
    metric.update(video, torch.tensor([2, 3]), ids=[4, 9])
    metric.update(video[:1], lengths=[2], ids=[4])
    assert float(metric.compute()) == pytest.approx((one + other) / 2)
    metric.reset()
    assert torch.isnan(metric.compute())
    for wrong in (video.float()[0], video[0, :, :2], video[0, :0]):
        with pytest.raises(InputError, match="uint8"):
            metric.score(wrong)


def test_networks_move_with_the_metric_and_are_not_saved() -> None:
    metric = Drift(AestheticScore(Brightness(), head()), ends)
    linear = metric.base._nets[1]
    assert not metric.state_dict() and not list(metric.parameters())
    metric.to("meta")
    assert isinstance(linear, nn.Linear) and linear.weight.device.type == "meta"


def test_throughput_is_a_ratio_of_sums() -> None:
    metric = Throughput()
    metric.update(33, 1.0)
    metric.update(66, 5.0)
    assert float(metric.compute()) == pytest.approx(99 / 6)
    assert Throughput(model_parallel=True)._reductions["seconds"] is not Throughput()._reductions["seconds"]
