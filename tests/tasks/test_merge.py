"""task=merge: the folder computes what the run computes, in diffusers too, and says where it comes from."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import HeliosPipeline, HeliosScheduler, HeliosTransformer3DModel
from safetensors.torch import load_file
from torch import Tensor

from helios_train import rng
from helios_train.errors import HeliosError, InputError
from helios_train.history import FRAMES, SECTION
from helios_train.models import adapters
from helios_train.models.codecs import dct_codec
from helios_train.models.loading import WEIGHTS, load_transformer
from helios_train.models.manifest import read_manifest
from helios_train.tasks import merge, weights

Run = Callable[..., None]
LORA = ("stage.trainable=lora", "stage.lora.rank=4", "stage.lora.alpha=8", "trainer.max_steps=2")
fp32 = pytest.mark.parametrize("runs", ["fp32"], indirect=True)  # where the dtype makes no difference
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def runs(request: pytest.FixtureRequest, tiny_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """full: 3 iterations with an average. full/merged. lora: 2 iterations on that folder. lora_ema: the same with an average."""
    folder = tmp_path_factory.mktemp(f"runs_{request.param}")
    dtype = f"model.dtype={request.param}"
    tiny_run(dtype, f"run_dir={folder}/full", "stage.ema.decay=0.9")
    tiny_run("task=merge", f"init={folder}/full")
    tiny_run(dtype, f"run_dir={folder}/lora", f"init={folder}/full/merged", *LORA)
    tiny_run(dtype, f"run_dir={folder}/lora_ema", f"init={folder}/full/merged", "stage.ema.decay=0.5", *LORA)
    return folder


def dtype_of(runs: Path) -> torch.dtype:
    return DTYPES[runs.name.split("_")[1].removesuffix("0")]


def dtype_name(runs: Path) -> str:
    return "fp32" if dtype_of(runs) == torch.float32 else "bf16"


def content(run: Path) -> dict[str, Any]:
    return torch.load(max((run / "checkpoints").glob("*.ckpt")), weights_only=True)


def average(run: Path) -> dict[str, Tensor]:
    (state,) = [state for state in content(run)["callbacks"].values() if "average" in state]
    return state["average"]


@torch.no_grad()
def velocity(model: HeliosTransformer3DModel) -> Tensor:
    draw = rng.generator(0, "what is compared")
    frames, anchor, x_t = (rng.normal(draw, (1, 16, count, 8, 8)) for count in (FRAMES, 1, SECTION))
    dtype = model.proj_out.weight.dtype
    first, long, mid, short, target = torch.arange(29)[None].split([1, 16, 2, 1, 9], dim=1)
    output = model(  # as diffusers' pipeline calls its own and ours
        hidden_states=x_t.to(dtype),
        timestep=torch.tensor([700.0]),
        encoder_hidden_states=rng.normal(draw, (1, 16, 64)).to(dtype),
        indices_hidden_states=target,
        indices_latents_history_short=torch.cat([first, short], dim=1),
        indices_latents_history_mid=mid,
        indices_latents_history_long=long,
        latents_history_short=torch.cat([anchor, frames[:, :, 18:]], dim=2).to(dtype),
        latents_history_mid=frames[:, :, 16:18].to(dtype),
        latents_history_long=frames[:, :, :16].to(dtype),
        return_dict=False,
    )
    return output[0].float()


@torch.no_grad()
def own_forward(run: Path, values: dict[str, Tensor]) -> Tensor:
    """The forward of the run's transformer, adapters and all, with the trained `values`."""
    model = weights.trained(run, "last").start.transformer
    assert adapters.trainable(model).keys() == values.keys()
    for name, parameter in adapters.trainable(model).items():
        parameter.copy_(values[name])
    return velocity(model.eval())


