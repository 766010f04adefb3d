"""A run folder: where things lie in it, who may write, which of several to go on with.

It holds config.yaml, run_card.txt, environment.json, metrics.csv, report.html, lock, checkpoints/<iteration>.ckpt and
videos/<iteration>_<caption>.mp4; plan.json where the run was planned, alarms.jsonl where its health is watched; with those
loggers wandb.json and wandb/, or tensorboard/.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from helios_train.errors import InputError

CHECKPOINT = re.compile(r"(\d+)\.ckpt")
REMEDIES = {
    errno.ENOSPC: "make room, then go on with resume=auto or the run folder's path",
    errno.EDQUOT: "your quota is used up: make room, then go on with resume=auto or the run folder's path",
    errno.EROFS: "the disk is mounted read-only: choose a run folder on one that can be written",
    errno.EACCES: "give yourself the right to write there, or choose another run_dir",
    errno.EPERM: "give yourself the right to write there, or choose another run_dir",
}
_held: set[int] = set()  # open lock files of this process
_hooked = False


class RunFolder:
    """One run on disk. Paths are attributes; nothing is created by looking."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self._lock: int | None = None

    @classmethod
    def create(cls, path: Path | None, default: Path) -> RunFolder:
        """A new folder: `path`, or else `default`, with _2, _3 ... added while that one exists.

        InputError where `path` already holds a run, or nothing can be written.
        """
        try:
            if path is None:
                folder = cls(make_unique(default))
            else:
                folder = cls(path)
                if folder.config.exists() or folder.newest_checkpoint():
                    raise InputError(f"run_dir={path} already holds a run: go on with resume={path}, or choose another run_dir")
            for part in (folder.checkpoints, folder.videos):
                part.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _cannot("create the run folder", path or default, error) from None
        return folder

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """An existing run; InputError where the folder is none."""
        folder = cls(path)
        if not folder.path.is_dir():
            raise InputError(f"{path}: no such run folder")
        if not folder.config.is_file():
            raise InputError(f"{path}: holds no {folder.config.name}, so it is no run folder")
        return folder

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints, <iteration>.ckpt."""
        return self.path / "checkpoints"

    @property
    def videos(self) -> Path:
        """Folder of the videos sampled while training."""
        return self.path / "videos"

    @property
    def metrics(self) -> Path:
        """CSV file of the metrics, a row each time they are logged."""
        return self.path / "metrics.csv"

    @property
    def alarms(self) -> Path:
        """JSON lines file of the alarms, a row where one begins and where it ends."""
        return self.path / "alarms.jsonl"

    @property
    def wandb(self) -> Path:
        """JSON file of what a resumed W&B run needs; W&B's own files are in the folder wandb beside it."""
        return self.path / "wandb.json"

    @property
    def tensorboard(self) -> Path:
        """Folder of TensorBoard's event files."""
        return self.path / "tensorboard"

    @property
    def card(self) -> Path:
        """Text file of the page printed before iteration 0."""
        return self.path / "run_card.txt"

    @property
    def plan(self) -> Path:
        """JSON file of what the run was planned to need, where it was planned."""
        return self.path / "plan.json"

    @property
    def config(self) -> Path:
        """YAML file of the composed config."""
        return self.path / "config.yaml"

    @property
    def environment(self) -> Path:
        """JSON file of the machine and the versions the run was started with, and gone on with."""
        return self.path / "environment.json"

    @property
    def report(self) -> Path:
        """Page about the run, to be opened in a browser."""
        return self.path / "report.html"

    @property
    def lock_file(self) -> Path:
        """File that is locked while a process writes here; holds its pid."""
        return self.path / "lock"

    def lock(self) -> None:
        """Take the folder for this process until `unlock` or its end, kill -9 included; InputError names who else has it."""
        global _hooked
        if self._lock is not None:
            return
        try:
            handle = os.open(self.lock_file, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise _cannot("lock the run folder", self.path, error) from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        except BlockingIOError:
            pid = os.pread(handle, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(handle)
            raise InputError(f"{self.path}: process {pid} is writing to this run; wait for it or stop it") from None
        except OSError as error:
            os.close(handle)
            raise _cannot("lock the run folder", self.path, error) from None
        self._lock = handle
        _held.add(handle)
        if not _hooked:  # a forked loader worker would keep the lock of a killed parent
            os.register_at_fork(after_in_child=_drop_locks)
            _hooked = True

    def unlock(self) -> None:
        """Give the folder back."""
        if self._lock in _held:
            _held.discard(self._lock)
            os.close(self._lock)
        self._lock = None

    def discard_unbegun(self) -> None:
        """Removes what `create` made, where this process has the lock and the run did not come to write its config."""
        if self._lock is None or self.config.is_file() or self.newest_checkpoint():
            return
        for file in (self.card, self.plan, self.lock_file):
            file.unlink(missing_ok=True)
        for folder in (self.checkpoints, self.videos, self.path):
            with suppress(OSError):  # somebody else's files are in it
                folder.rmdir()

    def locked(self) -> bool:
        """Whether some process, this one included, writes here."""
        try:
            handle = os.open(self.lock_file, os.O_RDONLY)
        except OSError:
            return False
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(handle)
        return False

    def newest_checkpoint(self) -> Path | None:
        """The checkpoint of the highest iteration; unfinished files (*.tmp) do not count."""
        found = self.checkpoints.iterdir() if self.checkpoints.is_dir() else []
        return max((path for path in found if CHECKPOINT.fullmatch(path.name)), key=iteration_of, default=None)

    def check_free(self, size: int) -> None:
        """InputError where the disk has less than `size` bytes free."""
        free = shutil.disk_usage(self.path).free
        if free < size:
            raise InputError(
                f"{self.path}: the run needs {size / 1e9:.1f} GB of disk and {free / 1e9:.1f} GB are free; "
                "make room, choose another run_dir or lower checkpoint.keep"
            )

    def save_config(self, config: Mapping[str, Any]) -> None:
        """Write config.yaml, whole or not at all; plain dicts, lists and scalars."""
        write(self.config, yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True, width=120))

    def load_config(self) -> dict[str, Any]:
        """Read config.yaml; InputError where it is missing or no mapping."""
        try:
            config = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        except OSError as error:
            raise _cannot("read", self.config, error) from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"{self.config}: is damaged ({str(error).splitlines()[0]}); start a new run") from None
        if not isinstance(config, dict):
            raise InputError(f"{self.config}: holds no config; start a new run")
        return config


