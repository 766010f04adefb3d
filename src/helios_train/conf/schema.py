"""The config as types: a dataclass a group, chosen by the group's `name`. Values, meanings and units stand in the YAML files.

No defaults here: each number has one place, and that is its file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from helios_train.conf.evaluation import Evaluate
from helios_train.conf.kinds import Above0, AtLeast0, Count, Decay, Draw, Frames, Pixels, Positive, Share, Sigma, Weights
from helios_train.conf.values import Range
from helios_train.conf.watched import Watch


@dataclass(frozen=True)
class Task:
    """The verb."""

    name: Literal["train", "prepare", "pairs", "merge", "sample", "evaluate", "chain", "plan"]


@dataclass(frozen=True)
class Prepare:
    """Keys of task=prepare."""

    source: str | None
    sizes: Literal["published"] | tuple[tuple[Pixels, Pixels], ...] | None
    lengths: Literal["published"] | tuple[Frames, ...] | None
    start: Literal["first", "random"]
    stride: Positive
    shard_samples: Positive
    raw: bool
    part: str
    bad: Literal["stop", "skip"]
    timeout: Above0
    batch: Positive
    negative_text: str | None


@dataclass(frozen=True)
class Merge:
    """Keys of task=merge."""

    output: str | None
    weights: Weights
    adapter_only: bool


@dataclass(frozen=True)
class Chain:
    """Keys of task=chain."""

    links: tuple[str, ...]
    pairs: str
    sample: str


@dataclass(frozen=True)
class Pairs:
    """Keys of task=pairs."""

    output: str
    count: Positive
    sections: Positive
    steps: Positive
    guidance: AtLeast0
    shard_samples: Positive
    batch: Positive
    part: str


@dataclass(frozen=True)
class Sample:
    """Keys of task=sample."""

    prompt: str | tuple[str, ...] | None
    script: tuple[tuple[Count, str], ...] | None
    crossfade: Count
    drift: bool
    image: str | None
    video: str | None
    size: tuple[Pixels, Pixels] | None
    count: Positive
    sections: Positive
    steps: Positive | tuple[Positive, ...] | None
    guidance: AtLeast0
    solver: Literal["unipc", "euler"]
    weights: Weights
    output: str
    fps: Positive


@dataclass(frozen=True)
class Plan:
    """Keys of task=plan."""

    card: Above0 | None
    output: str | None
    picture: str | None
    all: bool
    exact: bool
    hfu: Annotated[float, Range(above=0, at_most=1)]
    tflops: Above0


@dataclass(frozen=True)
class Lora:
    """Adapters and what trains in full beside them."""

    rank: Positive
    alpha: Above0
    patch_embedding: bool
    history_patches: bool
    history_adapters: bool


@dataclass(frozen=True)
class Mix:
    """True shares of the history mix."""

    t2v: Share
    i2v: Share
    v2v: Share
    full: Share
    draw: Draw


@dataclass(frozen=True)
class Corrupt:
    """Frame-Aware Corrupt."""

    noise: Share
    blur: Share
    saturation: Share
    clean: Share
    saturation_on_top: Share
    noise_max: Sigma
    blur_min: Sigma
    segments: Literal["own", "published"]
    draw: Draw


@dataclass(frozen=True)
class Flow:
    """Which noise levels are trained, and how they weigh."""

    density: Literal["logit_normal", "uniform", "mode"]
    logit_mean: float
    logit_std: Above0
    mode_scale: float
    weighting: Literal["none", "sigma_sqrt", "cosmap"]
    stratified: bool
    shift: Above0
    dynamic_shift: Literal["none", "exponential", "linear"]
    shift_cap: Above0 | None


@dataclass(frozen=True)
class Pyramid:
    """Levels of resolution, and the noise inside each."""

    ratios: tuple[Positive, ...]
    edges: tuple[Share, ...] | None
    gamma: Above0
    shift: Above0
    stratified: bool
    dynamic_shift: Literal["none", "exponential", "linear"]
    shift_cap: Above0 | None
    timesteps: Literal["float", "int"]
    sigmas: Literal["table", "exact"]
    positions: Literal["own", "matched"]


@dataclass(frozen=True)
class Ema:
    """Moving average of the weights."""

    decay: Decay
    start: Count


@dataclass(frozen=True)
class Stage:
    """What all stages have in common."""

    trainable: Literal["auto", "lora", "full"]
    lora: Lora
    caption_drop: Share | None
    ema: Ema


@dataclass(frozen=True)
class HistoryStage(Stage):
    """What the stages that train on one section given its history have in common."""

    mix: Mix
    corrupt: Corrupt


@dataclass(frozen=True)
class BaseStage(HistoryStage):
    """Keys of stage=base."""

    name: Literal["base"]
    anchor: bool
    flow: Flow


@dataclass(frozen=True)
class MidStage(HistoryStage):
    """Keys of stage=mid."""

    name: Literal["mid"]
    pyramid: Pyramid


@dataclass(frozen=True)
class FewSteps:
    """The few steps of a student, and what it is fed in them."""

    steps: tuple[Positive, ...]
    amplify: bool
    edges: tuple[Share, ...] | None
    gamma: Above0
    dynamic_shift: Literal["none", "exponential", "linear"]
    shift_tokens: Literal["own", "before"]
    timesteps: Literal["float", "int"]
    sigmas: Literal["table", "exact"]


@dataclass(frozen=True)
class OdeStage(Stage):
    """Keys of stage=ode."""

    name: Literal["ode"]
    student: FewSteps
    pairs: str | None
    pair_noise: Literal["each", "one"]
    sections: Positive
    weight: Above0


@dataclass(frozen=True)
class Sections:
    """What a rollout begins from, and over how many sections it goes."""

    history: Literal["given", "own"]
    exits: Literal["random", "last"]
    sections: tuple[Positive, Positive]
    anneal: Count
    cold_start: Count


@dataclass(frozen=True)
class Renoise:
    """At which noise levels teacher and critic look at what the student makes."""

    student: Literal["uniform", "beta"]
    critic: Literal["uniform", "beta"]
    anneal: Count
    low: Positive
    high: Positive
    dynamic_shift: Literal["none", "exponential", "linear"]
    sigmas: Literal["table", "exact"]


@dataclass(frozen=True)
class Critic:
    """What is the critic's alone."""

    lr: Above0
    clip: Above0


