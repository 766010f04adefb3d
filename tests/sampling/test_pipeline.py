"""Sampling through diffusers' HeliosPipeline with a tiny random transformer and the dct codec."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from diffusers import HeliosPipeline, HeliosTransformer3DModel
from torch import Tensor

from helios_train.errors import InputError
from helios_train.history import History
from helios_train.models.codecs import Codec, dct_codec
from helios_train.rng import torch_generator
from helios_train.sampling.pipeline import SamplerSettings, Sections, build_pipeline, grown, pixels
from helios_train.sampling.start import from_nothing

SIZE = (64, 96)


@pytest.fixture
def text() -> Tensor:
    prompts = torch.randn(2, 16, 32, generator=torch_generator(0, "text"))
    prompts[:, 5:] = 0
    return prompts


@pytest.fixture
def pipeline(tiny_transformer) -> HeliosPipeline:
    return build_pipeline(tiny_transformer(), dct_codec(), SamplerSettings())


class Sampled(NamedTuple):
    latents: Tensor
    frames: Tensor


def sample(pipeline: HeliosPipeline, text: Tensor, sections: int = 2, guidance: float = 3.0, seed: int = 0) -> Sampled:
    generators = [torch_generator(seed, "sample", row) for row in range(len(text))]
    denoise = Sections(pipeline, (3,), guidance, generators)
    latents = list(grown(denoise, [text] * sections, from_nothing(len(text), 16, SIZE)))
    codec = Codec("dct", pipeline.vae)
    return Sampled(torch.cat(latents, dim=2), torch.cat([pixels(codec, part) for part in latents], dim=1))


@pytest.mark.parametrize("solver", ["unipc", "euler"])
@pytest.mark.parametrize("shift", ["none", "exponential", "linear"])
def test_shapes_and_settings(tiny_transformer, text: Tensor, solver: str, shift: str) -> None:
    pipeline = build_pipeline(tiny_transformer(), dct_codec(), SamplerSettings(shift, solver))
    config = pipeline.scheduler.config
    assert (config.scheduler_type, config.use_dynamic_shifting) == (solver, shift != "none")
    if shift != "none":
        assert config.time_shift_type == shift
    video = sample(pipeline, text)
    assert video.frames.shape == (2, 66, *SIZE, 3) and video.frames.dtype == torch.uint8
    assert video.latents.shape == (2, 16, 18, 8, 12) and video.latents.dtype == torch.float32
    assert video.latents.isfinite().all() and video.latents[:, :, 9:].std() > 0.5


def test_the_same_seed_gives_the_same_bits_and_touches_no_global_state(pipeline: HeliosPipeline, text: Tensor) -> None:
    before = torch.get_rng_state()
    first, again, other = sample(pipeline, text), sample(pipeline, text), sample(pipeline, text, seed=1)
    assert torch.equal(first.latents, again.latents) and torch.equal(first.frames, again.frames)
    assert not torch.equal(first.latents, other.latents)
    assert torch.equal(before, torch.get_rng_state())


def test_modes_and_vae_come_back(pipeline: HeliosPipeline, text: Tensor) -> None:
    vae, modes = pipeline.vae, []
    pipeline.transformer.train()
    pipeline.transformer.blocks[0].eval()
    pipeline.transformer.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    video = sample(pipeline, text)
    assert modes and not any(modes)
    blocks = pipeline.transformer.blocks
    assert pipeline.transformer.training and not blocks[0].training and blocks[1].training
    assert pipeline.vae is vae and not video.latents.requires_grad
    assert all(weight.grad is None and weight.requires_grad for weight in pipeline.transformer.parameters())


def test_frames_are_the_pipeline_s_own(pipeline: HeliosPipeline, text: Tensor) -> None:
    """Up to where diffusers cuts: 66 frames to 65."""
    own = pipeline(
        prompt_embeds=text,
        negative_prompt_embeds=torch.zeros_like(text),
        height=SIZE[0],
        width=SIZE[1],
        num_frames=66,
        num_inference_steps=3,
        guidance_scale=3.0,
        generator=[torch_generator(0, "sample", row) for row in range(2)],
    ).frames
    assert own.shape == (2, 65, *SIZE, 3)
    ours = sample(pipeline, text).frames[:, :65]
    assert (torch.from_numpy(own * 255).round().int() - ours.int()).abs().max() <= 1


def test_guidance(pipeline: HeliosPipeline, text: Tensor) -> None:
    calls: list[Tensor] = []
    pipeline.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(kwargs["encoder_hidden_states"]), with_kwargs=True
    )
    unguided = sample(pipeline, text, sections=1, guidance=1.0)
    assert len(calls) == 3 and all(torch.equal(call, text) for call in calls)
    calls.clear()
    guided = sample(pipeline, text, sections=1, guidance=3.0)
    assert len(calls) == 6 and not any(call.any() for call in calls[1::2])  # null text is zeros
    assert not torch.equal(guided.latents, unguided.latents)


def test_sections_follow_their_history(tiny_transformer, text: Tensor) -> None:
    """Section 0 sees zeros; section 1 sees section 0's nine frames at the end of the 19, and its first frame as anchor."""
    transformer: HeliosTransformer3DModel = tiny_transformer()
    seen: list[dict[str, Tensor]] = []
    transformer.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    latents = sample(build_pipeline(transformer, dct_codec(), SamplerSettings()), text, guidance=1.0).latents
    names = ("latents_history_long", "latents_history_mid", "latents_history_short")
    assert not any(seen[0][name].any() for name in names)
    long, mid, short = (seen[3][name] for name in names)
    assert torch.equal(short[:, :, :1], latents[:, :, :1])
    assert torch.equal(torch.cat([long, mid, short[:, :, 1:]], dim=2)[:, :, -9:], latents[:, :, :9])
    assert not long[:, :, :10].any()


