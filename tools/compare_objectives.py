"""Compares objectives and architectures at equal FLOPs, as T5 was chosen.

    python tools/compare_objectives.py --data-dir DATA --output-dir DIR
    python tools/compare_objectives.py --data-dir DATA --output-dir DIR \
        --architectures encoder-decoder --objectives spans --rates 0.1 0.15 0.25 0.5 --spans 2 3 5

Every cell of the grid trains a small model on its own noise, and then on one task that all have in
common (--probe); the loss there is what they are compared by. Prints a table and writes table.md,
picture.svg and results.json to --output-dir. A cell that is done is not computed again; one that
was cut off goes on. DATA is a dataset made with a tokenizer that has sentinels.
"""

import dataclasses
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flaxpretrain import program
from flaxpretrain.analysis.comparison import (
    ARCHITECTURES,
    NOTHING,
    Setting,
    compare,
    grid,
    picture,
    ranked,
    table,
)
from flaxpretrain.data.noising import VARIANTS


def parser() -> program.Parser:
    """The arguments."""
    parser = program.Parser(__doc__)
    parser.add_argument("--data-dir", required=True, help="dataset to train and evaluate on")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder of the cells")
    parser.add_argument(
        "--architectures", nargs="+", default=list(ARCHITECTURES), help="some of the default"
    )
    parser.add_argument(
        "--objectives",
        nargs="+",
        default=[NOTHING, "spans", "bert", "prefix lm"],
        help=f"some of {NOTHING}, {', '.join(VARIANTS)}; {NOTHING} sees the common task alone",
    )
    parser.add_argument("--rates", nargs="+", type=float, default=[0.15], help="shares of noise")
    parser.add_argument(
        "--spans", nargs="+", type=float, default=[3.0], help="mean lengths in tokens"
    )
    for field in dataclasses.fields(Setting):
        if field.name != "data":
            parser.add_argument(
                f"--{field.name.replace('_', '-')}",
                type=type(field.default),
                default=field.default,
                help=_HELP[field.name],
            )
    return parser


_HELP = {
    "flops": "of a cell's training on its own noise",
    "probe": "noise of the common task",
    "probe_share": "FLOPs on the common task, as a share of --flops",
    "width": "of the hidden states",
    "layers": "of encoder, decoder, and a decoder alone",
    "length": "tokens of a source",
    "batch_size": "rows of a step",
    "learning_rate": "peak rate of AdamW",
    "eval_rows": "rows of the validation split",
    "seed": "of weights, order and noise",
}


def main(argv: list[str]) -> None:
    """Trains the cells and shows how they did."""
    arguments = parser().parse_args(argv)
    fields = [field.name for field in dataclasses.fields(Setting) if field.name != "data"]
    chosen = {name: getattr(arguments, name) for name in fields}
    setting = Setting(data=str(Path(arguments.data_dir).resolve()), **chosen)
    cells = grid(arguments.architectures, arguments.objectives, arguments.rates, arguments.spans)
    folder: Path = arguments.output_dir
    results = compare(cells, setting, folder, lambda text: print(text, file=sys.stderr, flush=True))
    rows = [dataclasses.asdict(cell) | result._asdict() for cell, result in ranked(results)]
    content = {"setting": chosen, "cells": rows}
    text = table(results, setting)
    (folder / "results.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / "table.md").write_text(text, encoding="utf-8")
    (folder / "picture.svg").write_text(picture(results, setting), encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    program.run(main)
