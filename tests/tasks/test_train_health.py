"""Runs poisoned on purpose, by the real train task at tiny size: which alarm is raised, and when; healthy ones raise none."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor

from helios_train.callbacks.metrics_csv import read_rows
from helios_train.conf import compose
from helios_train.data.toy import ToySpec, render
from helios_train.models.codecs import dct_codec
from helios_train.stages.base import BaseStage
from helios_train.tasks import run_task, sample, train, watching

SECTIONS, SIZE = 4, (64, 64)
VIDEOS = ("watch.sample=true", "watch.sample_every=1", f"watch.sample_sections={SECTIONS}", "watch.sample_steps=1")
QUICK = ("watch.sample_guidance=1", "watch.alarms.start=0", "optimizer.total=9")


def clip() -> np.ndarray:
    """A healthy toy video, as floats [F, H, W, 3], its colours away from black and white."""
    frames = render(0, 0, ToySpec(size=SIZE, sections=SECTIONS))[0]
    return 64 + frames.astype(float) / 2


def number(frames: np.ndarray) -> np.ndarray:
    """Of each frame its section."""
    return (np.arange(len(frames)) // 33)[:, None, None, None]


def grown(*colour: float) -> Callable[[np.ndarray], np.ndarray]:
    """A bias of so many levels more in each section."""
    return lambda frames: frames + number(frames) * np.array(colour)


def frozen(frames: np.ndarray) -> np.ndarray:
    """From the third section on nothing moves."""
    return np.where(number(frames) < 2, frames, frames[66:67])


def cut(frames: np.ndarray) -> np.ndarray:
    """In every other section the left half is lighter and the right half darker."""
    half = np.where(np.arange(SIZE[1]) < SIZE[1] // 2, 60, -60)[None, None, :, None]
    return frames + number(frames) % 2 * half


def tinted(frames: np.ndarray) -> np.ndarray:
    """Paler, with room for blue that grows."""
    return grown(0, 0, 40)(105 + 0.3 * (frames - 128))


POISONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "saturation": lambda frames: frames.mean(axis=3, keepdims=True) + (number(frames) * 22) * np.array([1.0, 0, 0]),
    "border": cut,
    "frozen": frozen,
    "solid": lambda frames: np.full_like(frames, 120),
    "luma": grown(-18, -18, -18),
    "colour": tinted,
    "nan": lambda frames: frames * math.nan,
}


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Given by iteration, what is done to the toy video whose latents stand for those the model would make."""
    plan: dict[int, Callable[[np.ndarray], np.ndarray]] = {}
    now = [0]
    begin = watching.video_sampler

    def sampler(*args: Any) -> Callable[[int], Any]:
        inner = begin(*args)

        def at(iteration: int) -> Any:
            now[0] = iteration
            return inner(iteration)

        return at

    def made(*_: Any) -> Iterator[Tensor]:
        frames = plan.get(now[0], lambda frames: frames)(clip())
        video = torch.from_numpy(frames).float().view(SECTIONS, 33, *SIZE, 3).permute(0, 4, 1, 2, 3) / 127.5 - 1
        yield from dct_codec().encode(video).split(1)

    monkeypatch.setattr(watching, "video_sampler", sampler)
    monkeypatch.setattr(sample, "grown", made)
    return plan.update


def alarms(run: Path) -> list[tuple[int, str, str]]:
    lines = (run / "alarms.jsonl").read_text().splitlines() if (run / "alarms.jsonl").is_file() else []
    return [(row["iteration"], row["alarm"], row["state"]) for row in map(json.loads, lines)]


def column(run: Path, name: str) -> list[tuple[int, float]]:
    return [(step, row[name]) for step, row in read_rows(run / "metrics.csv") if name in row]


