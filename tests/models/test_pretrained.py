"""Where weights lie: on this disk, or on a hub that may be out of reach."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from helios_train.errors import InputError
from helios_train.models.pretrained import mapped_weights, root_of


def test_a_folder_here(tmp_path: Path) -> None:
    assert root_of(str(tmp_path), ("vae",), "codec.weights") == tmp_path


@pytest.mark.parametrize("weights", ["/no/such/folder", "./here", "nowhere", "a/b/c", "", "~/none such"])
def test_no_folder_and_no_name(weights: str) -> None:
    with pytest.raises(InputError, match="^codec.weights=.*: no such folder; name a diffusers folder, or a model on the hub"):
        root_of(weights, ("vae",), "codec.weights")


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="no such folder"):
        root_of(str(tmp_path / "file"), ("vae",), "codec.weights")


def test_a_hub_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is a port that nobody listens on: the message says what to run where there is a network."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    command = r"run `hf download some-one/none --include 'text_encoder/\*' --include 'tokenizer/\*' --local-dir FOLDER`"
    with pytest.raises(InputError, match=command) as caught:
        root_of("some-one/none", ("text_encoder", "tokenizer"), "text.weights")
    assert "set text.weights=FOLDER" in str(caught.value)


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": 1}', '{"weight_map": {"a": "none.safetensors"}}', "{}"])
def test_a_damaged_index(tmp_path: Path, index: str) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    assert [name for name, _ in mapped_weights(tmp_path, "model")] == ["a"]
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(InputError, match="the weights cannot be read"):
        list(mapped_weights(tmp_path, "model"))