def test_a_model_without_an_anchor_is_shown_none(tiny_transformer, text: Tensor) -> None:
    built = build_pipeline(tiny_transformer(), dct_codec(), SamplerSettings())
    first = torch.randn(2, 16, 9, 8, 12, generator=torch_generator(0, "first"))
    history = from_nothing(2, 16, SIZE).followed_by(first)
    made = {
        (anchor, kept): Sections(built, (1,), 1.0, torch_generator(0, "noise"), anchor=anchor)(1, text, shown)
        for anchor in (True, False)
        for kept, shown in ((True, history), (False, history.keep(history.counts, (False, False))))
    }
    assert torch.equal(made[False, True], made[False, False]) and torch.equal(made[True, False], made[False, False])
    assert not torch.equal(made[True, True], made[False, True])


def test_levels_are_shifted_floats(pipeline: HeliosPipeline, text: Tensor) -> None:
    """t = 1000 f / (f + 1/s - 1), f = e^mu, s = linspace(.999, 0) without its end; mu by tokens, as diffusers' line has it."""
    times: list[Tensor] = []
    pipeline.transformer.register_forward_pre_hook(lambda _, args, kwargs: times.append(kwargs["timestep"]), with_kwargs=True)
    sample(pipeline, text, sections=1, guidance=1.0)
    factor = math.exp(0.5 + (9 * 8 * 12 // 4 - 256) * 0.65 / 3840)
    expected = [1000 * factor / (factor + 1 / level - 1) for level in (0.999, 0.666, 0.333)]
    assert [float(time[0]) for time in times] == pytest.approx(expected, rel=1e-5)
    assert times[0].is_floating_point()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("solver", ["unipc", "euler"])
def test_sections_are_the_pipeline_s_own_run(tiny_transformer, text: Tensor, solver: str, dtype: torch.dtype) -> None:
    """One call a section gives what one call for all gives, bit for bit: noise, history, anchor, solver state."""
    pipeline = build_pipeline(tiny_transformer().to(dtype), dct_codec(), SamplerSettings(solver=solver))
    seen: list[Tensor] = []
    names = ("latents_history_long", "latents_history_mid", "latents_history_short")
    pipeline.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(torch.cat([kwargs[name] for name in names], dim=2)), with_kwargs=True
    )
    own = pipeline(
        prompt_embeds=text,
        negative_prompt_embeds=torch.zeros_like(text),
        height=SIZE[0],
        width=SIZE[1],
        num_frames=132,
        num_inference_steps=3,
        guidance_scale=3.0,
        generator=[torch_generator(0, "sample", row) for row in range(2)],
        output_type="latent",
    ).frames
    its, seen[:] = seen[:], []
    assert own.shape == (2, 16, 36, 8, 12)
    assert torch.equal(sample(pipeline, text, sections=4).latents, own)
    assert len(its) == len(seen) == 4 * 3 * 2 and all(map(torch.equal, its, seen))


def test_a_section_comes_before_the_next_is_begun(pipeline: HeliosPipeline, text: Tensor) -> None:
    """Nothing is computed ahead, and the transformer has its mode back while the caller has a section."""
    calls: list[bool] = []
    pipeline.transformer.train().register_forward_pre_hook(lambda module, _: calls.append(module.training))
    running = grown(Sections(pipeline, (2,), 1.0, torch_generator(0, "sample")), [text[:1]] * 3, from_nothing(1, 16, SIZE))
    for number in range(1, 4):
        assert next(running).shape == (1, 16, 9, 8, 12)
        assert calls == [False] * 2 * number and pipeline.transformer.training
    with pytest.raises(StopIteration):
        next(running)


def test_nothing_is_decoded_on_the_way(pipeline: HeliosPipeline, text: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(pipeline.vae), "decode", lambda *_, **__: pytest.fail("decoded"))
    next(grown(Sections(pipeline, (1,), 1.0, torch_generator(0, "sample")), [text[:1]], from_nothing(1, 16, SIZE)))


def test_the_section_loop_knows_no_pipeline(text: Tensor) -> None:
    """Any maker of sections will do; it hears which section it makes, its text, and what precedes it."""
    heard: list[tuple[int, History]] = []

    def denoise(section: int, text: Tensor, history: History) -> Tensor:
        heard.append((section, history))
        return torch.full((1, 16, 9, 8, 12), section + 1.0) + torch.arange(9).view(1, 1, 9, 1, 1) / 10 + text.mean()

    texts = [torch.full((1, 16, 32), share) for share in (0.0, 0.01, 0.02, 0.03)]
    *_, last = grown(denoise, texts, from_nothing(1, 16, SIZE))
    assert [section for section, _ in heard] == [0, 1, 2, 3]
    assert [history.counts for _, history in heard] == [(0,), (9,), (18,), (19,)]
    assert [history.anchored for _, history in heard] == [(False,), (True,), (True,), (True,)]
    assert all((history.anchor == 1).all() for _, history in heard[1:])
    frames = [made + number / 10 for made in (1, 2.01, 3.02) for number in range(9)][-19:]
    torch.testing.assert_close(heard[3][1].frames[0, 0, :, 0, 0], torch.tensor(frames))
    torch.testing.assert_close(last[0, 0, 0], torch.full((8, 12), 4.03))


def test_text_may_change_between_sections(pipeline: HeliosPipeline, text: Tensor) -> None:
    """The sections before the change stay as they were, those after it do not; null text is zeros throughout."""
    calls: list[Tensor] = []
    pipeline.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(kwargs["encoder_hidden_states"]), with_kwargs=True
    )

    def run(texts: list[Tensor]) -> list[Tensor]:
        return list(grown(Sections(pipeline, (2,), 3.0, torch_generator(0, "sample")), texts, from_nothing(1, 16, SIZE)))

    same, changed = run([text[:1]] * 3), run([text[:1], text[1:], text[1:]])
    assert torch.equal(same[0], changed[0]) and not torch.equal(same[1], changed[1])
    conditional = calls[12::2]
    assert [torch.equal(call, text[:1]) for call in conditional] == [True] * 2 + [False] * 4
    assert all(torch.equal(call, text[1:]) for call in conditional[2:]) and not any(call.any() for call in calls[1::2])


def test_a_bf16_transformer_and_one_step(tiny_transformer, text: Tensor) -> None:
    pipeline = build_pipeline(tiny_transformer().to(torch.bfloat16), dct_codec(), SamplerSettings())
    latents = Sections(pipeline, (1,), 1.0, torch_generator(0, "sample"))(0, text[:1], from_nothing(1, 16, SIZE))
    assert latents.dtype == torch.float32 and pixels(dct_codec(), latents).shape == (1, 33, *SIZE, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": (64, 72)}, "multiples of 16"),
        ({"text": torch.zeros(1, 16, 31)}, "32"),
        ({"text": torch.zeros(16, 32)}, "32"),
    ],
)
def test_refusals(pipeline: HeliosPipeline, changes: dict[str, object], message: str) -> None:
    given = {"text": torch.zeros(1, 16, 32), "size": SIZE} | changes
    denoise = Sections(pipeline, (1,), 1.0, torch_generator(0, "sample"))
    with pytest.raises(InputError, match=message):
        next(grown(denoise, [given["text"]], from_nothing(1, 16, given["size"])))
