"""The Distill step: whose weights change, in which iterations, and what a NaN, several sections and other devices make of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from helios_train import rng
from helios_train.conf.compose import compose
from helios_train.conf.schema import Config
from helios_train.data.batch import Window, WindowPair
from helios_train.data.order import Ref
from helios_train.errors import ConfigError, InputError
from helios_train.history import FRAMES, SECTION, History, mix
from helios_train.models.loading import random_transformer
from helios_train.models.roles import CRITIC, STUDENT, TEACHER
from helios_train.objectives.flow import Loss
from helios_train.stages.distill import DistillStage, Drift, SectionCount
from helios_train.tasks import build, recipes
from helios_train.tasks.weights import shape

TINY = [
    "stage=distill",
    "model.heads=1",
    "model.head_dim=16",
    "model.rope_dim=[8,4,4]",
    "model.layers=2",
    "model.ffn_dim=32",
    "data.size=[64,64]",
    "data.global_batch=2",
    "data.micro_batch=1",
    "stage.student.steps=[2,2]",
    "stage.lora.rank=2",
    "stage.every=2",
    "stage.critic.lr=1e-3",
]


def config(*words: str) -> Config:
    return compose([*TINY, *words])


@torch.no_grad()
def built(given: Config, shared: bool = False) -> DistillStage:
    """Student and teacher of other weights, as after several stages; alone."""
    scores, student = (random_transformer(shape(given), torch.float32, seed) for seed in (0, 1))
    for number, one in enumerate((scores, student)):
        one.proj_out.weight.copy_(0.1 * rng.normal(rng.generator(number, "out"), one.proj_out.weight.shape))
    student = scores if shared else student
    build.adapt_cast(given, student, scores)
    return build.distill_of(given, student, scores).alone()


def window(position: int, iteration: int, seed: int = 0) -> Window:
    draw = rng.generator(seed, "window", position, iteration)
    frames, anchor = rng.normal(draw, (1, 16, FRAMES, 8, 8)), rng.normal(draw, (1, 16, 1, 8, 8))
    ref = Ref(iteration=iteration, position=position, epoch=0, sample=position)
    history = History(frames, anchor, (FRAMES,), (True,))
    return Window(rng.normal(draw, (1, 16, SECTION, 8, 8)), history, rng.normal(draw, (1, 16, 64)), (ref,), (3,))


def batch(iteration: int, size: int = 2) -> list[WindowPair]:
    return [WindowPair(window(place, iteration), window(place, iteration, seed=1)) for place in range(size)]


def weights(stage: DistillStage, role: str) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in stage.roles.trainable(role).items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def everything(stage: DistillStage) -> Iterator[tuple[str, Tensor]]:
    yield from stage.roles.student.transformer.state_dict().items()
    for name, value in stage.roles.scores.transformer.state_dict().items():
        yield f"scores.{name}", value


@pytest.mark.parametrize("shared", [True, False])
def test_who_changes_when(shared: bool) -> None:
    """The student in its turns, the critic always, nothing else ever; every flag stays."""
    stage = built(config("memory.checkpointing=true"), shared)
    flags = {name: weight.requires_grad for name, weight in stage.named_parameters()}
    frozen = {name: value.clone() for name, value in everything(stage) if ".lora_" not in name}
    for iteration in range(4):
        before = weights(stage, STUDENT), weights(stage, CRITIC)
        stage.training_step(batch(iteration), iteration)
        assert same(before[0], weights(stage, STUDENT)) is (iteration % 2 == 1), iteration
        assert not same(before[1], weights(stage, CRITIC))
        assert stage.averages_now is (iteration % 2 == 0)
        assert stage.iteration == iteration + 1
        assert {name: weight.requires_grad for name, weight in stage.named_parameters()} == flags
    assert same(frozen, dict(everything(stage)))
    assert float(stage.last["student/saturation_real"]) == pytest.approx(1, abs=0.1) and stage.last["student/saturation"] > 0
    assert stage.last["student/loss"] > 0 and stage.last["critic/loss/critic"] > 0 and stage.skipped == 0


def test_checkpointing_and_accumulation_change_nothing() -> None:
    """Two samples in one window, one after the other, or in windows of their own, with blocks computed again or kept."""
    losses, states = [], []
    for words, pairs in (
        ((), batch(0)),
        (("memory.checkpointing=true",), batch(0)),
        (("data.micro_batch=2",), [WindowPair(joined(0, 0), joined(0, 1))]),
    ):
        stage = built(config(*words))
        stage.training_step(pairs, 0)
        losses.append({name: float(value) for name, value in stage.last.items() if not math.isnan(float(value))})
        states.append(stage.state_dict())
    for other, state in zip(losses[1:], states[1:], strict=True):
        assert other == pytest.approx(losses[0], rel=1e-5)
        for name, value in state.items():
            torch.testing.assert_close(value, states[0][name], rtol=1e-4, atol=1e-6)


def joined(iteration: int, seed: int) -> Window:
    one, other = window(0, iteration, seed), window(1, iteration, seed)
    tensors = {name: torch.cat([getattr(one, name), getattr(other, name)]) for name in ("target", "text")}
    history = History(
        torch.cat([one.history.frames, other.history.frames]),
        torch.cat([one.history.anchor, other.history.anchor]),
        one.history.counts * 2,
        one.history.anchored * 2,
    )
    return replace(one, **tensors, history=history, refs=one.refs + other.refs, sections=one.sections * 2)


@pytest.mark.parametrize(("role", "skipped"), [(STUDENT, [1, 1]), (CRITIC, [1, 2]), (TEACHER, [1, 0])])
def test_a_role_that_is_not_finite_is_skipped_and_counted(role: str, skipped: list[int]) -> None:
    """Weights and moments stay as they are; a NaN of the student's is the critic's too, which learns from what it makes."""
    stage = built(config())
    velocity = stage.roles.velocity(role)
    broken = {role: lambda *given: velocity(*given) * math.nan}
    stage.cast = replace(stage.cast, **broken)
    before = weights(stage, STUDENT), weights(stage, CRITIC)
    for iteration in range(2):
        stage.training_step(batch(iteration), iteration)
    assert [trainee.skipped for trainee in stage.trainees] == [1, 2 if role != TEACHER else 0]
    assert same(before[0], weights(stage, STUDENT)) and same(before[1], weights(stage, CRITIC)) is (role != TEACHER)
    assert stage.iteration == 2 and stage.skipped_in_a_row == (1 if role == TEACHER else 2)
    assert skipped[0] == 1


def test_draws_of_student_and_critic_are_their_own() -> None:
    stage = built(config())
    sample = window(0, 0)
    seen = {}
    for who in (STUDENT, CRITIC):
        told, sections = stage.told(sample, who)
        objective: Any = stage.recipe.student if who == STUDENT else stage.recipe.critic
        seen[who] = objective.draw(*stage.where(sample), told.history.empty[0], sections)
        assert sections == 1 and torch.count_nonzero(told.negative) == 0
    assert not torch.equal(seen[STUDENT].rollouts[0].start, seen[CRITIC].rollouts[0].start)
    assert not torch.equal(seen[STUDENT].renoise.noise, seen[CRITIC].renoise.noise)
    modes = {who: [stage.recipe.mix.draw(0, 0, [place], f"{who} ")[0].mode for place in range(40)] for who in (STUDENT, CRITIC)}
    assert modes[STUDENT] != modes[CRITIC]


def test_saturation_is_the_students_alone_and_the_rest_is_shared() -> None:
    given = config("stage.corrupt={noise: 0.3, clean: 0.7, blur: 0, saturation_on_top: 1}")
    _, corrupt = recipes.mix_and_corrupt(given)
    history = window(0, 0).history
    for position in range(30):
        seen, own = Drift(corrupt, 0, "student", 0, position)(0, history)
        (draw,) = corrupt.draw(0, 0, [position], (16, 8, 8), "student section 0 ")
        assert torch.equal(seen.frames, history.frames) is (draw.mode == "clean")
        assert torch.equal(seen.anchor, own.anchor) and not torch.equal(seen.frames, own.frames)
        mean, own_mean = (frames.mean(dim=1) for frames in (seen.frames, own.frames))
        torch.testing.assert_close(mean, own_mean, rtol=1e-4, atol=1e-5)


def test_the_number_of_sections() -> None:
    assert SectionCount()(0, 5) == 1
    cold = SectionCount(1, 4, anneal=100, cold_start=50)
    assert {cold(0, iteration) for iteration in range(50)} == {1}
    counts = {
        name: [SectionCount(1, 4, anneal=anneal)(seed, 10) for seed in range(2000)]
        for name, anneal in (("early", 10**9), ("late", 0))
    }
    for name, share in (("early", 0.47), ("late", 0.25)):
        assert sum(count == 1 for count in counts[name]) / 2000 == pytest.approx(share, abs=0.05), name
        assert set(counts[name]) <= {1, 2, 3, 4}
    assert sum(counts["early"]) < 0.85 * sum(counts["late"])
    with pytest.raises(ValueError, match="fewest first"):
        SectionCount(2, 1)


def test_rollouts_on_their_own_history(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clip's history is not looked at, sections follow one another, gradient is of the last."""
    with pytest.raises(ConfigError, match="does not follow the student's history; set stage.gan.enabled=false"):
        config("stage.rollout.history=own")
    stage = built(config("stage.rollout.history=own", "stage.rollout.sections=[3,3]", "stage.gan.enabled=false"))
    told, sections = stage.told(window(0, 0), STUDENT)
    assert sections == 3 and told.history.empty == (True,)
    calls: list[tuple[int, bool]] = []
    velocity = stage.cast.student

    def counted(x_t: Tensor, t: Tensor, text: Tensor, history: History) -> Tensor:
        calls.append((history.counts[0], torch.is_grad_enabled()))
        return velocity(x_t, t, text, history)

    stage.cast = replace(stage.cast, student=counted)
    stage.train_student([window(0, 0)])
    assert {count for count, _ in calls} == {0, 9, 18}
    assert {count for count, graph in calls if graph} == {18}


