"""Pages about runs: what they hold, whatever a run folder holds; nothing from elsewhere, nothing unescaped, never too large."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import shutil
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import av
import pytest
import yaml

from helios_train.errors import InputError
from helios_train.evaluation import page_videos, report
from helios_train.evaluation.page_videos import album, by_importance
from helios_train.evaluation.recorded import Video, record

from . import run_folders

EVIL = "<script>alert('x')</script>\"'&<img src=x onerror=alert(1)>"


class Page(HTMLParser):
    """Elements of a page by tag, and the text people see."""

    def __init__(self, path: Path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.elements: dict[str, list[dict[str, str]]] = {}
        self.script, self.text, self._inside = "", "", [""]
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.setdefault(tag, []).append({name: value or "" for name, value in attrs})
        if tag in ("script", "style"):
            self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag == self._inside[-1]:
            self._inside.pop()

    def handle_data(self, data: str) -> None:
        if self._inside[-1] == "script":
            self.script += data
        elif self._inside[-1] != "style":
            self.text += data

    def all(self, tag: str, **has: str) -> list[dict[str, str]]:
        return [found for found in self.elements.get(tag, []) if all(found.get(key) == value for key, value in has.items())]

    @property
    def spaced(self) -> str:
        """The text and the script, with a space between any two elements."""
        return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", self.source)).split())

    @property
    def charts(self) -> dict[str, list[str]]:
        """Labels of the lines by title of the chart; the data every chart has for a pointer must be JSON."""
        titles = [figure["aria-label"] for figure in self.all("svg", role="img")]
        data = [json.loads(figure["data-chart"]) for figure in self.all("figure", **{"class": "chart"})]
        return {title: [line["label"] for line in one["lines"]] for title, one in zip(titles, data, strict=True)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with everything; not to be changed."""
    return run_folders.make(tmp_path_factory.mktemp("whole") / "first")


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A run folder with everything but videos."""
    return run_folders.make(tmp_path / "bare", moments=())


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return Path(shutil.copytree(whole, tmp_path / "first"))


def decoded(uri: str) -> tuple[int, int, int]:
    """Frames, rows and columns of a video in a page."""
    kind, _, data = uri.partition(",")
    assert kind == "data:video/mp4;base64"
    with av.open(BytesIO(base64.b64decode(data))) as opened:
        frames = [(frame.height, frame.width) for frame in opened.decode(video=0)]
    return len(frames), *frames[0]


def assert_closed(page: Page) -> None:
    """Nothing is loaded, and one script, the package's own, may run."""
    for elements in page.elements.values():
        for element in elements:
            for name in ("src", "href", "poster", "data", "action"):
                assert element.get(name, "#").startswith(("#", "data:")), element
            assert not [name for name in element if name.startswith("on")], element
    assert not page.all("link", rel="stylesheet") and not page.all("iframe") and "@import" not in page.source
    assert len(page.all("script")) == 1 and page.script == (Path(report.__file__).parent / "templates/page.js").read_text()
    (policy,) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    digest = base64.b64encode(hashlib.sha256(page.script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy["content"] and policy["content"].startswith("default-src 'none'")


def test_a_page_holds_the_whole_run(folder: Path) -> None:
    path = report.write(folder)
    page = Page(path)
    assert path == folder / "report.html" and path.stat().st_size < 1_000_000
    assert_closed(page)
    order = ["luma, video/student", "Warnings of the run card", "Videos", "Training loss", "Held-out loss", "Optimizer"]
    order += ["Drift", "Health", "Throughput", "Memory", "Environment", "Run card", "config.yaml"]
    main = page.text[page.text.index("Alarms") :]
    places = [main.index(f"\n{title}" if title == "Drift" else title) for title in order]
    assert places == sorted(places)
    for said in (
        "few clips for such a batch",
        "sections grow brighter",
        "2.13.0",
        "gone on with at iteration 200",
        "guidance: 2.0",
    ):
        assert said in page.text
    assert "missing, damaged" not in page.text
    videos = page.all("video")
    assert len(videos) == 6 and {decoded(video["src"]) for video in videos} == {(66, 32, 64)}
    assert len([image for image in page.all("img") if image["src"].startswith("data:image/webp")]) == 6
    assert page.text.index("iteration 400") < page.text.index("iteration 200")
    charts = page.charts
    assert charts["held-out loss"] == ["full history", "history dropped", "wrong caption"]
    assert charts["student: brightness"] == ["iteration 200", "iteration 400"]
    assert charts["live storages, moment by moment"] == ["device", "host"]
    assert {"gradient norm", "learning rate", "peak", "entropy", "time of an iteration", "student: loss"} <= charts.keys()
    assert len(page.all("line", **{"class": "mark"})) == 2


def test_the_tiles_say_where_the_run_stands(folder: Path) -> None:
    tiles = {one.label: one for one in report.figures.tiles(record(folder))}
    assert (tiles["iterations"].value, tiles["iterations"].note) == ("400", "of 400")
    assert (tiles["alarms"].value, tiles["alarms"].bad, tiles["skipped updates"].value) == ("2", True, "2")
    rows = run_folders.rows()
    assert tiles["held-out loss"].value == report.figures.short(rows[-1]["held_out/full"])
    late = [row["student/loss"] for row in rows if row["iteration"] >= 360.5]
    assert tiles["student loss"].value == report.figures.short(sum(late) / len(late))
    assert (tiles["planned peak"].value, tiles["planned peak"].unit) == ("62.6", "GiB")


def test_an_alarm_that_is_over_is_told_from_one_that_is_on(bare: Path) -> None:
    def written(*rows: tuple[int, str, str, str]) -> tuple[Page, dict[str, report.figures.Tile]]:
        keys = ("iteration", "alarm", "video", "state")
        (bare / "alarms.jsonl").write_text("".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in rows))
        page = Page(report.write(bare))
        return page, {tile.label: tile for tile in report.figures.tiles(record(bare))}

    first = [(110, "luma", "video/student", "on"), (120, "luma", "video/ema", "on"), (130, "nan", "", "on")]
    page, tiles = written(*first, (230, "luma", "video/student", "off"), (235, "nan", "", "off"), (1240, "nan", "", "on"))
    text = page.spaced
    assert "luma, video/student 1 110 110 230 —" in text and "luma, video/ema 1 120 120 still on —" in text
    assert "nan 2 130 1,240 still on —" in text and "Alarms what" in text
    assert text.index("luma, video/ema 1") < text.index("luma, video/student 1")
    assert (tiles["alarms"].value, tiles["alarms"].note, tiles["alarms"].bad) == ("4", "newest at 1,240, 2 still on", True)
    page, tiles = written((100, "luma", "", "off"), *first[:1], (230, "luma", "video/student", "off"))
    assert "Alarms, all of them over" in page.text and "still on" not in page.text
    assert page.all("section", id="alarms")[0]["class"] == "alarms warnings" and "missing, damaged" not in page.text
    assert (tiles["alarms"].value, tiles["alarms"].note, tiles["alarms"].bad) == ("1", "newest at 110, all over", False)


def test_text_of_others_is_text(folder: Path) -> None:
    shutil.rmtree(folder / "videos")
    run_folders.add_video(folder, 5, "student", EVIL)
    facts = next((folder / "videos").glob("*.json"))
    known = json.loads(facts.read_text())
    facts.write_text(json.dumps({**known, EVIL: EVIL, "fps": EVIL, "steps": [EVIL], "drift": {"sections": {EVIL: [1.0, 2.0]}}}))
    (folder / "config.yaml").write_text(yaml.safe_dump({**run_folders.CONFIG, "stage": {"name": EVIL}, EVIL: EVIL}))
    (folder / "run_card.txt").write_text(f"{EVIL}\n\nWARNINGS: 1\n  ! {EVIL}\n")
    (folder / "alarms.jsonl").write_text(
        json.dumps({"iteration": 1, "alarm": EVIL, "video": EVIL, "state": "on", "value": 1, "limit": 0, "seen": EVIL}) + "\n"
    )
    (folder / "environment.json").write_text(json.dumps([{EVIL: EVIL, "devices": [EVIL], "packages": {EVIL: EVIL}}]))
    (folder / "plan.json").write_text(
        json.dumps({"timeline": [[EVIL, 1, 1]], "by_group": {EVIL: 1}, "fits": {EVIL: True}, "moment": EVIL, "peak_gib": 1})
    )
    run_folders.write_rows(folder / "metrics.csv", [{"iteration": 1, f"loss/{EVIL}": 1.0, "loss": 2.0}])
    evil = Path(shutil.copytree(folder, folder.with_name(EVIL.replace("/", ""))))
    for path in (report.write(evil), report.compare([evil, folder], folder / "compare.html")):
        page = Page(path)
        assert_closed(page)
        assert page.text.count(EVIL) >= 5 and "alert" not in page.script
        assert {image["src"][:10] for image in page.all("img")} == {"data:image"}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("metrics.csv", None, "metrics.csv is not there"),
        ("metrics.csv", b"", "metrics.csv has no column of iterations"),
        ("metrics.csv", b"iteration,loss\r\n", "metrics.csv has no figures yet"),
        ("metrics.csv", b"\x00\xff\xfe garbage\n\x00", "metrics.csv has no column of iterations"),
        ("metrics.csv", b"iteration,loss\r\n1,2.0\r\nx,3.0\r\n2\r\n3,4.0", "3 damaged or cut rows"),
        ("metrics.csv", b"iteration,loss\r\n1,inf\r\n2,nan\r\n3,1e300\r\n4,word\r\n5,0.5\r\n", "infinite values are left out"),
        ("config.yaml", None, "config.yaml is not there"),
        ("config.yaml", b"stage: [", "config.yaml is damaged"),
        ("config.yaml", b"- just\n- a list\n", "config.yaml is damaged"),
        ("run_card.txt", None, "run_card.txt is not there"),
        ("run_card.txt", b"\xff\xfe\x00", ""),
        ("plan.json", b"{\"peak_gib\": ", "plan.json is damaged"),
        ("plan.json", b'{"timeline": [["a", "b"], 3, ["x", NaN, 1]], "by_group": [1], "fits": 5, "peak_gib": "much"}', ""),
        ("environment.json", None, "environment.json is not there"),
        ("environment.json", b"[3, null]", ""),
        ("alarms.jsonl", b'{"iteration": 1, "alarm": "", "state": "on"}\nnot json\n[1]\n{"alarm": 3}\n', "3 damaged or cut"),
        ("videos", None, ""),
    ],
)  # fmt: skip
def test_what_is_missing_or_damaged_is_said_and_the_rest_is_shown(
    bare: Path, name: str, content: bytes | None, said: str
) -> None:
    if content is None:
        (bare / name).unlink(missing_ok=name == "videos")
    else:
        (bare / name).write_bytes(content)
    page = Page(report.write(bare))
    assert_closed(page)
    assert said in page.text and ("missing, damaged" in page.text) is bool(said)
    for other, shown in (("metrics.csv", "student: loss"), ("config.yaml", "toy_distill"), ("environment.json", "3.11.2")):
        assert (shown in page.text) is (name != other), shown
    assert "None was sampled yet" in page.text


