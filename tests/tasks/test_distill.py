"""From a merged model to a few-step student: pairs, regression, distribution matching, merged and sampled as diffusers does."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from helios_train import rng
from helios_train.conf import compose
from helios_train.data.format import NEGATIVE
from helios_train.data.order import Ref
from helios_train.data.pairs import PairStore, read_pairs_manifest
from helios_train.errors import ConfigError, InputError
from helios_train.history import FRAMES, SECTION, History
from helios_train.models import checkpoint, manifest
from helios_train.models.loading import load_transformer
from helios_train.models.roles import CRITIC, STUDENT, TEACHER
from helios_train.models.text import HashText
from helios_train.sampling.pipeline import SamplerSettings
from helios_train.stages.distill import DistillStage
from helios_train.tasks import build
from helios_train.tasks.prepare import NEGATIVE_PROMPT

from ..conftest import TINY_RUN
from ..resume.runs import last_tensors

Run = Callable[..., None]
SIZE = ("data.size=[64,64]", "data.global_batch=2", "data.micro_batch=1", "data.toy.sections=2")
MID = (
    *SIZE,
    "stage=mid",
    "stage.pyramid.ratios=[1,1]",
    "stage.pyramid.positions=matched",
    "stage.lora.rank=2",
    "stage.lora.alpha=2",
    "stage.lora.history_patches=true",
)
FEW = ("stage.student.steps=[2,2]", "stage.lora.rank=2", "stage.lora.alpha=2")


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory, tiny_run: Run) -> Path:
    """A folder with base/ and mid/, models of one level and of two."""
    folder = tmp_path_factory.mktemp("merged")
    before: tuple[str, ...] = ()
    for name, words in (("base", SIZE), ("mid", MID)):
        tiny_run(*words, *before, f"run_dir={folder / f'run_{name}'}", "trainer.max_steps=1")
        tiny_run(*words, "task=merge", f"init={folder / f'run_{name}'}", f"merge.output={folder / name}")
        before = (f"init={folder / name}",)
    return folder


def pairs_words(merged: Path, output: Path, *more: str) -> tuple[str, ...]:
    small = ("pairs.count=5", "pairs.sections=2", "pairs.steps=3", "pairs.shard_samples=2", "pairs.batch=2", "pairs.guidance=2")
    return (*SIZE, *FEW, "stage=ode", "task=pairs", f"init={merged / 'mid'}", f"pairs.output={output}", *small, *more)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, tiny_run: Run, merged: Path) -> Path:
    output = tmp_path_factory.mktemp("pairs") / "made"
    tiny_run(*pairs_words(merged, output))
    return output


def contents(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.suffix in (".tar", ".json")
    }


def test_pairs_are_the_same_in_parts_and_after_a_stop(pairs: Path, tmp_path: Path, tiny_run: Run, merged: Path) -> None:
    parts = tmp_path / "parts"
    for part in ("2/2", "1/2"):
        with pytest.raises(InputError, match="run task=pairs"):
            read_pairs_manifest(parts)
        tiny_run(*pairs_words(merged, parts, f"pairs.part={part}"))
    assert contents(parts) == contents(pairs)
    (parts / "pairs.json").unlink()
    (parts / "ode" / "000001.idx").unlink()  # a shard that a killed process left without its index
    tiny_run(*pairs_words(merged, parts))
    assert contents(parts) == contents(pairs)
    with pytest.raises(InputError, match="another teacher, dataset or settings"):
        tiny_run(*pairs_words(merged, parts, "pairs.guidance=3"))


def test_pairs_go_with_the_stage_that_learns_from_them(tmp_path: Path, tiny_run: Run, merged: Path) -> None:
    with pytest.raises(ConfigError, match="add stage=ode"):
        tiny_run(*SIZE, "task=pairs", f"init={merged / 'mid'}", f"pairs.output={tmp_path}")


def test_what_a_pair_holds(pairs: Path) -> None:
    store = PairStore(pairs, 16)
    assert len(store) == 5 and [len(shard) for shard in store.by_shard()] == [2, 2, 1]
    one, other = (store[Ref(0, 0, 0, number)].trajectory for number in (0, 4))
    assert [[len(walk.times) for walk in levels] for levels in one.sections] == [
        [4, 4],
        [2, 2],
    ]  # amplified where nothing precedes
    for levels in one.sections:
        for walk, side in zip(levels, (4, 8), strict=True):
            assert walk.latents.shape[1:] == (16, 9, side, side) and walk.latents.isfinite().all()
            assert (np.diff(walk.times) < 0).all()
    assert not torch.equal(one.sections[0][0].latents[0], other.sections[0][0].latents[0]), "every pair has noise of its own"
    histories = list(one.histories())
    assert histories[0].empty == (True,) and histories[1].counts == (9,)
    torch.testing.assert_close(histories[1].frames[:, :, -9:], one.final(0))


def test_damaged_pairs_are_named(pairs: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(pairs, copy)
    tar = copy / "ode" / "000000.tar"
    data = bytearray(tar.read_bytes())
    data[3000] ^= 1
    tar.write_bytes(data)
    with pytest.raises(InputError, match=r"000000.tar, pair pair-000000000: ode.safetensors is damaged"):
        PairStore(copy, 16)[Ref(0, 0, 0, 0)]
    raw = json.loads((copy / "pairs.json").read_text())
    (copy / "pairs.json").write_text(json.dumps(raw | {"latent": [1, 2, 3, 4]}))
    with pytest.raises(InputError, match="does not match its sha"):
        read_pairs_manifest(copy)
    (copy / "pairs.json").write_text(json.dumps(raw | {"schema": 99}))
    with pytest.raises(InputError, match="schema 99 is newer"):
        read_pairs_manifest(copy)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory, tiny_run: Run, merged: Path, pairs: Path) -> Path:
    """A student by regression, merged."""
    folder = tmp_path_factory.mktemp("student")
    words = (*SIZE, *FEW, "stage=ode", f"init={merged / 'mid'}", f"stage.pairs={pairs}")
    tiny_run(*words, f"run_dir={folder / 'run'}", "trainer.log_every=1", "stage.sections=1")
    tiny_run(*words, "task=merge", f"init={folder / 'run'}", f"merge.output={folder / 'ode'}")
    return folder


def test_regression_logs_its_levels_and_keeps_what_a_sampler_must_know(student: Path) -> None:
    with (student / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 and all(float(row["loss"]) > 0 and float(row["loss/level_1"]) > 0 for row in rows)
    known = manifest.read_manifest(student / "ode")
    assert known is not None and [link.stage for link in known.lineage] == ["base", "mid", "ode"]
    settings = SamplerSettings.read(known.sampler)
    assert (settings.few_steps, settings.levels, settings.distilled) == ((2, 2), 2, True)
    index = json.loads((student / "ode" / "model_index.json").read_text())
    assert index["_class_name"] == "HeliosPyramidPipeline" and index["is_distilled"] is True
    assert index["scheduler"] == ["diffusers", "HeliosDMDScheduler"]


def distill_words(merged: Path, student: Path, *more: str) -> tuple[str, ...]:
    cast = (f"init={student / 'ode'}", f"stage.teacher={merged / 'base'}", "stage.every=2")
    return (*SIZE, "stage=distill", *FEW, *cast, "trainer.log_every=1", *more)


def test_distilled_merged_and_sampled(tmp_path: Path, tiny_run: Run, merged: Path, student: Path) -> None:
    run = tmp_path / "run"
    words = distill_words(merged, student)
    tiny_run(
        *words, f"run_dir={run}", "stage.ema.start=0", "watch.sample=true", "watch.sample_sections=1", "watch.sample_steps=2"
    )
    content = checkpoint.read(next((run / "checkpoints").glob("*3.ckpt")))
    adapters = {name for name in content["state_dict"] if not name.startswith("heads.critic.")}
    assert {name.split(".lora_")[1].split(".")[1] for name in adapters} == {"student", "critic"} and len(adapters) < len(
        content["state_dict"]
    )
    assert len(content["optimizer_states"]) == 2 and content["global_step"] == 3
    (average,) = (state for state in content["callbacks"].values() if "average" in state)
    assert average["updates"] == 2 and all(".critic." not in name for name in average["average"])  # iterations 0 and 2
    shown = sorted(path.name.split("_")[1] for path in (run / "videos").glob("*.mp4"))
    assert shown == ["ema", "student", "teacher"]
    with (run / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["critic/loss/critic"]]  # the others are of the videos
    assert float(rows[1]["student/loss"]) == float(rows[0]["student/loss"]) != float(rows[2]["student/loss"])
    assert len({row["critic/loss/critic"] for row in rows}) == 3
    merge = ("task=merge", f"init={run}", f"merge.output={tmp_path / 'merged'}", "merge.weights=last")
    tiny_run(*words, *merge)
    known = manifest.read_manifest(tmp_path / "merged")
    assert known is not None and [link.stage for link in known.lineage] == ["base", "mid", "ode", "distill"]
    assert known.lineage[-1].trained == "lora" and "adapters/distill.safetensors" in known.adapters["distill"]
    sample = ("task=sample", f"init={tmp_path / 'merged'}", f"sample.output={tmp_path / 'samples'}", "sample.count=1")
    tiny_run(*SIZE, *sample, "sample.sections=2", "sample.guidance=7")
    facts = json.loads(next((tmp_path / "samples").glob("*.json")).read_text())
    assert facts["steps"] == [2, 2] and facts["guidance"] == 1.0  # its own, whatever is asked


def test_on_a_shared_base_the_student_is_its_lineage(tmp_path: Path, tiny_run: Run, merged: Path, student: Path) -> None:
    """Before training it computes what its merged folder does; both kinds of bases train, merge and are sampled."""
    words = distill_words(merged, student, "stage.bases=shared", "memory.checkpointing=true")
    config = compose.compose([*TINY_RUN, *words])
    stage = build.stage(config)
    assert isinstance(stage, DistillStage) and stage.roles.shared
    plain = {
        name: load_transformer(folder, torch.float32).eval()
        for name, folder in (("ode", student / "ode"), ("base", merged / "base"))
    }
    draw = rng.generator(0, "inputs")
    frames, anchor = rng.normal(draw, (1, 16, FRAMES, 8, 8)), rng.normal(draw, (1, 16, 1, 8, 8))
    given = (rng.normal(draw, (1, 16, SECTION, 8, 8)), torch.tensor([500.0]), rng.normal(draw, (1, 16, 64)))
    history = History(frames, anchor, (FRAMES,), (True,))
    stage.transformer.eval()
    for role, name in ((STUDENT, "ode"), (CRITIC, "base"), (TEACHER, "base")):
        torch.testing.assert_close(
            stage.roles.velocity(role)(*given, history), plain[name].velocity(*given, history), rtol=1e-4, atol=1e-5
        )
    small = (given[0][..., :4, :4], *given[1:])
    own, shared = plain["ode"].velocity(*small, history), stage.roles.velocity(STUDENT)(*small, history)
    torch.testing.assert_close(shared, own, rtol=1e-4, atol=1e-5)
    plain["ode"].position("own")
    assert not torch.allclose(own, plain["ode"].velocity(*small, history)), "the mid model's positions are the student's"
    with pytest.raises(AssertionError):
        torch.testing.assert_close(plain["ode"].velocity(*given, history), plain["base"].velocity(*given, history))
    run = tmp_path / "run"
    tiny_run(*words, f"run_dir={run}")
    tiny_run(*words, "task=merge", f"init={run}", f"merge.output={tmp_path / 'merged'}")
    known = manifest.read_manifest(tmp_path / "merged")
    assert known is not None and [link.stage for link in known.lineage] == ["base", "mid", "ode", "distill"]


def test_it_goes_on_under_another_memory_choice(tmp_path: Path, tiny_run: Run, merged: Path, student: Path) -> None:
    """To the bit: a base streamed, the adversary's heads parked, its graphs kept, from the middle of the run on."""
    words = distill_words(merged, student, "stage.gan.start=1", "stage.gan.head_width=32", "stage.bases=distinct")
    words += ("trainer.max_steps=4", "checkpoint.every=2", "watch.sample=false", "watch.every=0")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    tiny_run(*words, "memory=h100_80gb", f"run_dir={whole}")
    tiny_run(*words, "memory=h100_80gb", f"run_dir={cut}", "trainer.max_steps=2", "optimizer.total=4")
    tiny_run(*words, "memory=stream", "memory.gan_replay=false", f"run_dir={cut}", "resume=auto")
    expected, found = last_tensors(whole), last_tensors(cut)
    assert len(found) > 50
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_the_negative_prompt_of_the_dataset_reaches_the_teacher(
    tmp_path: Path, tiny_run: Run, merged: Path, student: Path
) -> None:
    words = distill_words(merged, student, "stage.negative_text=prompt")
    with pytest.raises(InputError, match=r"has no negative prompt; prepare it with prepare.negative_text=published"):
        tiny_run(*words, f"run_dir={tmp_path / 'run'}")
    root = f"data.root={tmp_path / 'shards'}"
    tiny_run(*SIZE, "task=prepare", root, "prepare.negative_text=published")
    stage = build.stage(compose.compose([*TINY_RUN, *words, root]))
    assert isinstance(stage, DistillStage) and stage.recipe.negative is not None
    expected = HashText().encode([NEGATIVE_PROMPT])[0]
    torch.testing.assert_close(stage.recipe.negative[: len(expected)], expected, rtol=1e-2, atol=1e-2)  # stored in bf16
    assert stage.recipe.negative.shape == (16, 64) and torch.count_nonzero(stage.recipe.negative[len(expected) :]) == 0
    seen = []
    teacher = stage.cast.teacher
    stage.cast = replace(stage.cast, teacher=lambda x, t, text, history: (seen.append(text), teacher(x, t, text, history))[1])
    (batch,) = [
        pairs
        for pairs, _ in zip(build.data(compose.compose([*TINY_RUN, *words, root])).train_dataloader(), range(1), strict=False)
    ]
    stage.alone().training_step([pair.to("cpu") for pair in batch], 0)
    assert any(torch.equal(text[0], stage.recipe.negative) for text in seen)
    (tmp_path / "shards" / NEGATIVE).write_bytes(b"x")
    with pytest.raises(InputError, match="missing or not the file"):
        build.negative_text(compose.compose([*TINY_RUN, *words, root]))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("stage.teacher=null",), "takes a teacher"),
        (("stage.student.steps=[2,2,2]",), "levels"),
        (("stage.rollout.sections=[1,2]",), "stage.rollout.history=own"),
        (("stage.renoise.low=990",), "from low to high"),
        (("model.layers=1",), "has num_layers"),
        (("stage.bases=shared", "stage.teacher={student}/run"), "its lineage is unknown"),
        (
            ("stage.bases=shared", "stage.teacher={student}/ode", "init={merged}/base", "stage.student.steps=[2]"),
            "no chain of adapters",
        ),
    ],
)
def test_bad_input_of_distillation(
    words: tuple[str, ...], said: str, tmp_path: Path, tiny_run: Run, merged: Path, student: Path
) -> None:
    given = [word.replace("{student}", str(student)).replace("{merged}", str(merged)) for word in words]
    with pytest.raises((InputError, ConfigError), match=said):
        tiny_run(*distill_words(merged, student), f"run_dir={tmp_path / 'run'}", *given)


