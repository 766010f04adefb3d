"""Roles: one frozen transformer computes as student, teacher or critic, by the adapters that are in use during a call.

`Backbone.run` alone decides that, by setting PEFT's layer state: PEFT's own switches (set_adapter, disable_adapter,
enable_adapters) change `requires_grad` besides. A checkpointed block is computed again in backward, when another role may be at
work: `Backbone` hands every checkpoint the role of its forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from helios_train.history import History
from helios_train.models.adapters import NOTHING, Part
from helios_train.models.heads import Heads
from helios_train.models.transformer import HeliosTransformer, Offset

STUDENT, TEACHER, CRITIC = "student", "teacher", "critic"
HEADS = "heads"  # the critic when it judges


class Backbone:
    """One transformer with named adapters on it, of which each call uses some."""

    def __init__(self, transformer: HeliosTransformer, rest: Part = NOTHING):
        """`rest`: the part it plays outside of `run`."""
        self.transformer = transformer
        self._adapted = [module for module in transformer.modules() if isinstance(module, LoraLayer)]
        self._own: dict[str, nn.Module] = {}
        self.part = NOTHING
        self._play(rest)

    @contextmanager
    def run(self, part: Part) -> Iterator[HeliosTransformer]:
        """Inside, the transformer plays that part; afterwards what it played before. No flag of any weight changes."""
        before = self.part
        self._play(part)
        try:
            yield self.transformer
        finally:
            self._play(before)

    def checkpoint_blocks(self, every: int = 1) -> None:
        """As HeliosTransformer.checkpoint_blocks; blocks are computed again in the part of their forward.

        The last block is no exception: several graphs wait for their backward, and each would keep its activations.
        """
        self.transformer.checkpoint_blocks(self._as_now, every, spare_last=False)

    def _as_now(self) -> Callable[[], AbstractContextManager[HeliosTransformer]]:
        return partial(self.run, self.part)

    def _play(self, part: Part) -> None:
        for layer in self._adapted:
            layer._active_adapter = list(part.adapters)
        for name in self.part.layers.keys() - part.layers.keys():
            self._put(name, self._own.pop(name))
        for name, layer in part.layers.items():
            before = self._put(name, layer)
            self._own.setdefault(name, before)
        self.part = part

    def _put(self, name: str, layer: nn.Module) -> nn.Module:
        """Puts a layer in the place of `name`, under the adapters there; returns what was there."""
        owner, _, last = name.rpartition(".")
        place: nn.Module = self.transformer.get_submodule(owner)
        if isinstance(inner := getattr(place, last), LoraLayer):
            place, last = inner, "base_layer"  # type: ignore[assignment]
        before: nn.Module = getattr(place, last)
        setattr(place, last, layer)
        return before


def as_student(transformer: HeliosTransformer, lineage: Part = NOTHING) -> Backbone:
    """The backbone of a student, which is what it plays outside of `run`: its lineage below its own adapter."""
    return Backbone(transformer, Part((*lineage.adapters, STUDENT), lineage.layers))


@dataclass(frozen=True)
class Roles:
    """Who computes with what. Teacher and critic share a backbone; the student has its own, or (shared) the same one.

    present: called with a role (or HEADS) before it computes, brings its weights to the device.
    """

    student: Backbone
    scores: Backbone
    lineage: Part = NOTHING
    present: Callable[[str], None] = lambda who: None

    @property
    def shared(self) -> bool:
        """Whether all roles stand on one frozen base."""
        return self.student is self.scores

    def part(self, role: str) -> Part:
        """The part of a role: the student's lineage below its own adapter, the critic's adapter, or nothing."""
        if role == STUDENT:
            return Part((*self.lineage.adapters, STUDENT), self.lineage.layers)
        return {CRITIC: Part((CRITIC,)), TEACHER: NOTHING}[role]

    def backbone(self, role: str) -> Backbone:
        """The backbone that a role runs on."""
        return self.student if role == STUDENT else self.scores

    def velocity(self, role: str) -> Callable[[Tensor, Tensor, Tensor, History], Tensor]:
        """`velocity(x_t, t, text, history)` of a role; its backward may run while any other is at work."""
        backbone, part = self.backbone(role), self.part(role)

        def _velocity(x_t: Tensor, t: Tensor, text: Tensor, history: History) -> Tensor:
            self.present(role)
            with backbone.run(part) as transformer:
                return transformer.velocity(x_t, t, text, history)

        return _velocity

    def logits(self, role: str, heads: Heads) -> Callable[[Tensor, Tensor, Tensor, History, Offset], Tensor]:
        """`logits(x_t, t, text, history, offset) -> [B, N]` of heads on what a role's network computes of a crop."""
        backbone, part = self.backbone(role), self.part(role)

        def _logits(x_t: Tensor, t: Tensor, text: Tensor, history: History, offset: Offset = None) -> Tensor:
            self.present(HEADS)
            with backbone.run(part) as transformer:
                velocity, tokens = transformer.observe(x_t, t, text, history, heads.blocks, offset)
            return heads(velocity, tokens)  # type: ignore[no-any-return]

        return _logits

    def trainable(self, role: str) -> dict[str, nn.Parameter]:
        """The weights that train in a role, by name: those of its own adapter."""
        named = self.backbone(role).transformer.named_parameters()
        return {name: weight for name, weight in named if weight.requires_grad and f".{role}." in name}
