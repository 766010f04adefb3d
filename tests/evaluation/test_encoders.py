"""What metrics compute with, from folders, files and names."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from helios_train import rng
from helios_train.errors import InputError
from helios_train.evaluation.aesthetic import AestheticScore
from helios_train.evaluation.encoders import ClipImages, imported, linear_head


@pytest.fixture
def clip(tmp_path: Path) -> tuple[Path, CLIPModel]:
    """A CLIP of a few thousand parameters, saved as transformers saves one."""
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision, text = shape | {"image_size": 224, "patch_size": 56}, shape | {"vocab_size": 20}
    with rng.forked(0, "tiny clip"):
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    model.save_pretrained(tmp_path / "clip")
    return tmp_path / "clip", model


def test_clip_gives_projected_embeddings(clip: tuple[Path, CLIPModel]) -> None:
    folder, model = clip
    images = ClipImages(str(folder))
    pixels = rng.normal(rng.generator(0, "pixels"), (2, 3, 224, 224))
    with torch.no_grad():
        wanted = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
        assert torch.allclose(images(pixels), wanted, atol=1e-6) and images(pixels).shape == (2, 8)
    assert not any(parameter.requires_grad for parameter in images.parameters())
    (folder / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(InputError, match="cannot be loaded"):
        ClipImages(str(folder))
    with pytest.raises(InputError, match="evaluate.aesthetic.clip=no/folder/here"):
        ClipImages("no/folder/here")


def test_a_linear_head(tmp_path: Path, clip: tuple[Path, CLIPModel]) -> None:
    state = {"weight": torch.arange(8.0)[None], "bias": torch.tensor([0.5])}
    torch.save(state, tmp_path / "head.pth")
    head = linear_head(str(tmp_path / "head.pth"))
    assert float(head(torch.ones(1, 8))) == 28.5
    video = torch.full((2, 3, 224, 640), 90, dtype=torch.uint8)
    assert AestheticScore(ClipImages(str(clip[0])), head).score(video).value != 0
    for wrong in (
        {"weight": torch.zeros(2, 8), "bias": torch.zeros(2)},
        {"weight": torch.zeros(1, 8)},
        [1],
        state | {"more": state},
    ):
        torch.save(wrong, tmp_path / "wrong.pth")
        with pytest.raises(InputError, match="wrong.pth: no linear head"):
            linear_head(str(tmp_path / "wrong.pth"))


def test_callables_by_import_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_nets.py").write_text("class Nets:\n    @staticmethod\n    def answer():\n        return 42\n")
    monkeypatch.chdir(tmp_path)  # a module of the working directory, which `python -m helios_train` takes off the path
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    assert imported("my_nets:Nets.answer", "key")() == 42
    with pytest.raises(InputError, match="key=my_nets:other: cannot be imported"):
        imported("my_nets:other", "key")
    sys.modules.pop("my_nets")
