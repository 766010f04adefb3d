"""The umt5 text encoder: diffusers' embeddings, unpadded, of any caption; loaded when needed, known by its content."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, HeliosPipeline, HeliosScheduler
from diffusers.pipelines.helios.pipeline_helios import prompt_clean
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, UMT5EncoderModel

from helios_train.errors import InputError
from helios_train.models.text import TextEncoder, Umt5Text, clean, pad

ROWS = 24
CAPTIONS = [
    "a red circle on the blue background",
    "  The  rain in\tSpain&amp;amp;lt;3 \n\u200bschÃ¶n ",
    "x " * 5000,
    "null \x00 byte \x07 and \x1b[31m colour",
    "half \ud83d of a pair, \udcff alone",
    "&#0;&#xD800; &nbsp;&#28;|",
    "ein Kreis, grün — 圆形 🎈",
]


def encoder(folder: Path, rows: int = ROWS, dim: int = 32, **options: Any) -> Umt5Text:
    return Umt5Text(str(folder), rows, dim, **{"dtype": torch.float32, **options})


@pytest.fixture(scope="module")
def text(tiny_encoders: Path) -> Umt5Text:
    return encoder(tiny_encoders)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_and_zeros_are_those_of_diffusers_pipeline(tiny_encoders: Path, dtype: torch.dtype) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoders / "tokenizer")
    theirs = UMT5EncoderModel.from_pretrained(tiny_encoders / "text_encoder", dtype=dtype)
    vae = AutoencoderKLWan.from_pretrained(tiny_encoders, subfolder="vae")
    pipeline = HeliosPipeline(tokenizer, theirs, vae, HeliosScheduler(), None)
    with torch.no_grad():
        expected, mask = pipeline._get_t5_prompt_embeds(CAPTIONS, max_sequence_length=ROWS)
    rows = encoder(tiny_encoders, dtype=dtype).encode(CAPTIONS)
    assert [len(part) for part in rows] == mask.sum(1).tolist() and all(part.dtype == torch.float32 for part in rows)
    padded = pad(rows, ROWS)
    assert torch.equal(padded, expected.float()) and torch.equal(padded.to(dtype), expected)
    assert not padded[~mask].any() and len(rows[2]) == ROWS and 2 < len(rows[0]) < ROWS


def test_cleaning_is_diffusers() -> None:
    assert clean("1 < 2 &amp;lt; 3") == "1 < 2 < 3"
    odd = ["", " \n ", "ﬁne “quotes”", "&amp;amp;amp;", "a\x85b\u2028c\u3000d", "\ufeffBOM", "&lt;b&gt;", "<i>&amp;lt;"]
    for caption in CAPTIONS + odd:
        assert clean(caption) == prompt_clean(caption)


def test_an_empty_caption_is_the_null_text(text: Umt5Text, tiny_encoders: Path) -> None:
    """All rows zero, and not the one row that the tokenizer makes of nothing."""
    assert AutoTokenizer.from_pretrained(tiny_encoders / "tokenizer")("").input_ids == [1]
    empty, some, blank, unseen = text.encode(["", "red", " \n\t", "\x00\x07"])
    assert empty.shape == blank.shape == unseen.shape == (0, 32) and len(some) == 2
    assert not pad([empty], ROWS).any()
    assert torch.allclose(some, text.encode(["red"])[0], atol=1e-6)


def test_more_captions_than_go_together(text: Umt5Text) -> None:
    captions = [f"a red circle {number}" for number in range(Umt5Text.TOGETHER + 3)]
    many = text.encode(captions)
    assert len(many) == len(captions)
    for caption, rows in zip(captions, many, strict=True):
        assert torch.allclose(rows, text.encode([caption])[0], atol=1e-5)


def test_a_truncated_caption_keeps_the_end_mark(tiny_encoders: Path) -> None:
    """As the tokenizer does it: the end mark is the last of `rows` tokens."""
    tokens = AutoTokenizer.from_pretrained(tiny_encoders / "tokenizer")
    assert tokens("a b c d e f", max_length=4, truncation=True).input_ids[-1] == 1
    assert encoder(tiny_encoders, rows=4).encode(["a b c d e f"])[0].shape == (4, 32)


def test_nothing_is_loaded_before_it_is_needed(tiny_encoders: Path) -> None:
    untouched = Umt5Text("/no/such/folder", ROWS, 32)
    assert untouched.encode([""])[0].shape == (0, 32)
    lazy: TextEncoder = encoder(tiny_encoders)
    lazy.fingerprint()
    assert lazy._loaded is None
    first = lazy.encode(["red"])[0]
    lazy.unload()
    assert lazy._loaded is None and torch.equal(lazy.encode(["red"])[0], first)


def test_loading_leaves_the_global_generator_alone(tiny_encoders: Path) -> None:
    before = torch.get_rng_state()
    encoder(tiny_encoders).encode(["red"])
    assert torch.equal(before, torch.get_rng_state())


def copied(tiny_encoders: Path, to: Path) -> Path:
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(tiny_encoders / part, to / part)
    return to


def test_the_fingerprint_is_of_the_content(tiny_encoders: Path, tmp_path: Path, text: Umt5Text) -> None:
    """In any folder, in shards, in another order, stored wider than bf16 or not, under either name of the shared table."""
    known = text.fingerprint()
    assert len(known) == 64 and encoder(copied(tiny_encoders, tmp_path / "copy")).fingerprint() == known
    sharded = copied(tiny_encoders, tmp_path / "sharded")
    (sharded / "text_encoder" / "model.safetensors").unlink()
    model = UMT5EncoderModel.from_pretrained(tiny_encoders / "text_encoder")
    model.save_pretrained(sharded / "text_encoder", max_shard_size="10KB")
    assert len(list((sharded / "text_encoder").glob("*.safetensors"))) > 3
    assert encoder(sharded).fingerprint() == known and torch.equal(encoder(sharded).encode(["red"])[0], text.encode(["red"])[0])
    narrow = copied(tiny_encoders, tmp_path / "narrow")
    model.to(torch.bfloat16).save_pretrained(narrow / "text_encoder")
    assert encoder(narrow, dtype=torch.bfloat16).fingerprint() == known
    whole = copied(tiny_encoders, tmp_path / "whole")  # a UMT5 with its decoder, the table under its other name
    weights = load_file(whole / "text_encoder" / "model.safetensors")
    weights |= {"encoder.embed_tokens.weight": weights.pop("shared.weight"), "decoder.final_layer_norm.weight": torch.ones(32)}
    save_file(weights, whole / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
    assert encoder(whole).fingerprint() == known


def test_the_fingerprint_follows_what_changes_an_embedding(tiny_encoders: Path, tmp_path: Path, text: Umt5Text) -> None:
    known = {text.fingerprint(), encoder(tiny_encoders, rows=ROWS + 1).fingerprint()}
    assert len(known) == 2

    def changed(name: str, change: Callable[[Path], Any]) -> str:
        folder = copied(tiny_encoders, tmp_path / name)
        change(folder)
        return encoder(folder).fingerprint()

    def trained(folder: Path) -> None:
        path = folder / "text_encoder" / "model.safetensors"
        weights = load_file(path)
        name = "encoder.block.1.layer.0.SelfAttention.v.weight"
        save_file(weights | {name: weights[name] * 1.01}, path, metadata={"format": "pt"})

    def edited(file: str, was: str, now: str) -> Callable[[Path], Any]:
        def edit(folder: Path) -> None:
            content = (folder / file).read_text()
            assert was in content
            (folder / file).write_text(content.replace(was, now, 1))

        return edit

    def trimmed(folder: Path) -> None:
        """A call leaves its padding and truncation in the tokenizer's file when that is saved: no other tokenizer."""
        path = folder / "tokenizer" / "tokenizer.json"
        content = json.loads(path.read_text())
        path.write_text(json.dumps(content | {"truncation": {"max_length": 7}}))

    assert changed("trimmed", trimmed) == text.fingerprint()
    others = {
        changed("trained", trained),
        changed("words", edited("tokenizer/tokenizer.json", "circle", "square")),
        changed("shape", edited("text_encoder/config.json", '_max_distance": 128', '_max_distance": 64')),
    }
    assert len(others | known) == 5


