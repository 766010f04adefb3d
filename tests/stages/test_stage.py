"""What all stages share: the counter, the update that is skipped, what a checkpoint holds."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helios_train.errors import HeliosError
from helios_train.stages.stage import Stage
from helios_train.stages.trainee import LearningRate
from helios_train.tasks import build

Run = Callable[..., None]


def test_the_learning_rate() -> None:
    constant = LearningRate(2.0, "constant", warmup=4, decay=0.5, total=10)
    assert [constant(i) for i in (0, 1, 2, 3, 4, 9, 50)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0]
    linear = LearningRate(2.0, "linear", warmup=0, decay=0.4, total=10)
    assert [linear(i) for i in (0, 5, 6, 7, 8, 9, 10, 11)] == [2.0, 2.0, 2.0, 1.5, 1.0, 0.5, 0.0, 0.0]
    cosine = LearningRate(2.0, "cosine", warmup=0, decay=1.0, total=12)
    for i in range(13):
        assert cosine(i) == pytest.approx(1 + math.cos(math.pi * i / 12), abs=1e-12)
    assert LearningRate(2.0, "linear", decay=0.0, total=10)(9) == 2.0
    both = LearningRate(1.0, "linear", warmup=10, decay=1.0, total=10)
    assert both(4) == pytest.approx(0.5 * 0.6)


class Seen:
    """What the stage is before and after each update of a run; a loss is made NaN at the iterations of `broken`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, broken: tuple[int, ...] = (), infinite: tuple[int, ...] = ()):
        self.before: list[dict[str, Tensor]] = []
        self.after: list[dict[str, Tensor]] = []
        self.flags: list[dict[str, bool]] = []
        self.counted: list[tuple[int, int]] = []
        self.windows: list[int] = []
        self.parts = 0
        update, part, step = Stage.update, Stage.backward_part, build.BaseStage.training_step

        def seen_update(stage: Stage) -> None:
            self.before.append(self.state(stage))
            self.flags.append({name: weight.requires_grad for name, weight in stage.named_parameters()})
            update(stage)
            self.after.append(self.state(stage))
            self.flags.append({name: weight.requires_grad for name, weight in stage.named_parameters()})
            self.counted.append((int(stage.trainer.global_step), stage.skipped))
            self.stage = stage

        def seen_part(stage: Stage, loss: Tensor, sums: Tensor, parts: int) -> None:
            self.parts += 1
            loss = loss * math.nan if stage.iteration in broken else loss
            if stage.iteration in infinite:  # a loss that is finite, with a gradient that is not
                next(iter(stage.masters)).register_hook(lambda gradient: gradient * math.inf)
            part(stage, loss, sums, parts)

        def seen_step(stage: Any, micro_batches: Any, batch_idx: int) -> None:
            assert {window.iteration for window in micro_batches} == {stage.iteration} == {batch_idx}
            self.windows.append(stage.iteration)
            step(stage, micro_batches, batch_idx)

        monkeypatch.setattr(Stage, "update", seen_update)
        monkeypatch.setattr(Stage, "backward_part", seen_part)
        monkeypatch.setattr(build.BaseStage, "training_step", seen_step)

    def state(self, stage: Stage) -> dict[str, Tensor]:
        """Every weight of the module, every master, every moment."""
        state = {f"weight {name}": weight.detach().clone() for name, weight in stage.named_parameters()}
        state |= {f"master {name}": value.clone() for name, value in stage.masters.state_dict().items()}
        optimizer = stage.optimizers().optimizer
        for number, master in enumerate(stage.masters):
            state |= {f"moment {key} {number}": torch.as_tensor(value).clone() for key, value in optimizer.state[master].items()}
        return state


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def leaves(state: Any, name: str = "") -> dict[str, Tensor]:
    """The tensors and numbers of nested dicts."""
    if not isinstance(state, dict):
        return {name: torch.as_tensor(state)}
    return {key: value for child in state for key, value in leaves(state[child], f"{name} {child}").items()}


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_iterations_are_global_steps(tiny_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven iterations of three micro-batches: seven everywhere, and the gradient of the whole batch."""
    seen = Seen(monkeypatch)
    tiny_run(f"run_dir={tmp_path}/a", "data.global_batch=6", "data.micro_batch=2", "trainer.max_steps=7", "checkpoint.keep=9")
    assert seen.windows == list(range(7)) and seen.parts == 21
    assert [count for count, _ in seen.counted] == [1, 2, 3, 4, 5, 6, 7]
    assert sorted(path.name for path in (tmp_path / "a" / "checkpoints").iterdir()) == [f"{i:08d}.ckpt" for i in range(1, 8)]
    for number in range(1, 8):
        content = torch.load(tmp_path / "a" / "checkpoints" / f"{number:08d}.ckpt", weights_only=True)
        assert content["global_step"] == content["WindowModule"]["iteration"] == number
    assert [row["iteration"] for row in rows(tmp_path / "a")] == list("1234567")
    tiny_run(f"run_dir={tmp_path}/b", "data.global_batch=6", "data.micro_batch=6", "trainer.max_steps=2")
    for key in ("gradient_norm", "loss"):
        one, other = (float(rows(tmp_path / name)[0][key]) for name in "ab")
        assert one == pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize(("kind", "dtype"), [("broken", "fp32"), ("broken", "bf16"), ("infinite", "fp32")])
def test_an_update_that_is_not_finite_is_skipped(
    tiny_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, kind: str
) -> None:
    seen = Seen(monkeypatch, **{kind: (2,)})
    steps = 3 if kind == "infinite" else 5  # the hook stays to the end
    tiny_run(f"run_dir={tmp_path}/run", f"trainer.max_steps={steps}", f"model.dtype={dtype}")
    assert seen.counted == [(1, 0), (2, 0), (3, 1), (4, 1), (5, 1)][:steps]
    for number in range(steps):
        assert same(seen.before[number], seen.after[number]) == (number == 2)
    skipped = [row["skipped"] for row in rows(tmp_path / "run")]  # none in the rows of the alarm
    assert [float(value) for value in skipped if value] == [0, 0, 1, 1, 1][:steps]
    content = torch.load(max((tmp_path / "run" / "checkpoints").iterdir()), weights_only=True)
    assert content["counters"] == {"skipped": [1]} and content["global_step"] == steps
    assert all(value.isfinite().all() for value in content["state_dict"].values())


def test_too_many_in_a_row_stop_the_run(tiny_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Seen(monkeypatch, broken=(1, 3, 4, 5, 6))
    with pytest.raises(
        HeliosError, match=r"not finite in 3 iterations in a row; stopped after saving .*00000006\.ckpt"
    ) as caught:
        tiny_run(f"run_dir={tmp_path}/run", "trainer.max_steps=9", "trainer.nonfinite_limit=3", "checkpoint.every=100")
    assert caught.value.exit_code == 1
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["00000006.ckpt"]


def test_what_is_frozen_stays_out(tiny_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_run(f"run_dir={tmp_path}/base")
    seen = Seen(monkeypatch)
    lora = ("stage.trainable=lora", "stage.lora.rank=2", f"init={tmp_path}/base", "stage.ema.decay=0.9")
    tiny_run(f"run_dir={tmp_path}/run", *lora, "memory.checkpointing=true")
    flags = seen.flags
    assert len(flags) == 6 and all(each == flags[0] for each in flags)
    training = {name.removeprefix("transformer.") for name, flag in flags[0].items() if flag}
    assert training and len(training) < len(flags[0])
    content = torch.load(max((tmp_path / "run" / "checkpoints").iterdir()), weights_only=True)
    assert content["state_dict"].keys() == training
    (average,) = [state["average"] for state in content["callbacks"].values() if "average" in state]
    assert average.keys() == training
    (optimizer,) = content["optimizer_states"]
    assert len(optimizer["state"]) == len(training) and "hyper_parameters" not in content
    for name, before in seen.before[0].items():
        moved = not torch.equal(before, seen.after[-1][name])
        assert not moved or name.removeprefix("weight transformer.").removeprefix("master ") in training, name


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_a_resumed_run_is_the_run(tiny_run: Run, tmp_path: Path, optimizer: str) -> None:
    """Weights and moments, bit for bit; the large weights have moments of 8 bits."""
    common = (f"optimizer={optimizer}", "optimizer.warmup=0", "optimizer.total=4", "checkpoint.keep=9")
    tiny_run(f"run_dir={tmp_path}/straight", *common, "trainer.max_steps=4")
    tiny_run(f"run_dir={tmp_path}/halves", *common, "trainer.max_steps=2")
    tiny_run(f"run_dir={tmp_path}/halves", *common, "trainer.max_steps=4", "resume=auto")
    files = [tmp_path / name / "checkpoints" / "00000004.ckpt" for name in ("straight", "halves")]
    straight, halves = (torch.load(file, weights_only=True) for file in files)
    assert same(straight["state_dict"], halves["state_dict"])
    moments = [content["optimizer_states"][0]["state"] for content in (straight, halves)]
    assert moments[0].keys() == moments[1].keys()
    for number, state in moments[0].items():
        assert same(*(leaves(each) for each in (state, moments[1][number])))
    kinds = {value.dtype for state in moments[0].values() for value in leaves(state).values()}
    assert (torch.uint8 in kinds) == (optimizer == "adamw8bit")
    begun = torch.load(tmp_path / "straight" / "checkpoints" / "00000001.ckpt", weights_only=True)["state_dict"]
    assert not same(begun, straight["state_dict"])
