"""Where the time of a step goes, from the trace of a profiler.

    python tools/profile_table.py runs/bert_small
    python tools/profile_table.py runs/bert_small/tensorboard --json

The folder is a workdir whose run had --profile-steps, or any that jax.profiler.start_trace wrote
to; the newest trace in it counts. A time is what one step took of the wall clock, each instant
given away once; beside it, what the kernels of a part took, hidden behind others or not.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flaxpretrain import program
from flaxpretrain.analysis.profile import step_times


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = program.Parser(__doc__)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="a workdir or a trace")
    parser.add_argument("--json", action="store_true", help="print one line of JSON a device")
    return parser


def main(argv: list[str]) -> None:
    """Runs the program."""
    arguments = parser().parse_args(argv)
    found = step_times(arguments.folder)
    if arguments.json:
        for times in found:
            print(json.dumps(dataclasses.asdict(times)))
        return
    print("\n\n".join("\n".join(times.lines()) for times in found))


if __name__ == "__main__":
    program.run(main)
