"""task=train: a stage on a run folder, from iteration 0 or from where it stopped."""

from __future__ import annotations

import json
import logging
import os
import warnings
from dataclasses import asdict, replace
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import Strategy

from helios_train.callbacks import report
from helios_train.callbacks.checkpoint import RunCheckpoint
from helios_train.callbacks.ema import EmaCallback
from helios_train.callbacks.memory import MemoryWatch, device_of
from helios_train.callbacks.preempt import Preempt
from helios_train.callbacks.save_loggers import SaveLoggers
from helios_train.callbacks.throughput import Throughput
from helios_train.callbacks.validation import HeldOut
from helios_train.conf import compose
from helios_train.conf.rules import AUTO
from helios_train.conf.schema import Config
from helios_train.data.module import WindowModule
from helios_train.errors import InputError
from helios_train.models.checkpoint import AtomicCheckpointIO
from helios_train.models.ema import Ema
from helios_train.run import RunFolder, default_folder, find_resumable, iteration_of, write
from helios_train.stages.replicas import OneDevice, ReplicaStrategy
from helios_train.stages.stage import Stage
from helios_train.tasks import build, environment, handoff, needs, plan, prepare, recipes, run_card, sameness, watching

PATIENCE = timedelta(hours=6)  # for which devices wait for the first one to sample a video
RUN_DIR = "HELIOS_TRAIN_RUN_DIR"  # tells the processes of further devices which folder the first one chose


def run(config: Config, raw: dict[str, Any]) -> None:
    """Trains `stage=`, from `init`, random numbers, or an earlier stage that is made first."""
    config, raw = handoff.provided(config, raw, run)
    folder, checkpoint, config = _folder(config, raw)
    try:
        _train(config, raw, folder, checkpoint)
    except BaseException:
        folder.discard_unbegun()
        raise
    finally:
        folder.unlock()


