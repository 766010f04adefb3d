"""What a step will need before it runs: memory by owner and moment, and time, from a step traced on fake tensors.

The step is traced at two small depths and extended: blocks are alike, so every storage count is linear in their number. A plan is
compared with what cards offer, with the CUDA context and fragmentation added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw

from helios_train.memory.ledger import NOBODY, Report, Stretch
from helios_train.memory.places import DEVICE, HOST, PLACES

GIB = 2**30
CONTEXT = 0.6  # GiB of a CUDA context and its libraries
FRAGMENTATION = 0.03  # share of the live bytes that an allocator loses between them
CARDS = {"16 GB": 15.6, "24 GB": 23.5, "48 GB": 47.4, "80 GB": 79.2, "141 GB": 139.8}  # usable GiB
ACTIVATIONS = "activations and temporaries"  # what no one owns
SHOWN = 0.005  # GiB below which a group has no line of its own


@dataclass(frozen=True)
class Costs:
    """What a machine does in a second: floating-point operations at its best, and the share of them a step reaches."""

    peak: float = 989e12
    hfu: float = 0.45


@dataclass(frozen=True)
class Plan:
    """The needs of one iteration. Sizes in GiB; `timeline`: of each moment its name and peak at device and host, in order."""

    peak: float
    moment: str
    groups: Mapping[str, float]
    host: float
    host_groups: Mapping[str, float]
    timeline: Sequence[tuple[str, float, float]]
    flops: Mapping[str, float]
    seconds: float

    @property
    def reserved(self) -> float:
        """What the process will take of a card."""
        return self.peak * (1 + FRAGMENTATION) + CONTEXT

    def summary(self) -> str:
        """One line: the peak, its moment, what is taken of a card and of the host."""
        return (
            f"planned peak {self.peak:.2f} GiB, in {self.moment}; {self.reserved:.2f} with context and fragmentation, "
            f"{self.host:.2f} on the host"
        )

    def fits(self) -> dict[str, bool]:
        """Which cards hold it."""
        return {card: self.reserved <= usable for card, usable in CARDS.items()}

    def record(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "peak_gib": self.peak,
            "moment": self.moment,
            "by_group": dict(self.groups),
            "host_gib": self.host,
            "host_by_group": dict(self.host_groups),
            "reserved_gib": self.reserved,
            "fits": self.fits(),
            "flops": dict(self.flops),
            "seconds": self.seconds,
            "timeline": [list(moment) for moment in self.timeline],
        }

    def text(self) -> str:
        """For people: the peak and its moment, by group, the timeline, cards and time."""
        lines = [f"peak {self.peak:.2f} GiB on the device, in {self.moment}; {self.reserved:.2f} with context and fragmentation"]
        lines += [f"  {group:<28} {size:8.2f}" for group, size in self.groups.items() if size >= SHOWN]
        lines.append(f"host {self.host:.2f} GiB")
        lines += [f"  {group:<28} {size:8.2f}" for group, size in self.host_groups.items() if size >= SHOWN]
        lines.append("fits " + ", ".join(card if fits else f"not {card}" for card, fits in self.fits().items()))
        lines.append("moments in their order, the highest of each")
        highest: dict[str, float] = {}
        for name, device, _ in self.timeline:
            highest[name] = max(highest.get(name, 0.0), device)
        widest = max(highest.values(), default=1.0) or 1.0
        lines += [f"  {name:<28} {size:8.2f} {'#' * round(40 * size / widest)}" for name, size in highest.items()]
        total = sum(self.flops.values())
        lines.append(f"{total / 1e15:.3f} PFLOP an iteration, {self.seconds:.1f} s")
        lines += [f"  {name:<28} {share / 1e15:8.3f}" for name, share in self.flops.items() if share > total / 1000]
        return "\n".join(lines) + "\n"

    def picture(self) -> Image.Image:
        """The timeline: a bar a moment, device above host, the peak marked."""
        width, height, left, base = 1200, 420, 60, 300
        image = Image.new("RGB", (width, height), "white")
        pen = ImageDraw.Draw(image)
        top = max([self.peak, *(max(device, host) for _, device, host in self.timeline)], default=1.0) or 1.0
        step = (width - left - 20) / max(1, len(self.timeline))
        for number, (name, device, host) in enumerate(self.timeline):
            x = left + number * step
            pen.rectangle((x, base - 260 * device / top, x + step, base), fill="#3b6ea5")
            pen.rectangle((x, base + 2, x + step, base + 2 + 60 * host / top), fill="#b0b0b0")
            if name == self.moment and device == self.peak:
                pen.text((min(x, width - 260), base - 260 * device / top - 14), f"{name}: {device:.2f} GiB", fill="black")
        for share in (0.25, 0.5, 0.75, 1.0):
            y = base - 260 * share
            pen.line((left, y, width - 20, y), fill="#d8d8d8")
            pen.text((4, y - 6), f"{share * top:.2f}", fill="black")
        pen.text((left, height - 30), "live storages on the device (GiB, blue) and host (grey), moment by moment", fill="black")
        return image


def planned(stretches: Sequence[Stretch], flops: Mapping[str, float], costs: Costs) -> Plan:
    """A plan of the moments of an iteration, each with what its peak is made of."""
    highest = {place: max(stretches, key=lambda stretch: stretch.peak[place]) for place in PLACES}
    groups = {
        place: {ACTIVATIONS if owner == NOBODY else owner: size / GIB for owner, size in stretch.owners(place).items()}
        for place, stretch in highest.items()
    }
    return Plan(
        peak=highest[DEVICE].peak[DEVICE] / GIB,
        moment=highest[DEVICE].moment,
        groups=groups[DEVICE],
        host=highest[HOST].peak[HOST] / GIB,
        host_groups=groups[HOST],
        timeline=[(s.moment, s.peak[DEVICE] / GIB, s.peak[HOST] / GIB) for s in stretches],
        flops=dict(flops),
        seconds=sum(flops.values()) / (costs.peak * costs.hfu),
    )


def moments(report: Report) -> list[Stretch]:
    """The moments of a report in their order, and what lay between them as one more, if that is higher than all."""
    inside = max((stretch.peak[DEVICE] for stretch in report.timeline), default=0)
    return [*report.timeline, *([report.whole] if report.whole.peak[DEVICE] > inside else [])]


def extended(shallow: Sequence[Stretch], deep: Sequence[Stretch], depths: tuple[int, int], depth: int) -> list[Stretch]:
    """The moments at `depth` blocks, from those at two smaller depths: each part of each peak grows linearly.

    ValueError where the two traces do not have the same moments.
    """
    if [stretch.moment for stretch in shallow] != [stretch.moment for stretch in deep]:
        raise ValueError(f"traces of {depths[0]} and {depths[1]} blocks have other moments; plan all of them (plan.exact=true)")
    times = (depth - depths[0]) / (depths[1] - depths[0])
    return [_extended(one, other, times) for one, other in zip(shallow, deep, strict=True)]


def _extended(one: Stretch, other: Stretch, times: float) -> Stretch:
    stretch = Stretch(one.moment)
    for place in PLACES:
        cells = {
            cell: _line(one.cells[place].get(cell, 0), other.cells[place].get(cell, 0), times)
            for cell in one.cells[place].keys() | other.cells[place].keys()
        }
        stretch.cells[place] = {cell: size for cell, size in cells.items() if size}
        stretch.peak[place] = _line(one.peak[place], other.peak[place], times)
    return stretch


def _line(one: int, other: int, times: float) -> int:
    return max(0, round(one + times * (other - one)))


def extended_flops(one: Mapping[str, float], other: Mapping[str, float], depths: tuple[int, int], depth: int) -> dict[str, float]:
    """FLOPs at `depth` blocks, likewise."""
    times = (depth - depths[0]) / (depths[1] - depths[0])
    return {name: one.get(name, 0.0) + times * (other[name] - one.get(name, 0.0)) for name in other}
