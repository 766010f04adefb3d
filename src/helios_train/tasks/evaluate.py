"""task=evaluate: HeliosBench on a folder of videos, or on videos that are first sampled from a model.

Every video is decoded once for all metrics, a block of frames at a time. What is found of one is on disk before the next begins,
so a killed evaluation goes on; results are written from these records, by whichever process of several is last.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from shlex import split
from typing import Any

import torch

from helios_train.conf import compose
from helios_train.conf.schema import Config, Evaluate, Task
from helios_train.data.decode import Decoder
from helios_train.errors import ConfigError, InputError
from helios_train.evaluation.frames import BLOCK, Block, Clip
from helios_train.evaluation.metric import Score
from helios_train.evaluation.ratings import RULES, throughput_rating
from helios_train.evaluation.records import Record, Records, key
from helios_train.evaluation.results import RECORDS, THROUGHPUT, Failure, Mean, mean_of, write_all, write_merged, write_metric
from helios_train.evaluation.throughput import Throughput
from helios_train.evaluation.videos import Found, Prompt, Video, find, read_prompts
from helios_train.models.codecs import SECTION_FRAMES
from helios_train.run import write, writing
from helios_train.tasks import build, measures, sameness, sample
from helios_train.tasks.measures import Measure
from helios_train.tasks.progress import Progress

SHORT = 81  # frames of a video that count in a short evaluation
NAMED = 5  # things a line names before it counts the others
TOOK, PAGE = "seconds", "compare.html"


def run(config: Config, raw: dict[str, Any]) -> None:
    """Scores `evaluate.videos`, or samples from `init` and scores that, or compares `evaluate.compare`."""
    wanted = config.evaluate
    assert wanted is not None
    if not wanted.compare and wanted.videos is None and config.init is None:
        raise InputError("task=evaluate needs evaluate.videos=<folder of mp4>, or init=<weights to sample from>")
    output = Path(wanted.output)
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
    if wanted.compare:
        print(compare([Path(folder) for folder in wanted.compare], output))
        return
    prompts = read_prompts(Path(wanted.prompts)) if wanted.prompts else None
    sampled = sample_videos(config, prompts) if wanted.videos is None else None
    found = find(sampled.folder, prompts, sampled.names) if sampled else find(Path(wanted.videos or ""), prompts)
    evaluation = Evaluation(wanted, found, build.device(config), sampled.names if sampled else None)
    evaluation.tell()
    evaluation.score()
    print("\n".join(evaluation.finish()))
    if sampled and not evaluation.waits_for():
        sampled.write_throughput(output)


def compare(folders: list[Path], output: Path) -> Path:
    """The page that puts folders side by side; of those that were evaluated, all_models_merged.json too."""
    write_all(folders, output)
    report = importlib.import_module("helios_train.evaluation.report")  # it draws: only who compares waits for that
    return report.compare(folders, output / PAGE)


class Evaluation:
    """The videos of a folder, the metrics, and what is known already. planned: names of all videos that there are to be, where
    other processes may still be sampling some."""

    def __init__(self, keys: Evaluate, found: Found, device: torch.device, planned: Sequence[str] | None = None):
        self.keys, self.found = keys, found
        names = planned or [video.path.stem for video in found.videos]
        part, parts = map(int, keys.part.split("/"))
        self.mine = [video for video in found.videos if names.index(video.path.stem) % parts == part - 1]
        captions = any(video.text for video in found.videos)
        self.measures, self.left_out = measures.chosen(keys, captions, device)
        self.records = Records(Path(keys.output) / RECORDS)

    def tell(self) -> None:
        """What is measured, what is not, and why."""
        print(f"{len(self.found.videos)} videos, measured: {', '.join(measure.name for measure in self.measures)}", flush=True)
        for reason in sorted(set(self.left_out.values())):
            names = [name for name, why in self.left_out.items() if why == reason]
            print(f"not measured: {', '.join(names)} ({reason})")
        for name, reason in list(self.found.left_out.items())[:NAMED]:
            print(f"left out: {name} {reason}")
        if len(self.found.left_out) > NAMED:
            print(f"left out: {len(self.found.left_out) - NAMED} files more")
        if self.found.missing:
            missing = ", ".join(map(str, self.found.missing[:NAMED]))
            print(f"{len(self.found.missing)} prompts have no video: {missing}{', ...' * (len(self.found.missing) > NAMED)}")

    def score(self) -> None:
        """Computes what is missing of this process's share, video by video. InputError for a bad one with evaluate.bad=stop."""
        with Progress("evaluating", len(self.mine), "videos") as progress, Decoder(self.keys.timeout) as decoder:
            for video in self.mine:
                record = self.records.of(video)
                if missing := [each for each in self.measures if record.score(each.name, self._key(each, video)) is None]:
                    found = score_video(video, record.digest, missing, decoder, self.keys.length)
                    for measure in missing:
                        record.scores.pop(measure.name, None)
                        record.failed.pop(measure.name, None)
                        result = found[measure.name]
                        if isinstance(result, Score):
                            record.scores[measure.name] = (self._key(measure, video), result)
                        else:
                            record.failed[measure.name] = result
                    self.records.keep(video, record)
                    if self.keys.bad == "stop" and any(each.name in record.failed for each in self.measures):
                        raise InputError(f"{_named(video, record)}; repair or remove it, or set evaluate.bad=worst or skip")
                progress.advance()

    def waits_for(self) -> int:
        """How many videos other processes still have to sample or to score."""
        known = ((video, self.records.of(video)) for video in self.found.videos)
        unscored = sum(not all(self._known(record, each, video) for each in self.measures) for video, record in known)
        return unscored + len(self.found.unmade)

    def finish(self) -> list[str]:
        """Writes the results of all videos that any process has scored; returns lines for people."""
        if unscored := self.waits_for():
            return [f"{unscored} videos are other processes' (evaluate.part={self.keys.part}); who is last writes the results"]
        known = [(number, video, self.records.of(video)) for number, video in enumerate(self.found.videos)]
        output, worst = Path(self.keys.output), self.keys.bad == "worst"
        means: dict[str, Mean] = {}
        bad = [_named(video, record) for _, video, record in known if any(each.name in record.failed for each in self.measures)]
        for measure in self.measures:
            scores = [(number, video, record.score(measure.name, self._key(measure, video))) for number, video, record in known]
            scored = [(number, video, score) for number, video, score in scores if score is not None]
            failed = [
                Failure(number, video, record.failed[measure.name])
                for number, video, record in known
                if record.score(measure.name, self._key(measure, video)) is None
            ]
            means[measure.name] = mean_of(measure.metric, scored, failed, worst)
            write_metric(output, measure.name, scored, failed, means[measure.name], worst)
        summary = write_merged(output, means, self.keys.length, self.keys.strict)
        return [*self._lines(means, summary), *self._bad_lines(bad), str(output / "merged_results.json")]

    def _lines(self, means: dict[str, Mean], summary: dict[str, Any]) -> list[str]:
        rated = summary["non_drifting"] | summary["drifting"]
        lines = [f"{'metric':28} {'mean':>9} {'rating':>6} {'videos':>6}"]
        for name, mean in means.items():
            rating = rated[name]["rating"] if name in rated else "-"
            lines.append(f"{mean.variant or name:28} {mean.value:9.5f} {rating:>6} {mean.videos:6}")
        if summary["total_weighted_rating"] is not None:
            rules = sum(self.keys.length in rule.weights for rule in RULES.values())
            of = f", of {len(rated)} of {rules} metrics" if len(rated) < rules else ""
            lines.append(f"total {summary['total_weighted_rating']:g}{of}")
        return lines

    def _bad_lines(self, bad: list[str]) -> list[str]:
        if not bad:
            return []
        counted = "count with the worst score" if self.keys.bad == "worst" else "are left out of the means"
        more = [f"  and {len(bad) - NAMED} more, in the results"] if len(bad) > NAMED else []
        return [f"{len(bad)} bad videos {counted}:", *(f"  {line}" for line in bad[:NAMED]), *more]

    def _known(self, record: Record, measure: Measure, video: Video) -> bool:
        return record.score(measure.name, self._key(measure, video)) is not None or measure.name in record.failed

    def _key(self, measure: Measure, video: Video) -> str:
        return key(measure.settings | ({"text": video.text} if measure.reads_text else {}))


