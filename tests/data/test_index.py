"""ClipStore: any section by its bytes, damage named on every read, open files owned by one process."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import pickle
import time
from pathlib import Path

import pytest
import torch

from helios_train.data.format import Bucket, Manifest, ShardInfo, write_manifest
from helios_train.data.index import OPEN_FILES, ClipStore
from helios_train.data.writer import Sample, raw_info, raw_shard, shard_paths, write_shard
from helios_train.errors import InputError

Dataset = tuple[Path, list[Sample]]


def flip(path: Path, where: int) -> None:
    with open(path, "r+b") as file:
        file.seek(where)
        byte = file.read(1)[0]
        file.seek(where)
        file.write(bytes([byte ^ 1]))


def payload(store: ClipStore, sample: int) -> tuple[Path, int]:
    """The shard of a sample and where its latents' numbers begin."""
    number, row = store._locate(sample)
    index = store._index(number)
    return store.root / store.manifest.shards[number].url, int(index["offset"][row, 0] + index["payload"][row])


def test_everything_comes_back(dataset: Dataset) -> None:
    root, samples = dataset
    store = ClipStore(root)
    assert len(store) == 8
    assert [(b.frames, b.height, b.width, b.shard_sizes, b.first_ids) for b in store.buckets] == [
        (66, 32, 48, (3,), (0,)),
        (132, 32, 48, (3, 2), (3, 6)),
    ]
    for number, sample in enumerate(samples):
        count = store.section_count(number)
        assert count == len(sample.latents) and store.key(number) == sample.key and store.meta(number) == sample.meta
        assert torch.equal(store.text(number), sample.text) and store.text(number).dtype == torch.bfloat16
        for first in range(count):
            for last in range(first + 1, count + 1):
                read = store.sections(number, first, last)
                assert read.dtype == torch.bfloat16 and torch.equal(read, sample.latents[first:last])
    store.verify()


def test_what_is_read_may_be_written_to(dataset: Dataset) -> None:
    store = ClipStore(dataset[0])
    store.sections(0, 0, 1).zero_()
    assert torch.equal(store.sections(0, 0, 1), dataset[1][0].latents[:1])


@pytest.mark.parametrize(("sample", "first", "last"), [(0, 0, 3), (0, 1, 1), (0, -1, 1), (8, 0, 1), (-1, 0, 1)])
def test_what_is_not_there(dataset: Dataset, sample: int, first: int, last: int) -> None:
    with pytest.raises(InputError, match="not exist"):
        ClipStore(dataset[0]).sections(sample, first, last)


def test_only_the_asked_bytes_are_read_and_each_is_checked(dataset: Dataset) -> None:
    store = ClipStore(dataset[0])
    path, start = payload(store, 4)
    step = Bucket(132, 32, 48, 1).section_bytes
    flip(path, start + 2 * step + 5)
    assert torch.equal(store.sections(4, 0, 2), dataset[1][4].latents[:2])
    assert torch.equal(store.sections(4, 3, 4), dataset[1][4].latents[3:])
    with pytest.raises(InputError, match=r"000000.tar, clip clip_a-000000004: section 2 is damaged.*task=prepare"):
        store.sections(4, 0, 4)
    with pytest.raises(InputError, match="missing or not the file"):
        store.verify()


def test_damaged_text_and_record_are_named(dataset: Dataset) -> None:
    store = ClipStore(dataset[0])
    number, row = store._locate(7)
    for column, read, said in ((1, store.text, "text.safetensors"), (2, store.meta, "json")):
        flip(store.root / store.manifest.shards[number].url, int(store._index(number)["offset"][row, column]) + 3)
        with pytest.raises(InputError, match=rf"clip_a-000000007: {said} is damaged"):
            read(7)


def test_cut_missing_and_swapped_files(dataset: Dataset) -> None:
    root = dataset[0]
    shards = ClipStore(root).manifest.shards
    tar, index = root / shards[1].url, root / shards[1].index
    whole = tar.read_bytes()
    tar.write_bytes(whole[:-10240])
    with pytest.raises(InputError, match=r"000000.tar: \d+ bytes, but dataset.json lists \d+"):
        ClipStore(root).sections(3, 0, 1)
    tar.unlink()
    with pytest.raises(InputError, match="000000.tar: cannot be opened"):
        ClipStore(root).sections(3, 0, 1)
    tar.write_bytes(whole)
    flip(index, 300)
    with pytest.raises(InputError, match="000000.idx: its sha256"):
        ClipStore(root).sections(3, 0, 1)
    index.unlink()
    with pytest.raises(InputError, match="000000.idx: cannot be read"):
        ClipStore(root).key(3)
    assert len(ClipStore(root)) == 8 and torch.equal(ClipStore(root).sections(0, 0, 1), dataset[1][0].latents[:1])


def test_the_index_of_another_shard(dataset: Dataset) -> None:
    root = dataset[0]
    first, second = (root / shard.index for shard in ClipStore(root).manifest.shards[1:])
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)
    for sample, number in ((3, "000000"), (6, "000001")):
        with pytest.raises(InputError, match=f"{number}.idx: its sha256 is not the one dataset.json lists; copy the shard and"):
            ClipStore(root).sections(sample, 0, 1)
    with pytest.raises(InputError, match="idx: its sha256"):
        list(ClipStore(root).keys())


