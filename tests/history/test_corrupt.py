"""Frame-Aware Corrupt: measured on what comes out, not on what was drawn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helios_train.history import FRAMES, History
from helios_train.history.corrupt import DULL, MODES, SEGMENTS, VIVID, Corrupt, CorruptDraw, apply, blur, saturate

MakeHistory = Callable[..., History]
NOISE, BLUR, SATURATION, CLEAN = (Corrupt(*(float(mode == one) for mode in MODES)) for one in MODES)
SIZE = (3, 24, 40)  # C, H, W


def constant(value: float, batch: int, shape: tuple[int, int, int]) -> History:
    channels, *size = shape
    frames = torch.full((batch, channels, FRAMES, *size), value)
    return History(frames, frames[:, :, :1].clone(), (FRAMES,) * batch, (True,) * batch)


def alone(history: History, corrupt: Corrupt, position: int = 0) -> tuple[History, CorruptDraw]:
    shape = (history.frames.shape[1], *history.frames.shape[3:])
    (draw,) = corrupt.draw(0, 0, [position], shape)
    return apply(history, [draw]), draw


def factor_of(before: Tensor, after: Tensor) -> list[float]:
    """The saturation of each frame of [C, T, H, W], by least squares."""
    mean = before.mean(dim=0, keepdim=True)
    before, after = (before - mean).double(), (after - mean).double()
    return ((before * after).sum((0, 2, 3)) / before.square().sum((0, 2, 3))).tolist()


@pytest.mark.parametrize("shares", [(0.8, 0.1, 0.0, 0.1), (0.4, 0.4, 0.0, 0.2), (0.25, 0.25, 0.25, 0.25), (0.0, 0.0, 0.0, 1.0)])
def test_shares_of_the_modes(shares: tuple[float, ...], chi_square: Callable[..., float]) -> None:
    draws = [draw for iteration in range(50) for draw in Corrupt(*shares).draw(1, iteration, range(80), (1, 1, 1))]
    counts = Counter(draw.mode for draw in draws)
    assert chi_square([counts[mode] for mode in MODES], shares) > 0.001
    assert all(draw.saturated == (draw.mode == "saturation") for draw in draws)


def test_share_saturated_on_top_of_every_mode(chi_square: Callable[..., float]) -> None:
    corrupt = Corrupt(0.25, 0.25, 0.25, 0.25, saturation_on_top=0.9)
    draws = [draw for iteration in range(50) for draw in corrupt.draw(2, iteration, range(80), (1, 1, 1))]
    for mode in MODES:
        saturated = Counter(draw.saturated for draw in draws if draw.mode == mode)
        if mode == "saturation":
            assert set(saturated) == {True}
        else:
            assert chi_square([saturated[True], saturated[False]], [0.9, 0.1]) > 0.001


@pytest.mark.parametrize("shares", [(0.5, 0.5, 0.5, -0.5), (0.4, 0.1, 0.2, 0.2)])
def test_shares_that_are_none(shares: tuple[float, float, float, float]) -> None:
    with pytest.raises(ValueError, match="sum to 1"):
        Corrupt(*shares)


def test_every_frame_has_a_level_of_its_own(uniform: Callable[..., bool]) -> None:
    samples, big = 600, 1e5  # beside which the noise is nothing: what is left of it is 1 - s
    history = constant(big, samples, (2, 2, 2))
    noisy = apply(history, NOISE.draw(0, 3, range(samples), (2, 2, 2)))
    frames = torch.cat([noisy.frames, noisy.anchor], dim=2)
    levels = 1 - frames.double().mean(dim=(1, 3, 4)) / big  # [samples, 20], the anchor last
    for slot in range(FRAMES + 1):
        assert uniform(levels[:, slot], -1e-4, 1 / 3 + 1e-4), f"slot {slot}"
    assert uniform(levels, -1e-4, 1 / 3 + 1e-4)
    correlation = torch.corrcoef(levels.T)[~torch.eye(FRAMES + 1, dtype=torch.bool)]
    assert correlation.abs().max() < 4.5 / samples**0.5 and correlation.mean().abs() < 0.01


def test_the_noise_is_standard_normal_and_new_in_every_frame() -> None:
    shape = (4, 12, 16)
    (draw,) = NOISE.draw(0, 0, [5], shape)
    noisy = apply(constant(0.0, 1, shape), [draw])
    frames = torch.cat([noisy.frames[0], noisy.anchor[0]], dim=1).transpose(0, 1).flatten(1)  # [20, CHW]
    unit = frames / torch.from_numpy(draw.sigmas)[:, None]
    assert (unit.mean(dim=1).abs() < 4 / 768**0.5).all() and (unit.std(dim=1) - 1).abs().max() < 4 / (2 * 768) ** 0.5
    assert torch.corrcoef(unit)[~torch.eye(FRAMES + 1, dtype=torch.bool)].abs().max() < 4.5 / 768**0.5


def test_noise_formula(make_history: MakeHistory) -> None:
    history = make_history([19])
    after, draw = alone(history, NOISE)
    assert draw.noise is not None
    for slot in range(FRAMES):
        s = float(draw.sigmas[slot])
        torch.testing.assert_close(after.frames[0, :, slot], s * draw.noise[:, slot] + (1 - s) * history.frames[0, :, slot])
    s = float(draw.sigmas[FRAMES])
    torch.testing.assert_close(after.anchor[0], s * draw.noise[:, FRAMES:] + (1 - s) * history.anchor[0])


@pytest.mark.parametrize("corrupt", [NOISE, BLUR, SATURATION, CLEAN], ids=MODES)
@pytest.mark.parametrize("on_top", [0.0, 1.0])
def test_what_is_absent_stays_zero(corrupt: Corrupt, on_top: float, make_history: MakeHistory) -> None:
    counts, anchored = (0, 0, 1, 9, 18, 19), (False, True, True, True, True, True)
    history = make_history(counts, anchored)
    after = apply(history, replace(corrupt, saturation_on_top=on_top).draw(0, 0, range(6), (3, 4, 6)))
    assert (after.counts, after.anchored) == (counts, anchored)
    for b, count in enumerate(counts):
        assert not after.frames[b, :, : FRAMES - count].any()
        assert (after.frames[b, :, FRAMES - count :].flatten(2).abs().sum((0, 2)) > 0).all()
    assert not after.anchor[0].any() and all(bool(after.anchor[b].any()) for b in range(1, 6))


def test_clean_passes_bit_for_bit_beside_others(make_history: MakeHistory) -> None:
    history = make_history((19, 9, 18, 0))
    noisy, clean = NOISE.draw(0, 0, range(4), (3, 4, 6)), CLEAN.draw(0, 0, range(4), (3, 4, 6))
    after = apply(history, [clean[0], noisy[1], clean[2], clean[3]])
    for b in (0, 2, 3):
        assert torch.equal(after.frames[b], history.frames[b]) and torch.equal(after.anchor[b], history.anchor[b])
    assert not torch.equal(after.frames[1], history.frames[1])


@pytest.mark.parametrize("segments", SEGMENTS)
def test_blur_is_in_space_with_one_ratio_a_segment(segments: str, make_history: MakeHistory) -> None:
    history = make_history([19], channels=SIZE[0], size=SIZE[1:])
    history.frames[:] = history.frames[:, :, :1].clone()  # the same frame in every slot tells the ratios apart
    after, draw = alone(history, replace(BLUR, segments=segments), position=2)
    assert len({SIZE[1:], *((round(24 * r), round(40 * r)) for r in draw.ratios)}) == 5  # a place whose ratios all tell
    assert after.frames.shape == history.frames.shape
    for part, ratio in zip(SEGMENTS[segments], draw.ratios[:-1], strict=True):
        small = [round(side * ratio) for side in SIZE[1:]]
        for slot in range(FRAMES)[part]:  # frame by frame, as an image [1, C, H, W]
            image = F.interpolate(history.frames[:, :, slot], size=small, mode="bilinear", antialias=True)
            image = F.interpolate(image, size=SIZE[1:], mode="bilinear", antialias=True)
            torch.testing.assert_close(after.frames[:, :, slot], image)
            assert not torch.allclose(after.frames[:, :, slot], history.frames[:, :, slot], atol=1e-2)
    torch.testing.assert_close(after.anchor[0], blur(history.anchor[0], draw.ratios[-1]))
    assert not torch.allclose(after.anchor, history.anchor, atol=1e-2)


def test_a_frames_blur_does_not_depend_on_other_frames(make_history: MakeHistory) -> None:
    history = make_history([19], channels=SIZE[0], size=SIZE[1:])
    (draw,) = BLUR.draw(0, 0, [0], SIZE)
    before = apply(history, [draw]).frames
    history.frames[:, :, 7] += 10
    after = apply(history, [draw]).frames
    changed = [slot for slot in range(FRAMES) if not torch.equal(before[:, :, slot], after[:, :, slot])]
    assert changed == [7]


def test_blur_leaves_constant_frames_and_the_mean() -> None:
    levels = torch.arange(1.0, FRAMES + 1)[None, None, :, None, None].expand(1, *SIZE[:1], FRAMES, *SIZE[1:])
    history = History(levels.clone(), levels[:, :, :1].clone(), (FRAMES,), (True,))
    after, _ = alone(history, BLUR)
    torch.testing.assert_close(after.frames, history.frames, rtol=1e-6, atol=0)
    torch.testing.assert_close(after.anchor, history.anchor, rtol=1e-6, atol=0)
    assert torch.equal(blur(history.frames[0], 1.0), history.frames[0])


def test_ratios_are_uniform(uniform: Callable[..., bool]) -> None:
    ratios = torch.tensor([draw.ratios for draw in BLUR.draw(0, 0, range(2000), (1, 1, 1))])
    assert ratios.shape == (2000, 4) and uniform(ratios, 0.9, 1)
    assert torch.corrcoef(ratios.T)[~torch.eye(4, dtype=torch.bool)].abs().max() < 4.5 / 2000**0.5


def test_saturation_formula(make_history: MakeHistory) -> None:
    frames = make_history([19]).frames[0]
    mean = frames.sum(dim=0) / frames.shape[0]
    for f in (0.3, 1.0, 1.7):
        wanted = torch.stack([mean + f * (channel - mean) for channel in frames])
        torch.testing.assert_close(saturate(frames, f), wanted, rtol=1e-5, atol=1e-6)
    assert torch.allclose(saturate(frames, 0.0), mean.expand_as(frames), atol=1e-6)


@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize("corrupt", [SATURATION, replace(CLEAN, saturation_on_top=1.0)], ids=["mode", "on top"])
def test_one_factor_a_segment_and_never_on_the_anchor(segments: str, corrupt: Corrupt, make_history: MakeHistory) -> None:
    history = make_history([19])
    for position in range(20):
        after, draw = alone(history, replace(corrupt, segments=segments), position)
        found = factor_of(history.frames[0], after.frames[0])
        for part, factor in zip(SEGMENTS[segments], draw.factors, strict=True):
            assert found[part] == pytest.approx([factor] * len(found[part]), rel=1e-5)
        assert len({round(factor, 4) for factor in found}) == 3
        assert torch.equal(after.anchor, history.anchor)
        torch.testing.assert_close(after.frames.mean(dim=1), history.frames.mean(dim=1), rtol=1e-5, atol=1e-6)


def test_segments_cover_every_frame_once() -> None:
    assert [list(range(FRAMES)[part]) for part in SEGMENTS["own"]] == [list(range(16)), [16, 17], [18]]
    for parts in SEGMENTS.values():
        assert [slot for part in parts for slot in range(FRAMES)[part]] == list(range(FRAMES))
    assert [len(range(FRAMES)[part]) for part in SEGMENTS["published"]] == [1, 9, 9]


def test_factors_are_dull_or_vivid_with_equal_odds(chi_square: Callable[..., float], uniform: Callable[..., bool]) -> None:
    factors = torch.tensor([draw.factors for draw in SATURATION.draw(0, 0, range(1500), (1, 1, 1))]).flatten()
    dull, vivid = factors[factors < 1], factors[factors > 1]
    assert chi_square([len(dull), len(vivid)], [0.5, 0.5]) > 0.001
    assert uniform(dull, *DULL) and uniform(vivid, *VIVID)
    assert DULL == (0.3, 0.999) and VIVID == (1.001, 1.7)


def test_saturation_on_top_comes_after_the_noise(make_history: MakeHistory) -> None:
    history = make_history([19])
    (draw,) = replace(NOISE, saturation_on_top=1.0).draw(0, 0, [0], (3, 4, 6))
    both, noise = apply(history, [draw]), apply(history, [replace(draw, saturated=False)])
    for part, factor in zip(SEGMENTS["own"], draw.factors, strict=True):
        torch.testing.assert_close(both.frames[0, :, part], saturate(noise.frames[0, :, part], factor))
    assert torch.equal(both.anchor, noise.anchor) and not torch.equal(both.anchor, history.anchor)


def test_a_group_shares_the_mode_but_not_the_levels() -> None:
    corrupt = Corrupt(0.25, 0.25, 0.25, 0.25, saturation_on_top=0.5, group=8)
    draws = corrupt.draw(0, 0, range(400), (1, 1, 1))
    groups = [draws[at : at + 8] for at in range(0, 400, 8)]
    assert all(len({(draw.mode, draw.saturated) for draw in group}) == 1 for group in groups)
    assert {group[0].mode for group in groups} == set(MODES)
    assert len({draw.sigmas.tobytes() for draw in draws}) == len({draw.factors for draw in draws}) == 400
    free = replace(corrupt, group=1).draw(0, 0, range(400), (1, 1, 1))
    assert any(len({draw.mode for draw in free[at : at + 8]}) > 1 for at in range(0, 400, 8))


def test_a_draw_belongs_to_its_place(make_history: MakeHistory) -> None:
    corrupt, shape = Corrupt(0.8, 0.1, 0.0, 0.1, saturation_on_top=0.9), (3, 4, 6)
    history = make_history((19, 9, 18, 19))
    whole = apply(history, corrupt.draw(0, 5, range(4), shape))
    parts = [apply(_rows(history, rows), corrupt.draw(0, 5, list(rows), shape)) for rows in (range(0, 1), range(1, 4))]
    assert torch.equal(whole.frames, torch.cat([part.frames for part in parts]))
    assert torch.equal(whole.anchor, torch.cat([part.anchor for part in parts]))
    for seed, iteration in ((0, 6), (1, 5)):
        assert not torch.equal(whole.frames, apply(history, corrupt.draw(seed, iteration, range(4), shape)).frames)


def _rows(history: History, rows: range) -> History:
    own = slice(rows.start, rows.stop)
    return History(history.frames[own], history.anchor[own], history.counts[own], history.anchored[own])