@torch.no_grad()
def score_video(
    video: Video, digest: str, wanted: Sequence[Measure], decoder: Decoder, length: str = "long"
) -> dict[str, Score | str]:
    """Scores by metric, or why there is none, from one decoding of the video."""
    results: dict[str, Score | str] = {}
    scorers = {}
    try:
        frames = decoder.probe(video.path).frames
        frames = min(frames, SHORT) if length == "short" else frames
        clip = Clip(frames, video.text, f"{digest}:0-{frames}")
        for measure in wanted:
            try:
                scorers[measure.name] = measure.metric.begin(clip)
            except InputError as error:
                results[measure.name] = str(error)
        done = 0
        for pixels in decoder.stream(video.path, BLOCK):
            block = Block(done, pixels[: frames - done])
            for name, scorer in list(scorers.items()):
                try:
                    scorer.feed(block)
                except InputError as error:
                    results[name] = str(error)
                    del scorers[name]
            done += len(block)
            if done >= frames:
                break
    except InputError as error:
        return {measure.name: str(error) for measure in wanted}
    for name, scorer in scorers.items():
        try:
            score = scorer.end()
        except InputError as error:
            results[name] = str(error)
        else:
            finite = math.isfinite(score.value) and math.isfinite(score.signed)
            results[name] = score if finite else f"{name} is no finite number; see to the network that computes it"
    return results


