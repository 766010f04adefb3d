"""Device or host: where a tensor's bytes stand, and the only code that moves weights, their averages and what a step keeps.
(A window and its draws come to the device by a plain `to`.)

With CUDA a place is a device: the GPU, or pinned memory of the host. On a CPU (a plan on fake tensors, a laptop) both are CPU
memory, and the place is a label beside the storage; moving still makes a new storage, so that the two count alike. The label is
given when a storage is made and never changes: bytes do not move, they are copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakIdKeyDictionary

Place = Literal["device", "host"]
DEVICE: Place = "device"
HOST: Place = "host"
PLACES: tuple[Place, Place] = (DEVICE, HOST)
# Tensors that bitsandbytes keeps in attributes of a quantised weight, beside its data.
_ATTACHED = ("quant_state", "state2", "absmax", "code", "offset", "CB", "SCB")

_labels: WeakIdKeyDictionary = WeakIdKeyDictionary()  # storage -> place, for as long as the storage lives
_current: list[Place] = []
What = TypeVar("What", Tensor, nn.Module)


class Places:
    """The two places of one device. Copies are made on the current stream, without autograd."""

    def __init__(self, device: torch.device | str):
        """`device`: the one that computes."""
        self.device = torch.device(device)

    def place_of(self, tensor: Tensor) -> Place:
        """Where the tensor's bytes stand."""
        if tensor.device.type != self.device.type:
            return HOST
        return labelled(tensor.untyped_storage()) or DEVICE

    def empty_like(self, tensor: Tensor, place: Place) -> Tensor:
        """Uninitialised, of the tensor's shape, dtype and layout; on the host of a GPU it is pinned."""
        host = place == HOST and self.device.type == "cuda"
        with placing(place):
            empty = torch.empty_like(tensor.detach(), device="cpu" if host else self.device, pin_memory=host, requires_grad=False)
        label(empty.untyped_storage(), place)
        return empty

    def put(self, what: What, place: Place) -> What:
        """The same on that place: a tensor that is there already, or a copy; a module always itself, its weights moved.

        A module's parameters stay the objects they are, since optimizers, hooks and adapters hold them: their data are swapped,
        and their gradients go along. Hence not between a forward and its backward: the graph would keep the old data.
        """
        if isinstance(what, Tensor):
            return what if self.place_of(what) == place else self._copy(what, place, non_blocking=False)
        self._put_module(what, place)
        return what

    def put_but(self, module: nn.Module, waiting: Iterable[Tensor]) -> None:
        """The module's weights and buffers to the device, but for those `waiting` on the host. They stay the objects they are."""
        stay = {id(tensor) for tensor in waiting}
        for tensor in {id(t): t for t in (*module.parameters(), *module.buffers())}.values():
            if id(tensor) not in stay and self.place_of(tensor) != DEVICE:
                tensor.data = self._copy(tensor.data, DEVICE, non_blocking=False)

    def fetch(self, tensor: Tensor, out: Tensor | None = None) -> Tensor:
        """A copy on the device, into `out` if given. Asynchronous from pinned memory, which must outlive the copy."""
        return self._copy(tensor, DEVICE, non_blocking=True, out=out)

    def stow(self, tensor: Tensor, out: Tensor | None = None) -> Tensor:
        """A copy on the host, into `out` if given. Asynchronous: wait for the stream before reading it on the host."""
        return self._copy(tensor, HOST, non_blocking=True, out=out)

    @torch.no_grad()
    def _copy(self, tensor: Tensor, place: Place, non_blocking: bool, out: Tensor | None = None) -> Tensor:
        if out is None:
            out = self.empty_like(tensor, place)
        elif self.place_of(out) != place:
            raise ValueError(f"the buffer of a copy to the {place} stands on the {self.place_of(out)}")
        return out.copy_(tensor, non_blocking=non_blocking)

    @torch.no_grad()
    def _put_module(self, module: nn.Module, place: Place) -> None:
        # Not module.to: it swaps data as below, but fails in fake mode on a weak reference to the parameter.
        for tensor in {id(t): t for t in (*module.parameters(), *module.buffers())}.values():
            gradient, tensor.grad = tensor.grad, None
            if self.place_of(tensor) != place:
                tensor.data = self._copy(tensor.data, place, non_blocking=False)
            for holder, name, attached in list(_attached(tensor)):
                setattr(holder, name, self.put(attached, place))
            tensor.grad = gradient if gradient is None else self.put(gradient, place)


def read(scalar: Tensor, planned: float) -> float:
    """The value of a scalar tensor, which waits for the device; a plan's tensors have none: there it is `planned`."""
    return planned if isinstance(scalar, FakeTensor) else float(scalar)


def label(storage: torch.UntypedStorage, place: Place) -> None:
    """Says where a storage stands, before it is first counted; unlabelled ones stand on the device."""
    _labels[storage] = place


def labelled(storage: torch.UntypedStorage) -> Place | None:
    """The place a storage was given; None where nobody said."""
    return _labels.get(storage) if _labels.data else None


@contextmanager
def placing(place: Place) -> Iterator[None]:
    """Storages that a counter sees made inside stand at `place`, whatever made them."""
    _current.append(place)
    try:
        yield
    finally:
        _current.pop()


def placed_here() -> Place | None:
    """The place of the innermost `placing`."""
    return _current[-1] if _current else None


def materialise(
    build: Callable[[], nn.Module],
    fake: bool,
    rebuild: Callable[[nn.Module], None] | None = None,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """A module built on meta, given uninitialised storage: fake in the FakeTensorMode that is entered, or real on `device`.

    `rebuild` fills the buffers that are in no state dict, and is needed where there are any. Parameters are new objects, shared
    ones stay shared. ValueError where the mode and `fake` disagree or such buffers are left.
    """
    if fake != (active_fake_mode() is not None):
        raise ValueError(f"materialise with fake={fake} {'outside' if fake else 'inside'} a FakeTensorMode")
    with _disable_current_modes(), torch.device("meta"):
        module = build()
    made: dict[int, Tensor] = {}
    for owner in module.modules():
        for tensors in (owner._parameters, owner._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    empty = torch.empty_like(tensor.detach(), device=device)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
                tensors[name] = made[id(tensor)]  # type: ignore[assignment]
    if rebuild is not None:
        rebuild(module)
        return module
    lost = {name for name, _ in module.named_buffers()} - module.state_dict().keys()
    if lost:
        raise ValueError(f"buffers in no state dict: {', '.join(sorted(lost))}; give `rebuild`")
    return module


def tensors_of(what: Any) -> Iterator[Tensor]:
    """The tensors of tensors, modules and containers of them: weights, buffers, what is attached to them; no gradients."""
    if isinstance(what, Tensor):
        yield what
        yield from (tensor for _, _, tensor in _attached(what))
    elif isinstance(what, nn.Module):
        for tensor in (*what.parameters(), *what.buffers()):
            yield from tensors_of(tensor)
    elif isinstance(what, Mapping):
        for value in what.values():
            yield from tensors_of(value)
    elif isinstance(what, list | tuple | set | frozenset | Iterator):
        for value in what:
            yield from tensors_of(value)


def _attached(holder: Any) -> Iterator[tuple[Any, str, Tensor]]:
    """(object, attribute, tensor) for each tensor that a quantised weight keeps in its attributes."""
    for name in _ATTACHED:
        value = vars(holder).get(name)
        if isinstance(value, Tensor):
            yield holder, name, value
        elif value is not None:
            yield from _attached(value)
