"""Tells how well two kinds of text can be told apart by what frozen models make of them.

    python tools/probe.py runs/general runs/adapted --class negative.txt --class positive.txt
    python tools/probe.py bert-base-uncased --class A.txt --class B.txt --data-dir DATA

A logistic regression on the mean hidden state of each text, a text a line; the models stay as they
are. With --data-dir, texts that are documents of its validation split are those held out, so that
no model that was adapted to DATA has seen them; otherwise one text in ten is, by the seed.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from flaxpretrain import program
from flaxpretrain.conversion.sources import load_pretrained
from flaxpretrain.data import tokenizers
from flaxpretrain.data.store import open_dataset
from flaxpretrain.errors import UserError
from flaxpretrain.evaluation.probe import (
    choose_strength,
    documents_among,
    fit_probe,
    sentence_features,
    token_ids,
)
from flaxpretrain.locations import located


def parser() -> program.Parser:
    """The arguments."""
    parser = program.Parser(__doc__)
    parser.add_argument("models", metavar="MODEL", nargs="+", help="workdirs, folders or hub ids")
    parser.add_argument(
        "--class", type=Path, action="append", required=True, dest="classes", metavar="FILE",
        help="texts of one class, one a line; given twice",
    )  # fmt: skip
    parser.add_argument("--data-dir", type=located, help="its validation split is held out")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the folds and of the texts held out"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object, nothing else")
    return parser


def read(paths: list[Path]) -> tuple[list[str], np.ndarray]:
    """Texts that are there once, and the number of the class of each."""
    if len(paths) != 2:
        raise UserError(f"--class: expected two files, one a class; got {len(paths)}")
    found: dict[str, int] = {}
    for number, path in enumerate(paths):
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--class {path}: cannot be read as text: {error}") from error
        for line in lines:
            if line.strip():
                found.setdefault(line.strip(), number)
    return list(found), np.array(list(found.values()), np.int64)


def held_out(arguments, texts: list[str]) -> np.ndarray:
    """Which texts the probe is tested on."""
    if arguments.data_dir is None:
        return np.random.default_rng(arguments.seed).permutation(len(texts)) % 10 == 0
    dataset = open_dataset(arguments.data_dir)
    ids = token_ids(tokenizers.load(dataset.tokenizer_folder), texts)
    in_validation = documents_among(dataset.split("validation"), ids)
    chosen = in_validation & ~documents_among(dataset.split("train"), ids)
    if not chosen.any():
        raise UserError(
            f"--data-dir {arguments.data_dir}: no text of --class is a document of its validation "
            "split; build it from the same files with --format lines"
        )
    return chosen


def main(argv: list[str]) -> None:
    """Probes each model and prints its accuracy."""
    arguments = parser().parse_args(argv)
    texts, labels = read(arguments.classes)
    test = held_out(arguments, texts)
    result = {
        "texts": {"train": int((~test).sum()), "held_out": int(test.sum())},
        "majority": float(max(labels[test].mean(), 1 - labels[test].mean())),
        "models": [],
    }
    for name in arguments.models:
        config, params, tokenizer = load_pretrained(name)
        features = sentence_features(config, params, tokenizer, texts)
        strength = choose_strength(features[~test], labels[~test], arguments.seed)
        probe = fit_probe(features[~test], labels[~test], strength)
        result["models"].append(
            {
                "model": name,
                "strength": strength,
                "accuracy_train": probe.accuracy(features[~test], labels[~test]),
                "accuracy": probe.accuracy(features[test], labels[test]),
            }
        )
        if not arguments.json:
            print(f"{name}: {result['models'][-1]['accuracy']:.1%} of the texts held out")
    if arguments.json:
        print(json.dumps(result))
    else:
        counts = result["texts"]
        print(
            f"{counts['train']:,} texts to learn from, {counts['held_out']:,} held out; "
            f"always the more frequent class: {result['majority']:.1%}"
        )


if __name__ == "__main__":
    program.run(main)