def write(path: Path, text: str) -> None:
    """Write a small file of a run, whole or not at all; InputError where that cannot be done."""
    unfinished = path.with_name(path.name + ".tmp")
    with writing(path), unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
        unfinished.replace(path)


def append(path: Path, line: str) -> None:
    """Add one line to a file of a run, in one write: others see it whole or not at all; InputError where that cannot be done."""
    with writing(path):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(handle, f"{line}\n".encode())
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Inside, what goes wrong with the disk becomes one InputError about the file `path`, with what to do."""
    try:
        yield
    except OSError as error:
        raise _cannot("write", path, error) from error


def default_folder(stage: str, experiment: str, now: datetime) -> Path:
    """runs/<stage>/<experiment>/<date-time>, relative to the working directory."""
    return Path("runs") / stage / experiment / now.strftime("%Y-%m-%d_%H-%M-%S")


def iteration_of(checkpoint: Path) -> int:
    """The iteration a checkpoint's name says; InputError where it says none."""
    match = CHECKPOINT.fullmatch(checkpoint.name)
    if match is None:
        raise InputError(f"{checkpoint}: is not named like a checkpoint, <iteration>.ckpt")
    return int(match[1])


def find_resumable(parent: Path, same: Callable[[dict[str, Any]], bool], max_steps: int) -> Path | None:
    """The newest run in `parent` that nobody writes to, with a checkpoint before `max_steps`, whose config is the `same`."""
    for folder in map(RunFolder, newest_first(parent)):
        newest = folder.newest_checkpoint()
        if newest is None or iteration_of(newest) >= max_steps or folder.locked():
            continue
        try:
            if same(folder.load_config()):
                return folder.path
        except InputError:  # a damaged run is no reason not to start another
            continue
    return None


def newest_first(parent: Path) -> list[Path]:
    """The folders in `parent`, newest by name: names are dates."""
    folders = (path for path in parent.iterdir() if path.is_dir()) if parent.is_dir() else ()
    return sorted(folders, key=_by_date, reverse=True)


def compare_configs(saved: Mapping[str, Any], current: Mapping[str, Any], allowed: tuple[str, ...]) -> list[str]:
    """Dotted keys that differ or are on one side only, but for the `allowed` keys and what stands below them."""
    before, now = fixed_leaves(saved, allowed), fixed_leaves(current, allowed)
    return sorted(key for key in before | now if (key in before, before.get(key)) != (key in now, now.get(key)))


def fixed_leaves(config: Mapping[str, Any], allowed: tuple[str, ...]) -> dict[str, Any]:
    """The values of a config by dotted key, but for the `allowed` keys and what stands below them."""
    leaves = _leaves(config)
    return {key: value for key, value in leaves if not any(f"{key}.".startswith(f"{prefix}.") for prefix in allowed)}


def _leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", list(value) if isinstance(value, tuple) else value


def make_unique(folder: Path) -> Path:
    """Create `folder`, or the first free of folder_2, folder_3 ...; safe against another process doing the same."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    candidate, number = folder, 1
    while True:
        try:
            candidate.mkdir()
            return candidate
        except FileExistsError:
            number += 1
            candidate = folder.with_name(f"{folder.name}_{number}")


def _by_date(folder: Path) -> list[int | str]:
    """Sort key in which 2 comes before 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", folder.name)]


def _drop_locks() -> None:
    """In a forked child: close its copies of the locks; the parent keeps them."""
    for handle in _held:
        os.close(handle)
    _held.clear()


def _cannot(what: str, where: Path, error: OSError) -> InputError:
    remedy = f"; {REMEDIES[error.errno]}" if error.errno in REMEDIES else ""
    return InputError(f"{where}: cannot {what}: {error.strerror or error}{remedy}")
