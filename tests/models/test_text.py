"""Hashed words: a function of the words and their order, unit variance, zeros past the caption."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from helios_train.errors import InputError
from helios_train.models.text import HashText, pad

TEXT = HashText()


def rows(caption: str) -> torch.Tensor:
    return TEXT.encode([caption])[0]


def test_rows_are_words() -> None:
    short, empty = TEXT.encode(["a red circle", ""])
    assert short.shape == (3, 64) and empty.shape == (0, 64) and short.dtype == torch.float32
    assert rows(" ".join(str(i) for i in range(40))).shape == (16, 64)
    assert rows(" .,!? ").shape == (0, 64)
    assert HashText(rows=4, dim=10).encode(["one two three four five"])[0].shape == (4, 10)


def test_case_and_punctuation_do_not_matter() -> None:
    assert torch.equal(rows("A red, circle."), rows("a  RED circle"))
    assert torch.equal(rows("moving up-left"), rows("moving up left"))


def test_any_characters_are_taken() -> None:
    assert torch.equal(rows("a \x00red\x07 \ud83d circle\udcff"), rows("a red circle"))
    assert rows("word " * 2000).shape == (16, 64) and rows("\ud800").shape == (0, 64)


def test_a_row_is_its_word_and_the_one_before() -> None:
    a, b = rows("red circle and blue square"), rows("blue circle and red square")
    assert torch.equal(a[2], b[2])  # "and" after "circle" in both
    for row in (0, 1, 3, 4):
        assert not torch.allclose(a[row], b[row])
    # The same word after another keeps half of itself: correlation 1/2.
    pairs = [torch.stack([rows(f"x{i} word{i}")[1], rows(f"y{i} word{i}")[1]]) for i in range(200)]
    assert float(torch.corrcoef(torch.cat(pairs, dim=1))[0, 1]) == pytest.approx(0.5, abs=0.03)
    # Words shared by two captions in other places are not the same multiset of rows: binding is kept.
    assert sorted(a.sum(1).tolist()) != sorted(b.sum(1).tolist())


def test_unit_variance() -> None:
    many = torch.cat(TEXT.encode([f"some{i} other{i} words{i}" for i in range(200)]))
    assert float(many.std()) == pytest.approx(1, abs=0.02) and abs(float(many.mean())) < 0.02


def test_another_process_gives_the_same() -> None:
    code = (
        "from helios_train.models.text import HashText\ntext = HashText()\n"
        "print(text.encode(['a red circle'])[0].sum().item(), text.fingerprint())"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert said == [str(rows("a red circle").sum().item()), TEXT.fingerprint()]


def test_fingerprint_follows_the_shape() -> None:
    assert len({HashText().fingerprint(), HashText(rows=8).fingerprint(), HashText(dim=32).fingerprint()}) == 3
    assert HashText().fingerprint() == TEXT.fingerprint()


def test_an_embedding_may_be_changed_without_changing_the_next() -> None:
    first = rows("a red circle")
    kept = first.clone()
    first.zero_()
    assert torch.equal(rows("a red circle"), kept)


def test_pad() -> None:
    prompts = [part.bfloat16() for part in TEXT.encode(["a red circle", "", "blue"])]
    out = pad(prompts, 5)
    assert out.shape == (3, 5, 64) and out.dtype == torch.bfloat16
    assert torch.equal(out[0, :3], prompts[0]) and torch.equal(out[2, :1], prompts[2])
    assert not out[0, 3:].any() and not out[1].any() and not out[2, 1:].any()


def test_pad_refuses_what_does_not_fit() -> None:
    with pytest.raises(InputError, match=r"prompt 1 .*\[3, 64\]"):
        pad(TEXT.encode(["red", "a red circle"]), 2)
    with pytest.raises(InputError, match="prompt 1"):
        pad([torch.zeros(1, 8), torch.zeros(1, 9)], 4)
    with pytest.raises(InputError, match="at least one"):
        pad([], 4)
