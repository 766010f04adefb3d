"""Roles: who computes with what, that no flag changes, and that a recompute runs in the role of its forward."""

from __future__ import annotations

import copy

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from helios_train import rng
from helios_train.errors import InputError
from helios_train.history import History
from helios_train.models.adapters import Lora, Part, add_frozen, add_lora, folded, link_state, trainable
from helios_train.models.roles import CRITIC, STUDENT, TEACHER, Backbone, Roles
from helios_train.models.transformer import HeliosTransformer

Inputs = tuple[Tensor, Tensor, Tensor, History]
LORA = Lora(rank=3, alpha=6, patch_embedding=False, history_patches=False, history_adapters=True)


@torch.no_grad()
def moved(model: HeliosTransformer, seed: int) -> None:
    """Every weight that trains, moved as training would."""
    draw = rng.generator(seed, "moved")
    for weight in trainable(model).values():
        weight += 0.05 * rng.normal(draw, weight.shape)


def cast(model: HeliosTransformer, shared: bool) -> Roles:
    """Student and critic with adapters that do something."""
    score = model if shared else copy.deepcopy(model)
    add_lora(model, STUDENT, LORA, seed=1)
    add_lora(score, CRITIC, LORA, seed=2)
    for number, one in enumerate([model] if shared else [model, score]):
        moved(one, number)
    student = Backbone(model)
    return Roles(student, student if shared else Backbone(score))


def flags(roles: Roles) -> dict[str, bool]:
    backbones = {"student": roles.student, "scores": roles.scores}
    return {
        f"{name} {key}": weight.requires_grad
        for name, backbone in backbones.items()
        for key, weight in backbone.transformer.named_parameters()
    }


@pytest.mark.parametrize("shared", [True, False])
def test_the_teacher_is_the_base_and_the_others_are_their_own_folds(
    ours: HeliosTransformer, inputs: Inputs, shared: bool
) -> None:
    base = copy.deepcopy(ours)
    roles = cast(ours, shared)
    before = flags(roles)
    assert torch.equal(roles.velocity(TEACHER)(*inputs), base.velocity(*inputs))
    seen = {}
    for role in (STUDENT, CRITIC):
        alone = copy.deepcopy(base)
        alone.load_state_dict(_fold_of(roles, role))
        seen[role] = roles.velocity(role)(*inputs)
        torch.testing.assert_close(seen[role], alone.velocity(*inputs), rtol=1e-5, atol=1e-6)
        assert not torch.allclose(seen[role], base.velocity(*inputs), atol=1e-3)
    assert not torch.allclose(seen[STUDENT], seen[CRITIC], atol=1e-3)
    assert flags(roles) == before and roles.shared is shared
    for role, other in ((STUDENT, CRITIC), (CRITIC, STUDENT)):
        names = roles.trainable(role)
        assert names and all(f".{role}." in name and f".{other}." not in name for name in names)


def _fold_of(roles: Roles, role: str) -> dict[str, Tensor]:
    """The plain weights of a role: the other roles' adapters are zeros."""
    transformer = roles.backbone(role).transformer
    others = {
        name: torch.zeros_like(w) for name, w in transformer.named_parameters() if ".lora_" in name and f".{role}." not in name
    }
    return folded(transformer, others)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("every", [1, 2])