def test_every_option_reaches_the_objective() -> None:
    stage = built(
        config(
            "stage.align=0.25", "stage.mean_variance=1", "stage.decouple={enabled: true, start: 0, end: 1}", "stage.guidance=1.5"
        )
    )
    objective = stage.recipe.student
    assert objective.align == 0.25 and objective.mean_variance and objective.decoupled and objective.guidance == 1.5
    stage.training_step(batch(0), 0)
    assert {"student/loss/guidance", "student/loss/mean_variance", "student/loss/dmd", "student/loss"} <= stage.last.keys()


def test_the_mix_reaches_the_rollout(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = built(config("stage.mix={t2v: 1, i2v: 0, v2v: 0, full: 0}"))
    told, _ = stage.told(window(0, 0), CRITIC)
    assert told.history.empty == (True,) and isinstance(stage.recipe.mix, mix.Mix)
    assert isinstance(stage.recipe.critic(stage.cast.student, stage.cast.critic, told, draw_of(stage, told)), Loss)


def draw_of(stage: DistillStage, told: Any) -> Any:
    return stage.recipe.critic.draw(*stage.where(window(0, 0)), told.history.empty[0], 1)


GAN = ("stage.gan.start=2", "stage.gan.head_width=32")


def heads_of(stage: DistillStage) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in stage.state_dict().items() if name.startswith("heads.")}


