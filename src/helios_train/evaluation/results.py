"""Results in HeliosBench's layout: {metric}_results.json, merged_results.json of a model, all_models_merged.json of several.

Beyond the published keys a metric's file names the videos that have no score (`failed`) and what they count as, and merged
results say what was measured and has no rating (`not_rated`), and why.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from helios_train.errors import InputError
from helios_train.evaluation.metric import Score, VideoMetric
from helios_train.evaluation.ratings import BEST, RULES, Length, ratings, total
from helios_train.evaluation.videos import Video
from helios_train.run import write

MERGED, ALL = "merged_results.json", "all_models_merged.json"
RECORDS, THROUGHPUT = "records", "throughput.json"
PUBLISHED = {"motion_amplitude": "motion_fb"}  # what files call a metric, and its score, where that is not its name
Scored = Sequence[tuple[int, Video, Score]]  # with the video's place in the evaluation


class Failure(NamedTuple):
    """A video without a score: its place in the evaluation, and why."""

    number: int
    video: Video
    reason: str


class Mean(NamedTuple):
    """A metric over all videos: mean, mean with sign, how many are in it; the metric's `variant`, "" for the published form."""

    value: float
    signed: float
    videos: int
    variant: str = ""


def mean_of(metric: VideoMetric, scored: Scored, failed: Sequence[Failure], worst: bool) -> Mean:
    """The mean over scored videos and, with `worst`, over failed ones at the worst score there is; each place counts once."""
    bad = Score(0.0 if metric.higher_is_better else 1.0, {})
    metric.reset()
    metric.add([(number, score) for number, _, score in scored])
    if worst:
        metric.add([(failure.number, bad) for failure in failed])
    count = len({number for number, *_ in scored} | ({failure.number for failure in failed} if worst else set()))
    with torch.no_grad():
        value, signed = (float(metric.compute()), float(metric.signed())) if count else (math.nan, 0.0)
    return Mean(value, signed, count, metric.variant)


def write_metric(folder: Path, name: str, scored: Scored, failed: Sequence[Failure], mean: Mean, worst: bool) -> None:
    """{name}_results.json."""
    drift = RULES[name].drift
    base = name.removeprefix("drifting_")
    said = mean.variant or PUBLISHED.get(name, name)
    score_key = f"drift_{base}_score" if drift else mean.variant or PUBLISHED.get(name, f"{name}_score")
    rows = []
    for _, video, score in scored:
        row: dict[str, Any] = {"id": video.id, "video_name": video.path.name, score_key: score.value}
        row |= {f"{key}_{base}_score" if drift else key: value for key, value in score.details.items()}
        rows.append(row | ({"prompt": video.text} if "semantic" in name else {}))
    content = {
        "metric": said,
        "average_drift_score" if drift else "average_score": _finite(mean.value),
        "num_videos": mean.videos,
        "per_video_results": rows,
        "num_failed": len(failed),
        "failed_count_as": (1.0 if drift else 0.0) if worst else None,
        "failed": [{"id": each.video.id, "video_name": each.video.path.name, "reason": each.reason} for each in failed],
    }
    if drift:
        content["average_signed_drift"] = mean.signed
    _write(folder / f"{name}_results.json", content)


def write_merged(folder: Path, means: Mapping[str, Mean], length: Length, strict_compat: bool) -> dict[str, Any]:
    """merged_results.json; returns its summary."""
    rated = ratings({name: mean.value for name, mean in means.items() if not mean.variant}, length, strict_compat)
    summary: dict[str, Any] = {"non_drifting": {}, "drifting": {}, "total_weighted_rating": total(rated, length, strict_compat)}
    for name, rating in rated.items():
        summary["drifting" if RULES[name].drift else "non_drifting"][name] = {
            "name": name,
            "raw_score": means[name].value,
            "normalized_score": min(max(means[name].value, 0.0), 1.0),
            "rating": rating,
            "num_videos": means[name].videos,
        }
    not_rated = {
        name: {"raw_score": _finite(mean.value), "num_videos": mean.videos, "reason": _unrated(name, mean, length)}
        for name, mean in means.items()
        if name not in rated
    }
    about = {"length": length, "thresholds": "published" if strict_compat else "mended", "not_rated": not_rated}
    _write(folder / MERGED, {"rating_scale": BEST, "summary": summary, "per_video": {}, **about})
    return summary


def _unrated(name: str, mean: Mean, length: Length) -> str:
    if mean.variant:
        return f"{mean.variant} is not the published form, which the thresholds are of"
    if math.isnan(mean.value):
        return "no video has a score"
    if length not in RULES[name].weights:
        return f"has no weight for {length} videos"
    return "a mean of 0 is left out, as published"


def write_all(folders: Sequence[Path], output: Path) -> Path | None:
    """all_models_merged.json in the folder `output`, of those folders that were evaluated, each under its label among all; None
    where none was. InputError where results are damaged."""
    models: dict[str, dict[str, Any]] = {}
    for label, folder in zip(labels(folders), folders, strict=True):
        if not (folder / MERGED).is_file():
            continue
        try:
            summary = json.loads((folder / MERGED).read_text(encoding="utf-8"))["summary"]
            rated = {name: entry["rating"] for kind in ("non_drifting", "drifting") for name, entry in summary[kind].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{folder / MERGED}: no results ({error}); evaluate that model again") from error
        models[label] = rated | {"total_weighted_rating": summary["total_weighted_rating"]}
    if not models:
        return None
    metrics = [name for name in RULES if any(name in rated for rated in models.values())]
    content = {"num_models": len(models), "score_type": "rating", "metrics": metrics, "models": models, "rating_scale": BEST}
    output.mkdir(parents=True, exist_ok=True)
    _write(output / ALL, content)
    return output / ALL


def labels(folders: Sequence[Path]) -> list[str]:
    """Names of folders, with as much of their paths as tells them apart; numbered where that is nothing."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts), default=0) + 1):
        found = ["/".join(part[-depth:]) for part in parts]
        if len(set(found)) == len(found):
            return found
    return [f"{folder.resolve().name} ({number})" for number, folder in enumerate(folders, start=1)]


def _finite(value: float) -> float | None:
    return value if value == value else None


def _write(path: Path, content: Mapping[str, Any]) -> None:
    write(path, json.dumps(content, indent=2) + "\n")
