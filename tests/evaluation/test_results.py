"""Files of results: totals of the published example as they are written, what has no rating, names of models in one file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from helios_train.errors import InputError
from helios_train.evaluation.ratings import Length
from helios_train.evaluation.results import Mean, labels, write_all, write_merged

from .test_ratings import GOLDEN

PUBLISHED = {name: Mean(mean, 0.0, 2) for name, mean in GOLDEN.items()}


def merged(folder: Path, means: dict[str, Mean], length: Length, strict: bool) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    write_merged(folder, means, length, strict)
    return json.loads((folder / "merged_results.json").read_text())


@pytest.mark.parametrize(("length", "total"), [("long", 8.247), ("short", 7.45)])
def test_the_published_totals_are_written(tmp_path: Path, length: Length, total: float) -> None:
    found = merged(tmp_path, PUBLISHED, length, strict=True)
    summary = found["summary"]
    assert (summary["total_weighted_rating"], found["length"], found["thresholds"]) == (total, length, "published")
    assert [entry["rating"] for entry in summary["non_drifting"].values()] == [9, 3, 10, 8, 7]
    assert [entry["rating"] for entry in summary["drifting"].values()] == ([8, 10, 10, 10] if length == "long" else [])
    reasons = {name: entry["reason"] for name, entry in found["not_rated"].items()}
    drifts = [name for name in GOLDEN if name.startswith("drifting")]
    assert reasons == ({} if length == "long" else dict.fromkeys(drifts, "has no weight for short videos"))
    mended = merged(tmp_path, PUBLISHED, length, strict=False)
    assert mended["thresholds"] == "mended"
    assert mended["summary"]["total_weighted_rating"] == (7.45 if length == "short" else round(8.247 / 0.996, 4))


def test_what_has_no_rating_is_said_with_its_reason(tmp_path: Path) -> None:
    means = {
        "motion_amplitude": Mean(0.5, 0.0, 3, "motion_magnitude"),
        "semantic": Mean(0.0, 0.0, 3),
        "naturalness": Mean(math.nan, 0.0, 0),
        "motion_smoothness": Mean(0.995, 0.0, 3),
    }
    found = merged(tmp_path, means, "long", strict=True)
    assert list(found["summary"]["non_drifting"]) == ["motion_smoothness"] and found["summary"]["total_weighted_rating"] == 0.3
    assert found["not_rated"]["motion_amplitude"] == {
        "raw_score": 0.5,
        "num_videos": 3,
        "reason": "motion_magnitude is not the published form, which the thresholds are of",
    }
    assert found["not_rated"]["semantic"]["reason"] == "a mean of 0 is left out, as published"
    assert found["not_rated"]["naturalness"] == {"raw_score": None, "num_videos": 0, "reason": "no video has a score"}


def test_models_of_one_base_name_are_told_apart_as_on_a_page(tmp_path: Path) -> None:
    folders = [tmp_path / "a/evaluation", tmp_path / "b/evaluation"]
    for folder in folders:
        merged(folder, PUBLISHED, "long", strict=True)
    (tmp_path / "run").mkdir()
    assert write_all([*folders, tmp_path / "run"], tmp_path) == tmp_path / "all_models_merged.json"
    found = json.loads((tmp_path / "all_models_merged.json").read_text())
    assert found["num_models"] == 2 and found["metrics"] == list(GOLDEN)
    assert found["models"]["a/evaluation"] == found["models"]["b/evaluation"]
    assert found["models"]["a/evaluation"]["total_weighted_rating"] == 8.247
    assert labels(folders) == list(found["models"])
    assert labels([folders[0], folders[0]]) == ["evaluation (1)", "evaluation (2)"] and labels([]) == []
    assert write_all([tmp_path / "run"], tmp_path / "none") is None and not (tmp_path / "none").exists()
    (folders[1] / "merged_results.json").write_text('{"summary": 3}')
    with pytest.raises(InputError, match="b/evaluation/merged_results.json: no results"):
        write_all(folders, tmp_path)