def config(folder: Path, **changes: Any) -> None:
    path = folder / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = folder / "text_encoder" / "model.safetensors"
    content = load_file(path)
    change(content)
    save_file(content, path, metadata={"format": "pt"})


def shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


BOTH, ENCODE = ("fingerprint", "encode"), ("encode",)  # who notices
FAULTS: dict[str, tuple[Callable[[Path], Any], str, tuple[str, ...]]] = {
    "no text_encoder": (lambda at: shutil.rmtree(at / "text_encoder"), "holds no text_encoder/; name a folder with", BOTH),
    "no tokenizer": (lambda at: shutil.rmtree(at / "tokenizer"), "holds no tokenizer/", BOTH),
    "an empty tokenizer": (lambda at: (at / "tokenizer" / "tokenizer.json").unlink(), "tokenizer", BOTH),
    "half a tokenizer": (lambda at: shorten(at / "tokenizer" / "tokenizer.json"), "tokenizer", BOTH),
    "another width": (lambda at: config(at, d_model=64), "embeddings are 64 wide, text.dim is 32; set text.dim", BOTH),
    "another model": (lambda at: config(at, model_type="t5"), "holds a t5; text.weights names the folder of a UMT5", BOTH),
    "a wrong type": (lambda at: config(at, num_layers="two"), "config.json: is damaged|cannot be loaded", BOTH),
    "no config": (lambda at: (at / "text_encoder" / "config.json").unlink(), "config.json: cannot be read", BOTH),
    "no weights": (lambda at: (at / "text_encoder" / "model.safetensors").unlink(), "text_encoder.*copy", BOTH),
    "cut short": (lambda at: shorten(at / "text_encoder" / "model.safetensors"), "text_encoder.*copy", BOTH),
    "a weight missing": (
        lambda at: weights(at, lambda held: held.pop("encoder.final_layer_norm.weight")),
        "weights of UMT5EncoderModel are missing or misshapen, encoder.final_layer_norm.weight",
        ENCODE,
    ),
    "a weight misshapen": (
        lambda at: weights(at, lambda held: held.update({"encoder.final_layer_norm.weight": torch.ones(3)})),
        "encoder.final_layer_norm.weight|cannot be loaded",
        ENCODE,
    ),
    "fewer words than tokens": (
        lambda at: (
            config(at, vocab_size=20),
            weights(at, lambda w: w.update({"shared.weight": torch.ones(20, 32)})),
        ),
        "tokens, text_encoder/ 20: they are of two models",
        ENCODE,
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_that_cannot_be_used(tiny_encoders: Path, tmp_path: Path, fault: str) -> None:
    folder = copied(tiny_encoders, tmp_path / "model")
    spoil, said, noticed = FAULTS[fault]
    spoil(folder)
    for who in noticed:
        with pytest.raises(InputError, match=said) as caught:
            encoder(folder).encode(["red"]) if who == "encode" else encoder(folder).fingerprint()
        assert str(folder) in str(caught.value)


def test_weights_that_were_never_named() -> None:
    for ask in (lambda text: text.encode(["red"]), lambda text: text.fingerprint()):
        with pytest.raises(InputError, match="text.weights=null: text=umt5 needs its weights"):
            ask(Umt5Text(None))
