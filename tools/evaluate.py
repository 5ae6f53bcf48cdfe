"""Evaluates a model on a dataset under noise that is fixed once: loss, perplexity, accuracy.

    python tools/evaluate.py runs/quickstart --baselines
    python tools/evaluate.py bert-base-uncased --data-dir DATA --length 128 --rate 0.15
    python tools/evaluate.py runs/electra_tiny --discriminate "Los pájaros están hablando"
    python tools/evaluate.py google-t5/t5-small --exact-match pairs.jsonl

MODEL is a workdir, a Hugging Face folder or a hub id. A workdir is evaluated on its own dataset
as its run evaluates itself, so that the figures agree; other models are masked at 15 % in full
rows of 128 tokens, or of what they take; decoders predict the next token, encoder-decoders what
T5's or BART's noise hides. The figures are the same at any batch size and on any number of
devices. --exact-match asks how often the model makes a target of its source: given the target's own
tokens up to each, and by itself.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.progress import track

from flaxpretrain import program
from flaxpretrain.config import Data, dataset_folder, render
from flaxpretrain.conversion.sources import load_pretrained
from flaxpretrain.data.files import files_of
from flaxpretrain.data.mixing import MixedData, MixedDataset, held_out, open_mixed
from flaxpretrain.data.store import METADATA_FILE, Dataset, open_dataset
from flaxpretrain.errors import UserError
from flaxpretrain.evaluation.baselines import comparison
from flaxpretrain.evaluation.discriminate import discriminate, require_chances, show
from flaxpretrain.evaluation.exact_match import Watch, answers, read_pairs, teacher_forced
from flaxpretrain.evaluation.fixed_masks import baselines, check_dataset, evaluate, settings_of
from flaxpretrain.evaluation.subject import Subject, generation_settings, open_subject
from flaxpretrain.generation.strategies import Beam
from flaxpretrain.generation.writer import Writer
from flaxpretrain.locations import Location, located
from flaxpretrain.training.sharding import make_mesh


def parser() -> program.Parser:
    """The arguments."""
    parser = program.Parser(__doc__)
    parser.add_argument("model", metavar="MODEL", help="a workdir, a folder or a hub id")
    parser.add_argument("--data-dir", type=located, help="dataset; none: that of the workdir's run")
    parser.add_argument(
        "--split",
        default="validation",
        help="of the dataset, or several with commas; of a mixture, wiki/validation is that of one "
        "part and validation that of each",
    )
    parser.add_argument(
        "--rate", type=float, help="share of masked tokens; none: the run's, or 0.15"
    )
    parser.add_argument("--length", type=int, help="tokens a row; none: the run's last, or 128")
    parser.add_argument(
        "--batch-size", type=int, default=64, help="rows at a time; changes no figure"
    )
    parser.add_argument(
        "--max-rows", type=int, help="so many rows, picked by the seed; none: the run's, or all"
    )
    parser.add_argument(
        "--seed", type=int, help="of the noise and of the rows picked; none: the run's, or 0"
    )
    parser.add_argument("--step", type=int, help="of a workdir's checkpoint; none: the newest")
    parser.add_argument(
        "--compute", choices=("float32", "bfloat16"), default="float32", help="number format"
    )
    parser.add_argument("--fsdp", type=int, default=1, help="devices along the mesh's fsdp axis")
    parser.add_argument("--tensor", type=int, default=1, help="devices along its tensor axis")
    parser.add_argument(
        "--baselines",
        action="store_true",
        help="also score unigram and bigram models of the train split at the same positions",
    )
    parser.add_argument(
        "--discriminate",
        metavar="TEXT",
        action="append",
        help="mark each token with the probability that it was replaced, and evaluate nothing; "
        "repeatable",
    )
    parser.add_argument(
        "--exact-match",
        metavar="FILE",
        type=Path,
        help='pairs of texts, {"source": "...", "target": "..."} a line, to be answered exactly',
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=64, help="most tokens of an answer of --exact-match"
    )
    parser.add_argument("--beams", type=int, help="search answers so; none: the likeliest tokens")
    parser.add_argument("--show", type=int, default=0, help="so many answers of --exact-match")
    parser.add_argument("--json", action="store_true", help="one JSON object, nothing else")
    return parser


def check(arguments) -> None:
    """Raises UserError on numbers that cannot be."""
    for name in ("length", "batch_size", "max_rows", "fsdp", "tensor", "max_new_tokens"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be positive; got {value}")


def main(argv: list[str]) -> None:
    """Evaluates and prints."""
    arguments = parser().parse_args(argv)
    check(arguments)
    if arguments.discriminate:
        mark(arguments)
        return
    if arguments.exact_match:
        answer(arguments)
        return
    subject = open_subject(arguments.model, arguments.step)
    folder = arguments.data_dir
    if folder is None and subject.workdir is not None and subject.trained:
        folder = dataset_folder(subject.run, subject.workdir)
    if folder is None:
        raise UserError(f"--data-dir is needed: {arguments.model} does not say which dataset")
    dataset = dataset_of(subject.run.data, folder, arguments.data_dir)
    check_dataset(subject, dataset)
    for name in arguments.split.split(","):
        mixed = isinstance(dataset, MixedDataset)
        held = held_out(subject.run.data, dataset, name) if mixed else None
        for split in [name] if held is None else [each.split for each in held]:
            score(arguments, subject, dataset, split)


def dataset_of(data: Data, folder: Location, given: Location | None) -> Dataset:
    """The dataset in a folder, or those of a mixture."""
    if not isinstance(data, MixedData) or (given and files_of(given).text(METADATA_FILE)):
        return open_dataset(folder)
    return open_mixed(data if given is None else dataclasses.replace(data, folder=str(given)))


def score(arguments, subject: Subject, dataset: Dataset, split: str) -> None:
    """Evaluates on one split and prints."""
    settings = settings_of(
        subject,
        split=split,
        rate=arguments.rate,
        length=arguments.length,
        max_rows=arguments.max_rows,
        seed=arguments.seed,
    )
    watch = watcher(arguments)
    started = time.monotonic()
    mesh = make_mesh(-1, arguments.fsdp, arguments.tensor)
    figures = evaluate(
        subject,
        dataset,
        settings,
        mesh,
        arguments.batch_size,
        compute=arguments.compute,
        watch=watch,
    )
    result = {
        "model": subject.name,
        "step": subject.step,
        "split": settings.split,
        "rows": settings.rows(dataset),
        "length": settings.length,
        "seed": settings.seed,
        "compute": arguments.compute,
        "figures": figures,
        "objective": render(settings.objective),
    }
    if arguments.baselines:
        part, slash, _ = split.rpartition("/")
        result["baselines"] = baselines(dataset, settings, f"{part}{slash}train")._asdict()
    result["seconds"] = time.monotonic() - started
    if arguments.json:
        print(json.dumps(result))
        return
    print_result(result)


def mark(arguments) -> None:
    """Marks the tokens of the texts of --discriminate."""
    require_chances(arguments.model, arguments.step)
    config, params, tokenizer = load_pretrained(
        arguments.model, step=arguments.step, head="discriminator"
    )
    for marked in discriminate(config, params, tokenizer, arguments.discriminate):
        if arguments.json:
            tokens = [token._asdict() for token in marked.tokens]
            print(json.dumps({"text": marked.text, "tokens": tokens}, ensure_ascii=False))
        else:
            show(marked, Console())


def watcher(arguments) -> Watch:
    """Shows on a terminal how far an evaluation is."""
    errors = Console(stderr=True)
    shown = errors.is_terminal and not arguments.json

    def watch(parts: Iterable, count: int) -> Iterator:
        yield from track(parts, "evaluating", count, console=errors, disable=not shown)

    return watch


def answer(arguments) -> None:
    """Answers the sources of --exact-match and prints how often that is the target."""
    pairs = read_pairs(arguments.exact_match)
    strategy = None if arguments.beams is None else Beam(arguments.beams)
    config, params, tokenizer = load_pretrained(arguments.model, step=arguments.step, head="lm")
    writer = Writer(
        config,
        params,
        tokenizer,
        generation=generation_settings(arguments.model, tokenizer),
        compute=arguments.compute,
    )
    given = teacher_forced(writer, pairs)
    found = list(
        answers(
            writer,
            pairs,
            max_new_tokens=arguments.max_new_tokens,
            strategy=strategy,
            watch=watcher(arguments),
        )
    )
    exact = sum(each.is_exact for each in found) / len(found)
    shown = found[: arguments.show]
    if arguments.json:
        rows = [
            each.pair._asdict() | {"answer": each.text, "is_exact": each.is_exact} for each in shown
        ]
        result = {"pairs": len(pairs), "teacher_forced": given, "generated_exact_match": exact}
        print(json.dumps(result | ({"answers": rows} if rows else {}), ensure_ascii=False))
        return
    print(f"{arguments.model}: {len(pairs):,} pairs of {arguments.exact_match}, given its target")
    for name, value in given.items():
        print(f"  {name:<11}  {value:.4f}")
    print(f"by itself\n  exact_match  {exact:.4f}")
    for each in shown:
        sign = "=" if each.is_exact else "≠"
        print(f"  {each.pair.source}\n    {each.text} {sign} {each.pair.target}")


def print_result(result: dict) -> None:
    """The same for a reader."""
    step = "" if result["step"] is None else f", step {result['step']}"
    print(
        f"{result['model']}{step}: {result['rows']:,} rows of {result['length']} tokens of split "
        f"{result['split']}, seed {result['seed']}, {result['compute']}"
    )
    width = max(map(len, result["figures"]))
    for name, value in result["figures"].items():
        print(f"  {name:<{width}}  {value:.4f}")
    if "baselines" in result:
        counted = result["baselines"]
        # Counting predicts masked tokens; other terms of the loss are none of its business.
        loss = result["figures"].get("masked_lm", result["figures"]["loss"])
        print(comparison(result["split"], loss, counted["unigram"], counted["bigram"]))
        print(f"  {counted['positions']:,} masked positions")


if __name__ == "__main__":
    program.run(main)
