"""Text encoders: captions to rows of numbers. Rows past a caption are exactly zero, and no text is all rows zero."""

from __future__ import annotations

import hashlib
import html
import json
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import ftfy
import numpy as np
import torch
from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

from helios_train.errors import InputError
from helios_train.models import pretrained

_WORD = re.compile(r"\w+")
TOKENIZER = ("tokenizer.json", "spiece.model")  # files a tokenizer is made from, the first that is there


class TextEncoder(Protocol):
    """What encodes captions: at most `rows` rows of `dim` numbers each; `name` is what configs call it."""

    name: str
    rows: int
    dim: int

    def encode(self, captions: list[str]) -> list[torch.Tensor]:
        """One fp32 [L, dim] tensor a caption on the CPU, L at most `rows`; [0, dim] for a caption that says nothing."""

    def fingerprint(self) -> str:
        """Changes with what changes an embedding (sha256, hex)."""

    def unload(self) -> None:
        """Give back the memory of the weights; the next caption loads them again."""


class HashText:
    """Word embeddings without weights: a row is hash(word) + hash(previous word, word), unit variance an element.

    The pair term binds neighbours: with words alone "red circle, blue square" and "blue circle, red square" hold the same rows.
    """

    name = "hash"

    def __init__(self, rows: int = 16, dim: int = 64):
        self.rows, self.dim = rows, dim

    def encode(self, captions: list[str]) -> list[torch.Tensor]:
        """One fp32 [L, dim] tensor a caption, L words and at most `rows`: the rest of a longer caption is left out.

        Lower case, punctuation dropped; a caption without a word gives [0, dim].
        """
        return [self._encode(caption) for caption in captions]

    def _encode(self, caption: str) -> torch.Tensor:
        words = _WORD.findall(caption.lower())[: self.rows]
        pairs = zip(["", *words], words, strict=False)
        rows = [_gauss(word, self.dim) + _gauss(f"{before} {word}", self.dim) for before, word in pairs]
        if not rows:
            return torch.zeros(0, self.dim)
        return torch.from_numpy(np.stack(rows) * np.float32(0.5**0.5))

    def fingerprint(self) -> str:
        """Changes with anything that changes an embedding, a numpy whose Gaussians differ among it (sha256, hex)."""
        probe = self._encode("two words").numpy().tobytes()
        return hashlib.sha256(f"{self.name}:{self.rows}:{self.dim}:".encode() + probe).hexdigest()

    def unload(self) -> None:
        """There are no weights."""


@lru_cache(maxsize=65536)
def _gauss(text: str, dim: int) -> np.ndarray:
    """A standard normal fp32 vector that is a function of the text."""
    key = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")
    vector = np.random.Generator(np.random.Philox(key=key)).standard_normal(dim, dtype=np.float32)
    vector.flags.writeable = False
    return vector


