"""What a stage trains, how that is stepped and how its model is sampled: objects out of the config's `stage` and `optimizer`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, replace
from functools import partial
from importlib import resources
from typing import Any

import torch
import yaml
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.utils._python_dispatch import _disable_current_modes

from helios_train.conf.schema import BaseStage as BaseStageKeys
from helios_train.conf.schema import Config
from helios_train.conf.schema import DistillStage as DistillStageKeys
from helios_train.conf.schema import HistoryStage as HistoryStageKeys
from helios_train.conf.schema import MidStage as MidStageKeys
from helios_train.conf.schema import OdeStage as OdeStageKeys
from helios_train.diffusion.pyramid import Pyramid
from helios_train.diffusion.rollout import Rollout
from helios_train.diffusion.schedule import NoiseLevels
from helios_train.history.corrupt import Corrupt
from helios_train.history.mix import Mix
from helios_train.objectives.dmd import CriticObjective, Decoupled, StudentObjective
from helios_train.objectives.flow import FlowObjective, Objective
from helios_train.objectives.gan import Adversary
from helios_train.objectives.ode import OdeObjective
from helios_train.objectives.pyramid_flow import PyramidFlowObjective
from helios_train.objectives.regularise import MeanVariance
from helios_train.objectives.renoise import Renoise
from helios_train.sampling.pipeline import SamplerSettings
from helios_train.stages.base import BaseRecipe
from helios_train.stages.distill import DistillRecipe, SectionCount
from helios_train.stages.trainee import LearningRate, Training


def learns_velocities(config: Config) -> bool:
    """Whether the stage learns velocities at all noise levels, as Base and Mid do."""
    return isinstance(config.stage, BaseStageKeys | MidStageKeys)


def objective(config: Config) -> Objective:
    """What a stage that learns velocities trains."""
    assert isinstance(config.stage, BaseStageKeys | MidStageKeys)
    if isinstance(config.stage, MidStageKeys):
        keys = config.stage.pyramid
        return PyramidFlowObjective(
            Pyramid(len(keys.ratios), keys.edges, keys.gamma, keys.shift),
            ratios=keys.ratios,
            dynamic=keys.dynamic_shift,
            cap=keys.shift_cap,
            timesteps=keys.timesteps,
            sigmas=keys.sigmas,
            stratified=keys.stratified,
        )
    flow = config.stage.flow
    levels = NoiseLevels(
        density=flow.density,
        mean=flow.logit_mean,
        std=flow.logit_std,
        mode_scale=flow.mode_scale,
        stratified=flow.stratified,
        fixed=flow.shift,
        dynamic=flow.dynamic_shift,
        cap=flow.shift_cap,
        weighting=flow.weighting,
    )
    return FlowObjective(levels)


def base_recipe(config: Config) -> BaseRecipe:
    """Objective, history mix and corruption of a stage that trains on one section given its history."""
    return BaseRecipe(objective(config), *mix_and_corrupt(config), config.seed, config.data.global_batch)


def mix_and_corrupt(config: Config) -> tuple[Mix, Corrupt]:
    """What is done to the history."""
    assert isinstance(config.stage, HistoryStageKeys)
    mix, corrupt = asdict(config.stage.mix), asdict(config.stage.corrupt)
    group = {"sample": 1, "micro_batch": config.data.micro_batch}
    mix_group, corrupt_group = group[mix.pop("draw")], group[corrupt.pop("draw")]
    return Mix(**mix, group=mix_group), Corrupt(**corrupt, group=corrupt_group)


def rollout(config: Config) -> Rollout:
    """The few steps of a student."""
    assert isinstance(config.stage, OdeStageKeys | DistillStageKeys)
    keys = config.stage.student
    pyramid = Pyramid(len(keys.steps), keys.edges, keys.gamma)
    behind = keys.shift_tokens == "before"
    return Rollout(
        pyramid, keys.steps, keys.amplify, keys.dynamic_shift, timesteps=keys.timesteps, sigmas=keys.sigmas, behind=behind
    )


def ode_objective(config: Config) -> OdeObjective:
    """Regression on a teacher's trajectories."""
    assert isinstance(config.stage, OdeStageKeys)
    keys, few = config.stage, rollout(config)
    return OdeObjective(
        few.pyramid,
        keys.sections,
        keys.weight,
        few.dynamic,
        timesteps=few.timesteps,
        sigmas=few.sigmas,
        behind=few.behind,
    )


