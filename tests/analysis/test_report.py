"""A report shows what the workdirs say, and needs nothing but itself."""

import html.parser
import json
import subprocess
import sys
from pathlib import Path

import pytest

from flaxpretrain.analysis import report
from flaxpretrain.errors import UserError

ROOT = Path(__file__).parent.parent.parent


def workdir(folder, name, rate=1e-3, skipped=0):
    made = folder / name
    made.mkdir()
    rows = []
    for step in range(1, 41):
        rows.append(
            {
                "step": step,
                "loss": 8.0 / step,
                "loss/masked_lm": 8.0 / step,
                "learning_rate": rate,
                "mfu": None,
                "skipped_total": float(skipped if step > 20 else 0),
                "tokens_per_second_per_device": 1000.0 + step,
            }
        )
        if step % 20 == 0:
            rows.append({"step": step, "validation/masked_lm": 9.0 / step})
    (made / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (made / "config.json").write_text(json.dumps({"optimizer": {"rate": rate}, "name": "x"}))
    return made


class Page(html.parser.HTMLParser):
    """Text, and what a browser would have to load."""

    def __init__(self):
        super().__init__()
        self.text, self.loaded, self.images = [], [], 0

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("src", "href"):
                self.images += tag == "img"
                if not value.startswith("data:"):
                    self.loaded.append(value)

    def handle_data(self, data):
        self.text.append(data)


def read(path):
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    return page


def test_runs_lie_over_each_other_on_a_page_that_loads_nothing(tmp_path):
    one, two = workdir(tmp_path, "one", skipped=3), workdir(tmp_path, "two<b>", rate=2e-3)
    done = subprocess.run(
        [sys.executable, "tools/report.py", one, two, "--output-dir", tmp_path / "out"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    page = read(tmp_path / "out" / "report.html")
    text = " ".join(page.text)
    assert page.loaded == [] and page.images == len(list((tmp_path / "out").glob("*.png"))) == 6
    assert "step 21: 3 steps skipped before it" in text
    assert "optimizer.rate" in text and "0.001" in text and "0.002" in text
    assert '"x"' not in text  # what does not differ
    assert "two<b>" in text and "1,021" in text


def test_pictures_are_of_figures_with_two_points_at_least(tmp_path):
    run = report.read_run(workdir(tmp_path, "one"))
    titles = [title for title, _ in report.panels([run])]
    assert titles == [
        "Training loss",
        "Terms of the loss",
        "Loss on fixed noise",
        "Learning rate",
        "Tokens a second a device",
        "Skipped steps, in all",
    ]
    for title, names in report.panels([run])[:1]:
        assert report.picture([run], title, names).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "pattern", "fits"),
    [
        ("loss", "loss", True),
        ("loss/masked_lm", "loss", False),
        ("loss/masked_lm", "loss/*", True),
        ("validation/disc_accuracy", "*/*_accuracy", True),
        ("disc_accuracy", "*/*_accuracy", False),
        ("validation/masked_lm", "*/masked_lm", True),
        ("loss/masked_lm", "*/masked_lm", False),
        ("accuracy", "*_accuracy", False),
    ],
)
def test_patterns_of_figures(name, pattern, fits):
    assert report.matches(name, pattern) is fits


def test_a_smoothed_constant_is_that_constant_and_a_short_curve_itself():
    assert report.smoothed([2.0] * 500) == pytest.approx([2.0] * 500)
    assert report.smoothed([3.0, 1.0]) == [3.0, 1.0]


def test_figures_that_are_not_finite_are_events_not_points(tmp_path):
    made = tmp_path / "w"
    made.mkdir()
    rows = '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": NaN}\n{"step": 3, "loss": 1.0}\n'
    (made / "metrics.jsonl").write_text(rows)
    run = report.read_run(made)
    assert run.series("loss") == ([1, 3], [2.0, 1.0])
    assert run.events() == ["step 2: loss nan"]


def test_restarts_and_rewinds_are_events_and_the_time_is_divided(tmp_path):
    made = workdir(tmp_path, "one", skipped=2)
    for event, step, facts in (
        ("start", 0, {"lost_seconds": 0.0}),
        ("restart", 8, {"lost_seconds": 3.25}),
        ("rewind", 30, {"reason": "the loss is 9", "to": 8, "resumed": 35}),
    ):
        row = {"event": event, "step": step, "time": "2026-01-01T00:00:00+00:00"} | facts
        with open(made / "events.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
    (made / "goodput.json").write_text('{"seconds": {"steps": 90.0, "lost_work": 10.0}}')
    run = report.read_run(made)
    assert [text.split(",")[0] for text in run.events()] == [
        "step 0: start (lost seconds 0.0)",
        "step 8: restart (lost seconds 3.2)",
        "step 30: rewind: the loss is 9 (to 8",
        "step 21: 2 steps skipped before it",
    ]
    text = report.page([run], [])
    assert "<td>steps</td><td>90.0 s, 90.0%</td>" in text
    assert "<td>lost work</td><td>10.0 s, 10.0%</td>" in text


def test_a_folder_without_a_log_and_a_broken_log_are_one_line(tmp_path):
    with pytest.raises(UserError, match=r"has no metrics\.jsonl"):
        report.read_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="has not logged a step"):
        report.read_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("{broken\n")
    with pytest.raises(UserError, match="not JSON"):
        report.read_run(tmp_path)
