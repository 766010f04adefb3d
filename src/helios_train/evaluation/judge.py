"""A judge behind any server that speaks OpenAI's chat completions: plain HTTP, tried again where that may help."""

from __future__ import annotations

import base64
import hashlib
import http.client
import io
import json
import os
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

from PIL import Image

from helios_train.errors import HeliosError, InputError

KEY = "OPENAI_API_KEY"  # environment variable; the only place a key is read from
PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds before the second try, doubled before each further one up to the longest
PASSING = (408, 409, 425, 429, 500, 502, 503, 504, 529)  # HTTP states that may be gone a moment later
ABOUT_CONTENT = (400, 413, 422)  # HTTP states that may be about what is shown: a content filter, too large a question
RUBRIC = (
    "These pictures are frames of one video, in order. Judge from physics, anatomy, texture, light and motion whether the video "
    "was filmed or made by a generative model. Grade it: 1 = certainly generated, 2 = probably generated, 3 = cannot tell, "
    "4 = probably filmed, 5 = certainly filmed. Answer with that one digit and nothing else."
)


class HttpJudge:
    """Shows frames to `model` at `url` (such as https://api.openai.com/v1 or http://localhost:8000/v1) and gives its answer.

    Temperature 0. The key is the environment's OPENAI_API_KEY; without one none is sent, as local servers want it. `attempts`:
    tries in all; `timeout`: seconds one may take. Answers of different models, or to different rubrics, do not compare.
    """

    def __init__(
        self,
        url: str,
        model: str,
        attempts: int = 5,
        timeout: float = 120.0,
        rubric: str = RUBRIC,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self.url, self.model, self.attempts, self.timeout = url.rstrip("/"), model, attempts, timeout
        self.rubric, self.sleep = rubric, sleep
        self._answers = False  # whether it is known to

    @property
    def id(self) -> str:
        """What an answer depends on beside the video: the model, and the rubric's digest."""
        return f"{self.model} {hashlib.sha256(self.rubric.encode()).hexdigest()[:12]}"

    def __call__(self, frames: list[bytes]) -> str:
        """The answer to JPEGs. InputError where the server refuses these alone, HeliosError where it refuses all, or gives none
        after all attempts."""
        for attempt in range(1, self.attempts + 1):
            try:
                answer = self._post(frames)
                self._answers = True
                return answer
            except urllib.error.HTTPError as error:
                reason, wait = f"HTTP {error.code} {_said(error)}", _asked(error)
                if error.code in ABOUT_CONTENT and self._answers_others():
                    raise InputError(f"the judge at {self.url} refuses this video: {reason}") from None
                if error.code not in PASSING:
                    remedy = f"; set {KEY}" if error.code in (401, 403) else "; check evaluate.judge.url and evaluate.judge.model"
                    raise HeliosError(f"the judge at {self.url} refuses {self.model}: {reason}{remedy}") from None
            except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
                reason, wait = f"{type(error).__name__}: {error}", 0.0
            if attempt < self.attempts:
                backoff = min(LONGEST_PAUSE, PAUSE * 2 ** (attempt - 1))
                # Nothing that is computed depends on it: it keeps processes that failed together from coming back together.
                self.sleep(max(wait, backoff * random.SystemRandom().uniform(0.5, 1.0)))
        raise HeliosError(
            f"the judge at {self.url} gave no answer in {self.attempts} attempts ({reason}); what was scored is kept: start "
            "again when it is there, or leave naturalness out of evaluate.metrics"
        )

    def _answers_others(self) -> bool:
        """Whether it is the pictures that it refuses: it has answered before, or answers to a grey one."""
        if not self._answers:
            file = io.BytesIO()
            Image.new("RGB", (64, 64), (128, 128, 128)).save(file, "jpeg")
            try:
                self._post([file.getvalue()])
                self._answers = True
            except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError):
                return False
        return True

    def _post(self, frames: list[bytes]) -> str:
        pictures = [f"data:image/jpeg;base64,{base64.b64encode(frame).decode()}" for frame in frames]
        content: list[dict[str, Any]] = [{"type": "text", "text": self.rubric}]
        content += [{"type": "image_url", "image_url": {"url": picture}} for picture in pictures]
        body = {"model": self.model, "temperature": 0, "messages": [{"role": "user", "content": content}]}
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=self.timeout) as answer:
            return str(json.load(answer)["choices"][0]["message"]["content"])


def _said(error: urllib.error.HTTPError) -> str:
    """What the server says of it, cut to what one line holds."""
    try:
        return " ".join(error.read(500).decode(errors="replace").split())[:200]
    except (OSError, http.client.HTTPException):
        return ""


def _asked(error: urllib.error.HTTPError) -> float:
    """Seconds the server asks to wait."""
    try:
        return min(LONGEST_PAUSE, max(0.0, float(error.headers.get("Retry-After", 0))))
    except ValueError:
        return 0.0
