"""task=evaluate: one decoding a video, records that a killed one goes on from, bad videos, results in the published layout."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from helios_train.conf import compose
from helios_train.data.decode import Decoder
from helios_train.data.video import write_mp4
from helios_train.errors import ConfigError, InputError
from helios_train.evaluation.metric import Score
from helios_train.evaluation.videos import read_prompts
from helios_train.tasks import evaluate, measures

Run = Callable[..., None]
FRAMES = 17  # of the videos here: more than a block
STUBS = """
import torch

def between(before, after):
    return (before + after) / 2

def videos(frames):
    return torch.stack([frames.mean((1, 2, 3, 4)), torch.ones(len(frames))], dim=1)

def captions(texts):
    return torch.tensor([[float(len(text)), 1.0] for text in texts])
"""
PARTS = (
    "evaluate.interpolator=stub_nets:between",
    "evaluate.semantic.video_encoder=stub_nets:videos",
    "evaluate.semantic.text_encoder=stub_nets:captions",
)


def clip(number: int, frames: int = FRAMES) -> torch.Tensor:
    """A bar that moves over a plain background, [T, 64, 640, 3]: as wide as metrics look at it, so that nothing is resized."""
    video = torch.full((frames, 64, 640, 3), 40 + 20 * number, dtype=torch.uint8)
    for t in range(frames):
        video[t, 16:48, 40 + 2 * t : 140 + 2 * t] = 230
    return video


@pytest.fixture(autouse=True)
def stub_nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "nets").mkdir()
    (tmp_path / "nets/stub_nets.py").write_text(STUBS)
    monkeypatch.syspath_prepend(str(tmp_path / "nets"))
    yield
    sys.modules.pop("stub_nets", None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four videos with captions beside them."""
    videos = tmp_path / "videos"
    videos.mkdir()
    for number in range(4):
        write_mp4(videos / f"{number:03d}.mp4", clip(number), 25)
        (videos / f"{number:03d}.json").write_text(json.dumps({"caption": "a bar" * (number + 1)}))
    return videos


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many frames of each video were decoded."""
    count: Counter[str] = Counter()
    stream = Decoder.stream

    def counted(self: Decoder, path: Path, size: int) -> Iterator[torch.Tensor]:
        for block in stream(self, path, size):
            count[path.name] += len(block)
            yield block

    monkeypatch.setattr(Decoder, "stream", counted)
    return count


def results(output: Path, name: str) -> dict[str, Any]:
    return json.loads((output / f"{name}_results.json").read_text())


def do(videos: Path, output: Path, *words: str) -> None:
    raw = compose.plain(
        compose.compose_plain(["task=evaluate", f"evaluate.videos={videos}", f"evaluate.output={output}", *words])
    )
    evaluate.run(compose.typed(raw), raw)


def test_every_video_is_decoded_once_for_all_metrics(
    folder: Path, tmp_path: Path, decoded: Counter[str], capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    do(folder, output, *PARTS)
    assert decoded == {f"{number:03d}.mp4": FRAMES for number in range(4)}
    said = capsys.readouterr().out
    measured = ["motion_amplitude", "motion_smoothness", "semantic", "drifting_motion_smoothness", "drifting_semantic"]
    assert f"4 videos, measured: {', '.join(measured)}\n" in said
    assert "not measured: aesthetic, drifting_aesthetic (needs evaluate.aesthetic.head)" in said
    assert "not measured: naturalness, drifting_naturalness (needs evaluate.judge.model)" in said
    amplitude, drift = results(output, "motion_amplitude"), results(output, "drifting_semantic")
    assert (amplitude["metric"], amplitude["num_videos"], amplitude["num_failed"]) == ("motion_fb", 4, 0)
    rows = amplitude["per_video_results"]
    assert [(row["id"], row["video_name"]) for row in rows] == [(f"{n:03d}", f"{n:03d}.mp4") for n in range(4)]
    assert amplitude["average_score"] == pytest.approx(sum(row["motion_fb"] for row in rows) / 4)
    assert all(row["motion_magnitude"] > row["motion_fb"] > 0 for row in rows)
    row = drift["per_video_results"][2]
    assert row["drift_semantic_score"] == abs(row["start_semantic_score"] - row["end_semantic_score"])
    assert row["prompt"] == "a bar" * 3
    assert drift["average_drift_score"] == pytest.approx(sum(r["drift_semantic_score"] for r in drift["per_video_results"]) / 4)
    merged = json.loads((output / "merged_results.json").read_text())
    summary = merged["summary"]
    assert merged["rating_scale"] == 10 and merged["per_video"] == {}
    assert list(summary["non_drifting"]) == measured[:3] and list(summary["drifting"]) == measured[3:]
    smooth = summary["non_drifting"]["motion_smoothness"]
    assert smooth["raw_score"] == smooth["normalized_score"] == results(output, "motion_smoothness")["average_score"]
    assert f"total {summary['total_weighted_rating']:g}, of 5 of 9 metrics" in said
    before = {path.name: path.read_bytes() for path in output.glob("*.json")}
    decoded.clear()
    do(folder, output, *PARTS)
    assert not decoded and {path.name: path.read_bytes() for path in output.glob("*.json")} == before


def test_after_a_kill_only_what_is_missing_is_computed(
    folder: Path, tmp_path: Path, decoded: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    child = os.fork()
    if not child:
        kept = evaluate.Records.keep

        def killed(self: Any, video: Any, record: Any) -> None:
            if video.id == "002":
                os.kill(os.getpid(), signal.SIGKILL)
            kept(self, video, record)

        evaluate.Records.keep = killed  # type: ignore[method-assign]
        do(folder, output, "evaluate.interpolator=stub_nets:between")
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert sorted(path.name for path in (output / "records").glob("*.json")) == ["000.json", "001.json"]
    do(folder, output, "evaluate.interpolator=stub_nets:between")
    assert decoded == {"002.mp4": FRAMES, "003.mp4": FRAMES}
    assert results(output, "motion_smoothness")["num_videos"] == 4
    alone = tmp_path / "alone"
    do(folder, alone, "evaluate.interpolator=stub_nets:between")
    for path in alone.glob("*.json"):
        assert path.read_bytes() == (output / path.name).read_bytes()


def test_what_changed_is_computed_again_and_nothing_else(
    folder: Path, tmp_path: Path, decoded: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (*PARTS, "evaluate.metrics=[motion_amplitude,motion_smoothness,semantic]")
    output, fed = tmp_path / "out", Counter[str]()
    scored = evaluate.score_video

    def watched(video: Any, digest: str, wanted: Any, *rest: Any) -> Any:
        fed.update(measure.name for measure in wanted)
        return scored(video, digest, wanted, *rest)

    monkeypatch.setattr(evaluate, "score_video", watched)
    do(folder, output, *words)
    fed.clear(), decoded.clear()
    do(folder, output, *words, "evaluate.amplitude=magnitude")
    assert fed == {"motion_amplitude": 4}
    amplitude = results(output, "motion_amplitude")["per_video_results"][0]
    assert amplitude["motion_magnitude"] > amplitude["motion_helios_compat"] and "motion_fb" not in amplitude
    fed.clear(), decoded.clear()
    (folder / "001.json").write_text(json.dumps({"caption": "another bar"}))
    os.utime(folder / "002.mp4")  # a copy has the same bytes
    write_mp4(folder / "003.mp4", clip(9), 25)
    do(folder, output, *words, "evaluate.amplitude=magnitude")
    assert set(decoded) == {"001.mp4", "003.mp4"} and fed["semantic"] == 2 and fed["motion_smoothness"] == 1
    fed.clear()
    do(folder, output, *words, "evaluate.length=short")
    assert fed["semantic"] == 4


def test_bad_videos_are_named_and_counted(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = (folder / "001.mp4").read_bytes()
    (folder / "001.mp4").write_bytes(whole[: len(whole) // 2])
    write_mp4(folder / "004.mp4", clip(4, 1), 25)  # of one frame, which does not move
    words = ("evaluate.metrics=[motion_amplitude,motion_smoothness,drifting_motion_smoothness]", PARTS[0])
    do(folder, tmp_path / "out", *words)
    said = capsys.readouterr().out
    assert "2 bad videos count with the worst score" in said
    assert "001.mp4: " in said and "004.mp4: has 1 frame, and motion is seen between two (motion_amplitude)" in said
    found = results(tmp_path / "out", "motion_amplitude")
    good = [row["motion_fb"] for row in found["per_video_results"]]
    assert (found["num_videos"], found["num_failed"], found["failed_count_as"], len(good)) == (5, 2, 0.0, 3)
    assert found["average_score"] == pytest.approx(sum(good) / 5)
    assert [row["video_name"] for row in found["failed"]] == ["001.mp4", "004.mp4"]
    drift = results(tmp_path / "out", "drifting_motion_smoothness")
    assert (drift["num_videos"], drift["num_failed"], drift["failed_count_as"]) == (5, 1, 1.0)
    assert drift["average_drift_score"] >= 0.2
    do(folder, tmp_path / "out", *words, "evaluate.bad=skip")
    found = results(tmp_path / "out", "motion_amplitude")
    assert (found["num_videos"], found["num_failed"], found["average_score"]) == (3, 2, pytest.approx(sum(good) / 3))
    assert "2 bad videos are left out of the means" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"001\.mp4: .*evaluate.bad="):
        do(folder, tmp_path / "other", *words, "evaluate.bad=stop")
    with pytest.raises(InputError, match=r"001\.mp4: "):
        do(folder, tmp_path / "out", *words, "evaluate.bad=stop")  # what an earlier evaluation skipped stops this one
    (folder / "001.mp4").write_bytes(whole)
    do(folder, tmp_path / "out", *words)
    assert results(tmp_path / "out", "motion_amplitude")["num_failed"] == 1


def test_a_prompt_list_and_published_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    videos, prompts = tmp_path / "videos", tmp_path / "prompts.csv"
    videos.mkdir()
    prompts.write_text('id,prompt,duration\n2,"a fox, running",240\n10,a cow,120\n11,a hen,120\n')
    for name in ("2_240_ori17", "10_120_ori17", "7_120_ori17", "stray"):
        write_mp4(videos / f"{name}.mp4", clip(1), 25)
    words = (f"evaluate.prompts={prompts}", "evaluate.metrics=[semantic]", *PARTS[1:])
    do(videos, tmp_path / "out", *words)
    said = capsys.readouterr().out
    assert "left out: 7_120_ori17.mp4 id 7 is not in the prompt list" in said and "left out: stray.mp4" in said
    assert "1 prompts have no video: 11" in said
    rows = results(tmp_path / "out", "semantic")["per_video_results"]
    assert [(row["id"], row["prompt"]) for row in rows] == [(2, "a fox, running"), (10, "a cow")]
    write_mp4(videos / "2_240_ori99.mp4", clip(1), 25)
    with pytest.raises(InputError, match="id 2 is that of 2_240_ori17.mp4 too"):
        do(videos, tmp_path / "out", *words)
    prompts.write_text("id,prompt\n2,a fox\n")
    with pytest.raises(InputError, match="has no column duration"):
        do(videos, tmp_path / "out", *words)
    prompts.write_text("id,prompt,duration\n2,a fox,1\n2,a cow,1\n")
    with pytest.raises(InputError, match="id 2 comes twice"):
        do(videos, tmp_path / "out", *words)


def test_shares_make_one_result(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], decoded: Counter[str]) -> None:
    words = ("evaluate.metrics=[motion_smoothness]", PARTS[0])
    do(folder, tmp_path / "out", *words, "evaluate.part=1/3")
    assert set(decoded) == {"000.mp4", "003.mp4"} and "2 videos are other processes'" in capsys.readouterr().out
    assert not (tmp_path / "out/merged_results.json").exists()
    for part in ("2/3", "3/3"):
        do(folder, tmp_path / "out", *words, f"evaluate.part={part}")
    do(folder, tmp_path / "alone", *words)
    assert all(count in (FRAMES, 2 * FRAMES) for count in decoded.values())
    assert results(tmp_path / "out", "motion_smoothness") == results(tmp_path / "alone", "motion_smoothness")


def test_short_evaluations_see_81_frames(tmp_path: Path, decoded: Counter[str]) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    write_mp4(videos / "a.mp4", torch.cat([clip(1, 81), clip(9, 31)]), 25)
    write_mp4(videos / "b.mp4", clip(1, 81), 25)
    do(videos, tmp_path / "out", "evaluate.metrics=[motion_smoothness]", PARTS[0], "evaluate.length=short")
    rows = [row["motion_smoothness_score"] for row in results(tmp_path / "out", "motion_smoothness")["per_video_results"]]
    assert rows[0] == pytest.approx(rows[1], abs=1e-3) and decoded["a.mp4"] == 96  # six blocks of seven
    do(videos, tmp_path / "out", "evaluate.metrics=[motion_smoothness]", PARTS[0])
    long = [row["motion_smoothness_score"] for row in results(tmp_path / "out", "motion_smoothness")["per_video_results"]]
    assert long[0] < rows[0] - 1e-3 and long[1] == rows[1]


BAD = {
    ("evaluate.metrics=[semantic]",): "semantic needs evaluate.semantic.video_encoder and evaluate.semantic.text_encoder",
    ("evaluate.metrics=[aesthetics]",): "evaluate.metrics=",
    ("evaluate.metrics=[]",): "name at least one metric",
    ("evaluate.interpolator=no_such_module:between",): "no_such_module:between: cannot be imported",
    ("evaluate.interpolator=stub_nets:torch",): "is a module, which cannot be called",
    ("evaluate.interpolator=between",): "write it as module:function",
    ("evaluate.part=3/2",): "evaluate.part=3/2",
    ("trainer.devices=2", "data.micro_batch=1"): "takes one device a process",
    ("init=somewhere",): "evaluate.videos and init: one command",
    ("evaluate.prompts=no_such.csv",): "no_such.csv: is no list of prompts",
    ("evaluate.aesthetic.head=no_such.pth",): "no_such.pth: no linear head",
    ("evaluate.videos=no_such_folder",): "no such folder of videos",
    ("evaluate.videos=null",): "task=evaluate needs evaluate.videos=",
}


@pytest.mark.parametrize("words", BAD, ids=" ".join)
def test_what_cannot_be_is_refused(words: tuple[str, ...], folder: Path, tmp_path: Path) -> None:
    with pytest.raises((ConfigError, InputError)) as refused:
        do(folder, tmp_path / "out", *words)
    assert BAD[words] in str(refused.value)


@pytest.mark.parametrize(("row", "said"), [("3,a,0", "id 3 has 0 frames"), ("3", "is no list"), ("4,,9", "id 4 has no prompt")])
def test_a_prompt_that_asks_for_nothing_is_refused(tmp_path: Path, row: str, said: str) -> None:
    path = tmp_path / "prompts.csv"
    path.write_text(f"id,prompt,duration\n{row}\n")
    with pytest.raises(InputError, match=said):
        read_prompts(path)


def test_folders_are_compared(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "two"):
        do(folder, tmp_path / name / "evaluation", "evaluate.metrics=[motion_smoothness]", PARTS[0])
    words = [f"evaluate.compare=[{tmp_path}/one/evaluation,{tmp_path}/two/evaluation]", "evaluate.videos=null"]
    raw = compose.plain(compose.compose_plain(["task=evaluate", f"evaluate.output={tmp_path}/both", *words]))
    evaluate.run(compose.typed(raw), raw)
    page = (tmp_path / "both/compare.html").read_text()
    assert "motion smoothness" in page and page.count("· rating 10") == 2 and "metrics.csv" not in page
    assert capsys.readouterr().out.splitlines()[-1] == f"{tmp_path}/both/compare.html"
    assert "one/evaluation · two/evaluation · compared" in page
    both = json.loads((tmp_path / "both/all_models_merged.json").read_text())
    assert (both["num_models"], both["score_type"], both["metrics"]) == (2, "rating", ["motion_smoothness"])
    one, two = (both["models"][f"{name}/evaluation"] for name in ("one", "two"))  # labelled as on the page
    assert one == two and one["motion_smoothness"] == 10


@pytest.mark.parametrize("there", [1, 3])
def test_parts_share_what_is_planned_whatever_is_there_yet(folder: Path, tmp_path: Path, there: int) -> None:
    planned, device = [f"{number:03d}" for number in range(4)], torch.device("cpu")
    words = ["task=evaluate", "evaluate.metrics=[motion_amplitude]", f"evaluate.output={tmp_path}/out"]
    late = [folder / f"{name}.mp4" for name in planned if name != f"{there:03d}"]
    hidden = [path.rename(path.with_suffix(".later")) for path in late]  # what other processes are still sampling

    def evaluation(part: str) -> evaluate.Evaluation:
        keys = compose.compose([*words, f"evaluate.part={part}"]).evaluate
        assert keys is not None
        return evaluate.Evaluation(keys, evaluate.find(folder, None, planned), device, planned)

    second = evaluation("2/2")
    assert [video.path.stem for video in second.mine] == [f"{there:03d}"] and not evaluation("1/2").mine
    second.score()
    assert "3 videos are other processes'" in second.finish()[0] and not (tmp_path / "out/merged_results.json").exists()
    for path in hidden:
        path.rename(path.with_suffix(".mp4"))
    evaluation("1/2").score()
    last = evaluation("2/2")
    last.score()
    assert last.finish()[-1] == f"{tmp_path}/out/merged_results.json"


BROKEN = {
    "motion_smoothness": (
        "(before + after) / 2",
        "before * float('nan') if before.mean() > 0.3 else before",
        "interpolator gives",
    ),
    "semantic": ("torch.ones(", "float('nan') * torch.ones(", "semantic is no finite number"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_score_that_is_no_number_is_a_failure(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    stub = tmp_path / "nets/stub_nets.py"
    right, wrong, said = BROKEN[name]
    stub.write_text(stub.read_text().replace(right, wrong))
    do(folder, tmp_path / "out", *PARTS, f"evaluate.metrics=[motion_amplitude,{name}]")
    failed, other = (results(tmp_path / "out", metric)["num_failed"] for metric in (name, "motion_amplitude"))
    assert failed == (4 if name == "semantic" else 2) and other == 0
    assert said in capsys.readouterr().out
    assert "NaN" not in "".join(path.read_text() for path in (tmp_path / "out").rglob("*.json"))
    with pytest.raises(InputError, match=f"{said}.*evaluate.bad"):
        do(folder, tmp_path / "out", *PARTS, f"evaluate.metrics=[{name}]", "evaluate.bad=stop")
    do(folder, tmp_path / "out", "evaluate.metrics=[motion_amplitude]", "evaluate.bad=stop")  # of what is asked for none is bad


@pytest.mark.parametrize(("length", "total"), [("long", 8.247), ("short", 7.45)])
def test_the_published_example_from_config_to_total(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: str, total: float
) -> None:
    for number in range(2, 4):
        (folder / f"{number:03d}.mp4").unlink()
    pairs = {  # of the two videos that HeliosBench ships with its results; of drifts and semantic the mean alone is known
        "aesthetic": (0.68027, 0.63258),
        "motion_amplitude": (0.19912, 0.05888),
        "motion_smoothness": (0.98968, 0.99479),
        "semantic": (0.28176, 0.28176),
        "naturalness": (0.25, 0.75),
        "drifting_aesthetic": (0.02787, 0.02787),
        "drifting_motion_smoothness": (0.00096, 0.00096),
        "drifting_semantic": (0.00664, 0.00664),
        "drifting_naturalness": (0.0, 0.0),
    }
    stand_in = measures.KINDS["motion_amplitude"]
    monkeypatch.setattr(measures, "KINDS", dict.fromkeys(measures.KINDS, stand_in))
    monkeypatch.setattr(
        evaluate,
        "score_video",
        lambda video, digest, wanted, *rest: {one.name: Score(pairs[one.name][int(video.path.stem)], {}) for one in wanted},
    )
    output = tmp_path / "out"
    do(folder, output, "evaluate.strict=true", f"evaluate.length={length}")
    merged = json.loads((output / "merged_results.json").read_text())
    assert (merged["length"], merged["thresholds"]) == (length, "published")
    assert merged["summary"]["total_weighted_rating"] == total
    assert [entry["rating"] for entry in merged["summary"]["non_drifting"].values()] == [9, 3, 10, 8, 7]
    words = (f"evaluate.length={length}", "evaluate.metrics=[motion_smoothness,motion_amplitude]")
    do(folder, output, "evaluate.strict=true", *words)  # what is not measured counts for nothing
    strict = json.loads((output / "merged_results.json").read_text())["summary"]["total_weighted_rating"]
    assert strict == round((10 + 3) * (0.03 if length == "long" else 0.1), 4)
    do(folder, output, *words)
    mended = json.loads((output / "merged_results.json").read_text())
    assert (mended["thresholds"], mended["summary"]["total_weighted_rating"]) == ("mended", 6.5)


def test_magnitude_is_not_called_or_rated_as_the_published_amplitude(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (PARTS[0], "evaluate.metrics=[motion_amplitude,motion_smoothness]")
    do(folder, tmp_path / "out", *words, "evaluate.amplitude=magnitude")
    found = results(tmp_path / "out", "motion_amplitude")
    assert found["metric"] == "motion_magnitude"
    assert "motion_fb" not in found["per_video_results"][0] and "motion_magnitude" in found["per_video_results"][0]
    merged = json.loads((tmp_path / "out/merged_results.json").read_text())
    assert list(merged["summary"]["non_drifting"]) == ["motion_smoothness"]
    assert merged["not_rated"]["motion_amplitude"]["raw_score"] == found["average_score"]
    assert "not the published form" in merged["not_rated"]["motion_amplitude"]["reason"]
    assert merged["summary"]["total_weighted_rating"] == 10.0
    said = capsys.readouterr().out
    assert "of 1 of 9 metrics" in said and "\nmotion_magnitude " in said and "\nmotion_amplitude " not in said


def test_a_model_is_sampled_then_scored(
    tiny_run: Run, tmp_path: Path, decoded: Counter[str], capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_run("data.size=[32,64]", f"data.root={tmp_path}/shards", f"run_dir={tmp_path}/run", "trainer.max_steps=1")
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("id,prompt,duration\n3,a red circle,20\n5,a blue circle,40\n8,a green circle,10\n")
    words = ["task=evaluate", f"init={tmp_path}/run", f"evaluate.prompts={prompts}", f"evaluate.output={tmp_path}/out"]
    words += ['evaluate.sample="sample.steps=1 sample.guidance=1"', "evaluate.metrics=[motion_amplitude]"]
    tiny_run(*words)
    assert decoded == {"3_20_ori33.mp4": 33, "5_40_ori66.mp4": 66, "8_10_ori33.mp4": 33}
    speed = json.loads((tmp_path / "out/throughput.json").read_text())
    rows = speed["per_video_results"]
    assert [row["frames"] for row in rows] == [33, 66, 33]
    assert speed["frames_per_second"] == pytest.approx(99 / (rows[1]["seconds"] + rows[2]["seconds"]))
    assert speed["rating"] in range(1, 11)
    (made,) = (tmp_path / "out").glob("videos_*")
    bits = (made / "5_40_ori66.mp4").read_bytes()
    (made / "5_40_ori66.json").unlink()  # as of a process that was killed
    decoded.clear(), capsys.readouterr()
    tiny_run(*words)
    said = capsys.readouterr().out
    assert "2 of 3 videos are there already" in said and "sampling 1 of 1: a blue circle" in said
    assert not decoded and (made / "5_40_ori66.mp4").read_bytes() == bits
    speed = json.loads((tmp_path / "out/throughput.json").read_text())  # the one that was sampled again warmed up
    assert [row["warm_up"] for row in speed["per_video_results"]] == [True, True, False]
    assert speed["warm_up_videos"] == 2 and speed["frames_per_second"] == pytest.approx(33 / rows[2]["seconds"])
    prompts.write_text("id,prompt,duration\n3,a red circle,40\n8,a green circle,10\n")  # one longer, one less
    tiny_run(*words)
    said = capsys.readouterr().out
    assert "2 videos, measured" in said and "left out: 3_20_ori33.mp4 is none of those that are sampled now" in said
    assert list(decoded) == ["3_40_ori66.mp4"] and results(tmp_path / "out", "motion_amplitude")["num_videos"] == 2
    decoded.clear()
    tiny_run(*words, "seed=1")
    assert len(list((tmp_path / "out").glob("videos_*"))) == 2 and len(decoded) == 2
    for wrong in ("trainer.devices=2", "sample.output=x", '"', "sample.prompt=x"):
        with pytest.raises(ConfigError, match="evaluate.sample"):
            tiny_run(*words[:-2], f"evaluate.sample='{wrong}'")