@pytest.mark.parametrize(
    ("name", "weights"), [("full", "auto"), ("full", "last"), ("lora", "auto"), ("lora_ema", "ema"), ("lora_ema", "last")]
)
def test_the_folder_computes_what_the_run_computes(runs: Path, tiny_run: Run, tmp_path: Path, name: str, weights: str) -> None:
    run, ema = runs / name, weights != "last" and name != "lora"
    tiny_run("task=merge", f"init={run}", f"merge.output={tmp_path}/out", f"merge.weights={weights}")
    last = content(run)["state_dict"]
    values = average(run) if ema else last
    assert not ema or not all(torch.equal(values[key], last[key]) for key in last)
    dtype = dtype_of(runs)
    plain = HeliosTransformer3DModel.from_pretrained(tmp_path / "out", subfolder="transformer", torch_dtype=dtype)
    expected = own_forward(run, values)
    start = velocity(load_transformer(runs / "full" / "merged", dtype))
    distance = (velocity(plain) - expected).norm() / expected.norm()
    assert distance <= (1e-5 if dtype == torch.float32 else 3e-2)
    assert name == "full" or (start - expected).norm() > 2 * distance * expected.norm()
    link = read_manifest(tmp_path / "out").lineage[-1]
    assert (link.iterations, link.weights, link.trained) == (
        3 if name == "full" else 2,
        "ema" if ema else "last",
        name.split("_")[0],
    )
    assert not (tmp_path / "out.tmp").exists()


def test_every_weight_is_the_rounded_fp32_fold(runs: Path, tiny_run: Run, tmp_path: Path) -> None:
    tiny_run("task=merge", f"init={runs}/lora", f"merge.output={tmp_path}/out")
    base, merged = (
        load_file(folder / "transformer" / f"{WEIGHTS}.safetensors") for folder in (runs / "full" / "merged", tmp_path / "out")
    )
    values = content(runs / "lora")["state_dict"]
    assert base.keys() == merged.keys()
    changed = 0
    for name, stored in merged.items():
        layer = name.removesuffix(".weight")
        exact = values.get(name, base[name].float())
        if f"{layer}.lora_A.student.weight" in values:
            A, B = (values[f"{layer}.lora_{side}.student.weight"].flatten(1) for side in "AB")
            exact = exact + 2.0 * (B @ A).view_as(exact)  # alpha / rank
            changed += not torch.equal(stored, base[name])
        assert stored.dtype == base[name].dtype and torch.equal(stored, exact.to(stored.dtype)), name
    assert changed > 20 or (changed and dtype_of(runs) == torch.bfloat16)
    full, masters = base, average(runs / "full")
    assert all(torch.equal(full[name], masters[name].to(full[name].dtype)) for name in masters)


def test_the_lineage_and_the_adapter(runs: Path, tiny_run: Run, tmp_path: Path) -> None:
    """diffusers puts the adapter, with its scale, on the base it was trained on, and computes what the merged folder does."""
    tiny_run("task=merge", f"init={runs}/lora", f"merge.output={tmp_path}/out")
    first, second = (read_manifest(folder) for folder in (runs / "full" / "merged", tmp_path / "out"))
    assert first.base is None and len(first.lineage) == 1 and second.lineage[:1] == first.lineage
    assert [(link.trained, link.weights, link.iterations) for link in second.lineage] == [("full", "ema", 3), ("lora", "last", 2)]
    assert second.base and second.size == (64, 64)
    assert not (runs / "full" / "merged" / "adapters").exists() and not first.adapters
    file, layers = (tmp_path / "out" / name for name in second.adapters["base_2"])
    plain = HeliosTransformer3DModel.from_pretrained(runs / "full" / "merged", subfolder="transformer")
    before = velocity(plain)
    plain.load_lora_adapter(str(file), adapter_name="link")
    whole, values = load_file(layers), content(runs / "lora")["state_dict"]
    assert len(load_file(file)) + len(whole) == len(values)
    assert {name.split(".")[0] for name in whole} == {"patch_short", "patch_mid", "patch_long"}
    assert not plain.load_state_dict(whole, strict=False).unexpected_keys
    merged = velocity(HeliosTransformer3DModel.from_pretrained(tmp_path / "out", subfolder="transformer"))
    distance = (velocity(plain) - merged).norm()
    if dtype_of(runs) == torch.float32:
        assert distance <= 1e-5 * merged.norm()
    assert distance < 0.5 * (before - merged).norm()


