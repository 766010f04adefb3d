"""From config to encoders, and who must agree with whom: dataset, config, and the weights a run starts from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from helios_train.conf.compose import compose
from helios_train.conf.schema import Config
from helios_train.data.format import read_manifest, write_manifest
from helios_train.errors import InputError
from helios_train.models.codecs import dct_codec, wan_codec
from helios_train.models.manifest import NAME
from helios_train.models.text import HashText, Umt5Text
from helios_train.tasks import build, weights

Run = Callable[..., None]
MODEL = ("experiment=debug", "model.head_dim=16", "model.rope_dim=[8,4,4]", "trainer.accelerator=cpu", "watch.sample=false")
UMT5 = ("text=umt5", "text.dim=32", "text.rows=24", "model.text_dim=32")


def config(root: Path, *overrides: str) -> Config:
    return compose([*MODEL, f"data.root={root}", "data.toy.clips=8", *overrides])


@pytest.fixture(scope="module")
def toy(tiny_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of toy videos: dct and hash."""
    root = tmp_path_factory.mktemp("toy") / "shards"
    tiny_run("task=prepare", f"data.root={root}")
    return root


@pytest.fixture
def real(toy: Path, tmp_path: Path, tiny_encoders: Path) -> Path:
    """The same shards under records of wan and umt5."""
    root = shutil.copytree(toy, tmp_path / "real")
    manifest = read_manifest(root)
    codec = manifest.codec | {"name": "wan", "fingerprint": wan_codec(str(tiny_encoders)).fingerprint()}
    print_ = Umt5Text(str(tiny_encoders), 24, 32).fingerprint()
    text = {"name": "umt5", "fingerprint": print_, "rows": 24, "dim": 32}
    write_manifest(root, replace(manifest, codec=codec, text=text))
    return root


def test_the_device() -> None:
    there = torch.cuda.is_available()
    devices = {asked: "cuda" if there and asked != "cpu" else "cpu" for asked in ("auto", "cpu", *["gpu"] * there)}
    for asked, wanted in devices.items():
        assert build.device(compose([f"trainer.accelerator={asked}"])) == torch.device(wanted)
    if not there:
        with pytest.raises(InputError, match="trainer.accelerator=gpu: no GPU is seen here; use auto or cpu"):
            build.device(compose(["trainer.accelerator=gpu"]))


def test_encoders_by_config(tiny_encoders: Path) -> None:
    plain = compose(["text.rows=9"])
    assert build.codec(plain).fingerprint() == dct_codec().fingerprint()
    assert build.text(plain).fingerprint() == HashText(9, 64).fingerprint()
    real = compose(
        ["codec=wan", f"codec.weights={tiny_encoders}/vae", *UMT5, f"text.weights={tiny_encoders}", "trainer.accelerator=cpu"]
    )
    codec, text = build.codec(real), build.text(real)
    assert (codec.name, text.name, text.rows, text.dim) == ("wan", "umt5", 24, 32)
    assert isinstance(text, Umt5Text) and text.dtype == torch.bfloat16 and str(text.device) == "cpu"
    assert build.encoders(real) == {
        "codec": {"name": "wan", "fingerprint": codec.fingerprint()},
        "text": {"name": "umt5", "fingerprint": text.fingerprint(), "rows": 24, "dim": 32},
    }


def test_without_weights_nothing_is_known_and_nothing_encoded() -> None:
    bare = compose(["codec=wan", *UMT5])
    assert build.encoders(bare) == {"codec": {"name": "wan"}, "text": {"name": "umt5", "rows": 24, "dim": 32}}
    with pytest.raises(InputError, match="codec.weights=null: codec=wan needs its weights to encode and decode"):
        build.codec(bare)
    assert build.text(bare).encode([""])[0].shape == (0, 32)


def test_training_needs_no_weights_and_never_loads_umt5(real: Path, tiny_encoders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: Umt5Text) -> Any:
        raise AssertionError("loaded")

    monkeypatch.setattr(Umt5Text, "_load", load)
    build.data(config(real, "codec=wan", *UMT5))
    build.data(config(real, "codec=wan", f"codec.weights={tiny_encoders}", *UMT5, f"text.weights={tiny_encoders}"))


def test_another_encoder_than_the_dataset_s(toy: Path, real: Path, tiny_encoders: Path) -> None:
    dct, wan = dct_codec().fingerprint()[:12], wan_codec(str(tiny_encoders)).fingerprint()[:12]
    remedy = "; choose the codec and text of the dataset, or prepare it again"
    for root, overrides, said in (
        (toy, ["codec=wan"], f"codec: the dataset {toy} has dct {dct}, this config has wan weights unknown{remedy}"),
        (toy, ["codec=wan", f"codec.weights={tiny_encoders}"], f"has dct {dct}, this config has wan {wan}{remedy}"),
        (real, UMT5, f"codec: the dataset {real} has wan {wan}, this config has dct {dct}{remedy}"),
        (real, ["codec=wan"], "this config has hash "),
        (toy, ["text.rows=20"], "(16 rows of 64), this config has hash "),
        (toy, ["text.dim=32", "model.text_dim=32"], "(16 rows of 32); choose"),
        (real, ["codec=wan", *UMT5, "text.rows=512"], "this config has umt5 weights unknown (512 rows of 32)"),
    ):
        with pytest.raises(InputError) as caught:
            build.data(config(root, *overrides))
        assert said in str(caught.value)


