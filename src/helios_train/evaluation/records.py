"""What was found of each video, on disk: a small JSON a video, written whole or not at all, so that a killed evaluation goes on.

A score is known as long as what it was computed with (the file's bytes, the metric's settings, the caption where it is read) is
the same; each metric for itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helios_train.evaluation.metric import Score
from helios_train.evaluation.videos import Video
from helios_train.run import write

READ = 1 << 22  # bytes of a video hashed at a time


@dataclass
class Record:
    """One video: the file's state and sha256, and by metric the key of what it was computed with and the score, or why not."""

    state: list[int]
    digest: str
    scores: dict[str, tuple[str, Score]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def score(self, name: str, made_with: str) -> Score | None:
        """What is known under this key."""
        key, score = self.scores.get(name, ("", None))
        return score if key == made_with else None


class Records:
    """The records of a folder. Different videos may be written by different processes."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def of(self, video: Video) -> Record:
        """What is known of a video; nothing of one whose file has changed, or whose record is damaged."""
        stat = video.path.stat()
        state = [stat.st_size, stat.st_mtime_ns]
        known = self._read(video)
        if known is not None and known.state == state:
            return known
        digest = _digest(video.path)
        if known is not None and known.digest == digest:  # copied or touched
            known.state = state
            return known
        return Record(state, digest)

    def keep(self, video: Video, record: Record) -> None:
        """Writes what is known of a video. InputError where that cannot be done."""
        scores = {
            name: {"made_with": key, "score": score.value, "signed": score.signed, "details": score.details}
            for name, (key, score) in record.scores.items()
        }
        content = {
            "video": video.path.name,
            "state": record.state,
            "sha256": record.digest,
            "metrics": scores,
            "failed": record.failed,
        }
        write(self._path(video), json.dumps(content, indent=1) + "\n")

    def _path(self, video: Video) -> Path:
        return self.folder / f"{video.path.stem}.json"

    def _read(self, video: Video) -> Record | None:
        try:
            content = json.loads(self._path(video).read_text(encoding="utf-8"))
            scores = {
                name: (entry["made_with"], Score(float(entry["score"]), dict(entry["details"]), float(entry["signed"])))
                for name, entry in content["metrics"].items()
            }
            return Record(list(content["state"]), content["sha256"], scores, dict(content["failed"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None


def key(settings: Mapping[str, Any]) -> str:
    """A short digest of what a score is computed with: plain values alone."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(READ):
            digest.update(block)
    return digest.hexdigest()
