"""W&B: when it is online, what its files hold, and which rows it still gets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import wandb
from wandb.proto import wandb_internal_pb2

from helios_train.callbacks.metrics_csv import MetricsCsv
from helios_train.callbacks.wandb_run import BLOCK, HEADER, RECORD, WandbRun, has_key, last_step, records, resolve_mode
from helios_train.errors import InputError
from helios_train.run import RunFolder

KEY = "0" * 40


@pytest.fixture(autouse=True)
def _no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def netrc(tmp_path: Path, host: str) -> None:
    path = tmp_path / "netrc"
    path.write_text(f"machine {host} login user password {KEY}\n")
    path.chmod(0o600)


class TestMode:
    def test_auto_is_online_where_there_is_a_key(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert resolve_mode("auto") == "offline"
        netrc(tmp_path, "example.org")
        assert resolve_mode("auto") == "offline"
        netrc(tmp_path, "api.wandb.ai")
        assert resolve_mode("auto") == "online"
        (tmp_path / "netrc").unlink()
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        assert resolve_mode("auto") == "online" and resolve_mode("offline") == "offline"

    def test_a_server_of_ones_own(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        netrc(tmp_path, "wandb.example.org")
        assert not has_key()
        monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
        assert has_key()

    def test_the_environment_wins(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        for value, mode in (("offline", "offline"), ("dryrun", "offline"), ("disabled", "disabled"), ("online", "online")):
            monkeypatch.setenv("WANDB_MODE", value)
            assert resolve_mode("auto") == resolve_mode("online") == mode
        monkeypatch.setenv("WANDB_MODE", "upside-down")
        with pytest.raises(InputError, match="WANDB_MODE=upside-down"):
            resolve_mode("auto")

    def test_online_without_a_key_asks_nobody(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(InputError, match="WANDB_API_KEY.*logger.mode=offline"):
            resolve_mode("online")
        monkeypatch.setenv("WANDB_MODE", "online")
        with pytest.raises(InputError, match="there is no key"):
            resolve_mode("auto")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real file of 300 rows, several blocks long, one record longer than a block."""
    folder = tmp_path_factory.mktemp("file")
    with wandb.init(dir=folder, mode="offline", settings=wandb.Settings(silent=True)) as run:
        run.config["long"] = "x" * (2 * BLOCK)
        for step in range(300):
            run.log({"value": step / 3, "text": "y" * 100}, step=step, commit=True)
    return next(folder.glob("wandb/*run-*/*.wandb"))


class TestFiles:
    def test_every_row_is_read(self, file: Path) -> None:
        assert file.stat().st_size > 4 * BLOCK
        rows = {
            record.history.step.num: {
                (item.key or item.nested_key[0]): json.loads(item.value_json) for item in record.history.item
            }
            for record in records(file)
            if record.WhichOneof("record_type") == "history"
        }
        assert {step: row["value"] for step, row in rows.items()} == {step: step / 3 for step in range(300)}
        assert last_step(file) == 299

    def test_a_file_cut_anywhere_has_a_beginning(self, file: Path, tmp_path: Path) -> None:
        data, cut = file.read_bytes(), tmp_path / "cut.wandb"
        lasts = []
        for size in [0, 3, 7, 9, *range(10, len(data), 3001), BLOCK - 3, BLOCK, BLOCK + 3, 2 * BLOCK + 5]:
            cut.write_bytes(data[:size])
            lasts.append((size, last_step(cut)))
        values = [last for _, last in sorted(lasts)]
        assert values == sorted(values) and values[0] == -1 and 200 < values[-1] < 300

    @pytest.mark.parametrize("left", [0, 1, 6, 7])
    def test_a_record_that_ends_just_before_a_block(self, tmp_path: Path, left: int) -> None:
        """Less than a piece's head is left over as zeros; with 7 bytes left an empty first piece stands there."""
        filler, row = wandb_internal_pb2.Record(), wandb_internal_pb2.Record()  # type: ignore[attr-defined]
        row.history.step.num = 5
        size = BLOCK - len(HEADER) - RECORD.size - left
        filler.output_raw.line = "x" * size
        filler.output_raw.line = "x" * (2 * size - filler.ByteSize())
        assert filler.ByteSize() == size
        last = row.SerializeToString()
        data = HEADER + RECORD.pack(0, size, 1) + filler.SerializeToString()
        if left == RECORD.size:
            data += RECORD.pack(0, 0, 2) + RECORD.pack(0, len(last), 4) + last
        else:
            data += bytes(left) + RECORD.pack(0, len(last), 1) + last
        (tmp_path / "x.wandb").write_bytes(data)
        assert len(list(records(tmp_path / "x.wandb"))) == 2 and last_step(tmp_path / "x.wandb") == 5

    def test_another_format_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "x.wandb").write_bytes(HEADER[:-1] + b"\x07" + b"0" * 100)
        with pytest.raises(InputError, match="x.wandb.*logger=csv"):
            last_step(tmp_path / "x.wandb")


