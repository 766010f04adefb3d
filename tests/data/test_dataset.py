"""Windows read through real shards equal windows cut out of the whole latents."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import pytest
import torch

from helios_train.data.batch import MicroBatches, Piece, stack
from helios_train.data.dataset import WindowDataset
from helios_train.data.format import Bucket, Manifest, write_manifest
from helios_train.data.index import ClipStore
from helios_train.data.order import Ref
from helios_train.data.writer import Sample, write_shard
from helios_train.errors import InputError
from helios_train.history import windows
from helios_train.rng import generator, normal

Dataset = tuple[Path, list[Sample]]
EVERY = [(sample, section) for sample in range(8) for section in range(2 if sample < 3 else 4)]


def opened(dataset: Dataset, rows: int = 5, seed: int = 0, caption_drop: float = 0.0) -> WindowDataset:
    return WindowDataset(ClipStore(dataset[0]), rows, seed, caption_drop)


def assert_is_window(piece: Piece, sample: Sample, section: int) -> None:
    """The window cut out of all of the clip's sections up to the target."""
    latents = sample.latents.float()
    target, frames, anchor = windows.cut(latents[: section + 1], latents[0, :, 0], windows.Span(section, 0))
    assert torch.equal(piece.target, target) and torch.equal(piece.frames, frames) and torch.equal(piece.anchor, anchor)
    assert torch.equal(piece.target, latents[section])
    assert (piece.section, piece.count, piece.anchored) == (section, min(19, 9 * section), section > 0)
    assert {piece.target.dtype, piece.frames.dtype, piece.anchor.dtype, piece.text.dtype} == {torch.bfloat16}


def test_every_window_of_every_clip(dataset: Dataset) -> None:
    windows_of = opened(dataset)
    for sample, section in EVERY:
        piece = windows_of.piece(Ref(0, 0, 0, sample), section)
        assert_is_window(piece, dataset[1][sample], section)


def test_windows_without_an_anchor(dataset: Dataset) -> None:
    """What follows section 0 has an anchor, or none at all and says so; all else is the same."""
    store = ClipStore(dataset[0])
    one, other = (WindowDataset(store, 5, 0, anchors=anchors).piece(Ref(0, 0, 0, 5), 2) for anchors in (True, False))
    assert one.anchored and one.anchor.any() and not other.anchored and not other.anchor.any()
    assert torch.equal(one.frames, other.frames) and torch.equal(one.target, other.target)


@pytest.fixture
def long_clip(tmp_path: Path) -> Dataset:
    """One clip of six sections: its last windows no longer reach back to its first frame."""
    bucket = Bucket(198, 16, 24, n=1)
    latents = normal(generator(0, "long clip of the tests"), (6, *bucket.section_shape)).bfloat16()
    sample = Sample("long-0", latents, torch.ones(2, 8), {})
    shard = write_shard(tmp_path, bucket, 0, [sample])
    write_manifest(tmp_path, Manifest((bucket,), (shard,), {}, {}, source_sha256=""))
    return tmp_path, [sample]


def test_windows_of_a_long_clip(long_clip: Dataset) -> None:
    for section in range(6):
        piece = opened(long_clip).piece(Ref(0, 0, 0, 0), section)
        assert_is_window(piece, long_clip[1][0], section)
        assert piece.anchor.any() == (section > 0)


def test_only_the_sections_of_the_window_are_read(long_clip: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int, int]] = []
    whole = ClipStore.view

    def view(self: ClipStore, sample: int, first: int, last: int) -> torch.Tensor:
        asked.append((sample, first, last))
        return whole(self, sample, first, last)

    monkeypatch.setattr(ClipStore, "view", view)
    for section in (0, 3, 5):
        opened(long_clip).piece(Ref(0, 0, 0, 0), section)
    assert asked == [(0, 0, 1), (0, 0, 4), (0, 2, 6), (0, 0, 1)]  # the last for the anchor