def test_checkpointing_changes_no_gradient_while_roles_take_turns(
    ours: HeliosTransformer, inputs: Inputs, shared: bool, every: int
) -> None:
    """The student's graph waits while teacher and critic run, as in a distillation step."""

    def gradients(checkpointed: bool) -> dict[str, Tensor]:
        roles = cast(copy.deepcopy(ours), shared)
        if checkpointed:
            for backbone in {id(b): b for b in (roles.student, roles.scores)}.values():
                backbone.checkpoint_blocks(every)
        before = flags(roles)
        x_t, t, text, history = inputs
        out = roles.velocity(STUDENT)(x_t, t, text, history)
        with torch.no_grad():
            score = roles.velocity(TEACHER)(out, t, text, history)
        fake = roles.velocity(CRITIC)(x_t, t, text, history)
        again = roles.velocity(STUDENT)(out * 0.5, t, text, history)
        (again * score).sum().backward()
        roles.velocity(TEACHER)(x_t, t, text, history)
        fake.square().sum().backward()
        assert flags(roles) == before
        found = {}
        for role in (STUDENT, CRITIC):
            for name, weight in roles.trainable(role).items():
                assert weight.grad is not None, name
                found[name] = weight.grad
        return found

    plain, again = gradients(False), gradients(True)
    for name, gradient in plain.items():
        distance = (again[name] - gradient).norm() / gradient.norm()  # samples are added in another order
        assert distance < 1e-6, f"{name}: {distance:.1e}"


def test_without_the_role_of_the_forward_a_recompute_is_wrong(ours: HeliosTransformer, inputs: Inputs) -> None:
    """What the context is for: the same step with plain checkpointing gives another gradient, or none."""

    def gradient(safe: bool) -> Tensor:
        roles = cast(copy.deepcopy(ours), shared=True)
        if safe:
            roles.student.checkpoint_blocks()
        else:
            roles.student.transformer.checkpoint_blocks(spare_last=False)
        loss = roles.velocity(STUDENT)(*inputs).square().sum()
        with roles.student.run(Part((CRITIC,))):
            loss.backward()
        weight = roles.trainable(STUDENT)["blocks.0.attn1.to_q.lora_B.student.weight"]
        return torch.zeros_like(weight) if weight.grad is None else weight.grad

    right, wrong = gradient(True), gradient(False)
    assert (right - wrong).norm() > 0.1 * right.norm()


def test_a_lineage_on_a_shared_base_is_the_merged_student(ours: HeliosTransformer, inputs: Inputs) -> None:
    """Two earlier links, adapters and a layer trained in full, then a fresh adapter: as a student merged link by link."""
    base, merged, links = copy.deepcopy(ours), copy.deepcopy(ours), []
    for number, lora in enumerate((Lora(3, 6, False, True), Lora(2, 2, False, False, True))):
        stage = copy.deepcopy(merged)
        add_lora(stage, STUDENT, lora, seed=number)
        moved(stage, 10 + number)
        links.append(link_state(stage, STUDENT))
        merged.load_state_dict(folded(stage))
    layers: dict[str, nn.Module] = {}
    for number, link in enumerate(links):
        adapter = {name: value for name, value in link.items() if ".lora_" in name}
        add_frozen(base, f"link{number}", adapter, "test")
        for name in {name.partition(".")[0] for name in link if name not in adapter}:
            layer = layers[name] = copy.deepcopy(getattr(merged, name))
            layer.load_state_dict({part: link[f"{name}.{part}"] for part in ("weight", "bias")})
    add_lora(base, STUDENT, LORA, seed=5)
    add_lora(base, CRITIC, LORA, seed=6)
    backbone = Backbone(base)
    roles = Roles(backbone, backbone, Part(("link0", "link1"), layers))
    torch.testing.assert_close(roles.velocity(STUDENT)(*inputs), merged.velocity(*inputs), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(roles.velocity(TEACHER)(*inputs), ours.velocity(*inputs), rtol=0, atol=0)
    assert set(trainable(base)) == set(roles.trainable(STUDENT)) | set(roles.trainable(CRITIC))
    patch = base.patch_short
    assert isinstance(patch, LoraLayer) and patch.base_layer is not layers["patch_short"]


def test_an_adapter_of_another_model_is_refused_by_name(ours: HeliosTransformer) -> None:
    with pytest.raises(InputError, match=r"old.safetensors.*blocks.77.attn1.to_q"):
        add_frozen(ours, "old", {"transformer.blocks.77.attn1.to_q.lora_B.weight": torch.zeros(24, 2)}, "old.safetensors")
