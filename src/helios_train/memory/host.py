"""Memory of the host: what this process may still take of it, asked before it is taken."""

from __future__ import annotations

from pathlib import Path

from helios_train.errors import InputError

MEMINFO, GROUP, GROUPS = Path("/proc/meminfo"), Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")  # of Linux


def available() -> int | None:
    """Bytes: the machine's, or its control group's (a container's) where that has fewer; None where nobody says."""
    found = [size for size in (_machine(), _group()) if size is not None]
    return min(found, default=None)


def must_hold(size: int, what: str) -> None:
    """InputError where `what` takes more bytes than are available."""
    there = available()
    if there is not None and size > there:
        raise InputError(
            f"{what} takes {size / 2**30:.1f} GiB of the host's memory, {there / 2**30:.1f} are available; end what else runs "
            "here, or take a machine with more, or a memory= choice that needs less (task=plan plan.all=true tells)"
        )


def _machine() -> int | None:
    for line in _lines(MEMINFO):
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) * 1024
    return None


def _group() -> int | None:
    """What the limit leaves; pages of files that are mapped or cached can be given back, so they do not count."""
    own = next((line[3:] for line in _lines(GROUP) if line.startswith("0::")), None)
    if own is None:
        return None
    folder = GROUPS / own.strip("/")
    limit, taken = _lines(folder / "memory.max"), _lines(folder / "memory.current")
    if not limit or not taken or limit[0] == "max":
        return None
    told = dict(line.partition(" ")[::2] for line in _lines(folder / "memory.stat"))
    cached = sum(int(told.get(name, 0)) for name in ("active_file", "inactive_file"))
    return max(0, int(limit[0]) - int(taken[0]) + cached)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
