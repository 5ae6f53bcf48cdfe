"""One page with the curves of a run, or of several over each other.

    python tools/report.py runs/bert_small
    python tools/report.py runs/one runs/two --output-dir comparison

Writes report.html, which holds its pictures and needs no network, and the pictures as PNG beside
it: loss, accuracy, perplexity, learning rate, gradient norm, throughput, MFU, goodput, skipped
steps; beside them where the wall time went, restarts and rewinds, and for several runs the settings
in which they differ.
"""

import argparse
import dataclasses
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flaxpretrain import program
from flaxpretrain.analysis.report import page, panels, picture, read_run


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = program.Parser(__doc__)
    parser.add_argument("workdirs", metavar="WORKDIR", nargs="+", type=Path, help="of a run")
    parser.add_argument(
        "--output-dir", type=Path, help="where to write (default: report/ in the first workdir)"
    )
    return parser


def main(argv: list[str]) -> None:
    """Runs the program."""
    arguments = parser().parse_args(argv)
    runs = [read_run(workdir) for workdir in arguments.workdirs]
    if max(Counter(run.name for run in runs).values()) > 1:
        runs = [
            dataclasses.replace(run, name=str(workdir))
            for run, workdir in zip(runs, arguments.workdirs, strict=True)
        ]
    folder = arguments.output_dir or arguments.workdirs[0] / "report"
    folder.mkdir(parents=True, exist_ok=True)
    pictures = [(title, picture(runs, title, names)) for title, names in panels(runs)]
    for title, data in pictures:
        name = title.lower().replace(",", "").replace(" ", "_")
        (folder / f"{name}.png").write_bytes(data)
    aside = folder / "report.html.new"
    aside.write_text(page(runs, pictures), encoding="utf-8")
    aside.replace(folder / "report.html")
    print(f"{folder / 'report.html'}: {len(runs)} runs, {len(pictures)} pictures")


if __name__ == "__main__":
    program.run(main)
