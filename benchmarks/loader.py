"""Measures the host side alone: from shards on disk to framed and masked batches, on one thread.

Beside it, on the same text and in the same run, Transformers' DataCollatorForLanguageModeling
makes batches of the same shape from rows that lie in memory ready to use, so that its figure holds
no reading, no order and no packing. A token is a real input token, special tokens included.

    python benchmarks/loader.py
    python benchmarks/loader.py --data-dir DATASET --output benchmarks/results/loader.json

Without --data-dir it makes a throw-away store of random ids. Prints a table and one JSON line.
"""

import argparse
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


def tokens_per_second(
    make: Callable[[int], int], seconds: float, repeats: int
) -> tuple[float, float]:
    """Median and best speed of `make(i)`, which returns how many tokens it made."""
    make(0)
    speeds, number = [], 1
    for _ in range(repeats):
        done, begin = 0, time.perf_counter()
        while (spent := time.perf_counter() - begin) < seconds or not done:
            done += make(number)
            number += 1
        speeds.append(done / max(spent, time.perf_counter() - begin))
    return statistics.median(speeds), max(speeds)


def measure_pipeline(
    dataset: Dataset, split: Split, layout: Layout, length: int, batch_size: int, args: Any
) -> dict[str, Any]:
    """Speed of `Pipeline.batch` over consecutive steps."""
    masking = TokenMasking(rate=RATE)
    pipeline = Pipeline(
        split,
        layout,
        lambda n: MaskedFraming(vocabulary=dataset.vocabulary, length=n, masking=masking),
        (Phase(length=length, batch_size=batch_size, steps=1 << 40),),
        order_seed=0,
        noise_seed=0,
    )
    median, best = tokens_per_second(
        lambda step: int(np.count_nonzero(pipeline.batch(step)["segment_ids"])),
        args.seconds,
        args.repeats,
    )
    return {
        "layout": type(layout).__name__,
        "length": length,
        "batch_size": batch_size,
        "padding_share": round(pipeline.plans[length].padding_share, 5),
        "tokens_per_second": round(median),
        "best_tokens_per_second": round(best),
    }


def measure_collator(
    dataset: Dataset, split: Split, length: int, batch_size: int, args: Any
) -> dict[str, Any] | None:
    """Speed of the Transformers collator, or None where torch or transformers is not installed."""
    if not all(map(importlib.util.find_spec, ("torch", "transformers"))):
        return None
    import tokenizers
    import torch
    import transformers

    # numpy uses one thread for all that is measured here anyway.
    torch.set_num_threads(1)
    vocabulary = dataset.vocabulary
    names = {getattr(vocabulary, n): f"[{n.upper()}]" for n in ("pad", "unk", "cls", "sep", "mask")}
    table = {names.get(i, f"t{i}"): i for i in range(vocabulary.size)}
    model = tokenizers.models.WordLevel(table, unk_token=names[vocabulary.unk])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(model),
        **{
            f"{n}_token": names[getattr(vocabulary, n)]
            for n in ("pad", "unk", "cls", "sep", "mask")
        },
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

    median, best = tokens_per_second(make, args.seconds, args.repeats)
    return {
        "length": length,
        "batch_size": batch_size,
        "tokens_per_second": round(median),
        "best_tokens_per_second": round(best),
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }


def processor() -> str:
    """The processor's name, as the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def benchmark(dataset: Dataset, split: Split, args: argparse.Namespace) -> dict[str, Any]:
    """Measures every length, printing a line for each figure."""
    print(
        f"{'':28}{'length':>8}{'batch':>8}{'padding':>9}{'M tokens/s':>12}{'best':>8}{'ratio':>8}"
    )
    pipelines, collators = [], []
    for length in args.lengths:
        batch_size = max(1, args.batch_tokens // length)
        collator = measure_collator(dataset, split, length, batch_size, args)
        found = [
            measure_pipeline(dataset, split, layout, length, batch_size, args)
            for layout in (Blocks(), Documents())
        ]
        lines = [("Transformers collator", collator)] if collator else []
        for name, figure in [*lines, *((f["layout"], f) for f in found)]:
            if collator:
                figure["ratio"] = round(
                    figure["tokens_per_second"] / collator["tokens_per_second"], 1
                )
            print(
                f"{name:28}{length:8}{batch_size:8}{figure.get('padding_share', 0):9.2%}"
                f"{figure['tokens_per_second'] / 1e6:12.2f}"
                f"{figure['best_tokens_per_second'] / 1e6:8.2f}{figure.get('ratio', 0):8.1f}"
            )
        pipelines += found
        collators += [collator] if collator else []
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
