"""Naturalness: what a judge is shown, how its answers are read, kept and asked for again; a real server on this machine."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from helios_train.errors import HeliosError, InputError
from helios_train.evaluation.drifting import Drift
from helios_train.evaluation.judge import HttpJudge
from helios_train.evaluation.naturalness import Naturalness, jpeg, read
from helios_train.evaluation.windows import ends


def levels_video(levels: list[int], size: tuple[int, int] = (8, 16)) -> torch.Tensor:
    return torch.tensor(levels, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, *size)


def level(picture: bytes) -> int:
    return round(float(np.asarray(Image.open(io.BytesIO(picture))).mean()))


class Judge:
    """Answers the same, and remembers what it was shown."""

    def __init__(self, answer: str):
        self.answer, self.asked = answer, list[list[bytes]]()

    def __call__(self, frames: list[bytes]) -> str:
        self.asked.append(frames)
        return self.answer


@pytest.mark.parametrize(
    ("answer", "score"), [("1", 0.0), ("2", 0.25), ("5", 1.0), (" Grade: 4.", 0.75), ("7", 1.0), ("0", 0.0), ("-3", 0.0)]
)
def test_answers_become_scores(answer: str, score: float) -> None:
    found = Naturalness(Judge(answer)).score(levels_video([9]))
    assert found.value == score and found.details == {"raw_score": answer}


def test_an_answer_without_a_number_is_refused_and_not_kept(tmp_path: Path) -> None:
    judge = Judge("I cannot say")
    metric = Naturalness(judge, "judge", tmp_path)
    for _ in range(2):
        with pytest.raises(InputError, match="'I cannot say', which holds no number from 1 to 5"):
            metric.score(levels_video([9]))
    assert len(judge.asked) == 2 and not list(tmp_path.iterdir())
    with pytest.raises(InputError):
        read("")


def test_the_judge_sees_sixteen_frames_at_a_stride() -> None:
    judge = Judge("3")
    Naturalness(judge).score(levels_video(list(range(0, 243, 3))))
    shown = [level(picture) for picture in judge.asked[0]]
    assert len(shown) == 16 and np.abs(np.array(shown) - 15 * np.arange(16)).max() <= 2
    drift = Drift(Naturalness(judge), ends).score(levels_video(list(range(0, 243, 3))))
    assert drift.value == 0 and [len(frames) for frames in judge.asked[1:]] == [12, 12]
    assert level(judge.asked[1][0]) == 0 and abs(level(judge.asked[2][-1]) - 240) <= 2


def test_frames_are_shrunk_by_area_and_never_grown() -> None:
    large = torch.zeros(600, 1024, 3, dtype=torch.uint8)
    large[::2] = 200
    image = Image.open(io.BytesIO(jpeg(large)))
    assert image.size == (512, 300) and np.abs(np.asarray(image).astype(int) - 100).max() <= 2
    assert Image.open(io.BytesIO(jpeg(large[:8, :16]))).size == (16, 8)


def test_answers_are_kept_by_video_and_judge(tmp_path: Path) -> None:
    video, other = levels_video([9, 9]), levels_video([9, 10])
    first = Judge("4")
    assert Naturalness(first, "a", tmp_path).score(video).value == 0.75
    again = Judge("1")
    assert Naturalness(again, "a", tmp_path).score(video).value == 0.75 and not again.asked
    assert Naturalness(again, "b", tmp_path).score(video).value == 0.0
    assert Naturalness(again, "a", tmp_path).score(other).value == 0.0 and len(again.asked) == 2
    for path in tmp_path.iterdir():
        path.write_text("{")
    assert Naturalness(again, "a", tmp_path).score(video).value == 0.0 and len(again.asked) == 3
    drift = Drift(Naturalness(again, "a", tmp_path), ends)
    drift.score(levels_video(list(range(40)))), drift.score(levels_video(list(range(40))))
    assert len(again.asked) == 5  # two windows, once


@pytest.fixture
def server() -> Iterator[Callable[..., tuple[str, list[Any]]]]:
    """Starts a server that gives these (state, body) in turn, the last one for ever; its address, and the requests it got."""
    running: list[HTTPServer] = []

    def start(*answers: tuple[int, str]) -> tuple[str, list[Any]]:
        left, got = list(answers), list[Any]()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                got.append((self.path, self.headers.get("Authorization"), json.loads(body)))
                state, text = left.pop(0) if len(left) > 1 else left[0]
                self.send_response(state)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: object) -> None:
                pass

        running.append(HTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=running[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{running[-1].server_port}/v1", got

    yield start
    for each in running:
        each.shutdown()
        each.server_close()


def said(answer: str) -> tuple[int, str]:
    return 200, json.dumps({"choices": [{"message": {"content": answer}}]})


def test_a_server_is_asked_as_openai_s_is(server: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    url, got = server(said("5"))
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    judge = HttpJudge(url + "/", "some-model")
    assert judge([b"one", b"two"]) == "5" and "secret" not in judge.id and judge.id.startswith("some-model ")
    path, key, body = got[0]
    assert (path, key, body["model"], body["temperature"]) == ("/v1/chat/completions", "Bearer secret", "some-model", 0)
    content = body["messages"][0]["content"]
    assert [part["type"] for part in content] == ["text", "image_url", "image_url"]
    assert content[1]["image_url"]["url"] == "data:image/jpeg;base64,b25l"
    monkeypatch.delenv("OPENAI_API_KEY")
    judge([b"one"])
    assert got[1][1] is None
    assert HttpJudge(url, "some-model", rubric="other").id != judge.id != HttpJudge(url, "other").id


def test_what_may_pass_is_tried_again_with_growing_pauses(server: Callable[..., Any]) -> None:
    pauses: list[float] = []
    url, got = server((503, "busy"), (429, "slower"), (200, "no json"), (200, '{"choices": []}'), said("2"))
    assert HttpJudge(url, "m", attempts=5, sleep=pauses.append)([b""]) == "2"
    assert len(got) == 5 and len(pauses) == 4
    assert all(2**n / 2 <= pause <= 2**n for n, pause in enumerate(pauses))


def test_a_video_that_is_refused_is_bad_and_a_model_that_refuses_all_ends_it(server: Callable[..., Any]) -> None:
    url, got = server((400, "filtered"), said("5"), (400, "filtered"), said("4"))
    judge = HttpJudge(url, "m")
    for asked in (2, 3):  # the first time it is asked about a grey picture too
        with pytest.raises(InputError, match="refuses this video: HTTP 400 filtered"):
            judge([b"violent"])
        assert len(got) == asked
    assert judge([b"mild"]) == "4"
    url, got = server((400, "no such model"))
    with pytest.raises(HeliosError, match="refuses m: HTTP 400 no such model; check") as ended:
        HttpJudge(url, "m")([b""])
    assert not isinstance(ended.value, InputError) and len(got) == 2


def test_what_does_not_pass_ends_it(server: Callable[..., Any]) -> None:
    pauses: list[float] = []
    url, got = server((500, "broken"))
    with pytest.raises(HeliosError, match="no answer in 3 attempts.*HTTP 500 broken.*start again"):
        HttpJudge(url, "m", attempts=3, sleep=pauses.append)([b""])
    assert len(got) == 3 and len(pauses) == 2
    url, got = server((401, "who?"))
    with pytest.raises(HeliosError, match="refuses m: HTTP 401 who\\?; set OPENAI_API_KEY"):
        HttpJudge(url, "m", sleep=pauses.append)([b""])
    assert len(got) == 1
    with pytest.raises(HeliosError, match="no answer in 2 attempts"):
        HttpJudge("http://127.0.0.1:9/v1", "m", attempts=2, sleep=pauses.append)([b""])