class Umt5Text:
    """UMT5's encoder through transformers: what Wan and Helios models read.

    Nothing is loaded before a caption is encoded: 5.7 B parameters are 11 GB in bf16.
    """

    name = "umt5"
    TOGETHER = 8  # captions a forward
    SAMPLED = 64  # values of each weight that the fingerprint reads
    SHAPE = (  # keys of the encoder's config that an embedding depends on
        *("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "feed_forward_proj", "layer_norm_epsilon"),
        *("relative_attention_num_buckets", "relative_attention_max_distance"),
    )

    def __init__(
        self,
        weights: str | None,
        rows: int = 512,
        dim: int = 4096,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ):
        """`weights`: a diffusers folder with text_encoder/ and tokenizer/, or a model on the hub; None encodes nothing but the
        empty caption. `dtype`: of the compute."""
        self.weights, self.rows, self.dim = weights, rows, dim
        self.dtype, self.device = dtype, device
        self._loaded: tuple[Any, Any] | None = None  # tokenizer, encoder

    @torch.no_grad()
    def encode(self, captions: list[str]) -> list[torch.Tensor]:
        """One fp32 [L, dim] tensor a caption on the CPU, L its tokens with the end mark, at most `rows`: longer ones are cut.

        Cleaned and encoded as diffusers' HeliosPipeline does, at full length under a mask. A caption of nothing gives
        [0, dim], not the encoding of "" (one row, the end mark): a clip without caption then trains what guidance
        subtracts when sampling, the null text of all zeros. InputError where the weights cannot be used.
        """
        cleaned = [clean(caption) for caption in captions]
        rows = self._rows([caption for caption in cleaned if caption])
        return [next(rows) if caption else torch.zeros(0, self.dim) for caption in cleaned]

    def _rows(self, captions: list[str]) -> Iterator[torch.Tensor]:
        for at in range(0, len(captions), self.TOGETHER):
            tokenizer, encoder = self._loaded = self._loaded or self._load()
            tokens = tokenizer(
                captions[at : at + self.TOGETHER],
                padding="max_length",
                max_length=self.rows,
                truncation=True,
                return_attention_mask=True,
                return_tensors="pt",
            )
            ids, mask = tokens.input_ids.to(self.device), tokens.attention_mask.to(self.device)
            states = encoder(ids, mask).last_hidden_state
            for state, length in zip(states, tokens.attention_mask.sum(1).tolist(), strict=True):
                yield state[:length].float().cpu()

    def unload(self) -> None:
        """Give back the memory of the encoder; the next caption loads it again."""
        self._loaded = None

    def _load(self) -> tuple[Any, Any]:
        root = self._root()
        try:
            tokenizer = AutoTokenizer.from_pretrained(root / "tokenizer", local_files_only=True)
        except Exception as error:  # what transformers raises depends on where the damage lies
            said = pretrained.reason(error)
            raise InputError(f"{root / 'tokenizer'}: cannot be loaded ({said}); download or copy the folder again") from error
        encoder = pretrained.load(UMT5EncoderModel, root / "text_encoder", dtype=self.dtype)
        if len(tokenizer) > encoder.config.vocab_size:
            raise InputError(
                f"{root}: tokenizer/ knows {len(tokenizer)} tokens, text_encoder/ {encoder.config.vocab_size}: they are of two "
                "models; download or copy the folder again"
            )
        return tokenizer, encoder.to(self.device)

    def _root(self) -> Path:
        """The folder that holds both parts, checked to be of a UMT5 of the right width."""
        key = "text.weights"
        if self.weights is None:
            raise InputError(f"{key}=null: text=umt5 needs its weights to encode captions; name a diffusers folder")
        root = pretrained.root_of(self.weights, ("text_encoder", "tokenizer"), key)
        for part in ("text_encoder", "tokenizer"):
            if not (root / part).is_dir():
                raise InputError(f"{key}={self.weights}: holds no {part}/; name a folder with text_encoder/ and tokenizer/")
        if not any((root / "tokenizer" / file).is_file() for file in TOKENIZER):  # transformers would make one up
            raise InputError(f"{root / 'tokenizer'}: holds neither {' nor '.join(TOKENIZER)}; download or copy the folder again")
        config, path = pretrained.read_config(root / "text_encoder", key), root / "text_encoder" / "config.json"
        if config.get("model_type") != "umt5":
            raise InputError(f"{path}: holds a {config.get('model_type')}; {key} names the folder of a UMT5 encoder")
        if config.get("d_model") != self.dim:
            raise InputError(
                f"{path}: embeddings are {config.get('d_model')} wide, text.dim is {self.dim}; set text.dim (and the model's "
                "text_dim) to it, or choose the encoder the model was trained with"
            )
        return root

    def fingerprint(self) -> str:
        """sha256, hex, of rows and width, the tokenizer's file, the encoder's shape, and of each weight its name, shape and 64
        evenly spaced values in bf16.

        Reads a few megabytes and loads nothing. The same for one file and for shards, in any folder, stored in bf16 or wider.
        It misses a change that spares every sampled value, or is below bf16's rounding; training or another release is neither.
        """
        root = self._root()
        folder = root / "text_encoder"
        try:
            config = UMT5Config.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # a value of a wrong type
            raise InputError(f"{folder / 'config.json'}: is damaged ({pretrained.reason(error)}); copy it again") from error
        about = [self.name, self.rows, self.dim, {key: getattr(config, key) for key in self.SHAPE}]
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
        digest.update(_tokenizer_digest(root / "tokenizer"))
        samples = {}
        for name, weight in pretrained.mapped_weights(folder, "model"):
            name = "shared.weight" if name == "encoder.embed_tokens.weight" else name  # one tensor; files have either name
            if name == "shared.weight" or name.startswith("encoder."):  # a whole UMT5 has a decoder too
                values = weight.flatten()[:: max(1, weight.numel() // self.SAMPLED)].to(torch.bfloat16)
                samples[name] = f"{name}:{list(weight.shape)}:".encode() + values.contiguous().view(torch.uint8).numpy().tobytes()
        for name in sorted(samples):
            digest.update(samples[name])
        return digest.hexdigest()


def _tokenizer_digest(folder: Path) -> bytes:
    """sha256 of what cuts captions into tokens: tokenizer.json less what each call sets, or else sentencepiece's own file."""
    path = next(folder / file for file in TOKENIZER if (folder / file).is_file())
    try:
        content = path.read_bytes()
        if path.suffix == ".json":
            kept = {key: value for key, value in json.loads(content).items() if key not in ("version", "truncation", "padding")}
            content = json.dumps(kept, sort_keys=True).encode()
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: is no tokenizer ({pretrained.reason(error)}); download or copy it again") from error
    return hashlib.sha256(content).digest()


def clean(caption: str) -> str:
    """A caption as diffusers' pipelines clean it: ftfy's repairs, HTML entities resolved twice, white space as single spaces."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(caption)))).strip()


def pad(rows: list[torch.Tensor], length: int) -> torch.Tensor:
    """Prompts [L, dim] of any lengths as one [B, length, dim] batch, zeros past each prompt.

    The rows keep their type. InputError when a prompt is longer than `length`, or the widths differ.
    """
    if not rows:
        raise InputError("no prompts to pad: a batch needs at least one")
    dim = rows[0].shape[-1]
    out = rows[0].new_zeros(len(rows), length, dim)
    for number, prompt in enumerate(rows):
        if prompt.shape[0] > length or prompt.shape[-1] != dim:
            raise InputError(
                f"prompt {number} of the batch is {list(prompt.shape)}, but the model takes {length} rows of {dim}; "
                "prepare the data with the text encoder the model was built for"
            )
        out[number, : prompt.shape[0]] = prompt
    return out
