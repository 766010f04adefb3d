"""logger=wandb: a run's place at Weights & Biases, the same however often the run is killed and resumed."""

from __future__ import annotations

import json
import netrc
import os
import secrets
import struct
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import wandb
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from wandb.proto import wandb_internal_pb2

from helios_train.callbacks.metrics_csv import read_rows
from helios_train.errors import InputError, Preempted
from helios_train.run import RunFolder, write

HEADER, BLOCK, RECORD = b":W&B\xe1\xbe\x00", 32768, struct.Struct("<IHB")  # of W&B's files: LevelDB's log format
WHOLE, LAST = 1, 4  # kinds of a piece that end a record
NO_KEY = "there is no key: set WANDB_API_KEY, or run `wandb login`, or choose logger.mode=offline"


class WandbRun(WandbLogger):
    """One W&B run for one run folder, with one row an iteration: W&B's step is the iteration.

    After a kill, iterations between the last checkpoint and the kill are done again, bit for bit, and W&B has some of their
    rows: which ones only W&B knows, whose own process writes its file every few seconds and dies with what it had not
    written. So nothing is noted down on the way. A resumed run reads what there is, offline from W&B's files in the run
    folder, online from the server; leaves out the iterations that are there; and sends again, out of metrics.csv and videos/,
    the rows up to its checkpoint that are not. wandb.json keeps the id, and how far a run that ended in order had come.
    """

    def __init__(self, folder: RunFolder, resumed_at: int, mode: str, config: Mapping[str, Any], **place: Any):
        """`resumed_at`: the iteration gone on from. `mode`: auto, online or offline. `place`: project, entity, group, tags, name.

        InputError where W&B is to be reached and there is no key; nothing is sent before the first row.
        """
        self.folder, self.resumed_at, self.mode = folder, resumed_at, resolve_mode(mode)
        kept: dict[str, Any] = (
            json.loads(folder.wandb.read_text()) if folder.wandb.is_file() else {"id": secrets.token_hex(5), "sent": -1}
        )
        self.run_id = str(kept["id"])
        files = sorted(folder.path.glob(f"wandb/*run-*/run-{self.run_id}.wandb"))
        self.sent = max([int(kept["sent"]), *(last_step(path) for path in files)])
        self._row: dict[str, Any] = {}
        self._step = -1
        self._caught_up = False
        quiet = wandb.Settings(silent=True)
        super().__init__(save_dir=folder.path, id=self.run_id, mode=self.mode, config=dict(config), settings=quiet, **place)
        self._wandb_init.pop("anonymous", None)  # Lightning passes it always, and W&B warns of it

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run, begun when first asked for; InputError where W&B does not let it."""
        if self._experiment is None:
            self._keep()
            try:
                begun = super().experiment
            except wandb.Error as error:
                raise InputError(f"W&B: {error}; try again, or choose logger.mode=offline") from error
            where = begun.url if self.mode == "online" else self.mode
            files = f", id {self.run_id}, files in {begun.settings.sync_dir}" if self.mode == "offline" else ""
            print(f"W&B: {where}{files}", flush=True)
        return self._experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Adds to the row of iteration `step`; `save` sends it, and so does the next iteration's first metric."""
        assert step is not None
        self._catch_up()
        if step != self._step:
            self.save()
        self._step = step
        self._row.update(metrics)

    @rank_zero_only
    def save(self) -> None:
        """Sends the row, unless W&B has that iteration."""
        if self._row and self._step > self.sent:
            self.experiment.log({**self._row, "trainer/global_step": self._step}, step=self._step, commit=True)
            self.sent = self._step
        self._row = {}

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Ends the W&B run as the process will end; an iteration that failed half-way is not sent: it will be done again."""
        if self._experiment is None:
            return
        error = sys.exc_info()[1]
        if status == "success":
            self.save()
        elif isinstance(error, Preempted):
            self._experiment.mark_preempting()
        self._experiment.finish(exit_code=0 if status == "success" else getattr(error, "exit_code", 1))
        self._keep()

    def _catch_up(self) -> None:
        """Sends what a killed run has in its folder and W&B has not."""
        if self._caught_up:
            return
        self._caught_up = True
        run = self.experiment
        if self.mode == "online":
            self.sent = run.starting_step - 1
        rows: dict[int, dict[str, Any]] = {}
        for step, values in read_rows(self.folder.metrics):
            rows.setdefault(step, {}).update(values)
        for facts in self.folder.videos.glob("*.json"):
            step, caption = int(facts.name.partition("_")[0]), json.loads(facts.read_text())["caption"]
            rows.setdefault(step, {})["video"] = [wandb.Video(str(facts.with_suffix(".mp4")), caption=caption)]
        for step in sorted(rows):
            if step <= self.resumed_at:
                self._row, self._step = rows[step], step
                self.save()

    def _keep(self) -> None:
        write(self.folder.wandb, json.dumps({"id": self.run_id, "sent": self.sent}) + "\n")


def resolve_mode(asked: str) -> str:
    """online, offline or disabled: WANDB_MODE where it is set, else `asked`, of which auto is online where there is a key.

    InputError for online without a key, which would ask for one at the terminal.
    """
    mode = os.environ.get("WANDB_MODE") or asked
    mode = {"dryrun": "offline", "run": "online"}.get(mode, mode)  # W&B's old names
    if mode == "auto":
        return "online" if has_key() else "offline"
    if mode not in ("online", "offline", "disabled"):
        raise InputError(f"WANDB_MODE={mode}: must be online, offline or disabled")
    if mode == "online" and not has_key():
        raise InputError(f"W&B is to be online and {NO_KEY}")
    return mode


def has_key() -> bool:
    """Whether W&B will find a key without asking: in the environment, or in the netrc file `wandb login` writes."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        entries = netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        return False
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or wandb.setup().settings.base_url).netloc
    return bool({host, "api.wandb.ai"} & entries.keys())


def last_step(path: Path) -> int:
    """The highest step among the rows of one of W&B's files; -1 where it has none."""
    return max((record.history.step.num for record in records(path) if record.WhichOneof("record_type") == "history"), default=-1)


def records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file, up to where a killed writer left it. InputError for another format."""
    data = path.read_bytes()
    if not data.startswith(HEADER[: len(data)]):
        raise InputError(f"{path}: is no file of a W&B version known here; resume with logger=csv, or install that version")
    at, record = len(HEADER), b""
    while at + RECORD.size <= len(data):
        left = BLOCK - at % BLOCK
        if left < RECORD.size:  # no piece begins in the last bytes of a block
            at += left
            continue
        _, size, kind = RECORD.unpack_from(data, at)
        piece = data[at + RECORD.size : at + RECORD.size + size]
        if len(piece) < size or not kind:
            return
        at += RECORD.size + size
        record += piece
        if kind in (WHOLE, LAST):
            parsed = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
            parsed.ParseFromString(record)
            yield parsed
            record = b""