def test_other_weights_of_the_same_encoder(real: Path, tiny_encoders: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.copytree(tiny_encoders / part, other / part)
    for file, changes in (("vae/config.json", {"latents_mean": [0.0] * 16}), ("text_encoder/config.json", {"num_heads": 4})):
        (other / file).write_text(json.dumps(json.loads((other / file).read_text()) | changes))
    with pytest.raises(InputError, match="codec: the dataset .* has wan (.{12}), this config has wan (?!\\1).{12};"):
        build.data(config(real, "codec=wan", f"codec.weights={other}", *UMT5))
    build.data(config(real, "codec=wan", *UMT5, f"text.weights={other}"))  # written anew, not changed
    words = (other / "tokenizer" / "tokenizer.json").read_text()
    (other / "tokenizer" / "tokenizer.json").write_text(words.replace("circle", "square"))
    with pytest.raises(InputError, match="text: the dataset .* has umt5 (.{12}) .*, this config has umt5 (?!\\1).{12} "):
        build.data(config(real, "codec=wan", *UMT5, f"text.weights={other}"))


def test_videos_to_sample_and_no_weights_to_decode_them(real: Path, toy: Path, tiny_encoders: Path) -> None:
    asked = "codec=wan", *UMT5, "watch.sample=true"
    with pytest.raises(InputError, match="codec.weights=null: watch.sample=true decodes .* or set watch.sample=false"):
        build.data(config(real, *asked))
    build.data(config(real, *asked, f"codec.weights={tiny_encoders}"))
    build.data(config(toy, "watch.sample=true"))


@pytest.fixture(scope="module")
def run(tiny_run: Run, toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one iteration on the toy shards, and merged/."""
    folder = tmp_path_factory.mktemp("run") / "run"
    tiny_run(f"data.root={toy}", f"run_dir={folder}", "trainer.max_steps=1")
    tiny_run("task=merge", f"init={folder}", f"data.root={toy}")
    return folder


@pytest.mark.parametrize("init", ["merged", "", "checkpoints/00000001.ckpt"])
def test_another_encoder_than_the_weights_learned(run: Path, toy: Path, tmp_path: Path, init: str) -> None:
    learned = weights.start(config(toy, f"init={run / init}")).encoders
    assert learned and learned["codec"]["fingerprint"] == dct_codec().fingerprint() and learned["text"]["rows"] == 16
    build.data(config(toy, f"init={run / init}"))
    other, manifest = shutil.copytree(toy, tmp_path / "other"), read_manifest(toy)
    for part, name, overrides in (
        ("codec", "wan", ["codec=wan"]),
        ("text", "umt5", ["text=umt5", "text.rows=16", "text.dim=64"]),
    ):
        write_manifest(other, replace(manifest, **{part: getattr(manifest, part) | {"name": name}}))
        said = rf"{part}: the dataset {other} has {name} .*, init={run / init} has .*prepare the videos again with them"
        with pytest.raises(InputError, match=said):
            build.data(config(other, *overrides, f"init={run / init}"))


def test_same_name_and_other_fingerprint_than_the_weights(run: Path, toy: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run / "merged", tmp_path / "merged")
    known = json.loads((folder / NAME).read_text())
    known["codec"]["fingerprint"] = "f" * 64
    (folder / NAME).write_text(json.dumps(known))
    with pytest.raises(InputError, match=f"has dct .*, init={folder} has dct ffffffffffff;"):
        build.data(config(toy, f"init={folder}"))


def test_a_sampler_nobody_knows(run: Path, toy: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run / "merged", tmp_path / "merged")
    known = json.loads((folder / NAME).read_text())
    (folder / NAME).write_text(json.dumps(known | {"sampler": {"speed": 9}}))
    with pytest.raises(InputError, match="helios_train.json: sampler has unknown settings .*speed.*; merge the run again"):
        weights.start(config(toy, f"init={folder}"))


def test_a_folder_of_somebody_else_is_taken_at_the_config_s_word(run: Path, toy: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run / "merged" / "transformer", tmp_path / "theirs")
    begun = weights.start(config(toy, f"init={folder}"))
    assert begun.encoders is None and begun.lineage == () and len(str(begun.base)) == 64
    build.data(config(toy, f"init={folder}"))
