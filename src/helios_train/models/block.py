"""A block of the transformer: diffusers' parameters under a forward in which the modulation stays two rows a sample.

Axis letters: B batch, L tokens, D width, R rows of the modulation: 0 for the history (time 0), 1 for the target (time t).
Tokens before `split` are the history's.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from diffusers.models.transformers.transformer_helios import HeliosTransformerBlock
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge

from helios_train.kernels.gated_residual import gated_residual, gated_residual_layer_norm, gated_residual_modulated_norm
from helios_train.kernels.gelu import gelu_tanh, gelu_tanh_backward_
from helios_train.kernels.layer_norm import layer_norm
from helios_train.kernels.modulated_norm import modulated_norm
from helios_train.models.lora import by_input, by_weights, gathered, now

ROWS = 2048  # tokens in a piece of the feed-forward: at 14 B a hidden tensor of a piece is 54 MiB in bf16


class _Kept(torch.autograd.Function):
    """Its input again, which it saves: a checkpoint gives it back, and what follows need not be run again for it.

    Where the gate behind the feed-forward wants a gradient (an adapter on the time embedder) its output is wanted too: it is run
    again for that, and its first layer once more in `_FeedForwardAgain`, a sixth of a forward for .6 GiB at 14 B.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """x."""
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:  # type: ignore[override]
        """dy."""
        return dy


class _FeedForwardAgain(torch.autograd.Function):
    """A feed-forward whose backward runs it once more, piece by piece: the hidden activations of one piece are alive at a time.

    Called with the input as `_Kept` gave it, that one's node, the block, its `kernels`, what makes the context to run it again
    in, and the weights that train.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, node: Any, block: Block, kernels: str, again: Callable[[], AbstractContextManager[Any]], *w: Tensor
    ) -> Tensor:
        """The feed-forward of x [B, L, D]."""
        ctx.node, ctx.block, ctx.kernels, ctx.again = node, block, kernels, again
        return block.pieces(x.detach(), kernels)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """By x, in place of what the checkpoint made again, and by the weights. Two hidden tensors of a piece are alive."""
        widen, narrow = ctx.block.ffn.net[0].proj, ctx.block.ffn.net[2]
        trained = [weight for weight in ctx.block.ffn.parameters() if weight.requires_grad]
        x, sums = ctx.node.saved_tensors[0].contiguous(), dict[int, Tensor]()
        with ctx.again(), gathered(), torch.no_grad():
            for piece, d_out in zip(*(t.flatten(0, 1).split(ROWS) for t in (x, dy)), strict=True):
                leaf = piece.detach().requires_grad_()
                with torch.enable_grad():
                    hidden = widen(leaf)
                found = by_weights(narrow, gelu_tanh(hidden.detach(), ctx.kernels), d_out)
                d_hidden = gelu_tanh_backward_(by_input(narrow, d_out), hidden.detach(), ctx.kernels)
                hidden = get_gradient_edge(hidden)
                here, *of_widen = torch.autograd.grad(hidden, [leaf, *trained], d_hidden, allow_unused=True)
                piece.copy_(here)
                found |= {id(weight): g for weight, g in zip(trained, of_widen, strict=True) if g is not None}
                for key, gradient in found.items():
                    sums[key] = sums[key].add_(gradient) if key in sums else gradient
                del hidden, d_hidden, here, of_widen, found
        return x, None, None, None, None, *(sums.get(id(weight)) for weight in trained)


class Block(HeliosTransformerBlock):
    """Self-attention, cross-attention of the target's tokens to the text, feed-forward; each norm fused with what precedes it."""

    def forward(  # type: ignore[override]
        self,
        x_BLD: Tensor,
        text_BLD: Tensor,
        modulation_BR6D: Tensor,
        table: Tensor,
        split: int,
        kernels: str = "auto",
        again: Callable[[], AbstractContextManager[Any]] | None = None,
    ) -> Tensor:
        """x after the block, [B, L, D]; `text` [B, rows, D]; `modulation` [B, 2, 6, D]; `table` of `kernels.rope`.

        again: makes the context that a recompute needs, where the block is checkpointed; its feed-forward then is, by itself.
        """
        rows = (self.scale_shift_table[:, None] + modulation_BR6D.float()).unbind(2)
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = rows
        # No name for what attention gives: it would stay alive to the end of the block.
        normed = modulated_norm(x_BLD, scale, shift, split, self.norm1.eps, kernels)
        x_BLD, normed = self._before_text(
            x_BLD, self.attn1.processor(self.attn1, normed, None, table, split, kernels), gate, split, kernels
        )
        x_BLD, normed = gated_residual_modulated_norm(
            x_BLD,
            self.attn2.processor(self.attn2, normed, text_BLD, kernels=kernels),
            None,
            ffn_scale,
            ffn_shift,
            split,
            self.norm3.eps,
            kernels,
        )
        return gated_residual(x_BLD, self._feed_forward(normed, kernels, again), ffn_gate, split, kernels)

    def _feed_forward(self, normed_BLD: Tensor, kernels: str, again: Callable[[], AbstractContextManager[Any]] | None) -> Tensor:
        if again is None or not (torch.is_grad_enabled() and normed_BLD.requires_grad) or torch.compiler.is_compiling():
            return self.pieces(normed_BLD, kernels)
        kept = _Kept.apply(normed_BLD)
        weights = [now(weight) for weight in self.ffn.parameters() if weight.requires_grad]
        return _FeedForwardAgain.apply(kept, kept.grad_fn, self, kernels, again, *weights)  # type: ignore[no-any-return]

    def pieces(self, normed_BLD: Tensor, kernels: str) -> Tensor:
        """The feed-forward, piece by piece: in backward the hidden gradients of one piece are alive at a time."""
        widen, narrow = self.ffn.net[0].proj, self.ffn.net[2]
        pieces = [narrow(gelu_tanh(widen(piece), kernels)) for piece in normed_BLD.flatten(0, 1).split(ROWS)]
        return (torch.cat(pieces) if len(pieces) > 1 else pieces[0]).view_as(normed_BLD)

    def _before_text(self, x_BLD: Tensor, attended: Tensor, gate: Tensor, split: int, kernels: str) -> tuple[Tensor, Tensor]:
        """x after self-attention, and what of it reads the text, normed: the target, or all without guidance_cross_attn."""
        affine = getattr(self.norm2, "weight", None)
        if affine is not None and self.guidance_cross_attn:
            return gated_residual_layer_norm(x_BLD, attended, gate, affine, self.norm2.bias, split, self.norm2.eps, kernels)
        x_BLD = gated_residual(x_BLD, attended, gate, split, kernels)
        reading = x_BLD[:, split:] if self.guidance_cross_attn else x_BLD
        return x_BLD, reading if affine is None else layer_norm(reading, affine, self.norm2.bias, self.norm2.eps, kernels)
