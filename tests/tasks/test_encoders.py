"""codec=wan text=umt5 from videos to weights: what is stored is what the encoders say, and the weights know it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, HeliosPipeline, HeliosScheduler
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, UMT5EncoderModel

from helios_train.conf import compose
from helios_train.data.batch import stack
from helios_train.data.format import MANIFEST
from helios_train.data.index import ClipStore
from helios_train.data.order import Ref
from helios_train.data.toy import ToySpec, render
from helios_train.data.video import write_mp4
from helios_train.errors import InputError
from helios_train.models.codecs import Codec, wan_codec
from helios_train.models.manifest import read_manifest
from helios_train.models.text import Umt5Text
from helios_train.rng import torch_generator
from helios_train.tasks import build, run_task
from helios_train.tasks.prepare import prepare_folder

ROWS, SIZE, SEED = 24, (32, 48), 3
CAPTIONS = ("a red circle &amp; more\n", "x " * 5000, None)
SMALL = ("model.heads=1", "model.head_dim=16", "model.rope_dim=[8,4,4]", "model.layers=2", "model.ffn_dim=64")
MODEL = ("data=folder", "data.global_batch=2", "data.micro_batch=1", "trainer.accelerator=cpu", "trainer.progress=false", *SMALL)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three videos of two sections; a caption with an entity, one of 10,000 characters, none."""
    folder = tmp_path_factory.mktemp("videos")
    for number, caption in enumerate(CAPTIONS):
        write_mp4(folder / f"{number}.mp4", render(0, number, ToySpec(size=SIZE, sections=2))[0], 25)
        if caption is not None:
            (folder / f"{number}.txt").write_text(caption)
    return folder


def do(root: Path, encoders: Path, *overrides: str) -> None:
    """A task as the command line would do it."""
    parts = f"codec.weights={encoders}", "text=umt5", f"text.weights={encoders}", "text.dim=32", f"text.rows={ROWS}"
    own = f"data.root={root}", f"data.size=[{SIZE[0]},{SIZE[1]}]", "data.held_out=0", "model.text_dim=32", f"seed={SEED}"
    raw = compose.plain(compose.compose_plain([*MODEL, "codec=wan", *parts, *own, *overrides]))
    run_task(compose.typed(raw), raw)


