"""What a run needs of disk and host, counted on meta before its weights are there."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from helios_train.conf.schema import Config, DistillStage
from helios_train.memory.host import must_hold
from helios_train.memory.plan import GIB, Plan
from helios_train.memory.quantized import quantize
from helios_train.models import adapters
from helios_train.models.precision import DTYPES, cast
from helios_train.models.transformer import HeliosTransformer
from helios_train.tasks import build, weights

LINKS = ("mid", "ode")  # of the lineage of a student on its teacher's base
FP32 = 4  # bytes


@dataclass(frozen=True)
class Counted:
    """Bytes of what is frozen, as it is stored; numbers that train, and those of them that a moving average follows."""

    frozen: int
    trained: int
    followed: int


def counted(config: Config) -> Counted:
    """Of the run's networks, without their weights."""
    with torch.device("meta"):
        networks = bare(config)
        heads = build.heads(config, networks[-1]) if isinstance(config.stage, DistillStage) else None
    memory = config.memory
    if memory.bases != "bf16":
        for network in networks:
            quantize(network.blocks, memory.bases, memory.lineage == "as_bases")
    parameters = [dict(network.named_parameters()) for network in networks]
    trained = [{name: one for name, one in named.items() if one.requires_grad} for named in parameters]
    tensors = [tensor for network in networks for tensor in (*network.parameters(), *network.buffers())]
    judging = sum(one.numel() for one in heads.parameters()) if heads else 0
    critics = {name for named in trained for name in named if f".{build.CRITIC}." in name}
    followed = sum(one.numel() for named in trained for name, one in named.items() if name not in critics)
    return Counted(
        frozen=sum(tensor.nbytes for tensor in tensors if not tensor.requires_grad),
        trained=sum(one.numel() for named in trained for one in named.values()) + judging,
        followed=followed if config.stage.ema.decay else 0,
    )


def bare(config: Config) -> list[HeliosTransformer]:
    """The networks of a run with what trains on them, for a model on meta: one, or of distill on distinct bases two."""
    distill, shared = isinstance(config.stage, DistillStage), False
    if distill:
        shared = build.shares_base(config)
    found = [HeliosTransformer(**weights.shape(config)) for _ in range(2 if distill and not shared else 1)]
    for network in found:
        cast(network, DTYPES[config.model.dtype])
    if not distill:
        weights.adapt(config, found[0])
        return found
    for link in LINKS if shared else ():
        adapters.add_lora(found[0], link, replace(weights.lora(config), history_patches=False), config.seed)
        found[0].requires_grad_(False)
    build.adapt_cast(config, found[0], found[-1])
    return found


def disk(config: Config, needs: Counted) -> int:
    """Bytes of the checkpoints that are kept, and of one that is written: weights, two moments, the average."""
    return (config.checkpoint.keep + 1) * FP32 * (3 * needs.trained + needs.followed)


def check_host(config: Config, needs: Counted, plan: Plan | None) -> None:
    """InputError where the host cannot hold the run: what the plan has there, and on a CPU everything."""
    if build.device(config).type == "cpu":
        copies = 0 if DTYPES[config.model.dtype] == torch.float32 else DTYPES[config.model.dtype].itemsize
        size = needs.frozen + needs.trained * (4 * FP32 + copies) + needs.followed * FP32  # master, gradient, two moments
        must_hold(size, "the run without its activations")
    elif plan:
        must_hold(round(plan.host * GIB), f"memory={config.memory.name}")
