"""task=sample: text, image and video starts, captions that change, the size and encoders of the training."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from helios_train.conf import compose
from helios_train.data.toy import ToySpec, render
from helios_train.data.video import probe, read_frames, write_mp4
from helios_train.errors import ConfigError, InputError
from helios_train.evaluation.drift import Drift, measure
from helios_train.models.codecs import dct_codec
from helios_train.models.loading import random_transformer
from helios_train.models.text import HashText
from helios_train.models.transformer import HeliosTransformer
from helios_train.sampling.drift import DriftGuard
from helios_train.sampling.inputs import load_image
from helios_train.sampling.pipeline import SamplerSettings
from helios_train.sampling.script import Script
from helios_train.tasks import sample, weights

Run = Callable[..., None]
SIZE = (32, 64)
QUICK = ("task=sample", "sample.steps=2", "sample.sections=1", "sample.guidance=1")
SHAPE = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "text_dim": 64,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_dim": [8, 4, 4],
    "rope_theta": 100.0,
}


@pytest.fixture(scope="module")
def trained(tiny_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 2 iterations on videos of 32x64 pixels, which is not the default size, and its merged/."""
    folder = tmp_path_factory.mktemp("sampled")
    tiny_run("data.size=[32,64]", f"data.root={folder}/shards", f"run_dir={folder}/run", "trainer.max_steps=2")
    tiny_run("task=merge", f"init={folder}/run")
    return folder / "run"


def facts_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


@pytest.mark.parametrize("what", ["run", "checkpoint", "merged"])
def test_the_size_is_that_of_the_training(trained: Path, tiny_run: Run, tmp_path: Path, what: str) -> None:
    init = {"run": trained, "checkpoint": max(trained.glob("checkpoints/*.ckpt")), "merged": trained / "merged"}[what]
    tiny_run(*QUICK, f"init={init}", f"sample.output={tmp_path}", "sample.sections=2")
    (facts,) = facts_in(tmp_path)
    assert (facts["frames"], facts["height"], facts["width"]) == (66, *SIZE)
    (mp4,) = tmp_path.glob("*.mp4")
    assert probe(mp4)[:3] == (66, *SIZE) and mp4.with_suffix(".png").is_file()


def test_another_size_and_a_folder_of_nobody(trained: Path, tiny_run: Run, tmp_path: Path) -> None:
    tiny_run(*QUICK, f"init={trained}/merged", f"sample.output={tmp_path}/a", "sample.size=[64,32]")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "transformer").symlink_to(trained / "merged" / "transformer")  # without helios_train.json
    tiny_run(*QUICK, f"init={tmp_path}/theirs", f"sample.output={tmp_path}/b", "data.size=[48,64]")
    sizes = [(facts["height"], facts["width"]) for folder in "ab" for facts in facts_in(tmp_path / folder)]
    assert sizes == [(64, 32), (48, 64)]


def test_the_same_seed_gives_the_same_bytes(trained: Path, tiny_run: Run, tmp_path: Path) -> None:
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        plan = f"init={trained}", f"seed={seed}", "sample.prompt=[a red circle,a red circle]"
        tiny_run(*QUICK, *plan, f"sample.output={tmp_path}/{folder}")
    a, b, c = ({path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()} for folder in "abc")
    assert a == b and len(a) == 6
    first, second = "000_a_red_circle.mp4", "001_a_red_circle.mp4"
    assert len({a[first], a[second], c[first], c[second]}) == 4  # noise by seed and number


def test_history_is_noised_after_sections_that_drift(
    trained: Path, tiny_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "DriftGuard", partial(DriftGuard, threshold=0.0))  # every section but the first is off its past
    plan = f"init={trained}", "sample.sections=3"
    for drift in ("true", "false"):
        tiny_run(*QUICK, *plan, f"sample.output={tmp_path}/{drift}", f"sample.drift={drift}")
    (watched,), (plain,) = facts_in(tmp_path / "true"), facts_in(tmp_path / "false")
    assert watched["drifted"] == [1, 2] and "drifted" not in plain
    one, other = (next((tmp_path / drift).glob("*.mp4")).read_bytes() for drift in ("true", "false"))
    assert one != other


def test_image_to_video(trained: Path, tiny_run: Run, tmp_path: Path) -> None:
    image = Image.new("RGBA", (90, 70), (200, 30, 30, 128))
    image.save(tmp_path / "image.png")
    tiny_run(*QUICK, f"init={trained}", f"sample.image={tmp_path}/image.png", f"sample.output={tmp_path}/out")
    (facts,) = facts_in(tmp_path / "out")
    assert facts["frames"] == 33 and facts["start"] == f"{tmp_path}/image.png"
    assert facts["start_notes"] == ["transparent parts shown over white", "70x90 cropped and resized to 32x64"]
    tiny_run(*QUICK, f"init={trained}", f"sample.output={tmp_path}/without")
    videos = [next((tmp_path / folder).glob("*.mp4")).read_bytes() for folder in ("out", "without")]
    assert videos[0] != videos[1]


