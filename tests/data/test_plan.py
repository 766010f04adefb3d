"""Plans, receipts and locks: what several processes agree by."""

from __future__ import annotations

import dataclasses
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from helios_train.data.format import Bucket, ShardInfo
from helios_train.data.plan import (
    PLAN_PLACE,
    TOO_SHORT,
    Locks,
    Plan,
    PrepareSettings,
    Receipt,
    ShardPlan,
    Skipped,
    read_plan,
    read_receipt,
    refusal,
    write_plan,
    write_receipt,
)
from helios_train.errors import InputError

BUCKET = Bucket(66, 32, 48, n=2)
SHARD = ShardPlan(BUCKET, 3, [[0, 7, 80, 32, 48, 25.0, ["rotated 90"]], [1, 0, 66, 32, 48, 25.0, []]])
PLAN = Plan("identity", (SHARD,), (Skipped("ü.mp4", "unreadable", "is empty"),))


def test_a_plan_comes_back(tmp_path: Path) -> None:
    assert read_plan(tmp_path) is None
    write_plan(tmp_path, PLAN)
    assert read_plan(tmp_path) == PLAN
    for damage in ("", "{", "[]", '{"identity": "x", "shards": [[1, 2]], "skipped": []}'):
        (tmp_path / "prepare" / "plan.json").write_text(damage)
        with pytest.raises(InputError, match="plan.json: not a readable plan .*remove it, and the videos are looked at again"):
            read_plan(tmp_path)


def test_a_receipt_holds_as_long_as_its_files_do(tmp_path: Path) -> None:
    info = ShardInfo("lat/a.tar", 2, 5, "0" * 64, BUCKET.name, "index/a.idx", "1" * 64)
    skipped = (Skipped("b.mp4", "damaged", "is cut short"),)
    receipt = Receipt("identity", info, None, ("mp4",), {"lat/a.tar": 5}, {"missing": 1}, skipped)
    write_receipt(tmp_path, SHARD, receipt)
    assert read_receipt(tmp_path, PLAN, SHARD) is None  # its file is not there
    (tmp_path / "lat").mkdir()
    (tmp_path / "lat" / "a.tar").write_bytes(b"12345")
    assert read_receipt(tmp_path, PLAN, SHARD) == receipt
    assert read_receipt(tmp_path, dataclasses.replace(PLAN, identity="other"), SHARD) is None
    (tmp_path / "lat" / "a.tar").write_bytes(b"1234")
    assert read_receipt(tmp_path, PLAN, SHARD) is None
    nothing = Receipt("identity", None, None, (), {}, {}, skipped)
    write_receipt(tmp_path, SHARD, nothing)
    assert read_receipt(tmp_path, PLAN, SHARD) == nothing


def test_all_that_is_wrong_is_one_sentence() -> None:
    short = [Skipped(f"{i}.mp4", TOO_SHORT, "32 frames") for i in range(9)]
    assert refusal(Path("folder"), short, 20) is None
    bad = [Skipped(f"bad{i}.mp4", "unreadable", "is empty") for i in range(7)]
    assert str(refusal(Path("folder"), short + bad, 20)) == (
        "folder: 7 of 20 videos cannot be used: bad0.mp4: is empty; bad1.mp4: is empty; bad2.mp4: is empty; bad3.mp4: is empty; "
        "bad4.mp4: is empty; and 2 more. Repair or remove them, or leave them out with prepare.bad=skip"
    )


def test_bytes_follow_from_all_settings_but_three() -> None:
    names = {field.name for field in dataclasses.fields(PrepareSettings)}
    assert names - set(PrepareSettings(negative_text="blurred").followed()) == {"part", "bad", "timeout"}


def test_a_dataset_without_a_negative_prompt_is_identified_as_before_there_were_any() -> None:
    assert "negative_text" not in PrepareSettings().followed()


CONTEXT = multiprocessing.get_context("fork")


def _hold(root: Path, place: int, held: Any, go: Any) -> None:
    locks = Locks(root)
    with locks.hold(place) as mine:
        held.put(mine)
        go.wait()


def test_a_lock_is_one_process_s_and_goes_with_it(tmp_path: Path) -> None:
    held, go = CONTEXT.Queue(), CONTEXT.Event()
    process = CONTEXT.Process(target=_hold, args=(tmp_path, PLAN_PLACE + 3, held, go))
    process.start()
    assert held.get(timeout=60)
    locks = Locks(tmp_path)
    with locks.hold(PLAN_PLACE + 3) as mine, locks.hold(PLAN_PLACE + 2) as other:
        assert not mine and other
    process.kill()
    process.join()
    with locks.hold(PLAN_PLACE + 3) as mine:
        assert mine
    locks.close()
