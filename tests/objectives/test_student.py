"""The student's sections, one after the other, with networks that see all they are told."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from helios_train import rng
from helios_train.diffusion.pyramid import Pyramid
from helios_train.diffusion.rollout import Rollout
from helios_train.history import History
from helios_train.objectives.student import Views, as_it_is, bound, draw_sections, roll

SHAPE = (3, 9, 16, 32)
ROLLOUT = Rollout(Pyramid())
TEXT = rng.normal(rng.generator(0, "text"), (1, 5, 7))


class Student:
    """`weight x` plus a little of the history's mean; keeps what it was told."""

    def __init__(self) -> None:
        self.weight = torch.tensor(0.7, requires_grad=True)
        self.calls: list[tuple[History, bool]] = []

    def __call__(self, x_t: Tensor, t: Tensor, text: Tensor, history: History) -> Tensor:
        assert text is TEXT
        v = self.weight * x_t + 0.1 * history.frames.mean()
        self.calls.append((history, v.requires_grad))
        return v


def given(count: int = 19) -> History:
    draw = rng.generator(0, "history")
    frames, anchor = rng.normal(draw, (1, 3, 19, 16, 32)), rng.normal(draw, (1, 3, 1, 16, 32))
    return History(frames, anchor, (19,), (True,)).keep((count,), (count > 0,))


@pytest.mark.parametrize("sections", [1, 2, 3])
def test_sections_follow_each_other_and_gradient_reaches_the_last(sections: int) -> None:
    student, history = Student(), given(0)
    draws = draw_sections(ROLLOUT, 0, "student", (1, 2), SHAPE, True, sections)
    section = roll(ROLLOUT, student, TEXT, history, draws)
    expected, calls = history, 0
    for number, draw in enumerate(draws):
        last = number == sections - 1
        empty = number == 0
        counts = ROLLOUT.counts(empty)
        assert (draw.exits is None) == (not last)
        if last:
            assert torch.equal(section.history.frames, expected.frames) and section.history.counts == expected.counts
            assert not section.history.frames.requires_grad
            wanted = ROLLOUT(bound(Student(), TEXT, expected), draw, empty)
            assert torch.equal(section.latents, wanted.output)
            assert draw.exits is not None and len(student.calls) == calls + sum(stop + 1 for stop in draw.exits)
        else:
            assert not any(graph for _, graph in student.calls[calls : calls + sum(counts)])
            calls += sum(counts)
            with torch.no_grad():
                expected = expected.followed_by(ROLLOUT(bound(Student(), TEXT, expected), draw, empty).output)
    section.latents.sum().backward()
    assert student.weight.grad is not None and section.history.anchored == (sections > 1,)


def test_all_roles_see_one_view_and_the_student_its_own() -> None:
    """Corruption is of what is seen: history grows from what was made, not from what was seen of it."""
    student, seen = Student(), []

    def views(section: int, history: History) -> tuple[History, History]:
        seen.append(history)
        shared = History(history.frames + 10 + section, history.anchor, history.counts, history.anchored)
        return shared, History(shared.frames * 2, shared.anchor, shared.counts, shared.anchored)

    draws = draw_sections(ROLLOUT, 0, "student", (1, 2), SHAPE, False, 2)
    section = roll(ROLLOUT, student, TEXT, given(), draws, views)
    assert torch.equal(seen[0].frames, given().frames) and torch.equal(seen[1].frames[:, :, :10], given().frames[:, :, 9:])
    assert torch.equal(section.history.frames, seen[1].frames + 11)
    assert torch.equal(student.calls[0][0].frames, 2 * (seen[0].frames + 10))
    assert torch.equal(student.calls[-1][0].frames, 2 * section.history.frames)
    same: Views = as_it_is
    assert same(0, given())[0].counts == (19,)


def test_alignment_asks_for_the_last_sections_estimates() -> None:
    draws = draw_sections(ROLLOUT, 0, "student", (1, 2), SHAPE, False, 2)
    assert roll(ROLLOUT, Student(), TEXT, given(), draws).estimates == ()
    aligned = roll(ROLLOUT, Student(), TEXT, given(), draws, align=True)
    assert draws[-1].exits is not None and [len(found) for found in aligned.estimates] == [stop + 1 for stop in draws[-1].exits]


def test_nothing_has_a_graph_under_no_grad() -> None:
    student = Student()
    with torch.no_grad():
        roll(ROLLOUT, student, TEXT, given(), draw_sections(ROLLOUT, 0, "critic", (1, 2), SHAPE, False))
    assert not any(graph for _, graph in student.calls)


def test_samples_that_do_not_share_a_rollout() -> None:
    both = History(given().frames.repeat(2, 1, 1, 1, 1), given().anchor.repeat(2, 1, 1, 1, 1), (19, 19), (True, True))
    draws = draw_sections(ROLLOUT, 0, "student", (1, 2), SHAPE, False)
    with pytest.raises(ValueError, match="empty for some only"):
        roll(ROLLOUT, Student(), TEXT, both.keep((19, 0), (True, False)), draws)
    with pytest.raises(ValueError, match="a rollout of 0 sections"):
        draw_sections(ROLLOUT, 0, "student", (1, 2), SHAPE, False, 0)
