"""The Helios transformer: diffusers' parameters and names under a forward of our own, and what training asks of it.

diffusers' forward expands the modulation to every token and keeps it in the graph; here it stays two rows a sample, one for the
history (time 0), one for the target (time t). Same weights and inputs, same output.

Axis letters: B batch, C latent channels, T latent frames, H W latent rows and columns, L tokens, D width, R modulation rows.
Tokens run long history, mid, short (the anchor first), target; `split` is where the target begins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from diffusers import HeliosTransformer3DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_helios import pad_for_3d_conv
from diffusers.utils import apply_lora_scale
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from helios_train.history import ANCHOR_INDEX, LONG_INDICES, MID_INDICES, SHORT_INDICES, TARGET_INDICES, History
from helios_train.kernels.modulated_norm import modulated_norm
from helios_train.kernels.rope import rope_table
from helios_train.models.attention import BACKENDS, Attention
from helios_train.models.block import Block

HISTORY_PATCHES = {"patch_short": 1, "patch_mid": 2, "patch_long": 4}  # name -> how often it repeats the target's patch a side
TABLES = 32  # rotary tables kept, one a shape: 11 MB each at full resolution
Indices = Tensor | Sequence[int]
Offset = tuple[int, int] | None
Positions = Literal["own", "matched"]


class Part(NamedTuple):
    """Latents [B, C, T, H, W] that one patch layer turns into tokens, and their frames' positions in time."""

    patch: str
    latents: Tensor
    indices: tuple[int, ...]


class _Samples:
    """Tokens on their way through the blocks: all samples at once where activations are kept, else one by one.

    A sample alone fills a GPU, and those of a batch do not see one another: recomputed one by one, one's activations are alive.
    """

    def __init__(self, x_BLD: Tensor, text_BLD: Tensor, modulation_BR6D: Tensor):
        self._x, self._conditions = [x_BLD], (text_BLD, modulation_BR6D)

    @property
    def tokens(self) -> Tensor:
        """All of them, [B, L, D]."""
        return self.after(0)

    def after(self, split: int) -> Tensor:
        """Those of each sample from `split` on; cut first, so that in backward no sample's gradient keeps another's alive."""
        rows = [row[:, split:] if split else row for row in self._x]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def run(self, block: Callable[..., Tensor], at_once: bool = False) -> None:
        """Through `block(x, text, modulation)`."""
        if at_once:
            self._x = [block(self.tokens, *self._conditions)]
            return
        alone = [condition.split(1) for condition in self._conditions]
        rows = self._x if len(self._x) > 1 else self._x[0].split(1)
        self._x = [block(row, *given) for row, *given in zip(rows, *alone, strict=True)]