@fp32
def test_what_is_there_is_not_overwritten(runs: Path, tiny_run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for output in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(InputError, match="is not empty; choose another merge.output"):
            tiny_run("task=merge", f"init={runs}/full", f"merge.output={output}")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"] and (tmp_path / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("patches", [True, False])
def test_an_adapter_alone(runs: Path, tiny_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], patches: bool) -> None:
    """diffusers' pipeline takes it as a LoRA on the base it was trained on, and computes what the merged folder does."""
    run = runs / "lora"
    if not patches:
        run, own = tmp_path / "run", "stage.lora.history_patches=false"
        tiny_run(f"run_dir={run}", f"init={runs}/full/merged", *LORA, own, f"model.dtype={dtype_name(runs)}")
    tiny_run("task=merge", f"init={run}", f"merge.output={tmp_path}/merged")
    capsys.readouterr()
    tiny_run("task=merge", f"init={run}", f"merge.output={tmp_path}/alone", "merge.adapter_only=true")
    said, known = capsys.readouterr().out, read_manifest(tmp_path / "alone")
    names = ["adapters/base_2.safetensors", *["adapters/base_2.trained_layers.safetensors"] * patches]
    files = sorted(str(path.relative_to(tmp_path / "alone")) for path in (tmp_path / "alone").rglob("*") if path.is_file())
    assert files == [*names, "helios_train.json"] and known.adapters == {"base_2": names}
    assert all(name in said for name in names) and ("trained in full; the adapter needs them" in said) == patches
    assert known.lineage == read_manifest(tmp_path / "merged").lineage
    plain = HeliosTransformer3DModel.from_pretrained(runs / "full" / "merged", subfolder="transformer")
    before = velocity(plain)
    pipeline = HeliosPipeline(None, None, dct_codec().vae, HeliosScheduler(), plain)
    pipeline.load_lora_weights(tmp_path / "alone" / names[0])
    if patches:
        plain.load_state_dict(load_file(tmp_path / "alone" / names[1]), strict=False)
    merged = velocity(HeliosTransformer3DModel.from_pretrained(tmp_path / "merged", subfolder="transformer"))
    distance = (velocity(plain) - merged).norm()
    if dtype_of(runs) == torch.float32:
        assert distance <= 1e-5 * merged.norm()
    assert distance < 0.5 * (before - merged).norm()


@fp32
def test_no_adapter_to_write(runs: Path, tiny_run: Run, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="every weight was trained, so there is no adapter; use merge.adapter_only=false"):
        tiny_run("task=merge", f"init={runs}/full", f"merge.output={tmp_path}/out", "merge.adapter_only=true")
    assert not list(tmp_path.iterdir())


@fp32
def test_an_adapter_alone_is_no_start(runs: Path, tiny_run: Run, tmp_path: Path) -> None:
    run = shutil.copytree(runs / "lora", tmp_path / "run")
    tiny_run("task=merge", f"init={run}", "merge.adapter_only=true")
    assert read_manifest(run / "adapter") is not None
    with pytest.raises(InputError, match="holds adapters alone; merge their run with merge.adapter_only=false"):
        tiny_run(f"run_dir={tmp_path}/next", f"init={run}/adapter", *LORA)


@fp32
def test_every_link_s_adapter_comes_along(runs: Path, tiny_run: Run, tmp_path: Path) -> None:
    tiny_run("task=merge", f"init={runs}/lora", f"merge.output={tmp_path}/second")
    tiny_run(f"run_dir={tmp_path}/run", f"init={tmp_path}/second", *LORA)
    tiny_run("task=merge", f"init={tmp_path}/run", f"merge.output={tmp_path}/third")
    known = read_manifest(tmp_path / "third")
    assert known.adapters.keys() == {"base_2", "base_3"} and [link.stage for link in known.lineage] == ["base"] * 3
    for file in known.adapters["base_2"]:
        assert (tmp_path / "third" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
    assert (tmp_path / "third" / known.adapters["base_3"][0]).is_file()
    (tmp_path / "second" / "adapters" / "base_2.safetensors").unlink()
    with pytest.raises(InputError, match="base_2.safetensors: is missing, but helios_train.json lists it"):
        tiny_run("task=merge", f"init={tmp_path}/run", f"merge.output={tmp_path}/again")
    assert not (tmp_path / "again").exists() and not (tmp_path / "again.tmp").exists()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 96 KB: less than the weights, and more than a file's first pages."""
    place = tmp_path / "disk"
    place.mkdir()
    try:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", place], capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", place], check=True)


@fp32
@pytest.mark.parametrize("alone", ["true", "false"])
def test_a_full_disk(runs: Path, tiny_run: Run, disk: Path, alone: str) -> None:
    (disk / "mine.txt").write_text("mine")
    (disk / "filled").write_bytes(bytes(60_000 if alone == "true" else 0))
    with pytest.raises(InputError, match="out: cannot be written .*; make room, or choose another merge.output"):
        tiny_run("task=merge", f"init={runs}/lora", f"merge.output={disk}/out", f"merge.adapter_only={alone}")
    assert sorted(path.name for path in disk.iterdir()) == ["filled", "mine.txt"] and (disk / "mine.txt").read_text() == "mine"


