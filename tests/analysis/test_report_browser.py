"""The page of a report in a real browser: everything on it is drawn, and nothing is cut off."""

import html
import json
import re
import shutil
import subprocess

import matplotlib.image
import numpy as np
import pytest

from flaxpretrain.analysis.report import page, panels, picture, read_run
from tests.analysis.test_report import workdir

BROWSER = next(
    (b for b in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if b), None
)
QUIET = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars "
    "--disable-background-networking --disable-component-update --disable-sync "
    "--disable-dev-shm-usage"
).split()

PROBE = """<script>addEventListener("load", () => {
  const seen = {
    images: [...document.images].map(i => [i.alt, i.complete && i.naturalWidth, i.clientWidth]),
    headings: [...document.querySelectorAll("h1, h2")].map(h => h.textContent),
    cells: document.querySelectorAll("td").length,
    wide: document.documentElement.scrollWidth > innerWidth,
  };
  const told = document.createElement("pre");
  told.id = "seen";
  told.textContent = JSON.stringify(seen);
  document.body.append(told);
});</script>"""

pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs chromium on the PATH")


def browse(folder, *options):
    profile = folder / "profile"
    command = [BROWSER, *QUIET, f"--user-data-dir={profile}", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    runs = [read_run(workdir(folder, name, rate)) for name, rate in (("one", 1e-3), ("two", 2e-3))]
    pictures = [(title, picture(runs, title, names)) for title, names in panels(runs)]
    text = page(runs, pictures)
    (folder / "report.html").write_text(text, encoding="utf-8")
    # The page itself needs no script; this copy of it is asked what it came to.
    (folder / "probed.html").write_text(text.replace("</body>", PROBE + "</body>"), "utf-8")
    return folder, len(pictures)


@pytest.mark.parametrize("width", [1280, 500])
def test_a_browser_draws_every_picture_and_table_within_the_window(report, width):
    folder, pictures = report
    dom = browse(
        folder,
        f"--window-size={width},900",
        "--virtual-time-budget=5000",
        "--dump-dom",
        (folder / "probed.html").as_uri(),
    )
    seen = json.loads(html.unescape(re.search(r'<pre id="seen">(.*?)</pre>', dom, re.S)[1]))
    assert len(seen["images"]) == pictures
    assert all(loaded > 300 and shown > 200 for _, loaded, shown in seen["images"])
    assert seen["headings"][0] == "one and two" and "Settings that differ" in seen["headings"]
    assert seen["cells"] > 10
    assert not seen["wide"]


def test_what_it_draws_is_seen(report):
    folder, _ = report
    shot = folder / "shot.png"
    browse(
        folder,
        "--window-size=1280,1600",
        f"--screenshot={shot}",
        (folder / "report.html").as_uri(),
    )
    pixels = matplotlib.image.imread(shot)[..., :3]
    assert pixels.shape[:2] == (1600, 1280)
    for colour in (0x1F6FB4, 0xD4572A):  # the curves of the two runs
        wanted = np.array([colour >> 16, colour >> 8 & 255, colour & 255]) / 255
        assert (np.abs(pixels - wanted).max(axis=-1) < 0.05).sum() > 80
