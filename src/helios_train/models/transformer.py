"""The Helios transformer: diffusers' parameters and names, and what training asks of it.

Axis letters: B batch, C latent channels, T latent frames, H W latent rows and columns, L tokens, D width, N heads, K head width.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import HeliosTransformer3DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from helios_train import rng
from helios_train.errors import InputError
from helios_train.history import ANCHOR_INDEX, LONG_INDICES, MID_INDICES, SHORT_INDICES, TARGET_INDICES, History
from helios_train.kernels.rope import apply_rope
from helios_train.models.checkpoint import audit
from helios_train.models.precision import cast, dtype_of
from helios_train.models.pretrained import mapped_weights

WEIGHTS = "diffusion_pytorch_model"
HISTORY_PATCHES = {"patch_short": 1, "patch_mid": 2, "patch_long": 4}  # name -> how often it repeats the target's patch a side
# Where Wan and older Helios files keep what now has another name.
RENAMED = {"scale_shift_table": "norm_out.scale_shift_table"}
CONFIG_KEYS = inspect.signature(HeliosTransformer3DModel.__init__).parameters.keys() - {"self"}


class Attention:
    """Attention processor: as diffusers' own, with the rotary embedding of `kernels.rope`."""

    _attention_backend: Any = None
    _parallel_config: Any = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Tensor | None = None,
        original_context_length: int = 0,
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q_BLNK = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        k_BLNK = attn.norm_k(attn.to_k(context)).unflatten(2, (attn.heads, -1))
        v_BLNK = attn.to_v(context).unflatten(2, (attn.heads, -1))
        if rotary_emb is not None:
            q_BLNK, k_BLNK = apply_rope(q_BLNK, rotary_emb), apply_rope(k_BLNK, rotary_emb)
        out = dispatch_attention_fn(q_BLNK, k_BLNK, v_BLNK, attn_mask=attention_mask, backend=self._attention_backend)
        return attn.to_out[0](out.flatten(2, 3).type_as(q_BLNK))