def test_each_poison_raises_its_alarm_and_a_healthy_video_ends_it(
    tiny_run: Callable[..., None],
    tmp_path: Path,
    poison: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    known: dict[str, Tensor] = {}

    class Monitor(L.Callback):
        def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            known.update(trainer.callback_metrics)

    watchers = train.watchers
    monkeypatch.setattr(train, "watchers", lambda *args: [*watchers(*args), Monitor()])
    names = list(POISONS)
    poison({iteration: POISONS[name] for iteration, name in enumerate(names, start=2)})
    run = tmp_path / "run"
    tiny_run(*VIDEOS, *QUICK, "trainer.max_steps=9", "checkpoint.every=9", f"run_dir={run}")
    rows = alarms(run)
    on = {iteration: {name for at, name, state in rows if at == iteration and state == "on"} for iteration in range(1, 10)}
    assert on[1] == set() == on[9]
    explained = {"luma": {"border"}, "colour": {"saturation"}}  # light that goes in steps; a tint
    for iteration, name in enumerate(names, start=2):
        assert name in on[iteration] <= {name, *explained.get(name, set())}, (name, rows)
        assert dict(column(run, f"health/alarm/{name}"))[iteration] == 1
        assert dict(column(run, f"health/alarm/{name}"))[1] == 0
    assert {name for _, name, state in rows if state == "off"} == {*names}
    said = capsys.readouterr().out
    assert all(said.count(f"ALARM {name}, iteration {iteration}, video: ") == 1 for iteration, name in enumerate(names, start=2))
    assert len({step for step, _ in column(run, "drift/saturation_slope")}) == 9
    assert {"drift/saturation_slope", "drift/border_ratio", "health/alarm/nan", "toy/found"} <= known.keys()
    assert float(known["health/alarm/saturation"]) == 0
    facts = json.loads(next((run / "videos").glob("00000002_*.json")).read_text())
    assert facts["drift"]["figures"]["drift/saturation_slope"] == dict(column(run, "drift/saturation_slope"))[2]


def test_a_nan_in_the_data_is_told_in_its_iteration(
    tiny_run: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = BaseStage.training_step

    def broken(self: BaseStage, micro_batches: list[Any], batch_idx: int) -> None:
        bad = math.nan if self.iteration == 4 else 1.0
        step(self, [replace(window, target=window.target * bad) for window in micro_batches], batch_idx)

    monkeypatch.setattr(BaseStage, "training_step", broken)
    run = tmp_path / "run"
    tiny_run("trainer.max_steps=9", "watch.every=4", "watch.quantiles=0", "checkpoint.every=9", f"run_dir={run}")
    assert alarms(run) == [(5, "nan", "on"), (8, "nan", "off")]
    assert column(run, "health/alarm/nan") == [(5, 1.0), (8, 0.0)]
    said = capsys.readouterr().out
    assert "ALARM nan, iteration 5: " in said and "loss nan" in said and "samples " in said
    assert dict(column(run, "skipped"))[9] == 1 and math.isfinite(dict(column(run, "loss"))[9])


def test_a_resumed_run_has_every_alarm_once(tiny_run: Callable[..., None], tmp_path: Path, poison: Callable[..., None]) -> None:
    poison({2: POISONS["border"], 3: POISONS["frozen"], 4: POISONS["frozen"]})
    run = tmp_path / "run"
    words = (*VIDEOS, *QUICK, "checkpoint.every=1", "checkpoint.keep=9", f"run_dir={run}")
    tiny_run(*words, "trainer.max_steps=4")
    before = alarms(run)
    assert before == [(2, "border", "on"), (3, "border", "off"), (3, "frozen", "on")]
    for later in ("00000003.ckpt", "00000004.ckpt"):
        (run / "checkpoints" / later).unlink()  # as if it had been killed
    tiny_run(*words, "trainer.max_steps=5", "resume=auto", "watch.alarms.luma=0.07")  # limits may change
    assert alarms(run) == [*before, (5, "frozen", "off")]
    assert [step for step, _ in column(run, "health/alarm/frozen")] == [1, 2, 3, 4, 5]


def test_the_switch(tiny_run: Callable[..., None], tmp_path: Path, poison: Callable[..., None]) -> None:
    poison({1: POISONS["solid"]})
    run = tmp_path / "run"
    tiny_run(*VIDEOS, *QUICK, "trainer.max_steps=1", "watch.alarms.enabled=false", f"run_dir={run}")
    assert alarms(run) == [] and not any("drift" in name or "health" in name for _, row in read_rows(run / "metrics.csv")
                                         for name in row)  # fmt: skip


HEALTHY = ("experiment=toy_base", "trainer.max_steps=150", "watch.sample_every=50", "watch.every=0", "trainer.progress=false")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_healthy_toy_run_raises_no_alarm(tmp_path: Path, seed: int) -> None:
    words = (*HEALTHY, f"seed={seed}", "data.toy.clips=100", f"data.root={tmp_path}/shards", f"run_dir={tmp_path}/run")
    raw = compose.plain(compose.compose_plain(list(words)))
    run_task(compose.typed(raw), raw)
    assert alarms(tmp_path / "run") == []
    looked = column(tmp_path / "run", "health/alarm/saturation")
    assert [step for step, _ in looked] == [100, 150]


def test_by_default_a_run_is_looked_at_as_often_as_it_is_validated() -> None:
    for words in ([], ["stage=mid"], ["stage=distill"], ["experiment=toy_base"]):
        watch = compose.compose(words).watch
        assert watch.sample and watch.alarms.enabled and 0 < watch.sample_every <= watch.every, words