def test_video_to_video(trained: Path, tiny_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frames = render(0, 0, ToySpec(size=(64, 64), sections=5))[0]
    write_mp4(tmp_path / "long.mp4", frames[:140], 25)
    write_mp4(tmp_path / "short.mp4", frames[:32], 25)
    tiny_run(*QUICK, f"init={trained}", f"sample.video={tmp_path}/long.mp4", f"sample.output={tmp_path}/out")
    (facts,) = facts_in(tmp_path / "out")
    assert facts["frames"] == 33 and "history from frames 41 to 139, anchor from frame 0" in facts["start_notes"]
    assert "  history from frames 41 to 139" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"short.mp4: has 32 frames.*at least 33"):
        tiny_run(*QUICK, f"init={trained}", f"sample.video={tmp_path}/short.mp4", f"sample.output={tmp_path}/refused")
    (tmp_path / "damaged.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    with pytest.raises(InputError, match=r"damaged.png: not a readable image"):
        tiny_run(*QUICK, f"init={trained}", f"sample.image={tmp_path}/damaged.png", f"sample.output={tmp_path}/refused")
    assert not (tmp_path / "refused").exists()


def test_a_script(trained: Path, tiny_run: Run, tmp_path: Path) -> None:
    """Until the caption changes the video is that of the first caption alone."""
    script = "sample.script=[[0,a red circle],[1,a blue square]]"
    plan = f"init={trained}", "sample.sections=2", "sample.crossfade=1"
    tiny_run(*QUICK, *plan, script, f"sample.output={tmp_path}/script")
    (facts,) = facts_in(tmp_path / "script")
    assert facts["script"] == [[0, "a red circle"], [1, "a blue square"]] and facts["crossfade"] == 1
    assert facts["caption"] == "from section 0: a red circle\nfrom section 1: a blue square" and facts["toy"] == {}
    assert (tmp_path / "script" / "000_a_red_circle.mp4").is_file()


def sampled(transformer: HeliosTransformer, prompt: str | Script, sections: int, folder: Path, **more: Any) -> list[Tensor]:
    """The text the transformer is given, section by section."""
    texts: list[Tensor] = []
    hook = transformer.register_forward_pre_hook(
        lambda _, args, kwargs: texts.append(kwargs["encoder_hidden_states"][0]), with_kwargs=True
    )
    sampler = sample.VideoSampler(dct_codec(), HashText(), SamplerSettings(), SIZE, 25, 0, **more)
    sampler.sample(transformer, prompt, 0, sections, 1, 1.0, folder)
    hook.remove()
    return texts


def test_what_the_transformer_reads_of_a_script(tmp_path: Path) -> None:
    transformer = random_transformer(SHAPE, torch.float32, 0)
    texts = sampled(transformer, Script(((0, "a red circle"), (2, "a blue square")), 1), 4, tmp_path)
    (old,), (new,) = (sampled(transformer, caption, 1, tmp_path) for caption in ("a red circle", "a blue square"))
    for text, expected in zip(texts, (old, old, (old + new) / 2, new), strict=True):
        torch.testing.assert_close(text, expected)
    assert not old[3:].any() and old[:3].any()


def test_sections_are_told_of_as_they_come(tmp_path: Path) -> None:
    told: list[tuple[int, int, bool]] = []
    path = tmp_path / "000_a_red_circle.mp4"
    transformer = random_transformer(SHAPE, torch.float32, 0)
    sampled(transformer, "a red circle", 3, tmp_path, told=lambda done, count: told.append((done, count, path.exists())))
    assert told == [(1, 3, False), (2, 3, False), (3, 3, False)] and path.exists()


def test_an_image_is_encoded_anew_for_each_number(tmp_path: Path) -> None:
    """Its noise belongs to the video, as all noise does."""
    Image.new("RGB", (64, 32), (10, 200, 30)).save(tmp_path / "image.png")
    start, transformer = load_image(tmp_path / "image.png", SIZE), random_transformer(SHAPE, torch.float32, 0)
    anchors: list[Tensor] = []
    transformer.register_forward_pre_hook(
        lambda _, args, kwargs: anchors.append(kwargs["latents_history_short"][:, :, :1]), with_kwargs=True
    )
    sampler = sample.VideoSampler(dct_codec(), HashText(), SamplerSettings(), SIZE, 25, 0, start=start)
    for number in (0, 0, 1):
        sampler.sample(transformer, "a red circle", number, 1, 1, 1.0, tmp_path)
    assert torch.equal(anchors[0], anchors[1]) and not torch.equal(anchors[0], anchors[2])
    clean = dct_codec().encode(start.image[None, :, None].expand(-1, -1, 33, -1, -1))[:, :, :1]
    assert (anchors[0] - 0.88 * clean).std() == pytest.approx(0.12, abs=0.02)


def test_captions_are_encoded_before_the_transformer_is_there(
    trained: Path, tiny_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    for owner, name in ((HashText, "encode"), (HashText, "unload"), (weights, "start")):
        monkeypatch.setattr(owner, name, recorded(events, name, getattr(owner, name)))
    tiny_run(*QUICK, f"init={trained}/merged", "sample.prompt=[one,two]", f"sample.output={tmp_path}")
    assert events == ["encode", "unload", "start"]


def recorded(events: list[str], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        events.append(name)
        return function(*args, **kwargs)

    return call


def test_other_encoders_than_the_training_s(
    trained: Path, tiny_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder knows their fingerprints, and is not loaded for it; a run brings its own."""
    other = "text.rows=8", f"sample.output={tmp_path}"
    message = r"text: init=\S+ has hash .*16 rows.*this config has hash .*8 rows.*text=hash"
    with monkeypatch.context() as patched, pytest.raises(InputError, match=message):
        patched.setattr(weights, "start", lambda *_: pytest.fail("loaded"))
        tiny_run(*QUICK, *other, f"init={trained}/merged")
    assert not any(tmp_path.iterdir())
    tiny_run(*QUICK, *other, f"init={trained}")


@pytest.mark.parametrize(
    ("init", "message"),
    [("init=nowhere", "init=nowhere: no such folder"), ("init=null", "needs init="), ("init=7.ckpt", "init=7.ckpt: no such")],
)
def test_weights_that_are_not_there(tiny_run: Run, tmp_path: Path, init: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny_run(*QUICK, init, f"sample.output={tmp_path}/out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written(trained: Path, tiny_run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/out: cannot be written"):
        tiny_run(*QUICK, f"init={trained}", f"sample.output={tmp_path}/file/out")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sample.image=a.png", "sample.video=b.mp4"], "give one"),
        (["sample.prompt=[]"], "at least one caption"),
        (["sample.prompt=a", "sample.script=[[0,b]]"], "give one"),
        (["sample.script=[]"], "rise from 0"),
        (["sample.script=[[1,a]]"], "rise from 0"),
        (["sample.script=[[0,a],[2,b],[2,c]]"], "rise from 0"),
        (["sample.script=[[0,a],[4,b]]", "sample.sections=4"], "past the end"),
        (["sample.crossfade=-1"], "sample.crossfade"),
        (["sample.size=[64,40]"], "sample.size"),
    ],
)
def test_keys_that_do_not_go_together(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose.compose(["task=sample", "init=x", *overrides])


def test_only_toy_captions_are_judged(tmp_path: Path) -> None:
    transformer = random_transformer(SHAPE, torch.float32, 0)
    for prompt in ("a red circle on a blue background", "a dog"):
        sampled(transformer, prompt, 2, tmp_path)
    dog, circle = (facts["toy"] for facts in facts_in(tmp_path))
    assert dog == {} and "colour_right" in circle and circle["direction_right"] is None


def test_slow_and_quick_are_those_of_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The range of speeds in the config decides where slow ends, for `task=sample` and while training alike."""
    config = compose.typed(compose.plain(compose.compose_plain(["task=sample", "init=x", "data.toy.speed=[2,4]"])))
    ranges: list[tuple[float, float]] = []
    real = sample.judge
    monkeypatch.setattr(sample, "judge", lambda seen, caption, speed: ranges.append(speed) or real(seen, caption, speed))
    transformer = random_transformer(SHAPE, torch.float32, 0)
    sampled(transformer, "a red circle moving left quickly on a blue background", 1, tmp_path, toy_speed=sample.toy_speed(config))
    sampled(transformer, "a red circle moving left quickly on a blue background", 1, tmp_path)
    assert ranges == [(2, 4), (0.4, 1.0)]


def test_toy_captions_and_paces_are_the_run_s(tiny_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not those of the sampling command, which says nothing of toy videos."""
    toy = "data.toy.speed=[2,4]", "data.toy.motion_in_caption=true", f"data.root={tmp_path}/shards"
    tiny_run(*toy, f"run_dir={tmp_path}/run", "trainer.max_steps=1")
    ranges: list[tuple[float, float]] = []
    real = sample.judge
    monkeypatch.setattr(sample, "judge", lambda seen, caption, speed: ranges.append(speed) or real(seen, caption, speed))
    tiny_run(*QUICK, f"init={tmp_path}/run", f"sample.output={tmp_path}/out")
    (facts,) = facts_in(tmp_path / "out")
    assert ranges == [(2, 4)] and " moving " in facts["caption"]


def test_the_summary_counts_what_captions_say() -> None:
    figures = {
        "colour_right": True,
        "shape_right": False,
        "background_right": True,
        "direction_right": None,
        "pace_right": None,
        "ratio": 2.0,
        "motion": 0.5,
        "border_jump": 1.0,
    }
    still = figures | {"background_right": False, "shape_right": True, "ratio": math.nan}
    said = figures | {"direction_right": True, "pace_right": False, "ratio": 4.0, "border_jump": 2.0}
    assert sample.summary([still]) == "toy tracker: colour and background right in 0 of 1, shape in 1"
    assert sample.summary([figures, still, said]) == (
        "toy tracker: colour and background right in 2 of 3, shape in 1, direction in 1 and pace in 0 of 1; border jump 1.50 px, "
        "motion 0.50 px a frame, ratio 3.00 (worst video 4.00)"
    )


def test_drift_stands_in_the_facts_and_in_a_line(
    trained: Path, tiny_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = "sample.prompt=[a red circle on a blue background,a dog]"
    tiny_run(*QUICK, f"init={trained}/merged", prompts, f"sample.output={tmp_path}", "sample.sections=2")
    toy, dog = facts_in(tmp_path)
    lines = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert lines.index("drift a section, worst video") == lines.index("toy tracker") + 1
    for facts in (toy, dog):
        figures, sections = facts["drift"]["figures"], facts["drift"]["sections"]
        assert len(sections["saturation"]) == len(sections["latent_variance"]) == 2
        assert figures["drift/saturation_slope"] == pytest.approx(sections["saturation"][1] - sections["saturation"][0])
        assert figures["drift/saturation_slope_low"] is None and figures["drift/latent_nonfinite"] == 0
    seen = measure(read_frames(max(tmp_path.glob("*dog.mp4")), range(66)))  # the file has the same pixels, but for its codec
    assert seen.figures["drift/motion"] == pytest.approx(dog["drift"]["figures"]["drift/motion"], rel=0.3)


def test_the_drift_line_shows_the_worst_of_each() -> None:
    figures = {f"drift/{name}_slope": 0.01 for name in ("saturation", "luma", "red_green", "yellow_blue")}
    figures |= {"drift/border_ratio": 2.0, "drift/motion_least": 0.02, "drift/spread_least": 0.3}
    one = Drift(figures, {})
    other = Drift({**figures, "drift/saturation_slope": -0.5, "drift/yellow_blue_slope": 0.04, "drift/motion_least": 0.001}, {})
    short = Drift({**figures, **{name: math.nan for name in figures if "slope" in name}, "drift/border_ratio": math.nan}, {})
    assert sample.drift_summary([one, other, short]) == (
        "drift a section, worst video: saturation -0.5000, luma +0.0100, colour +0.0400; "
        "frames across borders to inside 2.00; least motion 0.0010, least spread 0.3000"
    )
    assert "saturation -, luma -, colour -; frames across borders to inside -;" in sample.drift_summary([short])


MINUTE = """
import re, sys, torch
from pathlib import Path
from helios_train.models.codecs import dct_codec
from helios_train.models.text import HashText
from helios_train.models.loading import random_transformer
from helios_train.sampling.pipeline import SamplerSettings
from helios_train.tasks.sample import VideoSampler

def memory(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

held = {}
def told(done, count):
    held[done] = memory("VmRSS")
    if done == 10:
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here

transformer = random_transformer(eval(sys.argv[2]), torch.float32, 0)
sampler = VideoSampler(dct_codec(), HashText(), SamplerSettings(), (128, 128), 25, 0, told=told)
saved, _ = sampler.sample(transformer, "a red circle on a blue background", 0, 44, 2, 1.0, Path(sys.argv[1]))
print(held[10], max(held.values()), memory("VmHWM"))
"""


def test_a_minute_in_bounded_memory(tmp_path: Path) -> None:
    """1,452 frames: from the 10th section to the end, the peak is less than 50 MB above what is held at the 10th; the frames
    alone would be 55."""
    run = subprocess.run([sys.executable, "-c", MINUTE, str(tmp_path), repr(SHAPE)], capture_output=True, text=True, check=True)
    at_10, _, peak = map(float, run.stdout.split())
    (facts,) = facts_in(tmp_path)
    assert facts["frames"] == 1452 and probe(next(tmp_path.glob("*.mp4"))).frames == 1452 and facts["toy"]
    assert peak - at_10 < 50
