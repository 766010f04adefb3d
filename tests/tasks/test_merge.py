"""task=merge: the folder computes what the run computes, in diffusers too, and says where it comes from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import HeliosTransformer3DModel
from safetensors.torch import load_file
from torch import Tensor

from helios_train import rng
from helios_train.errors import HeliosError, InputError
from helios_train.history import FRAMES, SECTION, History
from helios_train.models import adapters
from helios_train.models.manifest import read_manifest
from helios_train.models.transformer import WEIGHTS, HeliosTransformer, load_transformer
from helios_train.tasks import build, merge

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


def content(run: Path) -> dict[str, Any]:
    return torch.load(max((run / "checkpoints").glob("*.ckpt")), weights_only=True)


def average(run: Path) -> dict[str, Tensor]:
    (state,) = [state for state in content(run)["callbacks"].values() if "average" in state]
    return state["average"]


@torch.no_grad()
def velocity(model: HeliosTransformer3DModel) -> Tensor:
    draw = rng.generator(0, "what is compared")
    frames, anchor, x_t = (rng.normal(draw, (1, 16, count, 8, 8)) for count in (FRAMES, 1, SECTION))
    call = HeliosTransformer.velocity.__get__(model)  # diffusers' model is called as ours
    return call(x_t, torch.tensor([700.0]), rng.normal(draw, (1, 16, 64)), History(frames, anchor, (FRAMES,), (True,)))


@torch.no_grad()
def own_forward(run: Path, values: dict[str, Tensor]) -> Tensor:
    """The forward of the run's transformer, adapters and all, with the trained `values`."""
    model = build.trained(run, "last").start.transformer
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
    assert not list((runs / "full" / "merged" / "adapters").iterdir())
    file = tmp_path / "out" / "adapters" / "base_2.safetensors"
    plain = HeliosTransformer3DModel.from_pretrained(runs / "full" / "merged", subfolder="transformer")
    before = velocity(plain)
    plain.load_lora_adapter(str(file), adapter_name="link")
    tensors, values = load_file(file), content(runs / "lora")["state_dict"]
    assert len(tensors) == len(values)
    whole = {name: value for name, value in tensors.items() if not name.startswith("transformer.")}
    assert {name.split(".")[0] for name in whole} == {"patch_short", "patch_mid", "patch_long"}
    plain.load_state_dict(whole, strict=False)
    merged = velocity(HeliosTransformer3DModel.from_pretrained(tmp_path / "out", subfolder="transformer"))
    distance = (velocity(plain) - merged).norm()
    if dtype_of(runs) == torch.float32:
        assert distance <= 1e-5 * merged.norm()
    assert distance < 0.5 * (before - merged).norm()


@fp32
def test_what_is_there_is_not_overwritten(runs: Path, tiny_run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty; choose another merge.output"):
        tiny_run("task=merge", f"init={runs}/full", f"merge.output={tmp_path}")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


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
    unmerged = build.unadapted(build.trained(tmp_path / "run", "auto"))
    assert torch.equal(velocity(unmerged), velocity(merged))
