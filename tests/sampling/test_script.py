"""Which text a section gets when captions change within a video."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from helios_train.errors import InputError
from helios_train.rng import torch_generator
from helios_train.sampling.script import Script

TEXTS = torch.randn(3, 4, 5, generator=torch_generator(0, "texts"))


def test_a_crossfade_in_closed_form() -> None:
    """From section s on the new caption has (k + 1) / (N + 1), k = 0 .. N - 1, then everything."""
    sections, start = 12, 4
    for crossfade in (0, 1, 3, 5):
        shares = Script(((0, "a"), (start, "b")), crossfade).shares(sections)
        new = [min(max((section - start + 1) / (crossfade + 1), 0), 1) for section in range(sections)]
        np.testing.assert_allclose(shares[:, 1], new, atol=1e-12)
        np.testing.assert_allclose(shares.sum(1), 1, atol=1e-12)
        assert (np.count_nonzero(shares == 1, axis=1) == 0).sum() == crossfade  # mixed sections


def test_a_change_in_the_middle_of_a_change() -> None:
    """The third caption takes over from the mixture it finds: after 1/4 and 2/4 of b, c's rest is half a and half b."""
    shares = Script(((0, "a"), (1, "b"), (3, "c")), 3).shares(7)
    expected = [[1, 0, 0], [3 / 4, 1 / 4, 0], [1 / 2, 1 / 2, 0], [3 / 8, 3 / 8, 1 / 4], [1 / 4, 1 / 4, 1 / 2]]
    expected += [[1 / 8, 1 / 8, 3 / 4], [0, 0, 1]]
    np.testing.assert_allclose(shares, expected, atol=1e-12)


def test_texts_are_mixed_row_by_row() -> None:
    texts = list(Script(((0, "a"), (2, "b")), 1).texts(TEXTS[:2], 5))
    assert [text.shape for text in texts] == [(1, 4, 5)] * 5
    assert torch.equal(texts[0][0], TEXTS[0]) and torch.equal(texts[1][0], TEXTS[0])  # as encoded, bit for bit
    assert torch.equal(texts[3][0], TEXTS[1]) and torch.equal(texts[4][0], TEXTS[1])
    torch.testing.assert_close(texts[2][0], (TEXTS[0] + TEXTS[1]) / 2)


def test_zeros_past_both_captions_stay_zero() -> None:
    padded = TEXTS.clone()
    padded[0, 1:], padded[1, 2:] = 0, 0
    _, (mixed,) = Script(((0, "a"), (1, "b")), 2).texts(padded[:2], 2)
    assert not mixed[2:].any() and mixed[:2].all()
    torch.testing.assert_close(mixed[1], padded[1, 1] / 3)


def test_one_caption_and_a_script_that_goes_on_past_the_end() -> None:
    assert Script(((0, "a"),), 3).shares(2).tolist() == [[1], [1]]
    assert Script(((0, "a"), (1, "b"), (9, "c"))).shares(3)[:, 2].tolist() == [0, 0, 0]


def test_the_type_stays() -> None:
    assert {text.dtype for text in Script(((0, "a"), (1, "b")), 1).texts(TEXTS[:2].bfloat16(), 3)} == {torch.bfloat16}


@pytest.mark.parametrize("captions", [(), ((1, "a"),), ((0, "a"), (0, "b")), ((0, "a"), (3, "b"), (2, "c"))])
def test_sections_must_rise_from_0(captions: tuple[tuple[int, str], ...]) -> None:
    with pytest.raises(InputError, match="rise from 0"):
        Script(captions)
