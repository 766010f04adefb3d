"""Attention of a block through diffusers' dispatcher, and which of its backends a run can use.

Axis letters: B batch, L tokens, D width, N heads, K head width. Tokens before `split` are the history's.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import Tensor

from helios_train.errors import InputError
from helios_train.kernels.qk_norm_rope import qk_norm_rope

# Our name -> diffusers'. None of them fetches anything: the packages of the last three must be installed.
BACKENDS = {
    "sdpa": AttentionBackendName.NATIVE,
    "cudnn": AttentionBackendName._NATIVE_CUDNN,
    "flash": AttentionBackendName.FLASH,
    "flash3": AttentionBackendName._FLASH_3,
    "sage": AttentionBackendName.SAGE,
}
TRIED_TOKENS, LARGEST_ERROR = 128, 0.1  # of the trial: sage computes in 8 bits


class Attention:
    """Attention processor: diffusers' dispatch; norm and rotary embedding of queries and of keys are one op each."""

    _attention_backend: Any = None
    _parallel_config: Any = None

    def __call__(
        self,
        attn: Any,
        x_BLD: Tensor,
        context_BLD: Tensor | None = None,
        table: Tensor | None = None,
        split: int = 0,
        kernels: str = "auto",
    ) -> Tensor:
        """Of x to `context` (None: to itself), turned by the rotary `table` where there is one; like x."""
        context = x_BLD if context_BLD is None else context_BLD
        q_BLNK = qk_norm_rope(attn.to_q(x_BLD), attn.norm_q.weight, attn.heads, table, 0, attn.norm_q.eps, kernels)
        key_weight = _amplified(attn) if attn.is_amplify_history and split else attn.norm_k.weight
        k_BLNK = qk_norm_rope(attn.to_k(context), key_weight, attn.heads, table, split, attn.norm_k.eps, kernels)
        v_BLNK = attn.to_v(context).unflatten(2, (attn.heads, -1))
        out = dispatch_attention_fn(q_BLNK, k_BLNK, v_BLNK, backend=self._attention_backend)
        return attn.to_out[0](out.flatten(2, 3).type_as(q_BLNK))  # type: ignore[no-any-return]


def _amplified(attn: Any) -> Tensor:
    """The keys' weight for history and target, [2, D]: history keys grow 1 to max_scale times, learnt once or a head.

    A factor of a head commutes with the turning of its planes, so it may come before.
    """
    weight = attn.norm_k.weight
    factor = 1.0 + torch.sigmoid(attn.history_key_scale) * (attn.max_scale - 1.0)
    return torch.stack([weight * factor.repeat_interleave(len(weight) // len(factor)), weight])


def check_attention(name: str, heads: int, width: int, dtype: torch.dtype, device: torch.device, backward: bool) -> None:
    """Tries the backend on a few tokens of `heads` heads of that `width`, where it is to run, against the plain formula.

    `backward`: gradients are needed too; diffusers has none for flash3 and sage. InputError where the backend is not installed,
    does not run on these, or gives another output or gradient.
    """
    if name == "sdpa":
        return
    queries = torch.linspace(-2, 2, TRIED_TOKENS * heads * width, device=device).view(1, TRIED_TOKENS, heads, width)
    inputs = [part.to(dtype).requires_grad_(backward) for part in (queries, queries.sin(), queries.cos())]
    upstream = queries.flip(1).to(dtype)

    def outcome(backend: str) -> list[Tensor]:
        out = dispatch_attention_fn(*inputs, backend=BACKENDS[backend])
        return [out, *torch.autograd.grad(out, inputs, upstream)] if backward else [out]

    try:
        attention_dispatch._check_attention_backend_requirements(BACKENDS[name])
        found = outcome(name)
    except Exception as error:  # each backend has its own ways to say that it does not run
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        what = "trains" if backward else "runs"
        raise InputError(
            f"model.attention={name}: nothing {what} with it here ({reason}); install what it needs, or use sdpa"
        ) from error
    for own, expected in zip(found, outcome("sdpa"), strict=True):
        distance = (own.detach().float() - expected.detach().float()).norm() / expected.detach().float().norm()
        if not distance <= LARGEST_ERROR:
            raise InputError(f"model.attention={name}: differs from sdpa by {float(distance):.0%} here; use another")
