"""What metrics compute with, from names: CLIP's image encoder and LAION's head by their weights, anything else by import path."""

from __future__ import annotations

import importlib
import os
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from torch import Tensor, nn
from transformers import CLIPModel

from helios_train.errors import InputError
from helios_train.models import pretrained

IMPORT_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
ON_HUB = re.compile(r"([\w.-]+/[\w.-]+)/([\w./-]+)")


class ClipImages(nn.Module):
    """CLIP's projected image embeddings, [N, 3, S, S] -> fp32 [N, D]; in fp16 on a GPU, as published."""

    def __init__(self, weights: str, key: str = "evaluate.aesthetic.clip"):
        """`weights`: a folder of transformers' CLIPModel, or its name on the hub. InputError where it cannot be loaded."""
        super().__init__()
        self.model = pretrained.load(CLIPModel, pretrained.root_of(weights, ("",), key))

    def forward(self, pixels: Tensor) -> Tensor:
        """Embeddings as they are, not normalised."""
        dtype = torch.float16 if pixels.is_cuda else torch.float32
        found = self.model.to(dtype).get_image_features(pixel_values=pixels.to(dtype))
        return getattr(found, "pooler_output", found).float()  # older versions give the tensor itself


def linear_head(weights: str, key: str = "evaluate.aesthetic.head") -> nn.Linear:
    """A head of one number a row from a file with `weight` [1, D] and `bias` [1]; `weights` is its path, or OWNER/NAME/FILE on
    the hub. InputError where it holds something else."""
    path = Path(weights).expanduser()
    try:
        if not path.is_file() and (match := ON_HUB.fullmatch(weights)):
            path = Path(huggingface_hub.hf_hub_download(match[1], match[2]))
        state = torch.load(path, map_location="cpu", weights_only=True)
        (rows, width), bias = state["weight"].shape, state["bias"]
        if rows != 1 or bias.shape != (1,) or len(state) != 2:
            raise ValueError(f"weight {rows}x{width}, bias {list(bias.shape)}")
    except (OSError, ValueError, RuntimeError, LookupError, AttributeError, TypeError, pickle.UnpicklingError) as error:
        raise InputError(
            f"{key}={weights}: no linear head ({pretrained.reason(error)}); give a file with weight [1, D] and bias [1], or "
            "OWNER/NAME/FILE on the hub"
        ) from error
    head = nn.Linear(width, 1)
    head.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return head.eval().requires_grad_(False)


def imported(name: str, key: str) -> Callable[..., Any]:
    """The callable at `module:name`, of an installed module or one in the working directory. InputError where there is none;
    `key` is the config's, for messages."""
    if not IMPORT_PATH.fullmatch(name):
        raise InputError(f"{key}={name}: write it as module:function")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that no folder here hides an installed package
    module, _, attribute = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise InputError(f"{key}={name}: cannot be imported ({error}); install it, or start in its folder") from error
    if not callable(found):
        raise InputError(f"{key}={name}: is a {type(found).__name__}, which cannot be called; name a function or a module")
    return found
