"""The data of a run: the same windows for any number of workers and devices, resumable on the same data only."""

from __future__ import annotations

import json
import random
from itertools import chain, islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from helios_train import rng
from helios_train.data.batch import Window, WindowPair
from helios_train.data.format import Bucket, Manifest, write_manifest
from helios_train.data.index import ClipStore
from helios_train.data.module import LoadSettings, WindowModule
from helios_train.data.writer import Sample, write_shard
from helios_train.errors import InputError
from helios_train.history import windows

CLIPS = [(66, 16, 24, 4), (99, 16, 24, 5), (66, 24, 16, 5)]  # frames, height, width, how many
SETTINGS = LoadSettings(global_batch=4, micro_batch=2, workers=0, text_rows=4, seed=3)


def clip(name: int, frames: int, height: int, width: int) -> Sample:
    draw = rng.generator(0, "clip of the tests", name)
    shape = (frames // 33, 16, 9, height // 8, width // 8)
    return Sample(
        f"clip-{name:04d}", rng.normal(draw, shape).bfloat16(), rng.normal(draw, (1 + name % 3, 8)).bfloat16(), {"name": name}
    )


def write(root: Path, shard: int = 3, backward: bool = False, more: int = 0) -> dict[str, Sample]:
    """Shards of `shard` clips of three shapes; the same clips, by name, in other orders and beside `more` others."""
    samples, shards, buckets, name = {}, [], [], 0
    for frames, height, width, count in CLIPS:
        own = [clip(name + i, frames, height, width) for i in range(count)]
        own += [clip(1000 * (name + 1) + i, frames, height, width) for i in range(more)]
        own = own[::-1] if backward else own
        bucket = Bucket(frames, height, width, n=len(own))
        buckets.append(bucket)
        shards += [write_shard(root, bucket, at // shard, own[at : at + shard]) for at in range(0, len(own), shard)]
        samples |= {sample.key: sample for sample in own}
        name += count
    codec = {"name": "dct", "fingerprint": "f", "latents_mean": [0.0] * 16, "latents_std": [1.0] * 16}
    write_manifest(root, Manifest(tuple(buckets), tuple(shards), codec, {"name": "hash", "rows": 4, "dim": 8}, source_sha256="s"))
    return samples


@pytest.fixture
def data(tmp_path: Path) -> tuple[Path, dict[str, Sample]]:
    return tmp_path / "data", write(tmp_path / "data")


def module(root: Path, **changes: object) -> WindowModule:
    return WindowModule(root, LoadSettings(**(vars(SETTINGS) | changes)))


def batches(module: WindowModule, count: int) -> list[list[Window]]:
    return list(islice(iter(module.train_dataloader()), count))


def assert_same(first: list[list[Window]], second: list[list[Window]]) -> None:
    assert len(first) == len(second) and [len(batch) for batch in first] == [len(batch) for batch in second]
    for one, other in zip(chain(*first), chain(*second), strict=True):
        assert (one.refs, one.sections) == (other.refs, other.sections)
        assert (one.history.counts, one.history.anchored) == (other.history.counts, other.history.anchored)
        for a, b in ((one.target, other.target), (one.text, other.text)):
            assert torch.equal(a, b)
        assert torch.equal(one.history.frames, other.history.frames) and torch.equal(one.history.anchor, other.history.anchor)


def on_device(made: WindowModule, rank: int, ranks: int, step: int = 0) -> WindowModule:
    made.trainer = SimpleNamespace(global_rank=rank, world_size=ranks, global_step=step)  # type: ignore[assignment]
    return made


def test_loaded_windows_equal_windows_of_the_whole_latents(data: tuple[Path, dict[str, Sample]]) -> None:
    root, samples = data
    made = module(root)
    seen = set()
    for iteration, batch in enumerate(batches(made, 2 * made.order.batches)):
        assert len(batch) == 2 and [window.iteration for window in batch] == [iteration] * 2
        assert [position for window in batch for position in window.positions] == [0, 1, 2, 3]
        for window in batch:
            for b, (ref, section) in enumerate(zip(window.refs, window.sections, strict=True)):
                sample = samples[made.store.key(ref.sample)]
                latents = sample.latents.float()
                target, frames, anchor = windows.cut(latents[: section + 1], latents[0, :, 0], windows.Span(section, 0))
                assert torch.equal(window.target[b], target) and torch.equal(window.history.frames[b], frames)
                assert torch.equal(window.history.anchor[b], anchor)
                assert (
                    torch.equal(window.text[b, : len(sample.text)], sample.text.float())
                    and not window.text[b, len(sample.text) :].any()
                )
                seen.add(sample.key)
    assert seen == set(samples)


def test_a_window_is_widened_where_it_is_used(data: tuple[Path, dict[str, Sample]]) -> None:
    loaded = batches(module(data[0]), 1)[0][0]
    used = loaded.to("cpu")
    for before, after in (
        (loaded.target, used.target),
        (loaded.text, used.text),
        (loaded.history.frames, used.history.frames),
        (loaded.history.anchor, used.history.anchor),
    ):
        assert before.dtype == torch.bfloat16 and after.dtype == torch.float32 and torch.equal(before.float(), after)
    assert (used.refs, used.sections, used.history.counts) == (loaded.refs, loaded.sections, loaded.history.counts)


def test_workers_do_not_change_what_is_loaded(data: tuple[Path, dict[str, Sample]]) -> None:
    count = 7  # into the second epoch
    alone = batches(module(data[0], caption_drop=0.3), count)
    assert_same(alone, batches(module(data[0], caption_drop=0.3, workers=2), count))


@pytest.mark.parametrize("ranks", [2, 4])
def test_devices_share_one_stream(data: tuple[Path, dict[str, Sample]], ranks: int) -> None:
    whole = batches(module(data[0], micro_batch=1), 6)
    parts = [batches(on_device(module(data[0], micro_batch=1), rank, ranks), 6) for rank in range(ranks)]
    assert_same([list(chain(*own)) for own in zip(*parts, strict=True)], whole)


def test_resuming_goes_on_at_the_cursor(data: tuple[Path, dict[str, Sample]]) -> None:
    whole = batches(module(data[0]), 9)
    state = on_device(module(data[0]), 0, 1, step=5).state_dict()
    assert state["iteration"] == 5
    resumed = module(data[0], workers=1, micro_batch=1)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    joined = [window for batch in batches(resumed, 4) for window in batch]
    assert [ref for window in joined for ref in window.refs] == [
        ref for batch in whole[5:] for window in batch for ref in window.refs
    ]
    assert torch.equal(torch.cat([w.target for w in joined[:4]]), torch.cat([w.target for w in whole[5]]))


def test_the_state_is_plain(data: tuple[Path, dict[str, Sample]]) -> None:
    state = module(data[0]).state_dict()
    assert json.loads(json.dumps(state)) == state
    assert state["seed"] == 3 and state["global_batch"] == 4 and state["dataset"] == ClipStore(data[0]).manifest.manifest_sha


@pytest.mark.parametrize(
    ("changes", "named"), [({"seed": 4}, "seed was 3.*is 4"), ({"global_batch": 6}, "global_batch was 4.*is 6")]
)
def test_resuming_another_order_is_refused_by_name(
    data: tuple[Path, dict[str, Sample]], changes: dict[str, int], named: str
) -> None:
    other = module(data[0], **changes)
    with pytest.raises(InputError, match=f"cannot resume: {named}"):
        other.load_state_dict(module(data[0]).state_dict())
    assert other.start == 0


def test_resuming_on_another_dataset_is_refused_by_name(data: tuple[Path, dict[str, Sample]], tmp_path: Path) -> None:
    write(tmp_path / "other", more=1)
    with pytest.raises(InputError, match="cannot resume: dataset was"):
        module(tmp_path / "other").load_state_dict(module(data[0]).state_dict())
    write(tmp_path / "copy")  # the same clips in another folder are the same dataset
    module(tmp_path / "copy").load_state_dict(module(data[0]).state_dict() | {"iteration": 2})


def test_shapes_never_mix_in_a_loaded_batch(data: tuple[Path, dict[str, Sample]]) -> None:
    made = module(data[0])
    shapes = [{tuple(window.target.shape[2:]) for window in batch} for batch in batches(made, made.order.batches)]
    assert all(len(own) == 1 for own in shapes) and set.union(*shapes) == {(9, 2, 3), (9, 3, 2)}
    lengths = {made.store.section_count(r.sample) for r in made.order.batch(0)} | {
        made.store.section_count(r.sample) for r in made.order.batch(2)
    }
    assert lengths <= {2, 3}  # clips of different lengths share a batch: a window does not know how long its clip is


def test_held_out_clips_never_appear(data: tuple[Path, dict[str, Sample]]) -> None:
    made = module(data[0], held_out=3)
    held = set(made.held_out)
    trained = {ref.sample for iteration in range(4 * made.order.batches) for ref in made.order.batch(iteration)}
    assert len(held) == 3 and not held & trained and held | trained == set(range(14))


def test_the_choice_of_held_out_clips_depends_on_their_keys_only(data: tuple[Path, dict[str, Sample]], tmp_path: Path) -> None:
    def keys(root: Path, count: int, **changes: object) -> list[str]:
        made = module(root, held_out=count, **changes)
        return [made.store.key(sample) for sample in made.held_out]

    wanted = keys(data[0], 4)
    assert wanted == keys(data[0], 4, seed=99, global_batch=2) and wanted[:2] == keys(data[0], 2)
    write(tmp_path / "backward", shard=2, backward=True)
    assert keys(tmp_path / "backward", 4) == wanted
    write(tmp_path / "larger", more=4)  # among more clips those that were held out stay ahead of those that were not
    assert [key for key in keys(tmp_path / "larger", 25) if key in data[1]][:4] == wanted
    assert keys(data[0], 0) == []


def test_fewer_than_none_cannot_be_held_out(data: tuple[Path, dict[str, Sample]]) -> None:
    with pytest.raises(InputError, match="data.held_out=-1: 0 or more"):
        module(data[0], held_out=-1)


@pytest.mark.parametrize("count", [14, 20])
def test_holding_everything_out_is_refused(data: tuple[Path, dict[str, Sample]], count: int) -> None:
    with pytest.raises(InputError, match=f"data.held_out={count} leaves nothing to train on: the dataset has 14 clips"):
        module(data[0], held_out=count)


def test_held_out_windows(data: tuple[Path, dict[str, Sample]]) -> None:
    made = module(data[0], held_out=5)
    found = made.held_out_windows(clips=4, section=2)
    places = {ref.sample: (window, b) for window in found for b, ref in enumerate(window.refs)}
    assert set(places) == set(made.held_out[:4]) and all(len(window.refs) <= 2 for window in found)
    for sample, (window, b) in places.items():
        section = min(2, made.store.section_count(sample) - 1)
        stored = data[1][made.store.key(sample)]
        assert window.sections[b] == section and torch.equal(window.target[b], stored.latents[section].float())
        assert torch.equal(window.text[b, : len(stored.text)], stored.text.float())
    assert sorted(ref.position for window in found for ref in window.refs) == [0, 1, 2, 3]


@pytest.mark.parametrize(("ranks", "micro_batch"), [(1, 3), (2, 4), (4, 2)])
def test_a_global_batch_that_cannot_be_cut_is_refused(data: tuple[Path, dict[str, Sample]], ranks: int, micro_batch: int) -> None:
    made = on_device(module(data[0], micro_batch=micro_batch), 0, ranks)
    with pytest.raises(
        InputError, match=rf"data.global_batch=4 is not a multiple of data.micro_batch={micro_batch} x {ranks} devices"
    ):
        made.train_dataloader()


def test_a_global_batch_for_more_devices_than_divide_it(data: tuple[Path, dict[str, Sample]]) -> None:
    with pytest.raises(InputError, match="data.global_batch=4"):
        on_device(module(data[0], micro_batch=1), 0, 3).train_dataloader()


def test_loading_leaves_the_global_generators_alone(data: tuple[Path, dict[str, Sample]]) -> None:
    before = torch.get_rng_state(), random.getstate()
    batches(module(data[0], workers=1), 2)
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]


def test_windows_move_themselves(data: tuple[Path, dict[str, Sample]]) -> None:
    made = module(data[0])
    moved = made.transfer_batch_to_device(batches(made, 1)[0], torch.device("meta"), 0)
    for window in moved:
        assert {window.target.device.type, window.text.device.type, window.history.frames.device.type} == {"meta"}


def test_pairs_are_two_independent_windows_of_one_clip(data: tuple[Path, dict[str, Sample]]) -> None:
    single = batches(module(data[0], caption_drop=0.3), 12)
    pairs: list[list[WindowPair]] = batches(module(data[0], caption_drop=0.3, pairs=True), 12)  # type: ignore[assignment]
    assert_same([[pair.first for pair in batch] for batch in pairs], single)
    same, other = 0, 0
    for pair in chain(*pairs):
        first, second = pair.to("cpu").first, pair.to("cpu").second
        assert first.refs == second.refs and torch.equal(first.text, second.text)
        for sample, (one, two) in enumerate(zip(first.sections, second.sections, strict=True)):
            same, other = same + (one == two), other + (one != two)
            assert torch.equal(first.target[sample], second.target[sample]) == (one == two)
    assert same > 0 and other > 0
    with_workers: list[list[WindowPair]] = batches(module(data[0], caption_drop=0.3, pairs=True, workers=2), 3)  # type: ignore[assignment]
    assert_same([[pair.second for pair in batch] for batch in with_workers], [[p.second for p in batch] for batch in pairs[:3]])
