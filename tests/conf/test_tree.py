"""The YAML files: each composes and types, each key is explained, each published number is the published one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import helios_train.conf
from helios_train.conf import schema
from helios_train.conf.compose import compose, compose_plain, plain

TREE = Path(helios_train.conf.__file__).parent
FILES = sorted(path.relative_to(TREE) for path in TREE.rglob("*.yaml"))
OPTIONS = [(path.parts[0], path.stem) for path in FILES if len(path.parts) == 2 and not re.match("recipe/.*_", str(path))]
NEEDS = {  # what an option cannot stand without
    ("model", "14b"): ["text=umt5"],
    ("text", "umt5"): ["model=14b"],
    ("memory", "stream"): ["stage=distill"],
}


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes(group: str, option: str) -> None:
    config = compose([f"{group}={option}", *NEEDS.get((group, option), [])])
    assert getattr(config, group).name == option


def test_every_group_is_typed_and_has_files() -> None:
    assert {group for group, _ in OPTIONS} == set(schema.GROUPS)


@pytest.mark.parametrize("stage", [option for group, option in OPTIONS if group == "stage"])
@pytest.mark.parametrize("recipe", [option for group, option in OPTIONS if group == "recipe"])
def test_every_recipe_fits_every_stage_and_names_its_sources(stage: str, recipe: str) -> None:
    node = plain(compose_plain([f"stage={stage}", f"recipe={recipe}"]))
    compose([f"stage={stage}", f"recipe={recipe}"])
    own = yaml.safe_load((TREE / f"recipe/{stage}_{recipe}.yaml").read_text())
    assert node["recipe"]["sources"] == own["recipe"]["sources"]
    whole = {"mix", "corrupt"} & own["stage"].keys()  # named as one; of other groups each key is
    named = {f"stage.{name}" for name in whole}
    for group in own["stage"].keys() - whole:
        keys = own["stage"][group]
        named |= {f"stage.{group}.{key}" for key in keys} if isinstance(keys, dict) else {f"stage.{group}"}
    assert named == set(own["recipe"]["sources"])
    missing = re.findall(r"^  (\w+): \?\?\?", (TREE / f"stage/{stage}.yaml").read_text(), re.MULTILINE)
    assert set(missing) <= {key for name, keys in own["stage"].items() for key in (keys if isinstance(keys, dict) else [name])}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_every_key_has_a_comment(path: Path) -> None:
    lines = (TREE / path).read_text().splitlines()
    assert lines[0].startswith("#") or path.parts[0] == "recipe"
    block = None  # indent of a block whose lines explain themselves
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if block is not None and line.strip() and indent <= block:
            block = None
        if block is None and re.match(r"\s*(defaults|sources|template|hydra):", line):
            block = indent
        if block is None and (match := re.match(r"\s*(\w+): \S", line)) and match[1] not in ("name", "seed"):
            assert " #" in line or match[1] == "total" or line.strip().endswith("#"), line


def test_names_equal_the_files() -> None:
    for group, option in OPTIONS:
        node = yaml.safe_load((TREE / group / f"{option}.yaml").read_text())
        assert node.get(group, node)["name"] == option


def test_help_shows_every_option() -> None:
    page = yaml.safe_load((TREE / "hydra/help/helios.yaml").read_text())["template"]
    for group, option in OPTIONS:
        line = next(line for line in page.splitlines() if f" {group}= " in line)
        assert option in re.findall(r"\w+", line.partition("=")[2])


def test_recipes_of_the_base_stage() -> None:
    mixes, corruptions, shifts = {}, {}, {}
    for recipe in ("paper", "released", "corrected"):
        stage = compose([f"recipe={recipe}"]).stage
        mixes[recipe] = (stage.mix.t2v, stage.mix.i2v, stage.mix.v2v, stage.mix.full, stage.mix.draw)
        c = stage.corrupt
        corruptions[recipe] = (c.noise, c.blur, c.saturation, c.clean, c.saturation_on_top, c.segments, c.draw)
        shifts[recipe] = (stage.flow.dynamic_shift, stage.flow.shift_cap)
        assert (c.noise_max, c.blur_min) == (pytest.approx(1 / 3), 0.9)
    assert mixes == {
        "paper": (0.4, 0.0, 0.24, 0.36, "micro_batch"),
        "released": (0.4, 0.0, 0.24, 0.36, "micro_batch"),
        "corrected": (0.4, 0.1, 0.2, 0.3, "sample"),
    }
    assert corruptions == {
        "paper": (0.8, 0.1, 0.0, 0.1, 0.0, "own", "sample"),
        "released": (0.9, 0.0, 0.0, 0.1, 0.0, "published", "micro_batch"),
        "corrected": (0.8, 0.1, 0.0, 0.1, 0.9, "own", "sample"),
    }
    assert shifts == {"paper": ("exponential", 7.0), "released": ("none", 7.0), "corrected": ("exponential", None)}


def test_recipes_of_the_mid_stage() -> None:
    """History as in the base stage; the published training code feeds exact times and shifts nothing."""
    found = {}
    for recipe in ("paper", "released", "corrected"):
        stage, base = (compose([f"recipe={recipe}", f"stage={name}"]).stage for name in ("mid", "base"))
        assert (stage.mix, stage.corrupt) == (base.mix, base.corrupt)
        found[recipe] = (stage.pyramid.dynamic_shift, stage.pyramid.timesteps, stage.pyramid.sigmas)
    assert found == {
        "paper": ("linear", "float", "table"),
        "released": ("none", "float", "table"),
        "corrected": ("linear", "int", "table"),
    }


def test_models() -> None:
    shapes = {}
    for name in ("tiny", "small", "14b"):
        model = compose([f"model={name}", *NEEDS.get(("model", name), [])]).model
        shapes[name] = (model.heads * model.head_dim, model.layers, model.heads, model.ffn_dim, model.rope_dim, model.dtype)
    assert shapes == {
        "tiny": (128, 4, 2, 512, (24, 20, 20), "fp32"),
        "small": (512, 8, 8, 2048, (24, 20, 20), "fp32"),
        "14b": (5120, 40, 40, 13824, (44, 42, 42), "bf16"),
    }


def test_published_phases() -> None:
    init, refine = compose(["experiment=base_init"]), compose(["experiment=base_refine"])
    assert (init.optimizer.lr, init.trainer.max_steps) == (5e-5, 5500)
    assert (refine.optimizer.lr, refine.trainer.max_steps) == (3e-5, 7500)
    for config in (init, refine):
        optimizer = config.optimizer
        assert (optimizer.betas, optimizer.eps, optimizer.weight_decay, optimizer.clip) == ((0.9, 0.999), 1e-8, 1e-4, 1.0)
        assert (optimizer.schedule, optimizer.warmup, config.stage.ema.decay) == ("constant", 0, 0.0)
        assert (config.data.name, config.data.global_batch, config.data.size) == ("folder", 128, (384, 640))
        assert (config.model.name, config.stage.trainable, config.stage.lora.rank) == ("14b", "lora", 128)
    assert (init.experiment.name, refine.experiment.name) == ("base_init", "base_refine")


def test_published_phases_of_the_mid_stage() -> None:
    init, refine = compose(["experiment=mid_init"]), compose(["experiment=mid_refine"])
    for config, lr, steps, warmup, batch in ((init, 1e-4, 16000, 1000, 256), (refine, 3e-5, 20000, 500, 192)):
        assert (config.optimizer.lr, config.trainer.max_steps, config.optimizer.warmup) == (lr, steps, warmup)
        assert (config.data.global_batch, config.data.size, config.stage.lora.rank) == (batch, (384, 640), 256)
        assert config.memory.name == "auto" and config.stage.trainable == "lora" and config.stage.ema.decay == 0
    assert (init.stage.pyramid.ratios, refine.stage.pyramid.ratios) == ((1, 2, 1), (1, 1, 1))
    both = [(config.stage.lora.patch_embedding, config.stage.lora.history_patches) for config in (init, refine)]
    assert both == [(False, False), (True, True)]
    assert (init.experiment.name, refine.experiment.name) == ("mid_init", "mid_refine")


def test_published_phases_of_the_few_step_stages() -> None:
    regression, matching = compose(["experiment=ode_init"]), compose(["experiment=distill_init"])
    for config, steps in ((regression, 2500), (matching, 2000)):
        optimizer = config.optimizer
        assert (optimizer.lr, optimizer.betas, optimizer.weight_decay, optimizer.clip) == (2e-6, (0.0, 0.999), 1e-3, 1.0)
        assert (optimizer.schedule, optimizer.warmup, config.trainer.max_steps) == ("constant", 0, steps)
        assert (config.stage.trainable, config.stage.lora.rank, config.stage.student.steps) == ("lora", 256, (2, 2, 2))
        assert config.memory.name == "auto" and config.data.size == (384, 640)
    assert (regression.stage.sections, regression.stage.weight, regression.stage.ema.start) == (3, 80.0, 250)
    assert (matching.stage.every, matching.stage.guidance, matching.stage.critic.lr) == (5, 3.0, 4e-7)
    assert compose(["experiment=ode_init", "task=pairs"]).pairs.count == 1000
    judged = compose(["experiment=distill_released_gan"])
    assert not matching.stage.gan.enabled and judged.stage.gan.enabled and judged.recipe.name == "released"
    faults = judged.stage.gan
    assert (faults.real, faults.crops, faults.offsets) == ("other", "each", False)
    assert (faults.critic_steps, faults.heads_from) == ("two", "begin")
    assert (faults.start, faults.student_weight, faults.critic_weight) == (1000, 0.05, 0.01)
    assert (faults.r1, faults.r1_sigma, faults.r2) == (100.0, 0.1, 0.0)


def test_toy_base() -> None:
    config = compose(["experiment=toy_base"])
    stage, data = config.stage, config.data
    assert (stage.mix.t2v, stage.mix.i2v, stage.mix.v2v, stage.mix.full) == (0.1, 0.05, 0.1, 0.75)
    assert (stage.flow.density, stage.flow.stratified, stage.flow.shift) == ("logit_normal", True, 2.0)
    assert (stage.ema.decay, stage.caption_drop, data.size) == (0.99, 0.1, (64, 64))
    assert (config.optimizer.lr, config.optimizer.warmup, config.optimizer.total) == (2e-3, 50, 2000)


def test_an_experiment_gives_way_to_the_command_line() -> None:
    config = compose(["experiment=toy_base", "recipe=paper", "stage.flow.shift=1.5", "model=small"])
    assert (config.recipe.name, config.stage.flow.shift, config.model.name) == ("paper", 1.5, "small")
    assert config.stage.mix.draw == "micro_batch"


def test_toy_shards_are_named_by_their_settings() -> None:
    roots = [
        compose(extra).data.root
        for extra in ([], ["seed=1"], ["data.toy.seed=1"], ["data.size=[64,64]"], ["text.rows=20"], ["data.toy.radius=[13,17]"])
    ]
    assert roots[0] == roots[1]
    assert len(set(roots)) == len(roots) - 1
    assert re.fullmatch(r"shards/toy_64x128_[0-9a-f]{8}", roots[0])
