"""Measures the host side alone: from shards on disk to framed and masked batches, on one thread.

Beside it, on the same text and in the same run, Transformers' DataCollatorForLanguageModeling
makes batches of the same shape from rows that lie in memory ready to use, so that its figure holds
no reading, no order and no packing. A token is a real input token, special tokens included. On a
machine that does other work as well, the figure a core (by CPU time) says more than the clock's.

    python benchmarks/loader.py
    python benchmarks/loader.py --data-dir DATASET --output benchmarks/results/loader.json

Without --data-dir it makes a throw-away store of random ids. Prints a table and one JSON line.
"""

import argparse
import dataclasses
import importlib.util
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flaxpretrain import program
from flaxpretrain.config import Phase
from flaxpretrain.data.framing import MaskedFraming
from flaxpretrain.data.masking import TokenMasking
from flaxpretrain.data.pipeline import Pipeline
from flaxpretrain.data.rows import Blocks, Documents, Layout
from flaxpretrain.data.store import Dataset, Split, open_dataset
from flaxpretrain.data.store_writer import SplitWriter, id_type, write_metadata
from flaxpretrain.data.vocabulary import Vocabulary

LENGTHS = (128, 512)
RATE = 0.15
SPECIALS = ("pad", "unk", "cls", "sep", "mask")


def synthetic_dataset(folder: Path, tokens: int) -> Dataset:
    """Random ids in documents whose lengths are spread as those of articles are."""
    random = np.random.default_rng(0)
    vocabulary = Vocabulary(size=30522, pad=0, unk=100, cls=101, sep=102, mask=103)
    lengths = np.clip(random.lognormal(6.0, 1.2, tokens // 100 + 1), 1, 50_000).astype(np.int64)
    ends = np.minimum(np.cumsum(lengths), tokens)
    lengths = np.diff(np.unique(np.concatenate([[0], ends, [tokens]])))
    ids = random.choice(vocabulary.regular_ids(), tokens)
    one = np.ones(len(lengths), np.int64)
    writer = SplitWriter(folder, "train", id_type(vocabulary.size), shard_bytes=1 << 23)
    writer.append(ids, random.random(tokens) < 0.7, lengths, lengths, one, lengths * 4, one * 0)
    writer.close()
    write_metadata(folder, fingerprint="", vocabulary=vocabulary, splits={"train": writer.entry()})
    return open_dataset(folder)


@dataclasses.dataclass
class Contestant:
    """Something that makes batches: `make(i)` returns how many tokens its i-th batch holds."""

    name: str
    make: Callable[[int], int]
    facts: dict[str, Any]
    speeds: list[float] = dataclasses.field(default_factory=list)
    core_speeds: list[float] = dataclasses.field(default_factory=list)
    made: int = 0

    def run(self, seconds: float) -> None:
        """Measures one repetition."""
        tokens, begin, core_begin = 0, time.perf_counter(), time.process_time()
        while (spent := time.perf_counter() - begin) < seconds or not tokens:
            tokens += self.make(self.made)
            self.made += 1
        self.speeds.append(tokens / spent)
        self.core_speeds.append(tokens / (time.process_time() - core_begin))

    def figures(self) -> dict[str, Any]:
        """Medians of all repetitions, by the clock and by the time that a core worked for us."""
        return self.facts | {
            "tokens_per_second": round(statistics.median(self.speeds)),
            "tokens_per_core_second": round(statistics.median(self.core_speeds)),
        }


def ours(
    dataset: Dataset, split: Split, layout: Layout, length: int, batch_size: int
) -> Contestant:
    """`Pipeline.batch` over consecutive steps."""
    masking = TokenMasking(rate=RATE)
    pipeline = Pipeline(
        split,
        layout,
        lambda n: MaskedFraming(vocabulary=dataset.vocabulary, length=n, masking=masking),
        (Phase(length=length, batch_size=batch_size, steps=1 << 40),),
        order_seed=0,
        noise_seed=0,
    )
    name = type(layout).__name__
    padding = round(pipeline.plans[length].padding_share, 5)
    facts = {"layout": name, "length": length, "batch_size": batch_size, "padding_share": padding}
    return Contestant(
        name, lambda step: int(np.count_nonzero(pipeline.batch(step)["segment_ids"])), facts
    )


def theirs(dataset: Dataset, split: Split, length: int, batch_size: int) -> Contestant | None:
    """The Transformers collator, or None where torch or transformers is not installed."""
    if not all(map(importlib.util.find_spec, ("torch", "transformers"))):
        return None
    import tokenizers
    import torch
    import transformers

    # numpy uses one thread for all that is measured here anyway.
    torch.set_num_threads(1)
    vocabulary = dataset.vocabulary
    names = {getattr(vocabulary, n): f"[{n.upper()}]" for n in SPECIALS}
    table = {names.get(i, f"t{i}"): i for i in range(vocabulary.size)}
    model = tokenizers.models.WordLevel(table, unk_token=names[vocabulary.unk])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(model),
        **{f"{n}_token": names[getattr(vocabulary, n)] for n in SPECIALS},
    )
    collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=RATE)
    plan = Blocks().plan(split, length, 2)
    index = np.arange(min(batch_size * 4, plan.rows_per_epoch - 1))
    rows = [
        {
            "input_ids": [vocabulary.cls, *ids, vocabulary.sep],
            "attention_mask": [1] * length,
            # As run_mlm.py gives them: without, the collator looks for them token by token.
            "special_tokens_mask": [1, *([0] * (length - 2)), 1],
        }
        for ids in plan.rows(0, np.zeros_like(index), index)["ids"].tolist()
    ]
    starts = range(0, max(len(rows) - batch_size, 0) + 1, batch_size)
    batches = [rows[a : a + batch_size] for a in starts]

    def make(number: int) -> int:
        # Copies, since the collator takes the special tokens' mask out of what it is given.
        features = [dict(row) for row in batches[number % len(batches)]]
        return int(collator(features)["input_ids"].numel())

    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    facts = {"length": length, "batch_size": batch_size, **versions}
    return Contestant("Transformers collator", make, facts)