class HeliosTransformer(HeliosTransformer3DModel):
    """diffusers' HeliosTransformer3DModel with the call that objectives and samplers share."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.config.is_amplify_history:
            raise InputError("is_amplify_history=true is not supported yet; use a model without it")
        for block in self.blocks:
            for attention in (block.attn1, block.attn2):
                attention.set_processor(Attention())

    def velocity(self, x_t: Tensor, t: Tensor, text: Tensor, history: History) -> Tensor:
        """The velocity at `x_t` [B, C, 9, H, W] and times `t` [B] in [0, 1000], given text [B, rows, dim] and history.

        Shaped like x_t. History enters at time 0. Computed in the model's dtype, returned in fp32.
        """
        dtype = self.proj_out.weight.dtype
        indices = [torch.tensor(i, device=x_t.device)[None].expand(len(x_t), -1) for i in FRAME_INDICES]
        short = torch.cat([history.anchor, history.short], dim=2)
        output = self(
            hidden_states=x_t.to(dtype),
            timestep=t,
            encoder_hidden_states=text.to(dtype),
            indices_hidden_states=indices[0],
            indices_latents_history_short=indices[1],
            indices_latents_history_mid=indices[2],
            indices_latents_history_long=indices[3],
            latents_history_short=short.to(dtype),
            latents_history_mid=history.mid.to(dtype),
            latents_history_long=history.long.to(dtype),
            return_dict=False,
        )[0]
        return output.float()

    def checkpoint_blocks(self, context: Callable[[], Any] | None = None) -> None:
        """Keep only each block's input in the forward and compute the block again in backward.

        `context` gives the (forward, recompute) context managers of each call, for a caller who must restore what a recompute
        depends on. No random numbers are drawn in a block, so none are preserved.
        """
        extra: dict[str, Any] = {"context_fn": context} if context else {}

        def run(block: Callable[..., Tensor], *inputs: Any) -> Tensor:
            return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False, **extra)  # type: ignore[no-any-return]

        self.enable_gradient_checkpointing(gradient_checkpointing_func=run)


FRAME_INDICES = (TARGET_INDICES, (ANCHOR_INDEX, *SHORT_INDICES), MID_INDICES, LONG_INDICES)


def random_transformer(shape: Mapping[str, Any], dtype: torch.dtype, seed: int) -> HeliosTransformer:
    """A transformer of that shape (keys of diffusers' config) with random weights; its output starts at zero."""
    with rng.forked(seed, "transformer"):
        transformer = HeliosTransformer(**shape)
    for name in HISTORY_PATCHES:
        start_patch(transformer, name)
    nn.init.zeros_(transformer.proj_out.weight)
    nn.init.zeros_(transformer.proj_out.bias)
    cast(transformer, dtype)
    return transformer


@torch.no_grad()
def start_patch(transformer: HeliosTransformer3DModel, name: str) -> None:
    """Starts one history patch from the target's: the kernel tiled over time, rows, columns, divided by the number of tiles."""
    source, patch = transformer.patch_embedding, getattr(transformer, name)
    times = HISTORY_PATCHES[name]
    patch.weight.copy_(source.weight.repeat(1, 1, times, times, times) / times**3)
    patch.bias.copy_(source.bias)


def load_transformer(folder: Path, dtype: torch.dtype) -> HeliosTransformer:
    """The transformer of a diffusers folder (the pipeline's, or its `transformer/`), in `dtype` on the host.

    Takes Helios folders, older ones with a top-level scale_shift_table, and Wan text-to-video folders, whose missing history
    patches start from the target's. InputError names a key that is missing, extra or misshapen.
    """
    folder = folder / "transformer" if (folder / "transformer").is_dir() else folder
    shape = read_shape(folder)
    try:
        with torch.device("meta"):
            transformer = HeliosTransformer(**shape)
    except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:  # a number that is none, or fits no other
        raise InputError(f"{folder / 'config.json'}: makes no model ({error}); copy or export the folder again") from error
    weights = {RENAMED.get(name, name): value for name, value in mapped_weights(folder, WEIGHTS)}
    expected = {name: tuple(value.shape) for name, value in transformer.state_dict().items()}
    fresh = [name for name in HISTORY_PATCHES if f"{name}.weight" not in weights and f"{name}.bias" not in weights]
    if len(fresh) != len(HISTORY_PATCHES):  # all are there, or all are new: a folder with some is damaged
        fresh = []
    audit({name: size for name, size in expected.items() if name.split(".")[0] not in fresh}, weights, str(folder))
    for name, value in list(weights.items()):
        weights[name] = value.to(dtype_of(name, dtype))
    transformer.load_state_dict(weights, strict=False, assign=True)
    for name in fresh:
        getattr(transformer, name).to_empty(device="cpu")
        start_patch(transformer, name)
    config = transformer.config
    transformer.rope = type(transformer.rope)(config.rope_dim, config.rope_theta)  # its buffers are in no file
    cast(transformer, dtype)
    return transformer


def read_shape(folder: Path) -> dict[str, Any]:
    """The keys of config.json that make the model; InputError where the folder holds no such model."""
    path = (folder / "transformer" if (folder / "transformer").is_dir() else folder) / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); give a diffusers folder of a Helios or Wan transformer") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: is no JSON object; give a diffusers folder of a Helios or Wan transformer")
    known = ("HeliosTransformer3DModel", "HeliosTransformer", "WanTransformer3DModel")
    if config.get("_class_name") not in known:
        raise InputError(f"{path}: holds a {config.get('_class_name')}; give a folder of one of {', '.join(known)}")
    shape = {name: config[name] for name in sorted(CONFIG_KEYS & config.keys())} | {"has_multi_term_memory_patch": True}
    if config["_class_name"] == "WanTransformer3DModel":
        width = config.get("attention_head_dim")
        if not isinstance(width, int):
            raise InputError(f"{path}: attention_head_dim is {width}, no whole number; copy or export the folder again")
        shape["rope_dim"] = [
            width - 4 * (width // 6),
            2 * (width // 6),
            2 * (width // 6),
        ]  # Wan's own split: the rest goes to time
        images = config.get("image_dim") or config.get("added_kv_proj_dim")
        if images or config.get("in_channels", 16) != config.get("out_channels", 16):  # 2.2 appends the image to the channels
            raise InputError(f"{path}: is an image-to-video Wan; Base starts from a text-to-video one")
    return shape