def test_all_keys_at_once(dataset: Dataset) -> None:
    store = ClipStore(dataset[0])
    store.key(4)  # one index is read already
    assert [key.decode() for key in store.keys()] == [sample.key for sample in dataset[1]]


def test_damaged_videos_are_found_by_verify(dataset: Dataset) -> None:
    root, bucket = dataset[0], Bucket(66, 32, 48, 3)
    (root / "clip.mp4").write_bytes(b"video" * 100)
    url = shard_paths(bucket.name, 0)[2]
    with raw_shard(root, url) as tar:
        tar.add("clip_a-000000000", root / "clip.mp4", "mp4", {"frames": 66}, "a caption")
    manifest = ClipStore(root).manifest
    write_manifest(root, dataclasses.replace(manifest, raw=(raw_info(root, url, bucket.name, 1),)))
    ClipStore(root).verify()
    flip(root / url, 700)
    with pytest.raises(InputError, match="raw/b00066x32x48/000000.tar: missing or not the file"):
        ClipStore(root).verify()


def test_a_shard_cut_while_open(dataset: Dataset) -> None:
    store = ClipStore(dataset[0])
    store.sections(2, 0, 1)
    path, start = payload(store, 2)
    os.truncate(path, start + 100)
    with pytest.raises(InputError, match="the shard ends early, 100 of"):
        store.sections(2, 0, 1)


def descriptors() -> set[str]:
    found = set()
    for entry in os.listdir("/proc/self/fd"):
        try:
            found.add(os.readlink(f"/proc/self/fd/{entry}"))
        except FileNotFoundError:
            continue
    return {name for name in found if name.endswith(".tar")}


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors through /proc")
def test_nothing_is_open_before_it_is_needed(dataset: Dataset) -> None:
    before = descriptors()
    store = ClipStore(dataset[0])
    assert descriptors() == before
    store.sections(0, 0, 1)
    assert len(descriptors() - before) == 1
    store.close()
    assert descriptors() == before
    assert torch.equal(store.sections(0, 0, 1), dataset[1][0].latents[:1])


def _read_in_child(store: ClipStore, queue: multiprocessing.Queue) -> None:
    inherited = dict(store._files)
    got = store.sections(5, 1, 3).float().sum().item()
    files = [{shard.file for shard in shards.values()} for shards in (inherited, store._files)]
    queue.put((got, bool(inherited), files[0] & files[1]))


def test_a_forked_process_opens_its_own(dataset: Dataset) -> None:
    store = ClipStore(dataset[0])
    store.sections(5, 1, 3)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_read_in_child, args=(store, queue))
    child.start()
    got, inherited, shared = queue.get(timeout=60)
    child.join()
    assert got == dataset[1][5].latents[1:3].float().sum().item()
    assert inherited and not shared
    assert torch.equal(store.sections(5, 1, 3), dataset[1][5].latents[1:3])


def test_a_spawned_process_opens_its_own(dataset: Dataset) -> None:
    store = ClipStore(dataset[0])
    here = store.meta(5)
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # a method of ours: the child need not find this file
        assert pool.apply(store.meta, (5,)) == here


def test_pickle_leaves_descriptors_behind(dataset: Dataset) -> None:
    store = ClipStore(dataset[0])
    store.sections(0, 0, 1)
    copy = pickle.loads(pickle.dumps(store))
    assert not copy._files and torch.equal(copy.sections(0, 0, 1), store.sections(0, 0, 1))


def test_open_files_are_bounded(tmp_path: Path) -> None:
    bucket, count = Bucket(33, 16, 16, n=OPEN_FILES + 9), OPEN_FILES + 9
    latents = torch.arange(16 * 9 * 4).view(1, 16, 9, 2, 2) % 128
    shards = [
        write_shard(tmp_path, bucket, i, [Sample(f"s-{i:09d}", latents + i % 8, torch.zeros(0, 4), {})]) for i in range(count)
    ]
    write_manifest(tmp_path, Manifest((bucket,), tuple(shards), {}, {}, ""))
    store = ClipStore(tmp_path)
    for sample in [*range(count), 0, 3, count - 1]:
        assert torch.equal(store.sections(sample, 0, 1), (latents + sample % 8).bfloat16())
        assert store.text(sample).shape == (0, 4)
    assert len(store._files) == OPEN_FILES


def test_a_million_clips_open_at_once(tmp_path: Path) -> None:
    bucket, size = Bucket(132, 64, 128, n=1_000_000), 200
    shards = tuple(
        ShardInfo(
            f"lat/{bucket.name}/{i:06d}.tar", size, 1, "0" * 64, bucket.name, f"index/lat/{bucket.name}/{i:06d}.idx", "0" * 64
        )
        for i in range(bucket.n // size)
    )
    write_manifest(tmp_path, Manifest((bucket,), shards, {}, {}, ""))
    start = time.process_time()
    store = ClipStore(tmp_path)
    located = [store._locate(sample) for sample in range(0, 1_000_000, 1000)]
    took = time.process_time() - start
    assert len(store) == 1_000_000 and located[7] == (35, 0) and store._locate(999_999) == (4999, 199)
    assert took < 3, f"{took:.1f} s"  # processor time, so a busy machine does not matter
