"""The pages in a real browser, from disk: no error, videos play, charts answer a pointer."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from helios_train.evaluation import report

from . import run_folders

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
PROBE = """<script>
setTimeout(async () => {
  const figures = [...document.querySelectorAll("figure.chart")];
  const svg = figures[0].querySelector("svg"), box = svg.getBoundingClientRect();
  svg.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + box.width / 2, clientY: box.top + 9, bubbles: true}));
  const tip = document.getElementById("tip").textContent;
  const button = document.querySelector("button[data-line]:not([disabled])");
  button.click();
  const hidden = document.querySelectorAll("g.line[hidden]").length;
  const videos = [...document.querySelectorAll("video")];
  for (let i = 0; i < 100 && videos.some((one) => one.readyState < 1); i++) await new Promise((done) => setTimeout(done, 50));
  const drawn = figures.filter((one) => one.offsetParent && one.querySelector("g.line").getBBox().width > 0).length;
  const shown = figures.filter((one) => one.offsetParent).length;
  const widths = videos.map((one) => one.videoWidth), errors = videos.filter((one) => one.error).length;
  const wide = document.documentElement.scrollWidth - innerWidth;
  const pictures = [...document.images].map((one) => (one.loading = "eager", one.decode().then(() => one.naturalWidth)));
  const found = {tip, hidden, drawn, shown, widths, errors, wide, pictures: await Promise.all(pictures)};
  document.body.append(Object.assign(document.createElement("pre"), {id: "probe", textContent: JSON.stringify(found)}));
}, 100);
</script></body>"""

pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason=f"no browser here: none of {', '.join(BROWSERS)}")]


def opened(page: Path, home: Path) -> tuple[str, str]:
    """The page's elements after its scripts ran, and what the browser's console said."""
    assert BROWSER
    words = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--enable-logging=stderr", "--dump-dom")
    more = (f"--user-data-dir={home}", "--window-size=1300,900", "--virtual-time-budget=20000", "--timeout=60000")
    done = subprocess.run([BROWSER, *words, *more, page.as_uri()], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


def probed(page: Path, home: Path) -> dict[str, Any]:
    """What a script finds that is put into a copy of the page."""
    copy = page.with_name("probe.html")
    text = re.sub(r"script-src 'sha256-[^']*'", "script-src 'unsafe-inline'", page.read_text())
    copy.write_text(text.replace("</body>", PROBE))
    dom, console = opened(copy, home)
    assert not console, console
    (found,) = re.findall(r'<pre id="probe">(.*?)</pre>', dom, re.DOTALL)
    return dict(json.loads(found.replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">")))


def test_both_pages_open_without_an_error_and_work(tmp_path: Path) -> None:
    one, other = (run_folders.make(tmp_path / name, worse=worse) for name, worse in (("first", 0.0), ("second", 0.3)))
    for page, videos in ((report.write(one), 6), (report.compare([one, other], tmp_path / "compare.html"), 6)):
        _, console = opened(page, tmp_path / "browser")
        assert not console, console
        found = probed(page, tmp_path / "browser")
        assert found["errors"] == 0 and found["widths"] == [64] * videos, found
        assert len(found["pictures"]) == videos and min(found["pictures"]) > 300
        assert found["drawn"] == found["shown"] >= 8 and found["hidden"] == 1 and found["wide"] <= 0, found
        assert re.match(r"iteration \d+", found["tip"]) and re.search(r"0\.\d+$", found["tip"]), found["tip"]


def test_a_script_of_someone_else_does_not_run(tmp_path: Path) -> None:
    page = report.write(run_folders.make(tmp_path / "run", moments=()))
    evil = "<script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\"></body>"
    (tmp_path / "evil.html").write_text(page.read_text().replace("</body>", evil))
    dom, console = opened(tmp_path / "evil.html", tmp_path / "browser")
    assert "<title>run · run report" in dom and "Content Security Policy" in console