@pytest.fixture(scope="module")
def root(source: Path, tiny_encoders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shards") / "set"
    do(root, tiny_encoders, "task=prepare", f"prepare.source={source}")
    return root


class Recording(Codec):
    """Keeps the sections it was given, in order."""

    def encode(self, video: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None = None) -> torch.Tensor:
        """As the codec."""
        self.__dict__.setdefault("seen", []).append(video)
        return super().encode(video, generator)


def test_what_is_read_back_is_the_rounding_of_what_was_encoded(
    source: Path, root: Path, tiny_encoders: Path, tmp_path: Path
) -> None:
    """To the bit; and to 1e-5 it is diffusers' encode of the same windows, each alone."""
    codec = wan_codec(str(tiny_encoders))
    recording = Recording("wan", codec.vae)
    prepare_folder(source, tmp_path / "set", recording, Umt5Text(str(tiny_encoders), ROWS, 32), SIZE, seed=SEED)
    store, task = ClipStore(tmp_path / "set"), ClipStore(root)
    vae = AutoencoderKLWan.from_pretrained(tiny_encoders, subfolder="vae")
    mean, std = (torch.tensor(vae.config[name]).view(1, 16, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    assert len(recording.__dict__["seen"]) == len(store) == 3
    for clip, sections in enumerate(recording.__dict__["seen"]):
        assert sections.shape == (2, 3, 33, *SIZE) and float(sections.std()) > 0.1
        draws = [torch_generator(SEED, "posterior", clip, section) for section in range(2)]
        latents, stored = codec.encode(sections, draws), store.sections(clip, 0, 2)
        assert torch.equal(stored, latents.bfloat16()) and torch.equal(task.sections(clip, 0, 2), stored)
        for section in range(2):
            draw = torch_generator(SEED, "posterior", clip, section)
            with torch.no_grad():
                sample = vae.encode(sections[section : section + 1]).latent_dist.sample(generator=draw)
            assert (latents[section] - ((sample - mean) / std)[0]).abs().max() < 1e-5


def test_rows_and_zeros_are_diffusers(root: Path, tiny_encoders: Path) -> None:
    """What a window holds: the pipeline's embeddings in bf16, the model's 512 (here 24) rows, zeros past the caption."""
    theirs = UMT5EncoderModel.from_pretrained(tiny_encoders / "text_encoder", dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoders / "tokenizer")
    vae = AutoencoderKLWan.from_pretrained(tiny_encoders, subfolder="vae")
    pipeline = HeliosPipeline(tokenizer, theirs, vae, HeliosScheduler(), None)
    store = ClipStore(root)
    overrides = [*MODEL, "codec=wan", "text=umt5", "text.dim=32", f"text.rows={ROWS}", "model.text_dim=32", f"data.root={root}"]
    config = compose.compose([*overrides, f"data.size=[{SIZE[0]},{SIZE[1]}]", "data.held_out=0", "watch.sample=false"])
    dataset = build.data(config).dataset
    for clip, caption in enumerate(CAPTIONS):
        window = stack([dataset.piece(Ref(0, 0, 0, clip), 0)], ROWS).to("cpu").text[0]
        if caption is None:
            assert store.text(clip).shape == (0, 32) and torch.equal(window, torch.zeros(ROWS, 32))
            continue
        with torch.no_grad():
            embeds, mask = pipeline._get_t5_prompt_embeds(caption, max_sequence_length=ROWS)
        assert torch.equal(store.text(clip), embeds[0, : int(mask.sum())]) and torch.equal(window, embeds[0].float())
        assert not window[int(mask.sum()) :].any() and 2 < int(mask.sum()) <= ROWS


def test_the_weights_know_what_they_learned_from(root: Path, tiny_encoders: Path, tmp_path: Path) -> None:
    """Trained without the encoders, merged without the shards, sampled with the encoders: one road."""
    shards, run = shutil.copytree(root, tmp_path / "shards"), tmp_path / "run"
    bare = "codec.weights=null", "text.weights=null", "watch.sample=false", "watch.every=0", "trainer.max_steps=1"
    do(shards, tiny_encoders, f"run_dir={run}", *bare)
    card = (run / "run_card.txt").read_text()
    codec, text = wan_codec(str(tiny_encoders)), Umt5Text(str(tiny_encoders), ROWS, 32)
    assert f"codec wan {codec.fingerprint()[:12]}, text umt5 {text.fingerprint()[:12]} ({ROWS} rows of 32)" in card
    shutil.rmtree(shards)
    do(shards, tiny_encoders, "task=merge", f"init={run}", "codec.weights=null", "text.weights=null", "watch.sample=false")
    known = read_manifest(run / "merged")
    assert known is not None and known.codec == {"name": "wan", "fingerprint": codec.fingerprint()}
    assert known.text == {"name": "umt5", "fingerprint": text.fingerprint(), "rows": ROWS, "dim": 32}
    wanted = "sample.prompt=a red circle", "sample.sections=1", "sample.steps=1", "sample.solver=euler"
    do(shards, tiny_encoders, "task=sample", f"init={run}/merged", *wanted, f"sample.output={tmp_path}/videos")
    assert len(list((tmp_path / "videos").glob("*.mp4"))) == 1


def test_latents_that_are_no_numbers_are_not_stored(source: Path, tiny_encoders: Path, tmp_path: Path) -> None:
    spoiled = shutil.copytree(tiny_encoders, tmp_path / "spoiled")
    file = spoiled / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["quant_conv.bias"].fill_(float("nan"))
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match="finite"):
        do(tmp_path / "set", spoiled, "task=prepare", f"prepare.source={source}")
    assert not (tmp_path / "set" / MANIFEST).exists() and not list((tmp_path / "set").rglob("*.tar"))