class HeliosTransformer(HeliosTransformer3DModel):
    """diffusers' HeliosTransformer3DModel with the calls that objectives, samplers and discriminators share.

    `kernels`: which implementation the row-wise ops run, see `kernels.dispatch`. `compile_repeated_blocks` compiles its blocks.
    `positions`: where the tokens of a target that is smaller than its history are, in rows and columns: counted from 0 on its
    `own` grid, as diffusers' forward has them, or `matched`: the means of the full-size tokens they stand for, as a pooled
    history's tokens have them. Part of the model's config, where it is not `own`: diffusers' class does not know it.
    """

    _repeated_blocks = ("Block",)

    def __init__(self, *args: Any, positions: Positions = "own", **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.kernels = "auto"
        self._every, self._spared = 0, False  # of so many blocks one is checkpointed; 0: none is
        self._again: Callable[[], Callable[[], AbstractContextManager[Any]]] = _plainly  # called with a block
        self._waiting: Callable[[Tensor], AbstractContextManager[Any]] = nullcontext  # keeps a block's input for its recompute
        self._tables: dict[Any, Tensor] = {}
        self.streamed: Any = None  # what brings its blocks to the device, where they come one by one
        for block in self.blocks:
            block.__class__ = Block  # the same parameters, another forward
            for attention in (block.attn1, block.attn2):
                attention.set_processor(Attention())
        self.position(positions)

    @property
    def positions(self) -> Positions:
        """Where the tokens of a small target are: `own` or `matched`."""
        return self.config.get("positions", "own")  # type: ignore[no-any-return]

    def position(self, positions: Positions) -> None:
        """Says where they are from now on; ValueError for anything but `own` and `matched`."""
        if positions not in ("own", "matched"):
            raise ValueError(f"positions {positions!r}: own or matched")
        if positions != self.positions:
            self.register_to_config(positions=positions)
            self._tables.clear()

    def velocity(self, x_t: Tensor, t: Tensor, text: Tensor, history: History, offset: Offset = None) -> Tensor:
        """The velocity at `x_t` [B, C, 9, H, W] and times `t` [B] in [0, 1000], given text [B, rows, dim] and history.

        Shaped like x_t. History enters at time 0. `offset`: row and column, in tokens, at which `x_t`, a crop, begins; without
        one it is the whole frame. Computed in the model's dtype, returned in fp32.
        """
        output, _ = self._run(self._parts(x_t, history), t, text.to(self.proj_out.weight.dtype), offset)
        assert output is not None
        return output.float()

    def features(
        self, x_t: Tensor, t: Tensor, text: Tensor, history: History, blocks: Sequence[int], offset: Offset = None
    ) -> list[Tensor]:
        """The target's tokens [B, L, D] after each of `blocks` (rising), on the way of `velocity`; later blocks do not run."""
        dtype = self.proj_out.weight.dtype
        return self._run(self._parts(x_t, history), t, text.to(dtype), offset, tuple(blocks), to_the_end=False)[1]

    def observe(
        self, x_t: Tensor, t: Tensor, text: Tensor, history: History, blocks: Sequence[int], offset: Offset = None
    ) -> tuple[Tensor, list[Tensor]]:
        """`velocity` and `features` of one pass."""
        dtype = self.proj_out.weight.dtype
        output, features = self._run(self._parts(x_t, history), t, text.to(dtype), offset, tuple(blocks))
        assert output is not None
        return output.float(), features

    def _parts(self, x_t: Tensor, history: History) -> list[Part]:
        dtype = self.proj_out.weight.dtype
        short = torch.cat([history.anchor, history.short], dim=2)
        return [
            Part("patch_long", history.long.to(dtype), LONG_INDICES),
            Part("patch_mid", history.mid.to(dtype), MID_INDICES),
            Part("patch_short", short.to(dtype), (ANCHOR_INDEX, *SHORT_INDICES)),
            Part("patch_embedding", x_t.to(dtype), TARGET_INDICES),
        ]

    @apply_lora_scale("attention_kwargs")
    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        indices_hidden_states: Indices | None = None,
        indices_latents_history_short: Indices | None = None,
        indices_latents_history_mid: Indices | None = None,
        indices_latents_history_long: Indices | None = None,
        latents_history_short: Tensor | None = None,
        latents_history_mid: Tensor | None = None,
        latents_history_long: Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """As diffusers' forward, for its pipelines; frame indices are the same for every sample."""
        given = (
            ("patch_long", latents_history_long, indices_latents_history_long),
            ("patch_mid", latents_history_mid, indices_latents_history_mid),
            ("patch_short", latents_history_short, indices_latents_history_short),
        )
        parts = [Part(name, part, _host(where)) for name, part, where in given if part is not None and where is not None]
        frames = range(hidden_states.shape[2]) if indices_hidden_states is None else indices_hidden_states
        parts.append(Part("patch_embedding", hidden_states, _host(frames)))
        output, _ = self._run(parts, timestep, encoder_hidden_states)
        assert output is not None
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def _run(
        self,
        parts: Sequence[Part],
        timestep: Tensor,
        text: Tensor,
        offset: Offset = None,
        wanted: tuple[int, ...] = (),
        to_the_end: bool = True,
    ) -> tuple[Tensor | None, list[Tensor]]:
        """Output [B, C, T, H, W], None unless `to_the_end`, and the target's tokens after the `wanted` blocks."""
        embedded = [self._embedded(part) for part in parts]
        split = sum(tokens.shape[1] for tokens in embedded[:-1])
        x_BLD = torch.cat(embedded, dim=1)
        table = self._table(parts, offset, x_BLD)
        time_BD, modulation_BR6D, text_BLD = self._conditions(timestep, text, split)
        features: list[Tensor] = []
        blocks = self.blocks if to_the_end else self.blocks[: wanted[-1] + 1]
        samples = _Samples(x_BLD, text_BLD, modulation_BR6D)
        for number, block in enumerate(blocks):
            if self._kept(number, len(blocks), len(x_BLD)):
                samples.run(lambda *given, block=block: block(*given, table, split, self.kernels), at_once=True)
            else:
                samples.run(lambda *given, block=block: self._checkpointed(block, *given, table, split, self.kernels))
            if number in wanted:
                features.append(samples.after(split))
        if not to_the_end:
            return None, features
        return self._unpatched(self._normed_out(samples.after(split), time_BD), parts[-1].latents.shape), features

    def _checkpointed(self, block: Block, x_BLD: Tensor, *given: Any) -> Tensor:
        """The block, of which its input alone is kept. It draws no random numbers, so none are preserved."""
        again = self._again()
        with self._waiting(x_BLD):
            return checkpoint(  # type: ignore[no-any-return]
                block,
                x_BLD,
                *given,
                again,
                use_reentrant=False,
                preserve_rng_state=False,
                context_fn=lambda: (nullcontext(), again()),
            )

    def _kept(self, number: int, count: int, samples: int) -> bool:
        """Whether block `number` of `count` keeps its activations for backward, or needs none."""
        spared = self._spared and number == count - 1 and samples == 1
        return not self._every or number % self._every != 0 or spared or not torch.is_grad_enabled()

    def _embedded(self, part: Part) -> Tensor:
        """Tokens [B, L, D] of one part; history is padded to whole patches by repeating its last frame, row and column."""
        patch = getattr(self, part.patch)
        padded = HISTORY_PATCHES.get(part.patch, 1) > 1
        kernel = getattr(patch, "base_layer", patch).kernel_size  # an adapter on it has none of its own
        latents = pad_for_3d_conv(part.latents, kernel) if padded else part.latents
        return patch(latents).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]

    def _table(self, parts: Sequence[Part], offset: Offset, x_BLD: Tensor) -> Tensor:
        """Cosines and sines of all tokens, fp32 [L, 2K], computed once a shape; a plan's tensors have tables of their own."""
        _, height, width = self.config.patch_size
        grids = [(part.latents.shape[-2] // height, part.latents.shape[-1] // width) for part in parts]
        places = tuple((part.patch, part.indices) for part in parts)
        key = (places, tuple(grids), offset, x_BLD.device, getattr(x_BLD, "fake_mode", None))
        if key in self._tables:
            return self._tables[key]
        tables = []
        for part, (rows, columns) in zip(parts, grids, strict=True):
            indices = torch.tensor(part.indices, device=x_BLD.device)
            pool: Any = HISTORY_PATCHES.get(part.patch, 1)
            if part is parts[-1] and self.positions == "matched" and offset is None:
                scale = grids[0][0] // rows  # a whole frame of fewer tokens than the history's
                rows, columns, pool = rows * scale, columns * scale, (1, scale, scale)
            where = offset if offset and part is parts[-1] else (0, 0)
            tables.append(rope_table(indices, rows, columns, self.config.rope_dim, self.config.rope_theta, pool, where))
        if len(self._tables) >= TABLES:
            self._tables.clear()
        self._tables[key] = torch.cat(tables)
        return self._tables[key]

    def _conditions(self, timestep: Tensor, text: Tensor, split: int) -> tuple[Tensor, Tensor, Tensor]:
        """Time embedding [B, D], modulation [B, 2, 6, D], text [B, rows, D]."""
        time_BD, rows_BD, text_BLD = self.condition_embedder(timestep, text)
        target_B6D = rows_BD.unflatten(-1, (6, -1))
        history_B6D = target_B6D
        if split and self.zero_history_timestep:
            zero = torch.zeros(1, dtype=timestep.dtype, device=timestep.device)
            _, at_zero, _ = self.condition_embedder(zero, text, is_return_encoder_hidden_states=False)
            history_B6D = at_zero.unflatten(-1, (6, -1)).expand_as(target_B6D)
        return time_BD, torch.stack([history_B6D, target_B6D], dim=1), text_BLD

    def _normed_out(self, x_BLD: Tensor, time_BD: Tensor) -> Tensor:
        """The last norm, modulated by the target's time, and the projection to patches."""
        rows_B2D = self.norm_out.scale_shift_table + time_BD[:, None]
        shift, scale = (row[:, None].expand(-1, 2, -1) for row in rows_B2D.unbind(1))
        normed = modulated_norm(x_BLD, scale, shift, 0, self.norm_out.norm.eps, self.kernels)
        return self.proj_out(normed)  # type: ignore[no-any-return]

    def _unpatched(self, tokens_BLD: Tensor, shape: torch.Size) -> Tensor:
        """Tokens, each a patch of C channels last, as latents [B, C, T, H, W]."""
        patch = self.config.patch_size
        grid = [side // step for side, step in zip(shape[2:], patch, strict=True)]
        patches = tokens_BLD.reshape(shape[0], *grid, *patch, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
        return patches.flatten(6, 7).flatten(4, 5).flatten(2, 3).contiguous()  # a pipeline views it as [B, -1]

    def compute_with(self, kernels: str = "auto", attention: str = "sdpa", compiled: bool = False) -> None:
        """The implementation of the row-wise ops (`kernels.dispatch`), the attention (`attention.BACKENDS`), and whether
        torch.compile takes each block. The same numbers up to rounding (sage: 8 bits)."""
        self.kernels = kernels
        for block in self.blocks:
            for layer in (block.attn1, block.attn2):
                layer.processor._attention_backend = BACKENDS[attention]
        if compiled:
            self.compile_repeated_blocks()

    def keep_inputs(self, waiting: Callable[[Tensor], AbstractContextManager[Any]]) -> None:
        """Where the inputs of checkpointed blocks wait: each block runs inside `waiting(its input)`, as `memory.offload` has
        it."""
        self._waiting = waiting

    def checkpoint_blocks(
        self,
        context: Callable[[], Callable[[], AbstractContextManager[Any]]] | None = None,
        every: int = 1,
        spare_last: bool = True,
    ) -> None:
        """Keep only the input of every `every`-th block in the forward and compute that block again in backward.

        `spare_last`: not the last one, whose turn comes first in backward: where that follows at once, it costs no memory and
        saves a recompute (of one sample alone: several keep none); where several graphs wait for it, it costs one block's
        activations a graph. `context`, called as a
        block is called, gives what makes the contexts of its recomputes, for a caller who must restore what they depend on.
        """
        self._again = context or _plainly
        self._every, self._spared = every, spare_last


def _plainly() -> Callable[[], AbstractContextManager[Any]]:
    """Nothing is needed to run a block again."""
    return nullcontext


def _host(indices: Indices | range) -> tuple[int, ...]:
    """Frame indices as numbers; of a tensor [1 or B, T] those of the first sample."""
    if not isinstance(indices, Tensor):
        return tuple(indices)
    return tuple((indices[0] if indices.ndim == 2 else indices).tolist())
