"""metrics.csv: rows as they come, cut at the resumed iteration, whole after a kill."""

from __future__ import annotations

import csv
import math
from pathlib import Path

from helios_train.callbacks.metrics_csv import MetricsCsv


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_new_columns_widen_the_file_and_keep_its_rows(tmp_path: Path) -> None:
    log = MetricsCsv(tmp_path / "metrics.csv")
    log.log_metrics({"loss": 0.1}, step=1)
    log.log_metrics({"held_out": 2.0}, step=1)
    log.log_metrics({"loss": math.nan}, step=2)
    assert rows(tmp_path / "metrics.csv") == [
        {"iteration": "1", "loss": "0.1", "held_out": ""},
        {"iteration": "1", "loss": "", "held_out": "2.0"},
        {"iteration": "2", "loss": "nan", "held_out": ""},
    ]
    assert not list(tmp_path.glob("*.tmp"))


def test_values_survive_to_the_last_bit(tmp_path: Path) -> None:
    value = 0.1 + 0.2
    MetricsCsv(tmp_path / "metrics.csv").log_metrics({"loss": value}, step=1)
    assert float(rows(tmp_path / "metrics.csv")[0]["loss"]) == value


def test_resuming_cuts_what_came_after_and_a_torn_last_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    log = MetricsCsv(path)
    for step in range(1, 6):
        log.log_metrics({"loss": float(step), "lr": 1.0}, step=step)
    with path.open("a") as file:
        file.write("6,6.")  # killed while it wrote
    again = MetricsCsv(path, resumed_at=3)
    again.log_metrics({"loss": 40.0, "lr": 1.0}, step=4)
    assert [(row["iteration"], row["loss"]) for row in rows(path)] == [("1", "1.0"), ("2", "2.0"), ("3", "3.0"), ("4", "40.0")]


def test_a_run_that_starts_over_keeps_no_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    MetricsCsv(path).log_metrics({"held_out": 1.0}, step=0)
    MetricsCsv(path, None).log_metrics({"held_out": 1.0}, step=0)
    assert len(rows(path)) == 1
