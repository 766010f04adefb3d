"""Evaluations on a page: a row a metric, what is bad or missing, alone and beside runs, whatever their files hold."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from helios_train.evaluation import report, scores
from helios_train.evaluation.amplitude import MotionAmplitude
from helios_train.evaluation.metric import Score
from helios_train.evaluation.ratings import Length
from helios_train.evaluation.recorded import record
from helios_train.evaluation.results import Failure, Mean, write_merged, write_metric

from . import run_folders
from .test_ratings import GOLDEN
from .test_report import EVIL, Page, assert_closed

SPEED = {"frames_per_second": 19.53, "rating": 7, "warm_up_videos": 1, "per_video_results": []}


def evaluated(folder: Path, length: Length = "long", strict: bool = True, bad: int = 0, **means: float) -> Path:
    """A folder as task=evaluate leaves it, with the published example's means but for those given."""
    folder.mkdir(parents=True)
    (folder / "records").mkdir()
    known = {name: Mean(mean, 0.0, 12) for name, mean in {**GOLDEN, **means}.items() if mean >= 0}
    videos: Any = [SimpleNamespace(id=number, path=Path(f"{number:03d}.mp4"), text="") for number in range(12)]
    for name, mean in known.items():
        failed = [Failure(number, videos[number], "cut") for number in range(bad if name == "semantic" else 0)]
        write_metric(folder, name, [(11, videos[11], Score(mean.value, {}))], failed, mean, worst=True)
    write_merged(folder, known, length, strict)
    return folder


def rows(*folders: Path) -> dict[str, list[scores.Cell]]:
    found = [scores.scores(record(folder)) for folder in folders]
    assert None not in found
    return {name: cells for group in scores.table([one for one in found if one]) for name, cells in group.rows}


def test_scores_of_evaluations_stand_side_by_side(tmp_path: Path) -> None:
    one, other = evaluated(tmp_path / "one"), evaluated(tmp_path / "other", aesthetic=0.61, drifting_semantic=0.031, bad=7)
    (other / "throughput.json").write_text(json.dumps(SPEED))
    page = Page(report.compare([one, other], tmp_path / "compare.html"))
    assert_closed(page)
    for foreign in ("missing, damaged", "metrics.csv", "iterations", "What differs", "Final figures", "environment"):
        assert foreign not in page.text, foreign
    text = page.spaced
    order = ["Scores", "one other", "not drifting", "aesthetic 0.65643 · rating 9 0.61000 · rating 8"]
    order += ["motion amplitude 0.12900 · rating 3", "naturalness 0.50000 · rating 7", "drifting: less is better"]
    order += ["drifting aesthetic 0.02787 · rating 8", "drifting semantic 0.00664 · rating 10 0.03100 · rating 7"]
    order += ["total rating 8.247 ", "throughput, frames/s, not in the total — 19.53 · rating 7", "videos counted 12 12"]
    order += ["bad videos 0 7 000.mp4, 001.mp4, 002.mp4, 003.mp4, 004.mp4 and 2 more", "long long", "published published"]
    main = text[text.index("Scores The mean") :]
    places = [main.index(said) for said in order]
    assert places == sorted(places)
    assert "semantic 0.28176 · rating 8 0.28176 · rating 8 7 bad count as 0" in text and "do not compare" not in text
    found = rows(one, other)
    assert [cell.best for cell in found["aesthetic"]] == [cell.best for cell in found["drifting semantic"]] == [True, False]
    assert [cell.best for cell in found["total rating"]] == [True, False]
    assert not any(cell.best for cell in found["semantic"])
    tiles = {tile.label: tile for tile in scores.tiles(scores.scores(record(other)))}  # type: ignore[arg-type]
    assert (tiles["videos"].value, tiles["videos"].note, tiles["videos"].bad) == ("12", "7 bad", True)
    assert (tiles["throughput"].value, tiles["total rating"].note) == ("19.53", "of 9 of 9 metrics")


def test_what_was_not_measured_or_not_rated_is_said_and_totals_of_other_things_are_not_ranked(tmp_path: Path) -> None:
    one = evaluated(tmp_path / "one", semantic=-1)
    other = evaluated(tmp_path / "other", "short", strict=False)
    found = rows(one, other)
    assert found["semantic"][0] == scores.Cell("—", note="not measured")
    assert found["drifting aesthetic"][1].note == "not rated: has no weight for short videos"
    assert [cell.value for cell in found["not in the total"]] == ["1", "0"] and found["not in the total"][0].note == "semantic"
    assert not any(cell.best for cells in found.values() for cell in cells)
    said = Page(report.compare([one, other], tmp_path / "compare.html")).spaced
    assert "do not compare: they differ in the length of videos, thresholds, the metrics in them" in said


