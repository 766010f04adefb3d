"""What a phase of the step does not use waits on the host: the discriminator's heads, the adapters of whoever is idle.

Of four 14 B roles the heads are 1.8 GiB, each adapter 2.3; a switch copies them over the bus once each way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor, nn

from helios_train.memory.places import DEVICE, HOST, Place, Places, tensors_of


class Parking:
    """Groups of weights that are on the device when they are needed.

    The weights stay the Parameters they are; their data are swapped. A group may leave between a forward and its backward: the
    weights of checkpointed blocks are in no graph, and of the few others (embedders, patches) the graph keeps the old data on the
    device, which the new ones equal until the step.
    """

    def __init__(self, places: Places, groups: Mapping[str, Iterable[Tensor | nn.Module]], needs: Mapping[str, Sequence[str]]):
        """groups: weights, and modules that have buffers alone (quantized layers); all go to the host. needs: of whoever
        computes, the groups that must be there. `moved` is told of each group that came or went."""
        self.places, self.groups, self.needs = places, {name: list(weights) for name, weights in groups.items()}, needs
        self.moved: Callable[[str, list[Tensor | nn.Module]], object] = lambda name, weights: None
        self._here = set(self.groups)
        self._frozen: dict[int, Tensor] = {}  # their copies on the host
        for name in self.groups:
            self._move(name, HOST)

    def __call__(self, who: str) -> None:
        """`who` is about to compute: what the others alone need leaves, then what is missing comes."""
        needed = [name for name in self.needs[who] if name in self.groups]
        for name in sorted(self._here - set(needed)):
            self._move(name, HOST)
        for name in needed:
            if name not in self._here:
                self._move(name, DEVICE)

    def waiting(self) -> list[Tensor]:
        """What stands on the host now."""
        groups = [self.groups[name] for name in self.groups.keys() - self._here]
        return [tensor for group in groups for what in group for tensor in tensors_of(what)]

    def _move(self, name: str, place: Place) -> None:
        for what in self.groups[name]:
            if isinstance(what, Tensor):
                self._swap(what, place)
                continue
            for key, buffer in what._buffers.items():
                if buffer is not None and buffer.ndim > 0:
                    what._buffers[key] = self.places.put(buffer, place)
        self._here ^= {name}
        self.moved(name, self.groups[name])

    def _swap(self, weight: Tensor, place: Place) -> None:
        """A frozen weight's copy on the host is kept: it need not be written back."""
        if place == HOST and id(weight) in self._frozen:
            weight.data = self._frozen[id(weight)]
            return
        weight.data = self.places.put(weight.data, place)
        if place == HOST and not weight.requires_grad:
            self._frozen[id(weight)] = weight.data