def moments(stage: DistillStage) -> set[str]:
    """Names of the critic's weights that its optimizer has stepped."""
    optimizer, masters = stage._alone[1], stage.trainees[1].masters.masters
    return {name for name, master in masters.items() if optimizer.state.get(master)}


@pytest.mark.parametrize("shared", [True, False])
def test_the_adversary_begins_at_its_start(shared: bool) -> None:
    """Heads learn, and the student hears of them, from then on; until then not even a moment of theirs is there."""
    stage = built(config(*GAN, "memory.checkpointing=true"), shared)
    flags = {name: weight.requires_grad for name, weight in stage.named_parameters()}
    for iteration in range(4):
        heads = heads_of(stage)
        stage.training_step(batch(iteration), iteration)
        started = iteration >= 2
        assert same(heads, heads_of(stage)) is not started, iteration
        assert {name for name in moments(stage) if name.startswith("heads.")} == (set(heads) if started else set())
        figures = [float(stage.last[f"critic/gan/{name}"]) for name in ("margin", "r1", "loss")]
        assert all(math.isfinite(figure) is started for figure in figures)
        assert math.isfinite(float(stage.last["student/loss/gan"])) is started  # its turns are in even iterations
    assert -1 <= float(stage.last["student/gan/cosine"]) <= 1 and stage.skipped == 0
    assert float(stage.last["critic/loss"]) == pytest.approx(
        float(stage.last["critic/loss/critic"]) + float(stage.last["critic/gan/loss"]), rel=1e-5
    )
    assert {name: weight.requires_grad for name, weight in stage.named_parameters()} == flags


