"""Tells what is wrong with this installation, and what to do.

    python tools/doctor.py
    python tools/doctor.py --workdir WORKDIR

Looks at Python, packages, the devices jax finds (in a process apart, with a small product as a
test), accelerators it does not find or that another process holds, disk, memory and limits.
Exit code 0 when nothing is wrong, warnings aside; else 2.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.table import Table

from flaxpretrain import program
from flaxpretrain.analysis.doctor import GOOD, WARNING, WRONG, Finding, examine

COLOURS = {GOOD: "green", WARNING: "yellow", WRONG: "red"}


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = program.Parser(__doc__)
    parser.add_argument(
        "--workdir", type=Path, default=Path("."), help="where a run would write; may not exist"
    )
    parser.add_argument(
        "--seconds", type=float, default=180.0, help="how long the devices may take to answer"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    return parser


def table(findings: list[Finding]) -> Table:
    """The findings for a reader."""
    shown = Table(show_lines=False)
    for name in ("what", "verdict", "seen", "to do"):
        shown.add_column(name, overflow="fold")
    for one in findings:
        verdict = f"[{COLOURS[one.verdict]}]{one.verdict}[/]"
        shown.add_row(one.what, verdict, one.seen, one.remedy)
    return shown


def main(argv: list[str]) -> int:
    """Runs the program."""
    arguments = parser().parse_args(argv)
    findings = examine(arguments.workdir, arguments.seconds)
    if arguments.json:
        print(json.dumps({"findings": [dataclasses.asdict(one) for one in findings]}))
    else:
        Console().print(table(findings))
    return program.EXIT_USER if any(one.verdict == WRONG for one in findings) else program.EXIT_OK


if __name__ == "__main__":
    program.run(main)