def test_text_is_padded_with_zeros(dataset: Dataset) -> None:
    for number, sample in enumerate(dataset[1]):
        piece = opened(dataset).piece(Ref(0, 0, 0, number), 0)
        text, words = stack([piece], rows=5).text[0], len(sample.text)
        assert torch.equal(piece.text, sample.text.bfloat16())
        assert text.shape == (5, 8) and torch.equal(text[:words], piece.text) and not text[words:].any()
    assert {len(sample.text) for sample in dataset[1]} == {0, 1, 2, 3}


def test_text_that_is_too_long_is_an_error_that_says_what_to_do(dataset: Dataset) -> None:
    assert opened(dataset, rows=3).text(3).shape == (3, 8)
    with pytest.raises(
        InputError, match=r"clip_a-000000003 has 3 text rows, the model takes 2: prepare it again with text.rows=2"
    ):
        opened(dataset, rows=2).text(3)
    with pytest.raises(InputError, match="clip_a-000000003"):  # not by luck of the caption drop
        opened(dataset, rows=2).piece(Ref(0, 0, 0, 3), 0, dropped=True)


def test_the_section_is_uniform_and_belongs_to_epoch_and_sample(dataset: Dataset) -> None:
    windows_of = opened(dataset)
    drawn = [[windows_of[Ref(0, 0, epoch, sample)].section for epoch in range(150)] for sample in (0, 4, 5)]
    assert drawn[1] != drawn[2]
    for sections, count in ((drawn[0], 2), (drawn[1] + drawn[2], 4)):
        seen, wanted = Counter(sections), len(sections) / count
        assert set(seen) == set(range(count))
        assert sum((number - wanted) ** 2 / wanted for number in seen.values()) < 16.3  # 0.1 % of three degrees of freedom
    again = [windows_of[Ref(9, 3, epoch, 4)].section for epoch in range(150)]
    assert again == drawn[1]  # iteration and position play no part
    assert [opened(dataset, seed=1)[Ref(0, 0, epoch, 4)].section for epoch in range(150)] != drawn[1]


def test_share_of_dropped_captions(dataset: Dataset) -> None:
    windows_of, count, share = opened(dataset, caption_drop=0.3), 400, 0.3
    dropped = []
    for epoch in range(count):
        piece = windows_of[Ref(0, 0, epoch, 7)]
        assert not len(piece.text) or torch.equal(piece.text, windows_of.text(7))
        dropped.append(not len(piece.text))
    assert abs(sum(dropped) / count - share) < 4 * (share * (1 - share) / count) ** 0.5
    by_section: list[list[bool]] = [[] for _ in range(4)]
    for epoch, gone in enumerate(dropped):
        by_section[windows_of[Ref(0, 0, epoch, 7)].section].append(gone)
    for own in by_section:  # whichever section it is
        assert abs(sum(own) / len(own) - share) < 4 * (share * (1 - share) / len(own)) ** 0.5


@pytest.mark.parametrize(("caption_drop", "kept"), [(0.0, True), (1.0, False)])
def test_captions_all_kept_or_all_dropped(dataset: Dataset, caption_drop: float, kept: bool) -> None:
    windows_of = opened(dataset, caption_drop=caption_drop)
    texts = [windows_of[Ref(0, 0, epoch, 3)].text for epoch in range(20)]
    assert all(bool(len(text)) == kept for text in texts)


def test_pieces_are_stacked_in_micro_batches(dataset: Dataset) -> None:
    windows_of = opened(dataset)
    refs = [Ref(6, position, 2, sample) for position, sample in enumerate((0, 3, 4, 1))]
    pieces = [windows_of.piece(ref, section) for ref, section in zip(refs, (1, 3, 0, 0), strict=True)]
    first, second = MicroBatches(2, 5)(pieces)
    assert torch.equal(first.target[1], pieces[1].target) and torch.equal(second.history.frames[0], pieces[2].frames)
    assert first.history.counts == (9, 19) and second.history.anchored == (False, False)
    assert (first.positions, second.positions, first.iteration, first.sections) == ([0, 1], [2, 3], 6, (1, 3))
    assert first.text.shape == (2, 5, 8) and torch.equal(first.text[1, : len(pieces[1].text)], pieces[1].text)
    assert dataclasses.replace(first).to("cpu").refs == first.refs