def test_before_its_start_an_adversary_changes_nothing() -> None:
    states = []
    for words in (("stage.gan.enabled=false",), ("stage.gan.start=100", "stage.gan.head_width=32")):
        stage = built(config(*words))
        for iteration in range(2):
            stage.training_step(batch(iteration), iteration)
        states.append({name: value for name, value in stage.state_dict().items() if not name.startswith("heads.")})
    assert states[0].keys() == states[1].keys() and same(states[0], states[1])


def test_the_published_critic_takes_two_steps_and_another_windows_target() -> None:
    """recipe=released with the adversary: moments are stepped twice an iteration, the heads' from the first one on."""
    words = ("recipe=released", "stage.negative_text=null", "stage.gan.enabled=true", *GAN, "stage.student.shift_tokens=before")
    stage, seen = built(config(*words)), []
    assert not (stage.recipe.own_real or stage.recipe.one_step or stage.recipe.heads_wait)
    judging = stage.recipe.critic.judging
    critic = SimpleNamespace(**{name: getattr(stage.recipe.critic, name) for name in ("draw", "made", "denoising", "adversary")})
    critic.judging = lambda logits, told, section, draw: (seen.append(told.real), judging(logits, told, section, draw))[1]
    stage.recipe = replace(stage.recipe, critic=critic)
    for iteration in range(3):
        stage.training_step(batch(iteration), iteration)
        assert stage.iteration == iteration + 1
    optimizer, masters = stage._alone[1], stage.trainees[1].masters.masters
    assert {int(optimizer.state[master]["step"]) for master in masters.values()} == {4}  # 1, 1, and 2 after the start
    assert torch.equal(seen[-1], window(1, 2).target) and not torch.equal(seen[-1], window(1, 2, seed=1).target)
    assert math.isfinite(float(stage.last["critic/loss/critic"])) and math.isfinite(float(stage.last["critic/gan/loss"]))


def test_the_real_section_is_that_of_the_history_shown() -> None:
    stage = built(config(*GAN))
    told, _ = stage.told(window(1, 2, seed=1), CRITIC)
    assert torch.equal(told.real, window(1, 2, seed=1).target)


def test_blocks_that_the_model_lacks() -> None:
    assert built(config()).heads.blocks == (0, 1)  # of 2 blocks; of 40 the published 5, 15, 25, 35
    for blocks in ("[0,2]", "[1,0]", "[]"):
        with pytest.raises(InputError, match="blocks 0 to 1"):
            built(config(f"stage.gan.blocks={blocks}"))