class Served:
    """What an online run answers: `starting_step` is the server's."""

    url = "https://server/run"

    def __init__(self, starting_step: int):
        self.starting_step = starting_step
        self.rows: list[tuple[int, float]] = []
        self.codes: list[int] = []

    def log(self, row: dict[str, Any], step: int, commit: bool) -> None:
        assert commit and row["trainer/global_step"] == step
        self.rows.append((step, row["loss"]))

    def define_metric(self, *args: Any, **kwargs: Any) -> None: ...

    def finish(self, exit_code: int) -> None:
        self.codes.append(exit_code)


def online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, served: Served, resumed_at: int) -> WandbRun:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(wandb, "init", lambda **settings: served)
    folder = RunFolder(tmp_path)
    return WandbRun(folder, resumed_at, "auto", {}, project="p")


def test_online_the_server_says_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    csv = MetricsCsv(tmp_path / "metrics.csv")
    for step in range(1, 8):
        csv.log_metrics({"loss": step / 10}, step)
    (tmp_path / "wandb.json").write_text('{"id": "abc", "sent": 7}')  # to files, in a session that was offline
    MetricsCsv(tmp_path / "metrics.csv", 5)
    served = Served(starting_step=4)
    log = online(tmp_path, monkeypatch, served, 5)
    assert log.run_id == "abc"
    for step in (6, 7):
        log.log_metrics({"loss": step / 10}, step)
        log.save()
    assert served.rows == [(4, 0.4), (5, 0.5), (6, 0.6), (7, 0.7)]
    log.finalize("success")
    assert served.codes == [0] and json.loads((tmp_path / "wandb.json").read_text()) == {"id": "abc", "sent": 7}


def test_metrics_of_an_iteration_are_one_row_and_half_a_row_is_not_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = Served(starting_step=0)
    log = online(tmp_path, monkeypatch, served, 0)
    log.log_metrics({"loss": 1.0}, 1)
    log.log_metrics({"held_out": 2.0}, 1)
    assert served.rows == []
    log.log_metrics({"loss": 3.0}, 2)
    assert served.rows == [(1, 1.0)]
    log.finalize("failed")
    assert served.rows == [(1, 1.0)] and served.codes == [1]


def test_what_wandb_refuses_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(**settings: Any) -> None:
        raise wandb.errors.CommError("no such entity")

    log = online(tmp_path, monkeypatch, Served(0), 0)
    monkeypatch.setattr(wandb, "init", refused)
    with pytest.raises(InputError, match="no such entity.*logger.mode=offline"):
        log.log_metrics({"loss": 1.0}, 1)


def test_a_run_whose_files_were_sent_and_removed_keeps_id_and_place(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    csv = MetricsCsv(folder.metrics)
    first = WandbRun(folder, 0, "offline", {}, project="p")
    for step in range(3):
        csv.log_metrics({"loss": 1.0}, step)
        first.log_metrics({"loss": 1.0}, step)
    first.finalize("success")
    assert [last_step(path) for path in tmp_path.glob("wandb/offline-run-*/*.wandb")] == [2]
    for path in tmp_path.glob("wandb/offline-run-*/*.wandb"):
        path.unlink()
    again = WandbRun(folder, 2, "offline", {}, project="p")
    assert (again.run_id, again.sent) == (first.run_id, 2)