def test_regression_without_pairs_or_on_other_pairs(tmp_path: Path, tiny_run: Run, merged: Path, pairs: Path) -> None:
    words = (*SIZE, "stage=ode", f"init={merged / 'mid'}", f"run_dir={tmp_path / 'run'}")
    with pytest.raises(InputError, match=r"stage.pairs=null.*task=pairs"):
        tiny_run(*words, *FEW)
    with pytest.raises(InputError, match=r"made for a student of steps=\[2, 2\]"):
        tiny_run(*words, f"stage.pairs={pairs}", "stage.student.steps=[2,3]")


def test_published_pairs_share_one_noise(tmp_path: Path, tiny_run: Run, merged: Path, pairs: Path) -> None:
    output = tmp_path / "pairs"
    tiny_run(*pairs_words(merged, output, "recipe=released", "pairs.count=3", "stage.student.shift_tokens=before"))
    store = PairStore(output, 16)
    one, other = (store[Ref(0, 0, 0, number)].trajectory for number in (0, 2))
    assert torch.equal(one.sections[0][0].latents[0], other.sections[0][0].latents[0])
    assert not torch.equal(one.final(0), other.final(0)), "their captions differ"
    words = (*SIZE, *FEW, "stage=ode", f"init={merged / 'mid'}", f"run_dir={tmp_path / 'run'}")
    with pytest.raises(InputError, match=r"has one noise, stage.pair_noise=each"):
        tiny_run(*words, f"stage.pairs={output}")


def test_pairs_of_a_teacher_of_another_life_are_refused(tmp_path: Path, tiny_run: Run, merged: Path, pairs: Path) -> None:
    """A student may start from the teacher, or from what was made from it."""
    other, known = tmp_path / "other", manifest.read_manifest(merged / "mid")
    shutil.copytree(merged / "mid", other)
    assert known is not None
    base, mid = known.lineage
    manifest.write_manifest(other, replace(known, lineage=(base, replace(mid, seed=8))))
    words = (*SIZE, *FEW, "stage=ode", f"run_dir={tmp_path / 'run'}", f"stage.pairs={pairs}", "trainer.max_steps=1")
    with pytest.raises(InputError, match=r"its teacher was not made as init=.*\(mid of seed=0, here mid of seed=8\)"):
        tiny_run(*words, f"init={other}")
    manifest.write_manifest(other, replace(known, lineage=(base, mid, replace(mid, seed=8))))
    tiny_run(*words, f"init={other}")