@dataclass(frozen=True)
class Sampling:
    """Videos to sample for an evaluation: the config of the sampling, the videos, and the folder that is theirs alone."""

    config: Config
    jobs: list[sample.Job]
    folder: Path

    @property
    def names(self) -> list[str]:
        """Of the videos' files, in their order."""
        return [job.name for job in self.jobs]

    def took(self, name: str, frames: int, seconds: float, warm_up: bool) -> None:
        """Keeps what a video took, for whoever writes the results; the first of a process warms up."""
        row = {"video_name": f"{name}.mp4", "frames": frames, "seconds": seconds, "warm_up": warm_up}
        path = self.folder / TOOK / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        write(path, json.dumps(row) + "\n")

    def write_throughput(self, output: Path) -> None:
        """throughput.json: frames a second over the videos that any process has sampled, but for those that warmed up."""
        paths = [self.folder / TOOK / f"{name}.json" for name in self.names]
        rows = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]
        metric = Throughput()
        for row in rows:
            if not row["warm_up"]:
                metric.update(row["frames"], row["seconds"])
        measured = float(metric.compute()) if metric.frames else None
        rating = throughput_rating(measured) if measured else None
        warm_up = sum(row["warm_up"] for row in rows)
        content = {"frames_per_second": measured, "rating": rating, "warm_up_videos": warm_up, "per_video_results": rows}
        write(output / THROUGHPUT, json.dumps(content, indent=2) + "\n")

    def missing(self) -> list[sample.Job]:
        """Those that are not there, whole, with the caption and the length that are wanted."""
        return [job for job in self.jobs if not self._there(job)]

    def _there(self, job: sample.Job) -> bool:
        try:
            facts = json.loads((self.folder / f"{job.name}.json").read_text(encoding="utf-8"))
            whole = (self.folder / f"{job.name}.mp4").is_file()
            return whole and (facts["caption"], facts["frames"]) == (job.caption, job.sections * SECTION_FRAMES)
        except (OSError, ValueError, KeyError, TypeError):
            return False


def sample_videos(config: Config, prompts: list[Prompt] | None) -> Sampling:
    """Samples from `init` this process's share of what is not there yet; prompts give captions and lengths, else evaluate.sample
    does. Weights or settings that differ make another folder."""
    assert config.evaluate is not None
    plan = sampling(config, prompts)
    plan.folder.mkdir(parents=True, exist_ok=True)
    missing = plan.missing()
    if len(missing) < len(plan.jobs):
        print(f"{len(plan.jobs) - len(missing)} of {len(plan.jobs)} videos are there already", flush=True)
    part, parts = map(int, config.evaluate.part.split("/"))
    mine = [job for job in missing if plan.jobs.index(job) % parts == part - 1]
    for number, each in enumerate(sample.sampled(plan.config, mine, plan.folder) if mine else ()):
        plan.took(each.saved.mp4.stem, json.loads(each.saved.facts.read_text())["frames"], each.seconds, warm_up=number == 0)
    return plan


def sampling(config: Config, prompts: list[Prompt] | None) -> Sampling:
    """What is to be sampled. ConfigError where evaluate.sample cannot be read, or says what the prompts say."""
    assert config.evaluate is not None and config.init is not None
    try:
        words = split(config.evaluate.sample)
    except ValueError as error:
        raise ConfigError(f"evaluate.sample: {config.evaluate.sample!r} cannot be read ({error})") from None
    for word in words:
        if not word.startswith("sample.") or word.startswith("sample.output="):
            raise ConfigError(f"evaluate.sample: {word} has no place there; it takes the keys sample.* but sample.output")
    keys = compose.compose(["task=sample", *words]).sample
    assert keys is not None
    output = Path(config.evaluate.output)
    config = replace(config, task=Task("sample"), sample=keys)
    if prompts is None:
        jobs = sample.jobs(config)
    elif keys.prompt is not None or keys.script is not None:
        raise ConfigError("evaluate.sample: captions are those of evaluate.prompts; leave sample.prompt and sample.script out")
    else:
        jobs = [_job(row) for row in prompts]
    return Sampling(config, jobs, output / f"videos_{_settings_key(config)[:8]}")


def _job(row: Prompt) -> sample.Job:
    """Whole sections that are at least as long as is wanted; the number, and so the noise, is the id's."""
    sections = math.ceil(row.duration / SECTION_FRAMES)
    return sample.Job(row.id, row.prompt, sections, f"{row.id}_{row.duration}_ori{sections * SECTION_FRAMES}")


def _settings_key(config: Config) -> str:
    """Differs where the videos of one caption may."""
    assert config.sample is not None and config.init is not None
    init = Path(config.init)
    files = sorted(path for path in ([init] if init.is_file() else init.rglob("*")) if path.suffix in (".ckpt", ".safetensors"))
    weights = [[str(path.relative_to(init)), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    keys = asdict(config.sample)
    said = {name: keys[name] for name in keys if name not in ("output", "prompt", "count", "sections")}
    parts = [asdict(part) for part in (config.codec, config.text, config.model)]
    return key({"init": sameness.place(config.init), "weights": weights, "sample": said, "parts": parts, "seed": config.seed})


def _named(video: Video, record: Record) -> str:
    """A bad video, and each reason once with the metrics that it is the reason of."""
    reasons = sorted(set(record.failed.values()))
    names = {reason: [name for name, why in record.failed.items() if why == reason] for reason in reasons}
    said = {reason: reason if str(video.path) in reason else f"{video.path}: {reason}" for reason in reasons}
    return "; ".join(f"{said[reason]} ({', '.join(names[reason])})" for reason in reasons)
