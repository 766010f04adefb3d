"""Inputs of checkpointed blocks wait for the backward on the host.

At 14 B and 384x640 pixels a block's input is 113 MB, of forty blocks 4.2 GiB a pass, of a student's rollout 7. A copy to pinned
memory takes a thirtieth of the block's time, on a stream of its own; on the way back it is one more copy before the recompute.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from helios_train.memory.places import Places


class Offload:
    """Called with a block's input: inside, what autograd saves of that tensor is a copy on the host; everything else stays."""

    def __init__(self, places: Places):
        self.places = places
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, x: Tensor) -> AbstractContextManager[Any]:
        """The hooks around one block's call."""
        own = x.untyped_storage()._cdata

        def _pack(tensor: Tensor) -> Tensor | _Away:
            if tensor.untyped_storage()._cdata != own:
                return tensor
            return self._away(tensor)

        return saved_tensors_hooks(_pack, _back)

    def _away(self, tensor: Tensor) -> _Away:
        if self.places.device.type != "cuda":
            return _Away(self.places.stow(tensor), None, self.places)
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.places.device)
        self._stream.wait_stream(torch.cuda.current_stream(self.places.device))
        with torch.cuda.stream(self._stream):
            copied = self.places.stow(tensor)
            tensor.record_stream(self._stream)  # its memory is free for others once the copy is done
            event = torch.cuda.Event()
            event.record()
        return _Away(copied, event, self.places)


class _Away:
    """A tensor's copy on the host, and the event after which it is whole."""

    def __init__(self, copied: Tensor, done: torch.cuda.Event | None, places: Places):
        self.copied, self.done, self.places = copied, done, places


def _back(kept: Tensor | _Away) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    if kept.done is not None:
        torch.cuda.current_stream(kept.places.device).wait_event(kept.done)
    return kept.places.fetch(kept.copied)
