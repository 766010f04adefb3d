"""Videos and validation while a run trains: when they come, of what, and that the run does not notice."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch

from helios_train.callbacks.metrics_csv import read_rows
from helios_train.callbacks.videos import Clip, Videos
from helios_train.errors import InputError
from helios_train.models.checkpoint import read
from helios_train.run import RunFolder
from helios_train.sampling.pipeline import SamplerSettings
from helios_train.stages.stage import Stage
from helios_train.tasks import watching

RUN = ("stage.ema.decay=0.9", "trainer.max_steps=5", "checkpoint.every=5", "seed=3")
WATCHED = ("watch.sample=true", "watch.sample_every=2", "watch.every=1", "watch.quantiles=3")


def assert_same(one: Any, other: Any, where: str = "") -> None:
    """Bit equality of two nests of tensors and plain Python."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for number, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{where}[{number}]")
    else:
        assert one == other, where


def state(stage: Stage) -> dict[str, Any]:
    """Everything a video might disturb: weights, gradients, modes, and the global generators."""
    kind, keys, *rest = np.random.get_state()
    return {
        "weights": {name: value.clone() for name, value in stage.transformer.state_dict().items()},
        "masters": {name: value.clone() for name, value in stage.masters.state_dict().items()},
        "gradients": [master.grad is None for master in stage.masters],
        "requires": [parameter.requires_grad for parameter in stage.transformer.parameters()],
        "modes": [module.training for module in stage.transformer.modules()],
        "random": [torch.get_rng_state(), kind, keys.tolist(), rest, random.getstate(), torch.is_grad_enabled()],
    }


def test_a_run_with_videos_and_without_is_bit_equal(
    tiny_run: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_run(*RUN, f"run_dir={tmp_path / 'plain'}")
    calls = []
    sampling = Videos.on_train_batch_end

    def checked(self: Videos, trainer: Any, module: Stage, *rest: Any) -> None:
        before = state(module)
        sampling(self, trainer, module, *rest)
        assert_same(before, state(module), f"iteration {trainer.global_step}")
        calls.append(trainer.global_step)

    monkeypatch.setattr(Videos, "on_train_batch_end", checked)
    # Modes that differ from module to module must come back one by one.
    start = watching.video_sampler

    def mixed(config: Any, folder: RunFolder, transformer: Any, *rest: Any) -> Callable[[int], Clip]:
        transformer.blocks[0].eval()
        return start(config, folder, transformer, *rest)

    monkeypatch.setattr(watching, "video_sampler", mixed)
    tiny_run(*RUN, *WATCHED, f"run_dir={tmp_path / 'watched'}")
    assert calls == [1, 2, 3, 4, 5]
    plain, watched = (read(tmp_path / name / "checkpoints/00000005.ckpt") for name in ("plain", "watched"))
    for key in ("state_dict", "optimizer_states", "callbacks", "counters", "WindowModule", "global_step"):
        assert_same(plain[key], watched[key], key)
    losses = [
        [(step, row["loss"]) for step, row in read_rows(tmp_path / name / "metrics.csv") if "loss" in row]
        for name in ("plain", "watched")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 5
    names = {name for _, row in read_rows(tmp_path / "watched/metrics.csv") for name in row}
    assert {f"held_out/full/quantile_{number}" for number in (1, 2, 3)} <= names and "held_out/full/quantile_4" not in names


def test_videos_come_where_they_are_due_of_a_held_out_clip(tiny_run: Callable[..., None], tmp_path: Path) -> None:
    tiny_run(*RUN, *WATCHED, f"run_dir={tmp_path / 'run'}")
    videos = tmp_path / "run/videos"
    made = sorted(path.name for path in videos.glob("*.mp4"))
    assert [int(name.partition("_")[0]) for name in made] == [2, 4, 5]
    assert len(list(videos.iterdir())) == 3 * 3  # mp4, contact sheet, facts; nothing unfinished
    facts = [json.loads(path.read_text()) for path in sorted(videos.glob("*.json"))]
    assert len({fact["caption"] for fact in facts}) == 1 and " on a " in facts[0]["caption"]
    assert made[0] == f"00000002_{facts[0]['caption'].replace(' ', '_')}.mp4"
    tiny_run(*RUN, "watch.sample=true", f"run_dir={tmp_path / 'end'}")
    (last,) = (tmp_path / "end/videos").glob("*.mp4")
    assert last.name.startswith("00000005_")
    assert last.read_bytes() == next(videos.glob("00000005_*.mp4")).read_bytes()  # the same noise, whatever came before


def test_the_video_is_that_of_task_sample(tiny_run: Callable[..., None], tmp_path: Path) -> None:
    """Solver, noise and weights are those a user gets who asks for the same caption; its stored embedding is rounded to bf16."""
    tiny_run(*RUN, "watch.sample=true", "watch.sample_steps=5", f"run_dir={tmp_path / 'run'}")
    (watched,) = (tmp_path / "run/videos").glob("*.mp4")
    caption = json.loads(watched.with_suffix(".json").read_text())["caption"]
    plan = f"init={tmp_path / 'run'}", "seed=3", f"sample.prompt={caption}", "sample.sections=1", "sample.steps=5"
    distances = []
    for extra in ((), ("sample.solver=euler",)):
        output = tmp_path / f"samples{len(extra)}"
        tiny_run("task=sample", *plan, *extra, "sample.guidance=3", f"sample.output={output}")
        (sampled,) = output.glob("*.mp4")
        distances.append(np.abs(frames(sampled) - frames(watched)).mean())
    assert distances[0] < 0.1 < 10 * distances[0] < distances[1], distances


def frames(mp4: Path) -> np.ndarray:
    """[F, H, W, 3] as floats."""
    with av.open(str(mp4)) as opened:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in opened.decode(video=0)]).astype(float)