def test_cut_rows_and_odd_values_do_not_reach_the_charts(bare: Path) -> None:
    (bare / "metrics.csv").write_bytes(b"iteration,loss\r\n1,2.0\r\n2,nan\r\n3,inf\r\n4,0.5\r\n5,0.2")
    run = record(bare)
    assert run.columns["loss"].x.tolist() == [1, 4] and run.columns["loss"].y.tolist() == [2.0, 0.5] and run.reached == 4


def test_damaged_videos_leave_the_others(folder: Path) -> None:
    videos = sorted((folder / "videos").glob("*400_*.mp4"))
    videos[0].write_bytes(videos[0].read_bytes()[:300])
    videos[1].unlink()
    videos[1].with_suffix(".png").write_bytes(b"no picture")
    videos[2].with_suffix(".json").write_text("{")
    page = Page(report.write(folder))
    assert len(page.all("video")) == 4
    said = page.text
    assert f"videos/{videos[0].name} cannot be played" in said and f"videos/{videos[1].name} is not there" in said
    assert f"videos/{videos[1].stem}.png cannot be read" in said and f"{videos[2].stem}.json is damaged" in said
    assert "1 of 6 videos is shown as contact sheets only" in said and "1 of 6 videos is not shown" in said


def test_an_empty_folder_has_a_page_and_no_folder_has_none(tmp_path: Path) -> None:
    page = Page(report.write(tmp_path))
    assert "metrics.csv is not there" in page.text and not page.all("video")
    with pytest.raises(InputError, match="no such run folder"):
        report.write(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="no such run folder"):
        report.compare([tmp_path, tmp_path / "elsewhere"], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def video(iteration: int, name: str = "") -> Video:
    return Video(f"{iteration:08d}_x", iteration, name, None, None, {})


def test_the_newest_the_first_and_those_half_way_come_first() -> None:
    ranked = by_importance([video(iteration) for iteration in range(0, 900, 100)])
    assert [one.iteration for one in ranked][:5] == [800, 0, 400, 200, 600]
    assert sorted(one.iteration for one in ranked) == list(range(0, 900, 100))


def test_large_videos_are_shown_smaller_or_as_sheets_within_the_bound(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(folder / "videos")
    for iteration in (100, 200, 300):
        run_folders.add_video(folder, iteration, side=64, noise=60)
    sizes = [path.stat().st_size for path in (folder / "videos").glob("*.mp4")]
    limit = 600_000
    assert sum(sizes) * 4 / 3 > 2 * limit  # as text
    monkeypatch.setattr(report, "LIMIT", limit)
    monkeypatch.setattr(page_videos, "SMALLER", 1)
    path = report.write(folder)
    page = Page(path)
    assert path.stat().st_size < limit
    shown = page.all("video")
    assert len(shown) == 1 and decoded(shown[0]["src"])[0] == 66  # the newest stands first on the page
    assert page.text.index("iteration 300") < page.text.index("shown with fewer pixels", page.text.index("iteration 300"))
    assert "1 of 3 videos is shown with fewer pixels" in page.text
    assert "2 of 3 videos are shown as contact sheets only" in page.text
    monkeypatch.setattr(report, "LIMIT", 0)
    assert "3 of 3 videos are not shown" in Page(report.write(folder)).text


def test_no_more_videos_than_a_browser_bears(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_videos, "MOST", 2)
    found = album(record(folder).videos, 10**7)
    assert [(one.video.iteration, one.how) for one in found.shown] == [(400, "whole")] * 2
    assert found.notes == ["2 of 6 videos are shown, the newest, the first and some between; the others are in videos/"]


@pytest.mark.parametrize("rows", [50_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_a_long_run_has_a_small_page(tmp_path: Path, rows: int) -> None:
    with (tmp_path / "metrics.csv").open("w", newline="") as file:
        file.write("iteration,loss,gradient_norm,lr\r\n")
        file.writelines(f"{i},{1 + 1 / (i + 1)},{(i * 7919) % 101},0.0001\r\n" for i in range(rows))
    path = report.write(tmp_path)
    assert path.stat().st_size < 200_000 and f"{rows - 1:,}" in Page(path).text
    norm = record(tmp_path).columns["gradient_norm"]
    assert (norm.low.min(), norm.high.max(), norm.count.sum()) == (0, 100, rows)


def test_very_many_columns_are_cut_and_that_is_said(tmp_path: Path) -> None:
    names = [f"loss/part_{k}/a" for k in range(400)]
    run_folders.write_rows(tmp_path / "metrics.csv", [dict.fromkeys(["iteration", *names], 1.0)])
    assert "140 charts are left out" in Page(report.write(tmp_path)).text


def test_runs_side_by_side(folder: Path, tmp_path: Path) -> None:
    other = run_folders.make(tmp_path / "second", moments=(300,), worse=0.3, video=lambda *given: Path())
    run_folders.add_video(other, 300, "student")
    path = report.compare([folder, other], tmp_path / "new/compare.html")
    page = Page(path)
    assert path == tmp_path / "new/compare.html" and path.stat().st_size < 1_000_000
    assert_closed(page)
    assert page.charts["full history"] == page.charts["student: loss"] == ["first", "second"]
    assert page.charts["student: brightness"] == ["first", "second"] and page.charts["teacher: brightness"] == ["first"]
    assert len(page.all("video")) == 4 and "second, iteration 300" in page.text and page.text.count("no video") == 2
    differing = report.figures.differences([record(folder), record(other)])
    assert differing == [("stage.guidance", ["2.0", "1.7"])] and "stage.guidance" in page.text
    finals = {row.name: row for row in report.figures.finals([record(folder), record(other)])}
    last = [run_folders.rows(worse=worse)[-1]["held_out/full"] for worse in (0.0, 0.3)]
    row = finals["held-out · full history"]
    assert row.values == [report.figures.short(value) for value in last] and row.best == {0}
    assert row.change == f"{(last[1] / last[0] - 1) * 100:+.1f} %"
    assert finals["student: skipped updates"].values == ["1", "1"] and not finals["student: skipped updates"].best


def test_runs_of_one_name_are_told_apart_and_one_is_no_comparison(folder: Path, tmp_path: Path) -> None:
    again = Path(shutil.copytree(folder, tmp_path / "b" / "first", ignore=shutil.ignore_patterns("videos", "metrics.csv")))
    page = Page(report.compare([folder, again], tmp_path / "compare.html"))
    assert f"{tmp_path.name}/first" in page.text and "b/first" in page.text and "b/first: metrics.csv is not there" in page.text
    assert "Nothing, in what could be read" in page.text
    same = Page(report.compare([folder, folder, folder], tmp_path / "compare.html"))
    assert "first (3)" in same.text
    with pytest.raises(InputError, match="2 to 7 runs or evaluations, not 1"):
        report.compare([folder], tmp_path / "compare.html")


@pytest.mark.parametrize(("rest", "caption", "name"), [
    ("student_a_red_circle", "a red circle", "student"),
    ("student_of_physics", "Student of physics!", ""),
    ("student_student_of_physics", "student of physics", "student"),
    ("a_red_circle", "a red circle", ""),
    ("ema_x", "", "ema"),
])  # fmt: skip
def test_whose_video_it_is(tmp_path: Path, rest: str, caption: str, name: str) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / f"videos/00000007_{rest}.json").write_text(json.dumps({"caption": caption}))
    (found,) = record(tmp_path).videos
    assert (found.name, found.iteration) == (name, 7)


def test_the_folder_is_only_read(folder: Path) -> None:
    def contents() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    before = contents()
    report.write(folder)
    after = contents()
    assert after.keys() - before.keys() == {folder / "report.html"} and before == {key: after[key] for key in before}
