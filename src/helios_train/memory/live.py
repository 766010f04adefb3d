"""Counter of live storages: how many bytes are allocated at any time, whose they are, and what went on when they were made.

It watches operators, not an allocator, so a step on fake tensors counts as the real one would: `LiveCounter` sees each tensor
an operator takes or returns and holds its storage by a weak reference, so that a storage leaves the sum when the last tensor,
graph node or Python name lets go of it. Views share a storage and count once.

Not seen: scratch an operator allocates and frees inside itself (cuBLAS, the fold of a convolution), what a wrapper subclass
allocates inside its own dispatch, and memory no tensor owns (the CUDA context, fragmentation). All sizes are bytes.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from helios_train.memory.ledger import BEFORE, NOBODY, OUTSIDE, Cell, Ledger, Report, Stretch
from helios_train.memory.places import DEVICE, HOST, PLACES, Place, label, labelled, placed_here, tensors_of

_PLAIN = frozenset({Tensor, nn.Parameter, FakeTensor})
_SCALAR = 8  # a storage this small follows the others of its operator
_LIFTS = frozenset({torch.ops.aten.lift_fresh.default, torch.ops.aten.lift.default})


class _Watched(weakref.ref[torch.UntypedStorage]):
    """A weak reference to a storage, and what is counted for it."""

    __slots__ = ("cell", "counted", "key", "place", "size")
    key: int  # id of the storage object, which lives as long as the storage
    size: int  # as the storage says
    counted: int  # as the place's allocator says: 0 on meta, rounded up
    place: Place
    cell: Cell


class LiveCounter(TorchDispatchMode):
    """Counts live storages while it is entered, inside any FakeTensorMode (enter that one first).

    `device` is the one whose memory is planned: tensors of another type of device stand on the host, those of its own type
    where `places` says (on fake CPU tensors the place is a label only). `granularity` rounds each storage on the device up,
    512 for CUDA's allocator.
    """

    def __init__(self, device: torch.device | str = "cpu", granularity: int = 1):
        super().__init__()
        self.device, self.granularity = torch.device(device), granularity
        self._watched: dict[int, _Watched] = {}
        self._dead: deque[_Watched] = deque()  # filled from whichever thread frees; emptied before anything is added
        self._ledgers = {place: Ledger(place) for place in PLACES}
        self._owner, self._stack = NOBODY, [Stretch(OUTSIDE)]
        self._timeline: list[Stretch] = []
        self._faked = False

    def __enter__(self) -> Self:
        self._faked = active_fake_mode() is not None
        return super().__enter__()  # type: ignore[no-any-return]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would wrap each dispatch to keep the compiler out, at a third of the cost; nothing here is compiled

    @contextmanager
    def owner(self, owner: str) -> Iterator[None]:
        """What is made inside belongs to `owner`."""
        previous, self._owner = self._owner, owner
        try:
            yield
        finally:
            self._owner = previous

    @contextmanager
    def moment(self, moment: str) -> Iterator[None]:
        """What is made inside was made in `moment`, and its peak is kept. Moments nest: the outer one sees the inner's peak."""
        stretch = Stretch(moment)
        self._turn(lambda: self._stack.append(stretch))
        self._timeline.append(stretch)
        try:
            yield
        finally:
            self._turn(lambda: self._stack[-2].include(self._stack.pop()))

    @contextmanager
    def gradients(self, parameters: Iterable[nn.Parameter], owner: str) -> Iterator[None]:
        """Inside, what a backward leaves in the .grad of these parameters belongs to `owner`."""

        def hook(parameter: Tensor) -> None:
            if parameter.grad is not None:  # an earlier hook may have taken it
                self.claim(parameter.grad, owner)

        handles = [p.register_post_accumulate_grad_hook(hook) for p in parameters if p.requires_grad]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def claim(self, what: Any, owner: str) -> int:
        """Says whose the storages of tensors, modules, and containers of them are, made before or elsewhere; returns their bytes.

        A module's gradients are not its own: claim them by themselves. What was never seen before was made BEFORE. A peak that is
        past keeps the labels of its time.
        """
        self._settle()
        self._faked = active_fake_mode() is not None
        claimed: dict[int, _Watched] = {}
        for tensor in tensors_of(what):
            for plain in _plain(tensor):
                watched = self._see(plain, (owner, BEFORE), hosted=False)
                claimed[watched.key] = watched
        for watched in claimed.values():
            old, watched.cell = watched.cell, (owner, watched.cell[1])
            self._ledgers[watched.place].rename(old, watched.cell, watched.counted)
        return sum(watched.counted for watched in claimed.values())

    def live(self, place: Place = DEVICE) -> int:
        """Bytes of the storages that are alive now."""
        self._settle()
        return self._ledgers[place].live

    def report(self) -> Report:
        """Everything so far; moments still open are in it as they stand."""
        self._turn(lambda: None)
        whole = Stretch(OUTSIDE)
        for stretch in self._stack:
            whole.include(stretch)
        timeline = tuple(stretch.copy() for stretch in self._timeline)
        return Report(whole.copy(), timeline, {place: ledger.live for place, ledger in self._ledgers.items()})

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **kwargs) if kwargs else func(*args)
        self._settle()
        hosted = False
        if func not in _LIFTS:  # their input is a constant on its way into fake mode, gone at once
            hosted = self._inputs(args if not kwargs else (*args, *kwargs.values()))
        cell = (self._owner, self._stack[-1].moment)
        for tensor in _flat((output,)):
            self._see(tensor, cell, hosted)
        return output

    def _inputs(self, args: tuple[Any, ...]) -> bool:
        """Takes note of an operator's inputs; whether all of them stand on the host, and what it makes does therefore too."""
        host = device = False
        for tensor in _flat(args):
            watched = self._see(tensor, (NOBODY, BEFORE), False)
            if watched.size > _SCALAR:
                host, device = host or watched.place == HOST, device or watched.place == DEVICE
        return host and not device

    def _see(self, tensor: Tensor, cell: Cell, hosted: bool) -> _Watched:
        """The record of a tensor's storage, brought up to date, or made: then it is `cell`'s."""
        storage = tensor.untyped_storage()
        watched, size = self._watched.get(id(storage)), storage.nbytes()
        if watched is None or watched() is not storage:  # another thread may free one now, and its id be taken
            watched = _Watched(storage, self._dead.append)
            watched.key, watched.size, watched.counted, watched.cell = id(storage), 0, 0, cell
            watched.place = self._place(tensor, storage, hosted)
            self._watched[watched.key] = watched
        if size != watched.size:  # new, or resized in place
            watched.size = size
            counted = self._rounded(tensor, size, watched.place)
            self._ledgers[watched.place].add(watched.cell, counted - watched.counted)
            watched.counted = counted
        return watched

    def _place(self, tensor: Tensor, storage: torch.UntypedStorage, hosted: bool) -> Place:
        if tensor.device.type != self.device.type:
            return HOST
        if self._faked and not isinstance(tensor, FakeTensor):
            return HOST  # in a fake step only what the host drew (noise, levels) is real
        place = labelled(storage) or placed_here() or (HOST if hosted else DEVICE)
        if place == HOST:
            label(storage, place)
        return place

    def _rounded(self, tensor: Tensor, size: int, place: Place) -> int:
        if tensor.device.type == "meta":
            return 0
        return -(-size // self.granularity) * self.granularity if place == DEVICE else size

    def _settle(self) -> None:
        """Takes freed storages out of the sum."""
        while self._dead:
            watched = self._dead.popleft()
            self._ledgers[watched.place].add(watched.cell, -watched.counted)
            if self._watched.get(watched.key) is watched:
                del self._watched[watched.key]

    def _turn(self, change: Callable[[], object]) -> None:
        """Closes the books of the current stretch, lets `change` the stack, and opens those of what is then current."""
        self._settle()
        for ledger in self._ledgers.values():
            ledger.close(self._stack[-1])
        change()
        for ledger in self._ledgers.values():
            ledger.open(self._stack[-1])


def _flat(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors with a storage of their own among an operator's arguments or results."""
    for value in values:
        if isinstance(value, Tensor):
            if type(value) in _PLAIN:
                yield value
            else:
                yield from _plain(value)
        elif isinstance(value, list | tuple):
            yield from _flat(value)
        elif isinstance(value, dict):
            yield from _flat(value.values())


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor itself, or the ones a wrapper subclass is made of."""
    wrapped: Any = tensor
    if is_traceable_wrapper_subclass(wrapped):
        for name in wrapped.__tensor_flatten__()[0]:
            yield from _plain(getattr(wrapped, name))
    else:
        yield tensor