def test_the_average_is_what_is_sampled(tiny_run: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[int, dict[str, torch.Tensor]] = {}

    def sampler(config: Any, folder: RunFolder, transformer: Any, *rest: Any) -> Callable[[int], Clip]:
        def note(iteration: int) -> Clip:
            seen[iteration] = {name: value.detach().clone() for name, value in transformer.named_parameters()}
            return Clip(Path(), Path(), "")

        return note

    monkeypatch.setattr(watching, "video_sampler", sampler)
    tiny_run(*RUN, "watch.sample=true", f"run_dir={tmp_path / 'run'}")
    saved = read(tmp_path / "run/checkpoints/00000005.ckpt")
    (average,) = [state["average"] for state in saved["callbacks"].values() if "average" in state]
    assert seen.keys() == {5}
    for name, value in average.items():
        assert torch.equal(seen[5][name], value), name
    assert any(not torch.equal(seen[5][name], value) for name, value in saved["state_dict"].items())


class Waiting:
    """What Videos asks of a trainer on one of several devices."""

    def __init__(self, step: int):
        self.global_step, self.max_steps, self.loggers = step, 10, [object()]
        self.waited = 0
        self.strategy = SimpleNamespace(barrier=self._barrier)

    def _barrier(self, name: str) -> None:
        self.waited += 1


def test_a_further_device_only_waits_and_only_where_a_video_is_due(tiny_run: Callable[..., None]) -> None:
    stage = Stage.__new__(Stage)
    waited = {}
    for step in range(1, 11):
        trainer: Any = Waiting(step)
        Videos(None, 4, None).on_train_batch_end(trainer, stage, None, None, 0)
        waited[step] = trainer.waited
    assert [step for step, count in waited.items() if count] == [4, 8, 10] and max(waited.values()) == 1


def test_a_codec_without_weights_is_said_before_anything_trains(tiny_run: Callable[..., None], tmp_path: Path) -> None:
    config: Any = SimpleNamespace(watch=None, codec=watching.WanCodec("wan", None))
    with pytest.raises(InputError, match="codec.weights=null.*watch.sample=false"):
        watching.video_sampler(config, RunFolder(tmp_path), None, None, SamplerSettings())  # type: ignore[arg-type]
