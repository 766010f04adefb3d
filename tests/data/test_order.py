"""The order of samples: a function of seed, epoch and global batch, whole in every epoch and cut alike by any number of ranks."""

from __future__ import annotations

from collections import Counter
from itertools import chain, islice

import numpy as np
import pytest

from helios_train.data.order import GROUP, Cursor, Order, Ref
from helios_train.errors import InputError

# Two shapes, ids interleaved as shards are; 53 and 18 samples, shards of different sizes and an empty one.
SHARDS = np.split(np.arange(71), [5, 12, 20, 21, 30, 34, 42, 50, 55, 63, 66])
SHAPES = [[*SHARDS[:5], np.arange(0), *SHARDS[7:]], SHARDS[5:7]]
SIZES = [sum(map(len, shards)) for shards in SHAPES]
IDS = [set(chain.from_iterable(shard.tolist() for shard in shards)) for shards in SHAPES]


def order(global_batch: int = 8, seed: int = 0) -> Order:
    return Order(seed, global_batch, SHAPES)


def stream(cursor: Cursor, count: int) -> list[list[Ref]]:
    return list(islice(iter(cursor), count))


@pytest.mark.parametrize("global_batch", [1, 2, 8, 12, 40])
@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_an_epoch_holds_every_id_once_apart_from_fill(global_batch: int, epoch: int) -> None:
    made = order(global_batch)
    batches = made.epoch(epoch)
    assert batches.shape == (made.batches, global_batch)
    assert made.batches == sum(-(-size // global_batch) for size in SIZES)
    seen = Counter(batches.flatten().tolist())
    assert set(seen) == IDS[0] | IDS[1]
    assert made.fill == sum(seen.values()) - 71 == sum(-size % global_batch for size in SIZES)


def test_fill_comes_from_the_head_of_the_same_epochs_order() -> None:
    """One shape of 10 ids in batches of 4: the third batch is two ids and the first two of the first batch."""
    made = Order(3, 4, [[np.arange(10)]])
    for epoch in range(20):
        last = [batch for batch in made.epoch(epoch).tolist() if _shared(batch, made.epoch(epoch)) == 2]
        assert len(last) == 2 and made.fill == 2
        assert last[0][:2] == last[1][2:] or last[1][:2] == last[0][2:]


def _shared(batch: list[int], batches: np.ndarray) -> int:
    """How many of a batch's ids stand in another batch."""
    seen = Counter(batches.flatten().tolist())
    return sum(seen[number] > 1 for number in batch)


def test_a_shape_of_fewer_clips_than_a_batch_goes_round() -> None:
    made = Order(0, 8, [[np.array([4, 5, 6])]])
    (batch,) = made.epoch(0).tolist()
    assert batch == (batch[:3] * 3)[:8] and set(batch) == {4, 5, 6} and made.fill == 5


@pytest.mark.parametrize("global_batch", [2, 8, 40])
def test_shapes_never_mix_in_a_batch(global_batch: int) -> None:
    for epoch in range(5):
        kinds = [[set(batch) <= ids for ids in IDS] for batch in order(global_batch).epoch(epoch).tolist()]
        assert all(sum(kind) == 1 for kind in kinds)
        assert sum(kind[1] for kind in kinds) == -(-SIZES[1] // global_batch)


def test_batches_of_the_shapes_are_interleaved() -> None:
    kinds = ["".join(str(int(batch[0] in IDS[1])) for batch in order(2).epoch(epoch).tolist()) for epoch in range(10)]
    assert len(set(kinds)) == 10 and all("01" in kind and "10" in kind for kind in kinds)


def test_epochs_and_seeds_differ_and_repeat() -> None:
    epochs = [order().epoch(epoch).tobytes() for epoch in range(6)] + [order(seed=1).epoch(0).tobytes()]
    assert len(set(epochs)) == 7
    assert epochs[:6] == [order().epoch(epoch).tobytes() for epoch in range(6)]


def test_reading_stays_within_a_group_of_shards() -> None:
    shards = [np.arange(10 * i, 10 * i + 10) for i in range(3 * GROUP)]
    made = Order(0, 5, [shards])
    groups: list[set[int]] = []
    for batch in made.epoch(0):  # shards met in one batch belong to one group
        met = {int(sample) // 10 for sample in batch}
        met |= set().union(*(group for group in groups if group & met))
        groups = [group for group in groups if not group & met] + [met]
    assert [len(group) for group in groups] == [GROUP] * 3


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_ranks_slices_join_to_the_global_batch(ranks: int) -> None:
    made = order()
    count = 2 * made.batches + 3
    whole = [made.batch(iteration) for iteration in range(count)]
    slices = [stream(Cursor(made, 0, rank, ranks), count) for rank in range(ranks)]
    assert [list(chain.from_iterable(parts)) for parts in zip(*slices, strict=True)] == whole
    assert all(len(part) == 8 // ranks for own in slices for part in own)


@pytest.mark.parametrize("start", [0, 1, 9, 10, 11, 20, 33])
def test_starting_anywhere_equals_the_tail_of_the_stream(start: int) -> None:
    whole = stream(Cursor(order(), 0, 1, 2), 40)
    assert stream(Cursor(order(), start, 1, 2), 40 - start) == whole[start:]


def test_another_number_of_ranks_goes_on_with_the_same_stream() -> None:
    whole = [order().batch(iteration) for iteration in range(20)]
    first = [stream(Cursor(order(), 0, rank, 4), 7) for rank in range(4)]
    after = [stream(Cursor(order(), 7, rank, 2), 13) for rank in range(2)]
    joined = [list(chain.from_iterable(parts)) for part in (first, after) for parts in zip(*part, strict=True)]
    assert joined == whole


def test_refs_say_their_place() -> None:
    made = order()
    for iteration in range(3 * made.batches):
        refs = made.batch(iteration)
        epoch, index = divmod(iteration, made.batches)
        assert [ref.sample for ref in refs] == made.epoch(epoch)[index].tolist()
        assert [(ref.iteration, ref.position, ref.epoch) for ref in refs] == [(iteration, i, epoch) for i in range(8)]
        assert all(type(ref.sample) is int for ref in refs)


def test_a_cursor_has_no_length_and_starts_again_where_it_started() -> None:
    cursor = Cursor(order(), 5, 0, 1)
    with pytest.raises(TypeError):
        len(cursor)  # type: ignore[arg-type]
    assert stream(cursor, 3) == stream(cursor, 3)


def test_ids_left_out_never_appear() -> None:
    out = {0, 7, 20, 34, 41, 70} | set(SHARDS[4].tolist())  # a whole shard among them
    kept = [[shard[~np.isin(shard, list(out))] for shard in shards] for shards in SHAPES]
    for epoch in range(4):
        assert set(Order(0, 8, kept).epoch(epoch).flatten().tolist()) == (IDS[0] | IDS[1]) - out


def test_what_cannot_be_ordered_is_refused() -> None:
    with pytest.raises(InputError, match="no clip is left to train on"):
        Order(0, 8, [[np.arange(0)], []])
    with pytest.raises(InputError, match="data.global_batch=8 cannot be divided among 3 devices"):
        Cursor(order(), 0, 0, 3)


def test_ids_of_a_million_clips_are_whole() -> None:
    made = Order(0, 512, [[np.arange(at, at + 1000) for at in range(0, 1_000_000, 1000)]])
    epoch = made.epoch(0)
    assert epoch.shape == (1954, 512) and made.fill == 448
    assert (np.bincount(epoch.flatten(), minlength=1_000_000) >= 1).all() and len(np.unique(epoch)) == 1_000_000


def test_every_id_visits_every_place() -> None:
    """Over 600 epochs of 12 ids in batches of 4: each id in each position about 50 times an iteration."""
    made = Order(1, 4, [[np.arange(5), np.arange(5, 12)]])
    counts = np.zeros((12, 12))
    for epoch in range(600):
        counts[np.arange(12), made.epoch(epoch).flatten()] += 1
    distance = ((counts - 50) ** 2 / 50).sum()
    assert distance < 121 + 4 * (2 * 121) ** 0.5  # chi-square of 121 degrees of freedom, four deviations