def _train(config: Config, raw: dict[str, Any], folder: RunFolder, checkpoint: Path | None) -> None:
    main = _local_rank() == 0
    if main:
        prepare.toy_shards(config)
    data = build.data(config)
    config, why, planned = _fitted(config) if main else (config, "", None)
    raw = {**raw, "memory": asdict(config.memory)}
    there = needs.counted(config)
    disk = needs.disk(config, there)
    if main:
        folder.check_free(disk)
        needs.check_host(config, there, planned)
    stage = build.stage(config)
    ema = build.ema(config, stage)
    done = iteration_of(checkpoint) if checkpoint else 0
    if main:
        _announce(config, folder, run_card.card(config, stage, data, disk, why), done)
        if planned:
            write(folder.plan, json.dumps(planned.record(), indent=1) + "\n")
    logs = watching.loggers(config, raw, folder, done) if main else []
    device = device_of(build.device(config))
    watch = MemoryWatch(config.trainer.log_every, device, planned, partial(_may_take, config, raw), folder.path)
    loop = trainer(config, folder, [watch, *watchers(config, folder, stage, data, ema, done)], logs)
    if main:  # only now that all is well: the same command, put right, may use the folder
        _keep_config(folder, raw)
        environment.note(folder, done)
    try:
        with watch.explained():
            loop.fit(stage, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    finally:  # also of a run that a signal or an error ends
        if main:
            report.write(folder.path)


def _fitted(config: Config) -> tuple[Config, str, plan.Plan | None]:
    """The config with its memory choice, what the run card says of that, and the plan of a run on a GPU, which must fit."""
    card = plan.card_of(config)
    if config.memory.name == AUTO:
        memory, why, planned = plan.chosen(config, card)
        return replace(config, memory=memory), "\n".join([why, *([planned.summary()] if planned else [])]), planned
    planned = None if card is None else plan.must_fit(config, card)
    unplanned = "not planned: " + ("on a CPU task=plan tells what a GPU would take" if card is None else "the model is small")
    return config, f"memory {config.memory.name}: {planned.summary() if planned else unplanned}", planned


def _may_take(config: Config, raw: dict[str, Any]) -> list[str]:
    """The `memory=` choices that take less and that the run may go on under."""
    return [name for name in plan.smaller(config) if not sameness.changed(raw, {**raw, "memory": asdict(plan.preset(name))})]


def _keep_config(folder: RunFolder, raw: dict[str, Any]) -> None:
    """Writes config.yaml; of a run that goes on only what it remembers for the next time: its memory choice."""
    if not folder.config.is_file():
        folder.save_config(raw)
        return
    kept = folder.load_config()
    before, now = compose.saved(kept)["memory"], raw["memory"]
    if before != now:
        other = ", ".join(f"{name} {value} (was {before.get(name)})" for name, value in now.items() if value != before.get(name))
        print(f"from here on memory has {other}", flush=True)
        folder.save_config({**kept, "memory": now})


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def _folder(config: Config, raw: dict[str, Any]) -> tuple[RunFolder, Path | None, Config]:
    """The run folder, the checkpoint to go on from (None: a new run), and the config that holds from now on."""
    if _local_rank():
        if RUN_DIR not in os.environ:
            raise InputError("this process is one of several and was told no run folder; let trainer.devices start them")
        folder = RunFolder.open(Path(os.environ[RUN_DIR]))
        return (
            folder,
            folder.newest_checkpoint() if config.resume else None,
            compose.typed(_kept(compose.saved(folder.load_config()), raw)),
        )
    existing = _to_resume(config, raw)
    if existing is None:
        default = default_folder(config.stage.name, config.experiment.name, datetime.now())
        folder = RunFolder.create(Path(config.run_dir) if config.run_dir else None, default)
        folder.lock()
        checkpoint = None
    else:
        folder, raw = existing, _kept(compose.saved(existing.load_config()), raw)
        folder.lock()
        checkpoint = folder.newest_checkpoint()
        print(f"resuming {folder.path} at iteration {iteration_of(checkpoint) if checkpoint else 0}", flush=True)
    os.environ[RUN_DIR] = str(folder.path)
    return folder, checkpoint, compose.typed(raw)


def _to_resume(config: Config, raw: dict[str, Any]) -> RunFolder | None:
    """The run that `resume` asks for; None for a new one. InputError where it differs in what may not change."""
    if config.resume is None:
        return None
    if config.resume != "auto":
        folder = RunFolder.open(Path(config.resume))
    elif config.run_dir is not None:
        if not (Path(config.run_dir) / "config.yaml").is_file():
            print(f"resume=auto: {config.run_dir} holds no run yet; starting it", flush=True)
            return None
        folder = RunFolder.open(Path(config.run_dir))
    else:
        parent = default_folder(config.stage.name, config.experiment.name, datetime.now()).parent
        found = find_resumable(parent, lambda kept: not sameness.changed(compose.saved(kept), raw), config.trainer.max_steps)
        if found is None:
            print(f"resume=auto: no unfinished run like this one in {parent}; starting a new one", flush=True)
            return None
        folder = RunFolder.open(found)
    sameness.refuse(sameness.changed(compose.saved(folder.load_config()), raw), folder.path, folder.config.name)
    return folder


def _kept(saved: dict[str, Any], raw: dict[str, Any]) -> dict[str, Any]:
    """The config of a resumed run: today's, with the schedule's length and the memory choice of the first start."""
    try:
        return {**sameness.settled(saved, raw), "optimizer": {**raw["optimizer"], "total": saved["optimizer"]["total"]}}
    except (KeyError, TypeError):  # the one part of a cut file that no comparison misses
        raise InputError("config.yaml of the run folder is damaged (it lacks optimizer.total); start a new run") from None


def _announce(config: Config, folder: RunFolder, page: str, done: int) -> None:
    """Prints and keeps the run card."""
    if not done:
        write(folder.card, page)
    print(page, flush=True)
    print(f"run folder {folder.path}", flush=True)


def watchers(config: Config, folder: RunFolder, stage: Stage, data: WindowModule, ema: Ema | None, done: int) -> list[Callback]:
    """What happens around a step, in its order; `done` iterations are in the checkpoint to go on from."""
    checkpoint = RunCheckpoint(
        folder.checkpoints, config.checkpoint.every, config.checkpoint.keep, config.trainer.nonfinite_limit
    )
    callbacks: list[Callback] = []
    if ema:
        callbacks.append(EmaCallback(ema))
    callbacks.append(Throughput(config.trainer.log_every, config.data.global_batch, partial(_measured, config, folder, done)))
    if config.watch.every and config.data.held_out and recipes.learns_velocities(config):
        objective = recipes.objective(config)
        watch = config.watch
        callbacks.append(HeldOut(objective, watch.sigmas, watch.quantiles, watch.clips, watch.every, config.seed, ema))
    if config.watch.sample:
        callbacks += watching.videos(config, folder, stage, data, ema, main=_local_rank() == 0)
    if config.watch.alarms.enabled:
        callbacks.append(watching.health(config, folder, callbacks, done, main=_local_rank() == 0))
    if config.watch.sample:
        callbacks.append(report.RunReport(folder.path, config.watch.sample_every))
    callbacks += [SaveLoggers(), Preempt(checkpoint), checkpoint]
    if config.trainer.progress:
        callbacks.append(RichProgressBar())
    return callbacks


def _strategy(config: Config) -> Strategy | str:
    """How Lightning treats the devices."""
    if config.trainer.devices > 1:
        return ReplicaStrategy(timeout=PATIENCE)
    memory = config.memory
    on_host = memory.optimizer == "host" or memory.park != "nothing" or memory.stream
    return OneDevice(build.device(config)) if on_host else "auto"


def trainer(config: Config, folder: RunFolder, callbacks: list[Callback], loggers: list[Logger]) -> L.Trainer:
    """Lightning's Trainer as a run needs it; loggers on the first device alone."""
    _quieten()
    return L.Trainer(
        accelerator=config.trainer.accelerator,
        devices=config.trainer.devices,
        strategy=_strategy(config),
        max_steps=config.trainer.max_steps,
        max_epochs=-1,
        precision="32-true",
        callbacks=callbacks,
        logger=loggers or False,
        plugins=[AtomicCheckpointIO()],
        enable_checkpointing=True,
        enable_progress_bar=config.trainer.progress,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        default_root_dir=folder.path,
    )


def _quieten() -> None:
    """Leaves Lightning its warnings, and takes from it advertisements, notes on defaults and its own deprecated calls."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated.*")
    warnings.filterwarnings("ignore", message=".*sync_dist=True.*")  # what stages log is summed over the devices already


def _measured(config: Config, folder: RunFolder, done: int, seconds: float) -> None:
    """Adds what the run will take to its card."""
    if _local_rank() == 0:
        line = run_card.hours(config, done, seconds)
        with folder.card.open("a") as file:
            file.write(line)
        print(line, end="", flush=True)
