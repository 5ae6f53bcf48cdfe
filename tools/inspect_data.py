"""Shows what a recipe makes of a dataset: rows with their noise in colour, lengths, masks, padding.

    python tools/inspect_data.py configs/bert_small.py --data-dir DATA
    python tools/inspect_data.py configs/t5_tiny.py --data-dir DATA --rows 2 --picture t5.png

The rows are those that training would see, from step 1 on. Counts are over all batches looked at.
"""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console

from flaxpretrain import program
from flaxpretrain.analysis.inspection import LEGEND, coloured_row, inspect, picture, report
from flaxpretrain.analysis.padding import padding_by_layout
from flaxpretrain.config import dataset_folder, load
from flaxpretrain.data import tokenizers
from flaxpretrain.data.mixing import MixedData, open_mixed
from flaxpretrain.data.store import open_dataset
from flaxpretrain.errors import UserError
from flaxpretrain.locations import located
from flaxpretrain.training.session import open_pipeline, row_plan


def parser() -> program.Parser:
    """The arguments."""
    parser = program.Parser(__doc__)
    parser.add_argument("recipe", metavar="RECIPE", help="a Python file with recipe() -> Run")
    parser.add_argument("--data-dir", type=located, help="dataset; none: that of the recipe")
    parser.add_argument("--workdir", type=Path, help="of the recipe (default: runs/<its name>)")
    parser.add_overrides("change a field of the recipe; repeatable")
    parser.add_argument("--split", help="of the dataset; none: the recipe's")
    parser.add_argument("--phase", type=int, default=0, help="of the recipe, from 0")
    parser.add_argument("--batches", type=int, default=20, help="how many to count")
    parser.add_argument("--rows", type=int, default=3, help="how many to show")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="also draw it: .png, .svg, ..")
    return parser


def main(argv: list[str]) -> None:
    """Prints rows and counts."""
    arguments = parser().parse_args(argv)
    if arguments.batches < 1 or arguments.rows < 0:
        raise UserError("--batches must be positive and --rows not negative")
    run = load(arguments.recipe, arguments.overrides)
    if not 0 <= arguments.phase < len(run.phases):
        raise UserError(f"--phase {arguments.phase}: the recipe has {len(run.phases)} phases")
    folder = arguments.data_dir or dataset_folder(run, arguments.workdir or Path("runs") / run.name)
    if isinstance(run.data, MixedData):
        given = arguments.data_dir and str(arguments.data_dir)
        run = dataclasses.replace(
            run, data=dataclasses.replace(run.data, folder=given or run.data.folder)
        )
        dataset = open_mixed(run.data)
    else:
        dataset = open_dataset(folder)
    data = dataclasses.replace(run.data, split=arguments.split or run.data.split)
    phase = dataclasses.replace(
        run.phases[arguments.phase],
        steps=arguments.batches, tokens=None, epochs=None, seconds=None,
    )  # fmt: skip
    run = dataclasses.replace(run, data=data, phases=(phase,))
    pipeline = open_pipeline(run, dataset, run.phases)
    backend = tokenizers.load(dataset.tokenizer_folder).backend
    console, words = Console(), dataset.vocabulary
    first = pipeline.batch(0)
    if arguments.rows:
        console.print(LEGEND)
    for row in range(min(arguments.rows, phase.batch_size)):
        for line in coloured_row(first, row, words, backend):
            console.print(line, soft_wrap=True)
    found = inspect((pipeline.batch(step) for step in range(arguments.batches)), words)
    for line in report(found):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    plan = row_plan(run, dataset, run.data, phase.length)
    print(
        f"an epoch of split {data.split}: {plan.rows_per_epoch:,} rows, "
        f"{plan.padding_share:.2%} padding"
    )
    if not isinstance(run.data, MixedData):
        print(f"padding of an epoch in rows of {phase.length}, by layout:")
        layouts = padding_by_layout(run, dataset, run.data, phase.length)
        for name, (positions, share) in layouts.items():
            print(f"  {share:7.2%} of {positions:,} positions  {name}")
    if arguments.picture is not None:
        picture(found, arguments.picture, f"{run.name} on {folder.name}, split {data.split}")
        print(f"wrote {arguments.picture}")


if __name__ == "__main__":
    program.run(main)
