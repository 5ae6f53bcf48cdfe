"""Curves of one or several runs as a page that needs nothing but itself."""

import base64
import dataclasses
import datetime
import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flaxpretrain.errors import UserError
from flaxpretrain.training.goodput import ACTIVITIES, GOODPUT
from flaxpretrain.training.metrics import EVENTS, read_events, read_metrics

COLOURS = ("#1f6fb4", "#d4572a", "#2e8b57", "#8e44ad", "#b8860b", "#444444", "#17a2b8", "#e377c2")
STYLES = ("-", "--", ":", "-.")
SMOOTHING = 0.02
"""Share of a curve's points over which its smoothed form looks back."""

PANELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Training loss", ("loss",)),
    ("Terms of the loss", ("loss/*",)),
    ("Loss on fixed noise", ("*/masked_lm", "*/discriminator", "*/causal_lm", "*/denoising")),
    ("Perplexity on fixed noise", ("*/perplexity",)),
    ("Accuracy in training", ("*_accuracy",)),
    ("Accuracy on fixed noise", ("*/*_accuracy", "*/disc_auc")),
    ("Learning rate", ("learning_rate",)),
    ("Gradient norm", ("grad_norm",)),
    ("Tokens a second a device", ("tokens_per_second_per_device",)),
    ("Model FLOPs utilisation", ("mfu",)),
    ("Share of the time in steps", ("goodput",)),
    ("Share of the time in the rest", ("time/*",)),
    ("Skipped steps, in all", ("skipped_total",)),
    ("Passes over each dataset", ("epochs/*",)),
)
"""What is drawn, in this order: a title and the names of figures, `*` for any text without "/"."""


OWN_PANELS = ("loss", "time", "epochs")
"""First parts of names that are no split's, and have panels of their own."""


