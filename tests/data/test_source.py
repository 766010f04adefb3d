"""What a folder or a list names, and each way in which an entry, or the whole, cannot be used."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from helios_train.data.source import Entry, Problem, read_source
from helios_train.errors import InputError


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"video")


def listed(root: Path, name: str, content: str | bytes) -> tuple[list[Entry], list[Problem]]:
    path = root / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_source(path)


def test_a_folder_with_folders_in_it(tmp_path: Path) -> None:
    touch(tmp_path, "b.mp4", "a/clip_1.5x.MOV", "a/c.webm", "z/b.mp4", "a.mkv", "d.avi", "e.m4v")
    touch(tmp_path, "notes.md", ".hidden.mp4", ".git/f.mp4")
    (tmp_path / "a/clip_1.5x.txt").write_text("\n ein Kreis, grün \n", encoding="utf-8")
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfwith a byte order mark")
    (tmp_path / "b.json").write_text('{"colour": "red"}')
    (tmp_path / "z/b.txt").write_text("x" * 10_000)
    (tmp_path / "a.txt").write_text("  ")
    entries, problems = read_source(tmp_path)
    assert problems == []
    assert [entry.name for entry in entries] == ["a.mkv", "a/c.webm", "a/clip_1.5x.MOV", "b.mp4", "d.avi", "e.m4v", "z/b.mp4"]
    captions = ["", None, "ein Kreis, grün", "with a byte order mark", None, None, "x" * 10_000]
    assert [entry.caption for entry in entries] == captions
    assert entries[3] == Entry(tmp_path / "b.mp4", "b.mp4", "with a byte order mark", truth={"colour": "red"})


def test_what_is_wrong_in_a_folder_is_listed(tmp_path: Path) -> None:
    touch(tmp_path, "good.mp4", "latin.mp4", "json.mp4", "folder.mp4/inner.mp4", os.fsdecode(b"gr\xfcn.mp4"))
    (tmp_path / "latin.txt").write_bytes("grün".encode("latin-1"))
    (tmp_path / "json.json").write_text("{")
    (tmp_path / "lost.mp4").symlink_to("nowhere.mp4")
    os.mkfifo(tmp_path / "pipe.mp4")
    entries, problems = read_source(tmp_path)
    assert [entry.name for entry in entries] == ["folder.mp4/inner.mp4", "good.mp4"]
    reasons = dict(problems)
    assert set(reasons) == {"latin.mp4", "json.mp4", "lost.mp4", "pipe.mp4", "gr\\udcfcn.mp4"}
    assert "latin.txt cannot be read as UTF-8" in reasons["latin.mp4"] and "json.json is not JSON" in reasons["json.mp4"]
    assert "no such file, or a link to nothing" in reasons["lost.mp4"] and "is not a file" in reasons["pipe.mp4"]
    assert "name is not UTF-8" in reasons["gr\\udcfcn.mp4"]


def test_links_in_a_circle_end(tmp_path: Path) -> None:
    touch(tmp_path, "set/a.mp4", "other/b.mp4")
    (tmp_path / "set/up").symlink_to(tmp_path / "set")
    (tmp_path / "set/linked").symlink_to(tmp_path / "other")
    (tmp_path / "other/back").symlink_to(tmp_path / "set")
    (tmp_path / "set/self.mp4").symlink_to("self.mp4")
    entries, problems = read_source(tmp_path / "set")
    assert [entry.name for entry in entries] == ["a.mp4", "linked/b.mp4"]
    assert [problem.name for problem in problems] == ["self.mp4"]


def test_unusable_sources_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    touch(tmp_path, "text/notes.txt", "clip.mp4")
    (tmp_path / "none.csv").write_text("path,caption\n")
    (tmp_path / "none.jsonl").write_text("\n")
    for name, said in (
        ("gone", "no such folder or list"),
        ("gone.csv", "no such folder or list"),
        ("empty", r"holds no videos \(.mp4"),
        ("text", "holds no videos"),
        ("clip.mp4", "is neither a folder nor a .csv"),
        ("none.csv", "names no video"),
        ("none.jsonl", "names no video"),
    ):
        with pytest.raises(InputError, match=rf"/{name}: {said}.*; "):
            read_source(tmp_path / name)


CSV = """path,caption,start,end,x0,x1,y0,y1
a.mp4,"a red circle, on blue",,,,,,
sub/a.mp4,,33,99,,,,
a.mp4,"two
lines",0,33,0,64,8,40
"""


def test_a_csv(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4", "sub/a.mp4")
    entries, problems = listed(tmp_path, "list.csv", "\ufeff" + CSV.replace("\n", "\r\n"))
    assert problems == []
    assert entries == [
        Entry(tmp_path / "a.mp4", "a.mp4", "a red circle, on blue"),
        Entry(tmp_path / "sub/a.mp4", "sub/a.mp4", None, (33, 99)),
        Entry(tmp_path / "a.mp4", "a.mp4", "two\r\nlines", (0, 33), (0, 64, 8, 40)),
    ]
    assert listed(tmp_path, "short.csv", "caption, path\nx, a.mp4\n")[0] == [Entry(tmp_path / "a.mp4", "a.mp4", "x")]


def test_rows_of_a_csv_that_cannot_be_used(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4")
    rows = {
        "gone.mp4,c,,,,,,": "line 2: no such file",
        "a.mp4,one, two,,,,,,": "line 3: 9 cells under 8 columns",
        "a.mp4": "line 4: 1 cells",
        ",c,,,,,,": "line 5: path is missing or empty",
        "a.mp4,c,9,9,,,,": "line 6: cut is [9, 9], not whole numbers [start, end] with 0 <= start < end",
        "a.mp4,c,-1,9,,,,": "line 7: cut is",
        "a.mp4,c,5,,,,,": "line 8: cut is",
        "a.mp4,c,1.5,9,,,,": "line 9: cut is",
        "a.mp4,c,,,0,64,8,8": "line 10: crop is [0, 64, 8, 8], not whole numbers [x0, x1, y0, y1] with 0 <= x0 < x1 and",
        "a.mp4,c,,,0,64,8,": "line 11: crop is",
        "a.mp4,c,1,9,,,,": None,
        "./a.mp4,d,1,9,,,,": "line 13: is the same clip as line 12",
        "a.mp4,c,0," + "9" * 5000 + ",,,,": "line 14: cut is",
        "a" * 300 + ".mp4,c,,,,,,": "line 15: cannot be looked up",
        "a.mp4,gr\udcfcn,,,,,,": "line 16: caption is not UTF-8",
    }
    text = "\n".join(["path,caption,start,end,x0,x1,y0,y1", *rows])
    entries, problems = listed(tmp_path, "list.csv", text.encode(errors="surrogateescape"))
    assert [entry.cut for entry in entries] == [(1, 9)]
    wanted = [reason for reason in rows.values() if reason]
    assert len(problems) == len(wanted)
    for problem, start in zip(problems, wanted, strict=True):
        assert problem.reason.startswith(start) and ";" in problem.reason
    assert problems[0].name == "gone.mp4" and problems[1].name == "list.csv, line 3"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("path;caption\na.mp4;x\n", "unknown column 'path;caption'"),
        ("path,captoin\na.mp4,x\n", r"unknown column 'captoin' \(did you mean caption\?\)"),
        ("path\na.mp4\n", "has no column caption"),
        ("a.mp4,a red circle\n", "unknown column 'a.mp4'"),
        ("path,caption,start\na.mp4,x,3\n", "has no column end"),
        ("path,caption,x0,x1,y0\na.mp4,x,3,4,5\n", "has no column y1"),
        ("path,caption,path\na.mp4,x,a.mp4\n", "names a column twice"),
        ('path,caption\na.mp4,"never closed\n', "line 2 is not CSV"),
        ("", "has no column path"),
        ("path,caption\na.mp4,x\n".encode("utf-16"), "is UTF-16; save it as UTF-8"),
    ],
)
def test_csvs_that_cannot_be_used(content: str | bytes, said: str, tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4")
    with pytest.raises(InputError, match=f"list.csv: {said}"):
        listed(tmp_path, "list.csv", content)


def test_json_lines(tmp_path: Path) -> None:
    touch(tmp_path, "set/a.mp4", "b.mp4")
    (tmp_path / "set").mkdir(exist_ok=True)
    lines = [
        {"path": "a.mp4", "caption": " grün\u2028und rot "},
        {"path": str(tmp_path / "set/a.mp4"), "cut": [0, 40]},
        {"path": "../b.mp4", "caption": None, "cut": None, "crop": [0, 4, 2, 8]},
        {"path": "a.mp4", "cap": ["first", "second"], "cut": [3, 9], "fps": 25, "num_frames": 6, "resolution": {"height": 4}},
        {"path": "a.mp4", "cap": [], "cut": [3, 9], "crop": [0, 4, 2, 8]},
    ]
    text = "\ufeff" + "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    entries, problems = listed(tmp_path / "set", "list.jsonl", text)
    assert problems == []
    assert [entry.name for entry in entries] == ["a.mp4", "a.mp4", "../b.mp4", "a.mp4", "a.mp4"]
    assert [entry.caption for entry in entries] == ["grün\u2028und rot", None, None, "first", None]
    assert [entry.cut for entry in entries] == [None, (0, 40), None, (3, 9), (3, 9)]
    assert entries[2].path == tmp_path / "b.mp4" and entries[2].crop == (0, 4, 2, 8)
    assert listed(tmp_path / "set", "list.json", json.dumps(lines)) == (entries, [])


def test_json_lines_that_cannot_be_used(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4")
    lines = {
        b'{"path": "a.mp4", "caption": "c"': "line 1: is not JSON",
        b"[1, 2]": "line 2: is not an object",
        b'{"path": 3}': "line 3: path is missing",
        b'{"caption": "c"}': "line 4: path is missing",
        b'{"path": "a.mp4", "captoin": "c"}': "line 5: unknown key 'captoin' (did you mean caption?)",
        b'{"path": "a.mp4", "caption": ["c"]}': 'line 6: caption is ["c"], not text',
        b'{"path": "a.mp4", "cut": [true, 9]}': "line 7: cut is [true, 9]",
        b'{"path": "a.mp4", "cut": [9, 3]}': "line 8: cut is [9, 3]",
        b'{"path": "a.mp4", "cut": "0-9"}': "line 9: cut is",
        b'{"path": "a.mp4", "crop": [0, 4, 0]}': "line 10: crop is",
        b'{"path": "a.mp4", "caption": "gr\xfcn"}': "line 11: caption is not UTF-8",
        b'{"path": "a\\u0000.mp4"}': "line 12: path holds a zero byte",
        b"[" * 100_000: "line 13: is not JSON",
        b'{"path": "."}': "line 14: is not a file",
        b'{"path": "a.mp4", "cap": [3]}': "line 15: caption is 3, not text",
    }
    entries, problems = listed(tmp_path, "list.jsonl", b"\n".join(lines))
    assert entries == [] and len(problems) == len(lines)
    for problem, start in zip(problems, lines.values(), strict=True):
        assert problem.reason.startswith(start) and ";" in problem.reason


@pytest.mark.parametrize(("content", "said"), [("[1,", "is not JSON"), ('{"path": ""}', "is not a JSON list"), ("[]", "names")])
def test_json_lists_that_cannot_be_used(content: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"list.json: {said}"):
        listed(tmp_path, "list.json", content)
    assert listed(tmp_path, "list.json", '[7, {"path": "b.mp4"}]')[1][0].reason.startswith("item 1: is not an object")


def test_relative_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "set/a.mp4")
    monkeypatch.chdir(tmp_path)
    lines = [{"path": "a.mp4"}, {"path": str(tmp_path / "set/a.mp4"), "cut": [0, 9]}]
    (tmp_path / "set/list.json").write_text(json.dumps(lines))
    for source in (Path("set/list.json"), tmp_path / "set/list.json"):
        entries, _ = read_source(source)
        assert [entry.name for entry in entries] == ["a.mp4", "a.mp4"]
        assert all(entry.path.samefile("set/a.mp4") for entry in entries)
    assert read_source(Path("set"))[0][0].name == "a.mp4"


def test_a_long_list(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4")
    lines = [json.dumps({"path": "a.mp4", "caption": "c", "cut": [number, number + 33]}) for number in range(20_000)]
    entries, problems = listed(tmp_path, "list.jsonl", "\n".join(lines))
    assert len(entries) == 20_000 and problems == []
