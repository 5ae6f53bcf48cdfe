"""What cleaning a corpus did, for a reader: as text, and as a picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flaxpretrain.data.document import told
from flaxpretrain.errors import UserError


def table(report: Mapping[str, Any]) -> list[str]:
    """The counts of each step as aligned lines, between what was read and what is left."""
    heads = ("step", "documents dropped", "changed", "sentences dropped", "characters removed")
    rows = [
        (
            name,
            f"{tally['documents_dropped']:,}",
            f"{tally['documents_changed']:,}",
            f"{tally['sentences_dropped']:,}",
            f"{tally['characters_removed']:,}",
        )
        for name, tally in report["steps"].items()
    ]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = [_totals("read", report, "_read")]
    for source, lost in zip(report["sources"], report["lost"], strict=True):
        lines += told(source, lost)
    for row in (heads, *rows):
        first, *others = (f"{c:>{w}}" for c, w in zip(row, widths, strict=True))
        lines.append("  ".join([row[0].ljust(len(first)), *others]))
    kept = report["characters"] / max(1, report["characters_read"])
    lines.append(f"{_totals('left', report, '')} ({kept:.1%})")
    return lines


def _totals(name: str, report: Mapping[str, Any], suffix: str) -> str:
    counts = (
        f"{report[part + suffix]:,} {part}" for part in ("documents", "sentences", "characters")
    )
    return f"{name}: {', '.join(counts)}"


def text(report: Mapping[str, Any]) -> str:
    """The table, and examples of what each step did."""
    lines = table(report)
    for name, samples in report["samples"].items():
        lines += ["", f"{name}:"]
        for sample in samples:
            if sample["after"] is None:
                lines.append(f"  dropped: {sample['before']}")
            elif sample["after"]:
                lines += [f"  before:  {sample['before']}", f"  after:   {sample['after']}"]
            else:
                lines.append(f"  without: {sample['before']}")
    return "\n".join(lines) + "\n"


def picture(report: Mapping[str, Any], path: Path) -> None:
    """Bars of the documents and characters that each step took, as a PNG file.

    Raises:
      UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("a picture needs matplotlib: pip install matplotlib") from None
    names = list(report["steps"]) or ["nothing"]
    shares = {
        "documents dropped": ("documents_dropped", "documents_read"),
        "documents changed": ("documents_changed", "documents_read"),
        "characters removed": ("characters_removed", "characters_read"),
    }
    figure = Figure(figsize=(9, 1.6 + 0.5 * len(names)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(shares)
    for number, (label, (part, whole)) in enumerate(shares.items()):
        values = [
            100 * report["steps"].get(name, {}).get(part, 0) / max(1, report[whole])
            for name in names
        ]
        places = [row + (number - 1) * height for row in range(len(names))]
        bars = axes.barh(places, values, height, label=label)
        axes.bar_label(bars, [f"{value:.2g} %" if value else "" for value in values], padding=3)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel("% of what was read")
    axes.set_title(
        f"{', '.join(report['sources'])}: {report['documents']:,} of "
        f"{report['documents_read']:,} documents left"
    )
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)
