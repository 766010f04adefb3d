"""Windows: exactly the right frame in every slot, for every section of clips of every length."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from helios_train.history import (
    ANCHOR_INDEX,
    FRAMES,
    LONG_INDICES,
    MID_INDICES,
    SECTION,
    SHORT_INDICES,
    TARGET_INDICES,
    History,
    windows,
)

ALL = [(sections, section) for sections in range(1, 7) for section in range(sections)]


def frame(section: int, number: int) -> Tensor:
    """A latent frame [2, 2, 3] that says which it is; channels, rows and columns differ, nothing is zero."""
    place = torch.arange(12).view(2, 2, 3) / 16
    return 1000 * (section + 1) + 10 * (number + 1) + place


def clip(sections: int) -> Tensor:
    return torch.stack([torch.stack([frame(s, t) for t in range(SECTION)], dim=1) for s in range(sections)])


def cut(sections: int, section: int) -> tuple[windows.Span, Tensor, Tensor, Tensor]:
    """A window the way a reader cuts it: from the sections of its span alone."""
    where, latents = windows.span(section, sections), clip(sections)
    return where, *windows.cut(latents[where.first : section + 1], latents[0, :, 0], where)


@pytest.mark.parametrize(("sections", "section"), ALL)
def test_every_slot_holds_the_right_frame(sections: int, section: int) -> None:
    where, target, frames, anchor = cut(sections, section)
    assert (target.shape, frames.shape, anchor.shape) == ((2, 9, 2, 3), (2, 19, 2, 3), (2, 1, 2, 3))
    for t in range(SECTION):
        assert torch.equal(target[:, t], frame(section, t))
    for slot in range(FRAMES):
        number = SECTION * section - FRAMES + slot  # counted from the clip's first frame
        wanted = frame(*divmod(number, SECTION)) if number >= 0 else torch.zeros(2, 2, 3)
        assert torch.equal(frames[:, slot], wanted), f"slot {slot}"
    assert torch.equal(anchor[:, 0], frame(0, 0) if section else torch.zeros(2, 2, 3))
    assert where.anchored == (section > 0)


def test_counts_and_first_sections() -> None:
    spans = [windows.span(section, 6) for section in range(6)]
    assert [where.count for where in spans] == [0, 9, 18, 19, 19, 19]
    assert [where.first for where in spans] == [0, 0, 0, 0, 1, 2]  # no more is read than 19 frames need
    assert [where.section for where in spans] == list(range(6))


@pytest.mark.parametrize(("section", "sections"), [(-1, 3), (3, 3), (0, 0)])
def test_sections_outside_the_clip(section: int, sections: int) -> None:
    with pytest.raises(ValueError, match=f"section {section} of a clip of {sections}"):
        windows.span(section, sections)


def test_more_sections_than_needed_change_nothing() -> None:
    where, latents = windows.span(5, 6), clip(6)
    whole = windows.cut(latents, latents[0, :, 0], where)
    for got, wanted in zip(whole, cut(6, 5)[1:], strict=True):
        assert torch.equal(got, wanted)


def test_rotary_frame_indices() -> None:
    assert ANCHOR_INDEX == 0 and SHORT_INDICES == (19,)
    assert LONG_INDICES == tuple(range(1, 17)) and MID_INDICES == (17, 18) and TARGET_INDICES == tuple(range(20, 29))


def test_segments_are_the_slots_their_indices_say() -> None:
    _, _, frames, anchor = cut(5, 4)
    history = History(frames[None], anchor[None], (19,), (True,))
    for segment, indices in ((history.long, LONG_INDICES), (history.mid, MID_INDICES), (history.short, SHORT_INDICES)):
        assert segment.shape[2] == len(indices)
        for place, index in enumerate(indices):  # slot = index - 1, since index 0 is the anchor's
            assert torch.equal(segment[0, :, place], frame(*divmod(SECTION * 4 - FRAMES + index - 1, SECTION)))


def test_shapes_of_a_history_are_checked() -> None:
    frames, anchor = torch.zeros(2, 3, 19, 4, 4), torch.zeros(2, 3, 1, 4, 4)
    for wrong in (
        (frames[:, :, 1:], anchor, (0, 0), (False, False)),
        (frames, anchor[:1], (0, 0), (False, False)),
        (frames, anchor, (0,), (False, False)),
        (frames, anchor, (0, 0), (False,)),
    ):
        with pytest.raises(ValueError):
            History(*wrong)
