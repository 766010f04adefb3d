"""Strictness: what may not be said on the command line, and what the one line of the answer names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from helios_train.conf import compose, schema
from helios_train.errors import ConfigError
from helios_train.tasks import sameness

BAD = {
    "+optimizer.lr=1": "keys cannot be added",
    "+optimizer.new=1": "keys cannot be added",
    "++optimizer.lr=1": "keys cannot be added",
    "~optimizer.lr": "keys cannot be removed",
    "~stage": "keys cannot be removed",
    "optimizer.lrr=1": "optimizer.lrr: no such key; nearest: optimizer.lr",
    "lr=1": "lr: no such key; nearest: optimizer.lr",
    "optimizer.learning_rate=1": "nearest: optimizer.lr",
    "optimizer.lr.x=1": "nearest: optimizer.lr",
    "trainer.max_step=1": "nearest: trainer.max_steps",
    "stage.lora={rnk: 3}": "stage.lora.rnk: no such key; nearest: stage.lora.rank",
    "stage.lora=3": "stage.lora=3: must be a group of keys",
    "optimizer.lr=abc": "optimizer.lr=abc: must be a number > 0",
    "optimizer.lr=-1": "optimizer.lr=-1: must be a number > 0",
    "trainer.max_steps=1.5": "trainer.max_steps=1.5: must be a whole number >= 1",
    "trainer.max_steps=abc": "trainer.max_steps=abc: must be a whole number",
    "stage.flow.stratified=1": "stage.flow.stratified=1: must be true or false",
    "stage.flow.density=normal": "must be one of logit_normal, uniform, mode",
    "data.size=[64,65]": "data.size=[64, 65]: must be a list of 2: each a whole number >= 16 and a multiple of 16",
    "data.size=64": "data.size=64: must be a list of 2",
    "stage=bse": "stage=bse: no such option; nearest: stage=base",
    "recipe=base_paper": "recipe=base_paper: no such option; nearest: recipe=paper (of corrected, paper, released)",
    "recipe@_global_=paper": "groups cannot be moved",
    "model=null": "model=null: no such option",
    "optimizer={lr: 1}": "no such option",
    "optimizer=3": "optimizer=3: no such option",
    "data.name=folder": "choose another option by data=",
    "sample.steps=3": "sample.steps: task=train has no such key; task=sample has it",
    "optimizer.lr": "write key=value",
    "=3": "names no key",
    "optimizer.lr=[": "cannot be read",
    "optimizer.lr=1,2": "put -m before it",
    "seed=${sed}": "seed: Interpolation key 'sed' not found",
    "hydra.no_such=1": "hydra.no_such",
    "stage.mix.t2v=0.5": "stage.mix: shares must sum to 1; t2v 0.5 + i2v 0.1 + v2v 0.2 + full 0.3 = 1.1",
    "stage.corrupt.noise=0.9": "stage.corrupt: shares must sum to 1",
    "data.micro_batch=3": "data.global_batch=8: must be a multiple of data.micro_batch=3 x trainer.devices=1",
    "data.held_out=400": "must be less than data.toy.clips=400",
    "data.toy.radius=[18,13]": "must be [smallest, largest]",
    "data.toy.radius=[13,40]": "does not fit",
    "model.rope_dim=[24,20,18]": "must sum to model.head_dim=64; 24 + 20 + 18 = 62",
    "model=14b": "set text.dim=4096",
    "watch.sigmas=[]": "name at least one noise level",
    "--config-name=x": "--config-dir",
    "--config-dir=/no/such": "no such folder",
    "--resolve": "goes with --cfg",
    "--no-such-flag": "unrecognized arguments: --no-such-flag",
}


def refusal(*arguments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose.check_arguments(arguments)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize("argument", BAD)
def test_refused_on_one_line_that_says_what_and_where(argument: str) -> None:
    said = refusal(argument)
    assert BAD[argument] in said
    assert "\n" not in said.strip()


def test_a_key_of_another_option_names_it() -> None:
    assert refusal("data=folder", "data.toy.clips=3") == "data.toy.clips: data=folder has no such key; data=toy has it"


@dataclass(frozen=True)
class Gan:
    weight: float


@dataclass(frozen=True)
class Distill:
    gan: Gan | None
    bases: str


def test_a_switch_of_another_stage_names_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(schema.GROUPS["stage"], "distill", Distill)
    assert refusal("stage.bases=shared") == "stage.bases: stage=base has no such key; stage=distill has it"
    assert refusal("stage.gan.weight=1") == "stage.gan.weight: stage=base has no such key; stage=distill has it"
    assert "no such key; nearest: stage." in refusal("stage.gan.wieght=1")


def test_two_mistakes_name_the_first_key() -> None:
    assert "optimizer.lrr" in refusal("optimizer.lrr=1", "optimizer.epss=1")


def test_keys_that_exclude_one_another() -> None:
    assert "model.kernels=reference: torch.compile cannot trace" in refusal("model.kernels=reference", "model.compile=true")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["data.size=[64,96]"],
            "3 levels need sides that are multiples of 64 pixels, such as [64,64], [64,128]",
        ),
        (["stage.pyramid.ratios=[1,1,1,1]", "data.size=[64,128]"], "4 levels need sides that are multiples of 128 pixels"),
        (["stage.pyramid.ratios=[]"], "there are 1 to 4 levels"),
        (["stage.pyramid.ratios=[1,1,1,1,1]"], "there are 1 to 4 levels"),
        (["stage.pyramid.gamma=0.4"], "at most 1/3"),
        (["stage.pyramid.shift=2"], "leave it at 1"),
        (["stage.pyramid.edges=[0,0.5,1]"], "3 levels need 4 numbers that rise from 0 to 1"),
        (["stage.pyramid.edges=[0,0.5,0.4,1]"], "that rise from 0 to 1"),
        (["stage.pyramid.edges=[0,0.5,0.6,0.9]"], "from 0 to 1"),
        (["stage.flow.shift=2"], "stage.flow.shift: stage=mid has no such key; stage=base has it"),
    ],
)
def test_pyramids_that_cannot_be(given: list[str], message: str) -> None:
    assert message in refusal("stage=mid", *given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["watch.sample_steps=[20,20]"], "watch.sample_steps=[20, 20]: the model has 1 level; give a number, or a list of 1"),
        (["watch.sample_steps=[]"], "watch.sample_steps=[]: the model has 1 level"),
        (["stage=mid", "watch.sample_steps=[20,20]"], "watch.sample_steps=[20, 20]: the model has 3 levels"),
    ],
)
def test_steps_of_other_levels_than_the_model_s(given: list[str], message: str) -> None:
    assert message in refusal(*given)
    compose.compose(["stage=mid", "watch.sample_steps=[20,10,5]"])
    compose.compose(["stage=mid", "stage.pyramid.ratios=[1,1]", "watch.sample_steps=[20,20]"])


def test_a_needed_input_is_asked_for() -> None:
    assert "prepare.source=null" in refusal("task=prepare", "data=folder")


def test_a_typo_in_a_file_of_ones_own_is_named(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text("# @package _global_\nexperiment: {name: mine, about: x}\nseedd: 4\n")
    assert refusal("--config-dir", str(tmp_path), "experiment=mine") == "seedd: no such key; nearest: seed"


class TestSweep:
    def test_every_combination_is_checked(self) -> None:
        assert "optimizer.lr=-2" in refusal("-m", "seed=1,2", "optimizer.lr=1,-2")
        assert "data.micro_batch=8" in refusal("-m", "data.global_batch=8,4", "data.micro_batch=4,8")
        assert "stage=bse" in refusal("-m", "stage=base,bse")
        assert "seed=-1" in refusal("-m", "seed=range(-1,2)")
        assert "optimizer.lr=0" in refusal("-m", "optimizer.lr=interval(0,1)")

    def test_a_good_one_passes_and_asks_for_a_folder(self) -> None:
        assert compose.check_arguments(["-m", "optimizer.lr=1e-3,2e-3"]) == compose.Command(None, True)
        assert compose.check_arguments(["-m", "optimizer.lr=1e-3,2e-3", "hydra.sweep.dir=x"]) == compose.Command(None, False)

    def test_several_devices_are_refused(self) -> None:
        assert "trainer.devices=2" in refusal("-m", "trainer.devices=1,2")
        assert "trainer.devices=2" in refusal("-m", "trainer.devices=2", "data.micro_batch=4", "seed=1,2")


def test_what_lightning_gives_its_child_processes_passes() -> None:
    child = ['hydra.run.dir="."', "hydra.job.name=train_ddp_process_1", "hydra.output_subdir=null"]
    assert compose.check_arguments(["trainer.devices=2", "data.micro_batch=4", *child]) == compose.Command(None, False)


def test_good_values_arrive_typed() -> None:
    config = compose.compose(["run_dir=a b", "optimizer.lr=1", "stage.caption_drop=0.5", "seed=7", "trainer.max_steps=10"])
    assert (config.run_dir, config.optimizer.lr, config.stage.caption_drop, config.seed) == ("a b", 1.0, 0.5, 7)
    assert config.optimizer.total == 10
    assert (config.prepare, config.merge, config.sample) == (None, None, None)
    prompts = compose.compose(["task=sample", 'sample.prompt=["a red circle","a, b"]'])
    assert prompts.sample is not None and prompts.sample.prompt == ("a red circle", "a, b")


def test_plain_is_resolved_and_without_hydra() -> None:
    node = compose.plain(compose.compose_plain(["trainer.max_steps=9"]))
    assert node["optimizer"]["total"] == 9
    assert "hydra" not in node

    def scalars(value: Any) -> bool:
        if isinstance(value, dict):
            return all(map(scalars, value.values()))
        return all(map(scalars, value)) if type(value) is list else type(value) in (int, float, str, bool, type(None))

    assert scalars(node)
    assert compose.typed(node) == compose.compose(["trainer.max_steps=9"])


def test_a_run_from_before_the_alarms_had_none() -> None:
    raw = compose.plain(compose.compose_plain([]))
    old = {**raw, "watch": {name: value for name, value in raw["watch"].items() if name != "alarms"}}
    typed = compose.typed(compose.saved(old))
    assert not typed.watch.alarms.enabled and typed.watch.alarms.border is None
    assert compose.saved(raw) == raw
    assert sameness.changed(compose.saved(old), raw) == []  # it may go on, watched from now on