def test_a_form_of_its_own_has_no_rating_and_no_best(tmp_path: Path) -> None:
    one, other = evaluated(tmp_path / "one"), evaluated(tmp_path / "other")
    metric = MotionAmplitude(lambda before, after: before, mode="magnitude")
    means = {name: Mean(mean, 0.0, 12) for name, mean in GOLDEN.items()}
    means["motion_amplitude"] = Mean(2.5, 0.0, 12, metric.variant)
    write_metric(other, "motion_amplitude", [], [], means["motion_amplitude"], worst=True)
    write_merged(other, means, "long", True)
    cells = rows(one, other)["motion amplitude"]
    assert (cells[1].value, cells[1].rating) == ("2.50000", "") and "not the published form" in cells[1].note
    assert not any(cell.best for cell in cells) and cells[0] == replace(cells[0], rating="3", note="")


def test_runs_and_evaluations_are_mixed(tmp_path: Path) -> None:
    run = run_folders.make(tmp_path / "run", moments=())
    other = run_folders.make(tmp_path / "other", moments=(), worse=0.3)
    evaluation = evaluated(tmp_path / "run/evaluation")
    both = evaluated(tmp_path / "both")
    (both / "config.yaml").write_text("seed: 1\n")
    page = Page(report.compare([run, evaluation, other, both], tmp_path / "compare.html"))
    assert_closed(page)
    assert page.charts["full history"] == ["run", "other"]
    text = page.spaced
    assert "key run other both" in text  # an evaluation has no config
    assert "evaluation both not drifting" in text and "both: metrics.csv is not there" in text
    assert "evaluation: " not in text
    page = Page(report.compare([run, evaluation], tmp_path / "compare.html"))
    assert "What differs" not in page.text and "Final figures" in page.text and "missing, damaged" not in page.text


DAMAGED = {
    "{": "merged_results.json is damaged",
    "[]": "merged_results.json is damaged",
    '{"summary": {"non_drifting": 3, "total_weighted_rating": "x"}}': "total rating",
    '{"summary": {"non_drifting": {"semantic": 5, "unknown": {}}, "drifting": {"drifting_semantic": {"raw_score": []}}}}': "",
}


@pytest.mark.parametrize("content", DAMAGED)
def test_damaged_results_leave_the_others(tmp_path: Path, content: str) -> None:
    one, other = evaluated(tmp_path / "one"), evaluated(tmp_path / "other")
    (one / "merged_results.json").write_text(content)
    (one / "semantic_results.json").write_text('{"failed": [3, {}]}')
    (one / "throughput.json").write_text("no json")
    page = Page(report.compare([one, other], tmp_path / "compare.html"))
    assert DAMAGED[content] in page.text and "0.65643 · rating 9" in page.text and "throughput.json is damaged" in page.text
    assert "metrics.csv" not in page.text


def test_an_unfinished_evaluation_is_called_so(tmp_path: Path) -> None:
    one, other = evaluated(tmp_path / "one"), evaluated(tmp_path / "other")
    (one / "merged_results.json").unlink()
    said = Page(report.compare([one, other], tmp_path / "compare.html")).text
    assert "merged_results.json is not there: the evaluation is not finished" in said and "metrics.csv" not in said


def test_text_of_others_is_text(tmp_path: Path) -> None:
    folder = evaluated(tmp_path / EVIL.replace("/", ""))
    merged = json.loads((folder / "merged_results.json").read_text())
    merged |= {"length": EVIL, "thresholds": EVIL, "not_rated": {"semantic": {"raw_score": 1, "reason": EVIL}, EVIL: {}}}
    merged["summary"]["non_drifting"].pop("semantic")
    (folder / "merged_results.json").write_text(json.dumps(merged))
    (folder / "semantic_results.json").write_text(json.dumps({"failed": [{"video_name": EVIL}], "failed_count_as": EVIL}))
    page = Page(report.compare([folder, evaluated(tmp_path / "other")], tmp_path / "compare.html"))
    assert_closed(page)
    assert page.text.count(EVIL) >= 4 and not page.all("img")