def distill_recipe(config: Config, negative: torch.Tensor | None = None) -> DistillRecipe:
    """Objectives of student and critic, and what is done to the history. `negative`: see DistillRecipe."""
    assert isinstance(config.stage, DistillStageKeys)
    keys, looks = config.stage, config.stage.renoise
    few = replace(rollout(config), leave=keys.rollout.exits)
    looking = Renoise(anneal=looks.anneal, dynamic=looks.dynamic_shift, low=looks.low, high=looks.high, sigmas=looks.sigmas)
    student = StudentObjective(
        few,
        replace(looking, density=looks.student),
        keys.guidance,
        keys.align,
        MeanVariance(keys.mean_variance) if keys.mean_variance else None,
        Decoupled(keys.decouple.start, keys.decouple.end) if keys.decouple.enabled else None,
        adversary(config),
    )
    critic = CriticObjective(few, replace(looking, density=looks.critic), adversary(config))
    sections = SectionCount(*keys.rollout.sections, keys.rollout.anneal, keys.rollout.cold_start)
    given = keys.rollout.history == "given"
    return DistillRecipe(
        student,
        critic,
        *mix_and_corrupt(config),
        config.seed,
        keys.every,
        sections,
        given,
        negative,
        own_real=keys.gan.real == "own",
        one_step=keys.gan.critic_steps == "one",
        heads_wait=keys.gan.heads_from == "start",
    )


def adversary(config: Config) -> Adversary | None:
    """The adversary of stage=distill; None where it is off."""
    assert isinstance(config.stage, DistillStageKeys)
    keys = config.stage.gan
    if not keys.enabled:
        return None
    return Adversary(
        start=keys.start,
        ramp=keys.ramp,
        student=keys.student_weight,
        critic=keys.critic_weight,
        r1=keys.r1,
        r1_sigma=keys.r1_sigma,
        r2=keys.r2,
        r2_sigma=keys.r2_sigma,
        offsets=keys.offsets,
        one_crop=keys.crops == "shared",
        replay=config.memory.gan_replay,
    )


def value_of(config: Config, key: str) -> Any:
    """The value of a dotted key; a dict for a group of keys."""
    value: Any = asdict(config)
    for part in key.split("."):
        value = value[part]
    return value


def published_value(config: Config, key: str) -> Any:
    """What the recipe's own file gives a dotted key."""
    file = resources.files("helios_train.conf") / "recipe" / f"{config.stage.name}_{config.recipe.name}.yaml"
    value: Any = yaml.safe_load(file.read_text())
    for part in key.split("."):
        value = value[part]
    return value


def optimizer(config: Config, parameters: Iterable[nn.Parameter]) -> Optimizer:
    """AdamW in fp32, or with 8-bit moments."""
    o = config.optimizer
    common = {"lr": o.lr, "betas": o.betas, "eps": o.eps, "weight_decay": o.weight_decay}
    if o.name == "adamw":
        return AdamW(list(parameters), fused=True, **common)  # type: ignore[arg-type]
    from bitsandbytes.optim import AdamW8bit  # here: it probes for CUDA when imported

    with _disable_current_modes():  # its tables of 256 values are real, also where a plan is traced
        return AdamW8bit(list(parameters), **common)  # type: ignore[arg-type]


def learning_rate(config: Config) -> LearningRate:
    """The schedule."""
    o = config.optimizer
    return LearningRate(o.lr, o.schedule, o.warmup, o.decay, o.total)


def training(config: Config) -> Training:
    """How what is trained first (in distill the student) is stepped."""
    return Training(partial(optimizer, config), learning_rate(config), config.optimizer.clip)


def sampler(config: Config) -> SamplerSettings:
    """How the trained model is sampled: shifted as trained, and where training has no dynamic shift, as diffusers' pipelines."""
    solver = config.sample.solver if config.sample else "unipc"
    if isinstance(config.stage, OdeStageKeys | DistillStageKeys):
        few = config.stage.student
        own = few.edges, few.gamma, 1.0, False, few.steps, few.amplify
        return SamplerSettings(few.dynamic_shift, solver, len(few.steps), *own)
    assert isinstance(config.stage, BaseStageKeys | MidStageKeys)
    if isinstance(config.stage, MidStageKeys):
        keys = config.stage.pyramid
        linear = keys.dynamic_shift if keys.dynamic_shift != "none" else "linear"
        return SamplerSettings(linear, solver, len(keys.ratios), keys.edges, keys.gamma, keys.shift)
    dynamic = config.stage.flow.dynamic_shift
    return SamplerSettings(dynamic if dynamic != "none" else "exponential", solver, anchor=config.stage.anchor)
