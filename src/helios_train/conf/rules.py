"""What no single value shows: keys that must agree with one another. One ConfigError, one sentence, for the first that do not."""

from __future__ import annotations

from collections.abc import Iterator

from helios_train.conf.schema import Config, Data, FolderData, Model, ToyData
from helios_train.errors import ConfigError

NOMINAL_SIDE = 64  # pixels of the shorter side that lengths of toy videos are given for
ROUNDING = 1e-6  # shares may sum to 1 within this


def check(config: Config, sweep: bool = False) -> None:
    """Raise ConfigError for the first rule broken; `sweep`: the config is one run of a sweep."""
    if sweep and config.trainer.devices > 1:
        # the processes of further devices are started with the same command line: each would run the whole sweep
        raise ConfigError(
            f"trainer.devices={config.trainer.devices}: runs of a sweep take one device each; start them one by one"
        )
    for broken in _broken(config):
        raise ConfigError(broken)


def _broken(config: Config) -> Iterator[str]:
    mix, corrupt = config.stage.mix, config.stage.corrupt
    yield from _sum_to_one("stage.mix", {"t2v": mix.t2v, "i2v": mix.i2v, "v2v": mix.v2v, "full": mix.full})
    modes = {"noise": corrupt.noise, "blur": corrupt.blur, "saturation": corrupt.saturation, "clean": corrupt.clean}
    yield from _sum_to_one("stage.corrupt", modes)
    yield from _model(config.model)
    yield from _data(config.data, config.trainer.devices)
    if not config.watch.sigmas:
        yield "watch.sigmas=[]: name at least one noise level, or set watch.every=0"
    if config.task.name == "train" and config.model.text_dim != config.text.dim:
        yield (
            f"model.text_dim={config.model.text_dim} and text.dim={config.text.dim}: must be equal; "
            f"choose a text of that width, or set text.dim={config.model.text_dim}"
        )
    if config.prepare and isinstance(config.data, FolderData) and config.prepare.source is None:
        yield "prepare.source=null: name the folder of mp4 files to prepare (or choose data=toy)"


def _sum_to_one(key: str, shares: dict[str, float]) -> Iterator[str]:
    if abs(sum(shares.values()) - 1) > ROUNDING:
        written = " + ".join(f"{name} {share:g}" for name, share in shares.items())
        yield f"{key}: shares must sum to 1; {written} = {sum(shares.values()):g}"


def _model(model: Model) -> Iterator[str]:
    if sum(model.rope_dim) != model.head_dim:
        written = " + ".join(str(dim) for dim in model.rope_dim)
        yield f"model.rope_dim: must sum to model.head_dim={model.head_dim}; {written} = {sum(model.rope_dim)}"


def _data(data: Data, devices: int) -> Iterator[str]:
    if data.global_batch % (data.micro_batch * devices):
        yield (
            f"data.global_batch={data.global_batch}: must be a multiple of data.micro_batch={data.micro_batch} x "
            f"trainer.devices={devices}; the number of micro-batches a device accumulates is their quotient"
        )
    if not isinstance(data, ToyData):
        return
    toy = data.toy
    if data.held_out >= toy.clips:
        yield f"data.held_out={data.held_out}: must be less than data.toy.clips={toy.clips}; nothing is left to train on"
    if not toy.shapes:
        yield "data.toy.shapes=[]: name at least one shape"
    for name, (low, high) in (("radius", toy.radius), ("speed", toy.speed)):
        if low > high:
            yield f"data.toy.{name}=[{low:g},{high:g}]: must be [smallest, largest]"
    if 2 * toy.radius[1] >= NOMINAL_SIDE:
        yield f"data.toy.radius: {toy.radius[1]:g} px does not fit; it is given for videos whose shorter side is {NOMINAL_SIDE}"