@dataclass(frozen=True)
class Decouple:
    """Guidance as a pull of its own."""

    enabled: bool
    start: Count
    end: Count


@dataclass(frozen=True)
class Gan:
    """The adversary: heads on the critic that tell real sections from the student's."""

    enabled: bool
    start: Count
    ramp: Count
    heads: Literal["published", "light"]
    head_width: Positive | None
    blocks: tuple[Count, ...] | None
    student_weight: AtLeast0
    critic_weight: Above0
    r1: AtLeast0
    r1_sigma: Above0
    r2: AtLeast0
    r2_sigma: Above0
    real: Literal["own", "other"]
    crops: Literal["shared", "each"]
    offsets: bool
    critic_steps: Literal["one", "two"]
    heads_from: Literal["start", "begin"]


@dataclass(frozen=True)
class DistillStage(HistoryStage):
    """Keys of stage=distill."""

    name: Literal["distill"]
    teacher: str | None
    bases: Literal["auto", "shared", "distinct"]
    student: FewSteps
    rollout: Sections
    renoise: Renoise
    guidance: AtLeast0
    negative_text: Literal["prompt"] | None
    every: Positive
    critic: Critic
    align: AtLeast0
    mean_variance: AtLeast0
    decouple: Decouple
    gan: Gan


@dataclass(frozen=True)
class Recipe:
    """Which published behaviour the run follows; `sources` maps a key to where its number comes from."""

    name: str
    about: str
    sources: dict[str, str]


@dataclass(frozen=True)
class Model:
    """Shape of the transformer."""

    name: str
    heads: Positive
    head_dim: Positive
    layers: Positive
    ffn_dim: Positive
    text_dim: Positive
    freq_dim: Annotated[int, Range(at_least=2, multiple=2)]
    rope_dim: tuple[
        Annotated[int, Range(at_least=2, multiple=2)],
        Annotated[int, Range(at_least=2, multiple=2)],
        Annotated[int, Range(at_least=2, multiple=2)],
    ]
    rope_theta: Above0
    dtype: Literal["fp32", "bf16"]
    kernels: Literal["auto", "reference", "triton", "compile"]
    attention: Literal["sdpa", "cudnn", "flash", "flash3", "sage"]
    compile: bool


@dataclass(frozen=True)
class DctCodec:
    """Keys of codec=dct."""

    name: Literal["dct"]


@dataclass(frozen=True)
class WanCodec:
    """Keys of codec=wan."""

    name: Literal["wan"]
    weights: str | None


@dataclass(frozen=True)
class Text:
    """What every text encoder has."""

    rows: Positive
    dim: Positive


@dataclass(frozen=True)
class HashText(Text):
    """Keys of text=hash."""

    name: Literal["hash"]


@dataclass(frozen=True)
class Umt5Text(Text):
    """Keys of text=umt5."""

    name: Literal["umt5"]
    weights: str | None
    dtype: Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Data:
    """What every data option has."""

    root: str
    size: tuple[Pixels, Pixels]
    global_batch: Positive
    micro_batch: Positive
    workers: Count
    held_out: Count