@fp32
def test_a_place_that_cannot_be_written(runs: Path, tiny_run: Run, disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with pytest.raises(InputError, match="out: cannot be written .*Read-only file system"):
        tiny_run("task=merge", f"init={runs}/lora", f"merge.output={disk}/out")
    file = runs / "full" / "config.yaml"
    with pytest.raises(InputError, match="cannot be written .*Not a directory"):
        tiny_run("task=merge", f"init={runs}/lora", f"merge.output={file}/out")


@fp32
def test_the_encoders_are_those_of_the_dataset(runs: Path, tiny_run: Run, tmp_path: Path) -> None:
    """As the shards were made, not as the config says now; the shards may be gone."""
    run = shutil.copytree(runs / "full", tmp_path / "run")
    file = max((run / "checkpoints").glob("*.ckpt"))
    changed = content(run)
    stored = changed["WindowModule"]["encoders"]
    assert stored["codec"]["fingerprint"] == dct_codec().fingerprint() and stored["text"]["dim"] == 64
    stored["codec"]["fingerprint"], stored["text"]["fingerprint"] = "c" * 64, "d" * 64
    torch.save(changed, file)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(re.sub(r"(?m)^  root: .*$", f"  root: {tmp_path}/gone", config))
    tiny_run("task=merge", f"init={run}", f"merge.output={tmp_path}/out")
    known = read_manifest(tmp_path / "out")
    assert known.codec == {"name": "dct", "fingerprint": "c" * 64}
    assert known.text == {"name": "hash", "fingerprint": "d" * 64, "rows": 16, "dim": 64}


@fp32
def test_no_average_to_merge(runs: Path, tiny_run: Run, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no EMA.*use weights=last"):
        tiny_run("task=merge", f"init={runs}/lora", f"merge.output={tmp_path}/out", "merge.weights=ema")
    assert not list(tmp_path.iterdir())


FAULTS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "missing": (lambda weights: weights.pop("patch_mid.bias"), "missing patch_mid.bias"),
    "extra": (lambda weights: weights.update(stray=torch.zeros(1)), "unexpected stray"),
    "misshapen": (lambda weights: weights.update({"patch_long.bias": torch.zeros(3)}), r"patch_long.bias is \(3,\), not \(16,\)"),
}


@fp32
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("which", ["last", "ema"])
def test_a_wrong_key_is_refused_by_name(runs: Path, tiny_run: Run, tmp_path: Path, fault: str, which: str) -> None:
    change, said = FAULTS[fault]
    run = shutil.copytree(runs / "lora_ema", tmp_path / "run")
    file = max((run / "checkpoints").glob("*.ckpt"))
    damaged = torch.load(file, weights_only=True)
    states = [damaged["state_dict"]] + [state["average"] for state in damaged["callbacks"].values() if "average" in state]
    change(states[which == "ema"])
    torch.save(damaged, file)
    with pytest.raises(InputError, match=said) as caught:
        tiny_run("task=merge", f"init={run}", f"merge.output={tmp_path}/out", f"merge.weights={which}")
    assert file.name in str(caught.value) and not (tmp_path / "out").exists()


@fp32
def test_a_fold_that_changes_the_forward_leaves_no_folder(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def doubled(*args: Any) -> dict[str, Tensor]:
        return {name: 2 * value for name, value in fold(*args).items()}

    fold = adapters.folded
    monkeypatch.setattr(adapters, "folded", doubled)
    (tmp_path / "out.tmp").mkdir()  # of a merge that was killed
    with pytest.raises(HeliosError, match="compute something else"):
        merge.merge(runs / "lora", tmp_path / "out", "auto")
    assert not list(tmp_path.iterdir())


@fp32
def test_the_config_goes_along(runs: Path, tiny_run: Run, tmp_path: Path) -> None:
    """What no key of ours sets, as the base has it: here the history's own time."""
    folder = shutil.copytree(runs / "full" / "merged", tmp_path / "base")
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"zero_history_timestep": False}))
    tiny_run(f"run_dir={tmp_path}/run", f"init={folder}", *LORA)
    tiny_run("task=merge", f"init={tmp_path}/run")
    merged = load_transformer(tmp_path / "run" / "merged", torch.float32)
    assert merged.config.zero_history_timestep is False
    unmerged = weights.unadapted(weights.trained(tmp_path / "run", "auto"))
    assert torch.equal(velocity(unmerged), velocity(merged))
