"""The script in the page on Python runs as it stands."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import av
import pytest
from diffusers import HeliosTransformer3DModel

import helios_train
from helios_train.models.checkpoint import read

PAGE = Path(__file__).parents[1] / "docs/python.md"


def test_the_page_holds_one_complete_script(tmp_path: Path) -> None:
    (script,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)
    (tmp_path / "script.py").write_text(script)
    environment = os.environ | {"PYTHONPATH": str(Path(helios_train.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "script.py"], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    video = tmp_path / done.stdout.splitlines()[-1]
    with av.open(str(video)) as opened:
        assert [(frame.height, frame.width) for frame in opened.decode(video=0)] == [(32, 48)] * 66
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open(newline="")))
    assert [int(row["iteration"]) for row in rows] == [1, 2, 3] and all(float(row["loss"]) > 0 for row in rows)
    assert read(tmp_path / "last.ckpt")["global_step"] == 3
    loaded = HeliosTransformer3DModel.from_pretrained(tmp_path / "model/transformer")
    weights = read(tmp_path / "last.ckpt")["state_dict"]
    assert all(value.equal(weights[name]) for name, value in loaded.state_dict().items())
    made = {path.name for path in tmp_path.iterdir()}
    assert made == {"script.py", "videos", "shards", "metrics.csv", "last.ckpt", "samples", "model"}


def test_names_on_the_page_exist() -> None:
    for module, names in re.findall(r"^from (helios_train\S*) import (.+)$", PAGE.read_text(), flags=re.MULTILINE):
        imported = __import__(module, fromlist=["*"])
        for name in names.split(", "):
            assert hasattr(imported, name), f"{module}.{name}"


@pytest.mark.parametrize("name", re.findall(r"`(?:[a-z_]+\.)*([A-Z]\w+)(?:\(\))?`", PAGE.read_text()))
def test_classes_the_text_names_exist(name: str) -> None:
    source = Path(helios_train.__file__).parent
    if name != "Trainer":
        assert any(f"class {name}" in path.read_text() for path in source.rglob("*.py")), name