def processor() -> str:
    """The processor's name, as the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def benchmark(dataset: Dataset, split: Split, args: argparse.Namespace) -> dict[str, Any]:
    """Measures every length, printing a line for each figure."""
    print(
        f"{'':28}{'length':>8}{'batch':>8}{'padding':>9}{'M tokens/s':>12}{'a core':>8}{'ratio':>8}"
    )
    pipelines, collators = [], []
    for length in args.lengths:
        batch_size = max(1, args.batch_tokens // length)
        collator = theirs(dataset, split, length, batch_size)
        found = [
            ours(dataset, split, layout, length, batch_size) for layout in (Blocks(), Documents())
        ]
        everyone = [collator, *found] if collator else found
        for contestant in everyone:
            contestant.make(0)
        # In turns, so that what else the machine does slows all of them alike.
        for _ in range(args.repeats):
            for contestant in everyone:
                contestant.run(args.seconds)
        base = collator.figures()["tokens_per_core_second"] if collator else None
        for contestant in everyone:
            figures = contestant.figures()
            figures["ratio"] = round(figures["tokens_per_core_second"] / base, 1) if base else None
            print(
                f"{contestant.name:28}{length:8}{batch_size:8}"
                f"{figures.get('padding_share', 0):9.2%}"
                f"{figures['tokens_per_second'] / 1e6:12.2f}"
                f"{figures['tokens_per_core_second'] / 1e6:8.2f}{figures['ratio'] or '-':>8}"
            )
            (collators if contestant is collator else pipelines).append(figures)
    return {
        "benchmark": "loader",
        "threads": 1,
        "processor": processor(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "split_tokens": split.tokens,
        "shards": len(split.shards),
        "pipeline": pipelines,
        "transformers_collator": collators,
    }


def main(argv: list[str]) -> None:
    """Parses arguments, measures, prints."""
    parser = program.Parser(__doc__)
    parser.add_argument("--data-dir", type=Path, help="a dataset; without it one is made up")
    parser.add_argument("--split", default="train", help="which split of it")
    parser.add_argument("--tokens", type=int, default=20_000_000, help="tokens to make up")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="row lengths")
    parser.add_argument(
        "--batch-tokens", type=int, default=1 << 17, help="positions a batch, padding included"
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="seconds a repetition")
    parser.add_argument("--repeats", type=int, default=7, help="repetitions; the median counts")
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        dataset = (
            open_dataset(args.data_dir)
            if args.data_dir
            else synthetic_dataset(Path(scratch), args.tokens)
        )
        result = benchmark(dataset, dataset.split(args.split), args)
    private = {str(args.data_dir): "DATASET", str(args.output): "RESULT.json"}
    result["command"] = " ".join(
        ["python benchmarks/loader.py", *(private.get(a, a) for a in argv)]
    )
    print(json.dumps(result))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    program.run(main)