@dataclass(frozen=True)
class ToyVideos:
    """What the rendered videos show."""

    clips: Positive
    sections: Positive
    shapes: tuple[str, ...]
    radius: tuple[Above0, Above0]
    speed: tuple[AtLeast0, AtLeast0]
    motion_in_caption: bool
    fps: Positive
    seed: Count


@dataclass(frozen=True)
class ToyData(Data):
    """Keys of data=toy."""

    name: Literal["toy"]
    toy: ToyVideos


@dataclass(frozen=True)
class FolderData(Data):
    """Keys of data=folder."""

    name: Literal["folder"]


@dataclass(frozen=True)
class Optimizer:
    """Keys of every optimizer option."""

    name: Literal["adamw", "adamw8bit"]
    lr: Above0
    betas: tuple[Decay, Decay]
    eps: Above0
    weight_decay: AtLeast0
    clip: Above0
    schedule: Literal["constant", "linear", "cosine"]
    warmup: Count
    decay: Share
    total: Positive


@dataclass(frozen=True)
class Memory:
    """Where bytes live, and what is computed again."""

    name: str
    bases: Literal["bf16", "int8", "nf4"]
    lineage: Literal["bf16", "as_bases"]
    stream: bool
    park: Literal["nothing", "heads", "idle"]
    checkpointing: bool
    checkpoint_every: Positive
    block_inputs: Literal["device", "host"]
    optimizer: Literal["device", "host"]
    gan_replay: bool


@dataclass(frozen=True)
class Trainer:
    """The loop and its devices."""

    name: Literal["default"]
    max_steps: Positive
    devices: Positive
    accelerator: Literal["auto", "cpu", "gpu"]
    log_every: Positive
    progress: bool
    nonfinite_limit: Positive


@dataclass(frozen=True)
class CsvLogger:
    """Keys of logger=csv."""

    name: Literal["csv"]


@dataclass(frozen=True)
class TensorBoardLogger:
    """Keys of logger=tensorboard."""

    name: Literal["tensorboard"]


@dataclass(frozen=True)
class WandbLogger:
    """Keys of logger=wandb."""

    name: Literal["wandb"]
    project: str
    entity: str | None
    group: str | None
    tags: tuple[str, ...]
    mode: Literal["auto", "online", "offline"]


@dataclass(frozen=True)
class Experiment:
    """A named run; its name is part of the run folder's."""

    name: str
    about: str


@dataclass(frozen=True)
class Checkpoint:
    """When weights are saved and how many files stay."""

    every: Positive
    keep: Positive


@dataclass(frozen=True)
class Config:
    """The whole config. Order matters for messages: what others interpolate (trainer, data) is read first."""

    task: Task
    stage: BaseStage | MidStage | OdeStage | DistillStage
    trainer: Trainer
    data: ToyData | FolderData
    recipe: Recipe
    model: Model
    codec: DctCodec | WanCodec
    text: HashText | Umt5Text
    optimizer: Optimizer
    memory: Memory
    logger: CsvLogger | TensorBoardLogger | WandbLogger
    watch: Watch
    experiment: Experiment
    checkpoint: Checkpoint
    run_dir: str | None
    resume: str | None
    init: str | None
    seed: Count
    prepare: Prepare | None = None
    pairs: Pairs | None = None
    merge: Merge | None = None
    sample: Sample | None = None
    evaluate: Evaluate | None = None
    chain: Chain | None = None
    plan: Plan | None = None


# Group -> its classes by `name`; "" stands for any other name. A later stage is one more entry of "stage".
GROUPS: dict[str, dict[str, type]] = {
    "task": {"": Task},
    "stage": {"base": BaseStage, "mid": MidStage, "ode": OdeStage, "distill": DistillStage},
    "recipe": {"": Recipe},
    "model": {"": Model},
    "codec": {"dct": DctCodec, "wan": WanCodec},
    "text": {"hash": HashText, "umt5": Umt5Text},
    "data": {"toy": ToyData, "folder": FolderData},
    "optimizer": {"": Optimizer},
    "memory": {"": Memory},
    "trainer": {"": Trainer},
    "logger": {"csv": CsvLogger, "tensorboard": TensorBoardLogger, "wandb": WandbLogger},
    "watch": {"": Watch},
    "experiment": {"": Experiment},
}
# Task -> the class of the keys that stand under its name.
TASKS: dict[str, type] = {
    "prepare": Prepare,
    "pairs": Pairs,
    "merge": Merge,
    "sample": Sample,
    "evaluate": Evaluate,
    "chain": Chain,
    "plan": Plan,
}