@dataclasses.dataclass(frozen=True)
class RunLog:
    """What a workdir tells of its run: rows of metrics, configuration, machine."""

    name: str
    rows: Sequence[Mapping[str, Any]]
    config: Mapping[str, Any]
    facts: Mapping[str, Any]
    happened: Sequence[Mapping[str, Any]] = ()
    """Starts, restarts, preemptions, rewinds: the rows of events.jsonl."""
    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Wall time by activity, over all restarts."""

    def series(self, figure: str) -> tuple[list[int], list[float]]:
        """Steps and values of a figure, where it was logged and is a finite number."""
        points = [
            (int(row["step"]), float(row[figure]))
            for row in self.rows
            if isinstance(row.get(figure), int | float) and math.isfinite(row[figure])
        ]
        return [step for step, _ in points], [value for _, value in points]

    def figures(self) -> list[str]:
        """Names of all figures, as first logged."""
        return list(dict.fromkeys(name for row in self.rows for name in row if name != "step"))

    def events(self) -> list[str]:
        """Restarts and rewinds, what the guard skipped, and where the loss was not finite."""
        found = [_in_words(event) for event in self.happened]
        before = 0.0
        for row in self.rows:
            skipped = row.get("skipped_total")
            if isinstance(skipped, int | float) and skipped > before:
                found.append(f"step {row['step']}: {skipped - before:.0f} steps skipped before it")
                before = skipped
            loss = row.get("loss")
            if isinstance(loss, float) and not math.isfinite(loss):
                found.append(f"step {row['step']}: loss {loss}")
        return found


def _in_words(event: Mapping[str, Any]) -> str:
    """An event with what is known about it."""
    known = {k: v for k, v in event.items() if k not in ("event", "step", "time", "reason")}
    facts = ", ".join(f"{k.replace('_', ' ')} {_short(v)}" for k, v in known.items())
    reason = f": {event['reason']}" if "reason" in event else ""
    more = f" ({facts})" if facts else ""
    return f"step {event['step']}: {event['event']}{reason}{more}, {event['time']}"


def _short(value: Any) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def read_run(workdir: Path) -> RunLog:
    """The log of a workdir; raises UserError where there is none, or a row is broken."""
    path = workdir / "metrics.jsonl"
    if not path.exists():
        raise UserError(f"{workdir} has no metrics.jsonl: give the --workdir of a run")
    try:
        rows = read_metrics(path)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: a row is not JSON ({error}); was the file edited?") from None
    if not rows:
        raise UserError(f"{path} is empty: the run has not logged a step yet")
    known = {}
    for name in ("config.json", "run.json", GOODPUT):
        file = workdir / name
        known[name] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return RunLog(
        workdir.name,
        rows,
        known["config.json"],
        known["run.json"],
        read_events(workdir / EVENTS),
        known[GOODPUT].get("seconds", {}),
    )


def matches(name: str, pattern: str) -> bool:
    """Whether a figure has the form of a pattern: `*` stands for text without "/"."""
    if name.count("/") != pattern.count("/"):
        return False
    if pattern.startswith("*/") and name.split("/")[0] in OWN_PANELS:
        return False
    pairs = zip(name.split("/"), pattern.split("/"), strict=True)
    return all(_fits(part, form) for part, form in pairs)


def _fits(part: str, form: str) -> bool:
    if "*" not in form:
        return part == form
    before, after = form.split("*", 1)
    long_enough = len(part) >= len(before) + len(after)
    return long_enough and part.startswith(before) and part.endswith(after)


def smoothed(values: Sequence[float]) -> list[float]:
    """Exponential moving average over a share of the points, unbiased at its start."""
    keep = 1.0 - 1.0 / max(1.0, SMOOTHING * len(values))
    total, weight, out = 0.0, 0.0, []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1.0
        out.append(total / weight)
    return out


def panels(runs: Sequence[RunLog]) -> list[tuple[str, list[str]]]:
    """Titles with the figures under them that at least one run has two points of."""
    names = list(dict.fromkeys(name for run in runs for name in run.figures()))
    drawn = [name for name in names if any(len(run.series(name)[0]) > 1 for run in runs)]
    found = [
        (title, [name for name in drawn if any(matches(name, form) for form in forms)])
        for title, forms in PANELS
    ]
    return [(title, names) for title, names in found if names]


def picture(runs: Sequence[RunLog], title: str, names: Sequence[str]) -> bytes:
    """One panel as PNG: a colour a run (or figure, of one run), the raw curve pale behind."""
    # Imported here: half a second, and only reports draw.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, run in enumerate(runs):
        for place, name in enumerate(names):
            steps, values = run.series(name)
            if not steps:
                continue
            alone = len(runs) == 1
            colour = COLOURS[(place if alone else number) % len(COLOURS)]
            style = "-" if alone else STYLES[place % len(STYLES)]
            if name.startswith("loss") or name == "grad_norm":
                axes.plot(steps, values, color=colour, alpha=0.2, linewidth=0.8)
                values = smoothed(values)
            marker = "." if len(steps) < 30 else None
            label = name if alone else f"{run.name} {name}"
            axes.plot(steps, values, style, color=colour, label=label, marker=marker, linewidth=1.4)
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize="x-small")
    written = io.BytesIO()
    figure.savefig(written, format="png", dpi=110, metadata={"Software": None})
    return written.getvalue()


def _summary(run: RunLog) -> dict[str, str]:
    """The last of each figure on fixed noise, and how the run went."""
    last = max(int(row["step"]) for row in run.rows)
    rates = sorted(run.series("tokens_per_second_per_device")[1])
    devices = run.facts.get("devices", {})
    shown = {
        "last step": f"{last:,}",
        "devices": f"{devices.get('count', '?')} x {devices.get('kind', '?')}",
        "tokens/s/device, median": f"{rates[len(rates) // 2]:,.0f}" if rates else "",
    }
    for name in run.figures():
        values = run.series(name)[1]
        if values and (
            name in ("loss", "mfu", "goodput", "skipped_total")
            or ("/" in name and not name.startswith("time/"))
        ):
            shown[name] = f"{values[-1]:.4g}"
    return shown


def _flat(config: Any, path: str = "") -> dict[str, str]:
    """A configuration as dotted names."""
    if isinstance(config, Mapping):
        parts = config.items()
    elif isinstance(config, list):
        parts = enumerate(config)
    else:
        return {path: json.dumps(config)}
    return {
        name: value
        for key, part in parts
        for name, value in _flat(part, f"{path}.{key}" if path else str(key)).items()
    }


def _table(rows: Sequence[Sequence[str]], head: Sequence[str]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}"
    "img{width:49%;height:auto}@media(max-width:800px){img{width:100%}}"
    "table{border-collapse:collapse;margin:1em 0}"
    "td,th{border-bottom:1px solid #ddd;padding:.2em .8em;text-align:left;overflow-wrap:anywhere}"
    "th{background:#f6f6f6}tr:hover td{background:#fafafa}td+td{font-variant-numeric:tabular-nums}"
)


def page(runs: Sequence[RunLog], pictures: Sequence[tuple[str, bytes]]) -> str:
    """The HTML: figures at the end, pictures, events, and the settings in which runs differ."""
    summaries = [_summary(run) for run in runs]
    names = list(dict.fromkeys(name for summary in summaries for name in summary))
    title = " and ".join(run.name for run in runs)
    images = "".join(
        f'<img alt="{html.escape(name)}" '
        f'src="data:image/png;base64,{base64.b64encode(data).decode()}">'
        for name, data in pictures
    )
    events = [(run.name, event) for run in runs for event in run.events()]
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{datetime.date.today().isoformat()}</p>",
        _table([[n, *(s.get(n, "") for s in summaries)] for n in names], ["", *_names(runs)]),
        images,
        _times(runs),
        "<h2>Events</h2>",
        _table(events, ("run", "what")) if events else "<p>No step was skipped.</p>",
    ]
    if len(runs) > 1:
        flat = [_flat(run.config) for run in runs]
        keys = list(dict.fromkeys(key for config in flat for key in config))
        differ = [
            [key, *(config.get(key, "") for config in flat)]
            for key in keys
            if len({config.get(key) for config in flat}) > 1
        ]
        parts += ["<h2>Settings that differ</h2>", _table(differ, ["", *_names(runs)])]
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body>{body}</body></html>\n"
    )


def _times(runs: Sequence[RunLog]) -> str:
    """Where the wall time of the runs went, all restarts together."""
    if not any(run.seconds for run in runs):
        return ""
    totals = [sum(run.seconds.values()) for run in runs]
    rows = [
        [
            name.replace("_", " "),
            *(
                f"{run.seconds.get(name, 0.0):,.1f} s, {run.seconds.get(name, 0.0) / total:.1%}"
                if total
                else ""
                for run, total in zip(runs, totals, strict=True)
            ),
        ]
        for name in ACTIVITIES
        if any(run.seconds.get(name) for run in runs)
    ]
    return "<h2>Where the time went</h2>" + _table(rows, ["", *_names(runs)])


def _names(runs: Sequence[RunLog]) -> list[str]:
    return [run.name for run in runs]
