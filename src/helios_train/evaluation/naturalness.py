"""Naturalness: a vision-language model is shown frames and says how real they look."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from helios_train.errors import InputError
from helios_train.evaluation.frames import Block, Clip
from helios_train.evaluation.metric import Score, Scorer, VideoMetric
from helios_train.evaluation.windows import strided
from helios_train.run import write

SHOWN_SIDE = 512  # pixels of the longer side of what the judge sees
QUALITY = 95  # of the JPEGs
LOWEST, HIGHEST = 1, 5  # what a judge may say: surely made by a machine, surely filmed
Judge = Callable[[list[bytes]], str]


class Naturalness(VideoMetric):
    """(s - 1) / 4, with s the whole number in the judge's answer, kept within 1 to 5.

    `judge`: JPEGs of at most 16 frames -> its answer. `judge_id` says all that its answer depends on; with a
    `cache` folder an answer is kept under the video's digest and that id, and never asked for again.
    """

    def __init__(self, judge: Judge, judge_id: str = "", cache: Path | None = None, **options: Any):
        super().__init__((judge,), **options)
        self.judge_id, self.cache = judge_id, cache

    def begin(self, clip: Clip) -> Scorer:
        """Keeps the JPEGs of one video."""
        return _Shown(self, clip)

    def ask(self, frames: list[bytes], digest: str) -> str:
        """The judge's answer, from the cache where it is there."""
        path = None if self.cache is None else self.cache / f"{_name(f'{digest} {self.judge_id}')}.json"
        if path is not None and (known := _cached(path, digest, self.judge_id)) is not None:
            return known
        answer = self._nets[0](frames)
        read(answer)  # what says nothing is not kept
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path, json.dumps({"video": digest, "judge": self.judge_id, "answer": answer}) + "\n")
        return answer


def read(answer: str) -> int:
    """The first whole number of an answer, kept within 1 to 5. InputError where there is none."""
    found = re.search(r"-?\d+", answer)
    if found is None:
        raise InputError(f"the judge answered {answer[:80]!r}, which holds no number from {LOWEST} to {HIGHEST}")
    return min(max(int(found[0]), LOWEST), HIGHEST)


def jpeg(frame_HW3: Tensor) -> bytes:
    """A frame uint8 [H, W, 3] as the judge sees it: the longer side brought to 512 by area, smaller ones left as they are."""
    image = Image.fromarray(frame_HW3.numpy())
    scale = SHOWN_SIDE / max(image.size)
    if scale < 1:
        image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.BOX)
    file = io.BytesIO()
    image.save(file, "jpeg", quality=QUALITY)
    return file.getvalue()


class _Shown:
    def __init__(self, metric: Naturalness, clip: Clip):
        self.metric, self.digest, self.wanted = metric, clip.digest, strided(clip.frames)
        self.frames: list[bytes] = []

    def feed(self, block: Block) -> None:
        self.frames += [jpeg(block.pixels[place]) for place in block.places(self.wanted)]

    def end(self) -> Score:
        answer = self.metric.ask(self.frames, self.digest)
        return Score((read(answer) - LOWEST) / (HIGHEST - LOWEST), {"raw_score": answer})


def _cached(path: Path, digest: str, judge_id: str) -> str | None:
    """The answer on disk; None where there is none, or a damaged one."""
    try:
        known = json.loads(path.read_text())
        return str(known["answer"]) if (known["video"], known["judge"]) == (digest, judge_id) else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _name(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:32]
