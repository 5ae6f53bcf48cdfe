"""Measures the dataset builder against the bare tokenizer, on the same text and in the same run.

Bare is the `tokenizers` library's `encode_batch` over all lines in batches of 1,000, and nothing
else: the lines lie in memory, the ids are dropped. The builder reads the files, finds documents,
hashes them, encodes, and writes and flushes shards; it calls `encode_batch_fast`, which leaves out
offsets, so that one is measured too. All use one thread. Then one process is compared with two on
a larger text, and the peak memory of one with four times the text. On a machine that does other
work as well, the figures by CPU time say more than those by the clock.

    python benchmarks/builder.py --corpus TEXTS --vocab-file vocab.txt
    python benchmarks/builder.py --output benchmarks/results/builder.json

Without --corpus and --vocab-file it takes the English Wikipedia text and the vocabulary of
bert-base-uncased in the folder that FLAXPRETRAIN_TEST_DATA names. Prints a table and a JSON line.
"""

import os

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RAYON_NUM_THREADS"] = "1"

import argparse
import json
import multiprocessing
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers as library

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flaxpretrain import program
from flaxpretrain.data import tokenizers
from flaxpretrain.data.building import build
from flaxpretrain.data.sources import TextFiles, text_files
from flaxpretrain.errors import UserError

BATCH = 1000


def parser() -> program.Parser:
    """The arguments."""
    parser = program.Parser(__doc__)
    parser.add_argument("--corpus", type=Path, help="a text file or folder, a sentence a line")
    parser.add_argument("--vocab-file", type=Path, help="a WordPiece vocab.txt")
    parser.add_argument("--rounds", type=int, default=3, help="of every measurement; the median")
    parser.add_argument("--repeat", type=int, default=4, help="times the text, for two processes")
    parser.add_argument("--output", type=Path, help="a JSON file for the results")
    return parser


def inputs(arguments: argparse.Namespace) -> tuple[Path, Path]:
    """The corpus and the vocabulary, given or from the folder of test data."""
    corpus, vocabulary = arguments.corpus, arguments.vocab_file
    folder = os.environ.get("FLAXPRETRAIN_TEST_DATA")
    if (corpus is None or vocabulary is None) and not folder:
        raise UserError("give --corpus and --vocab-file, or set FLAXPRETRAIN_TEST_DATA")
    corpus = corpus or Path(folder or "", "en_wikipedia_2018", "train.txt")
    return corpus, vocabulary or Path(folder or "", "vocab", "bert-base-uncased", "vocab.txt")


def timed(work: Callable[[], Any]) -> dict[str, float]:
    """Seconds by the clock and of the CPU, processes that were waited for included."""
    before, start = os.times(), time.perf_counter()
    work()
    seconds, after = time.perf_counter() - start, os.times()
    return {"seconds": seconds, "cpu_seconds": sum(after[:4]) - sum(before[:4])}


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    """The median of every figure, to the millisecond."""
    return {name: round(statistics.median(r[name] for r in rounds), 3) for name in rounds[0]}


def build_once(
    source: TextFiles, tokenizer: tokenizers.Tokenizer, num_processes: int = 1
) -> dict[str, float]:
    """Builds into a throw-away folder."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "data")
        return timed(lambda: build([source], tokenizer, output, num_processes=num_processes))


def against_the_tokenizer(
    source: TextFiles, tokenizer: tokenizers.Tokenizer, rounds: int
) -> dict[str, Any]:
    """The bare tokenizer and the builder by turns, one thread each."""
    lines = [line for document in source.documents() for line in document.sentences]
    backend = library.Tokenizer.from_str(tokenizer.backend.to_str())

    def bare(encode: Callable[..., Any]) -> dict[str, float]:
        def work() -> None:
            for first in range(0, len(lines), BATCH):
                encode(lines[first : first + BATCH], add_special_tokens=False)

        return timed(work)

    measured: dict[str, list[dict[str, float]]] = {"bare": [], "bare_fast": [], "builder": []}
    for _ in range(rounds):
        measured["bare"].append(bare(backend.encode_batch))
        measured["builder"].append(build_once(source, tokenizer))
        measured["bare_fast"].append(bare(backend.encode_batch_fast))
    found: dict[str, Any] = {name: medians(values) for name, values in measured.items()}
    for name in ("bare", "bare_fast"):
        for unit in ("seconds", "cpu_seconds"):
            # Of each round, whose parts the machine treated most alike.
            pairs = zip(measured[name], measured["builder"], strict=True)
            shares = [other[unit] / builder[unit] for other, builder in pairs]
            found[f"builder_speed_of_{name}_by_{unit}"] = round(statistics.median(shares), 3)
    return found


def two_processes(
    source: TextFiles, tokenizer: tokenizers.Tokenizer, rounds: int
) -> dict[str, Any]:
    """One process and two by turns, on the same text; starting the processes is in the time."""
    measured: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    for _ in range(rounds):
        for count, values in measured.items():
            values.append(build_once(source, tokenizer, count))
    speedups = [
        one["seconds"] / two["seconds"] for one, two in zip(measured[1], measured[2], strict=True)
    ]
    return {
        "one_process": medians(measured[1]),
        "two_processes": medians(measured[2]),
        "speedup": round(statistics.median(speedups), 3),
        "best_speedup": round(max(speedups), 3),
    }


def peak_megabytes(corpus: Path, vocabulary: Path, repeat: int) -> float:
    """Peak resident memory of a fresh process that builds the text so many times over."""
    # A fresh interpreter: a process never gives its own peak back.
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_build_and_measure, (corpus, vocabulary, repeat))


def _build_and_measure(corpus: Path, vocabulary: Path, repeat: int) -> float:
    build_once(repeated(corpus, repeat), tokenizers.load(vocabulary))
    status = Path("/proc/self/status").read_text()
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return round(int(peak.split()[1]) / 1024, 1)


def repeated(corpus: Path, times: int) -> TextFiles:
    """The corpus, so many times in a row."""
    source = text_files(corpus)
    return TextFiles(source.name, source.paths * times)


def main(argv: list[str]) -> None:
    """Measures, prints a table and a JSON line."""
    arguments = parser().parse_args(argv)
    corpus, vocabulary = inputs(arguments)
    tokenizer = tokenizers.load(vocabulary)
    source = repeated(corpus, 1)
    megabytes = source.size() / 1e6
    load_before = os.getloadavg()[0]
    ratio = against_the_tokenizer(source, tokenizer, arguments.rounds)
    scaling = two_processes(repeated(corpus, arguments.repeat), tokenizer, arguments.rounds)
    memory = {f"{n}x": peak_megabytes(corpus, vocabulary, n) for n in (1, 4)}
    result = {
        "benchmark": "builder",
        "command": "python benchmarks/builder.py " + " ".join(argv),
        "corpus": f"{corpus.parent.name}/{corpus.name}",
        "corpus_megabytes": round(megabytes, 2),
        "vocabulary": f"{vocabulary.parent.name}/{vocabulary.name}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load_average_before": round(load_before, 2),
        "python": platform.python_version(),
        "tokenizers": library.__version__,
        "rounds": arguments.rounds,
        **ratio,
        "scaling_megabytes": round(megabytes * arguments.repeat, 2),
        **scaling,
        "peak_megabytes": memory,
    }
    print(f"{'':<28}{'MB/s':>8}{'MB/s a core':>14}")
    for label, figures, size in (
        ("bare encode_batch", ratio["bare"], megabytes),
        ("bare encode_batch_fast", ratio["bare_fast"], megabytes),
        ("builder, one process", ratio["builder"], megabytes),
        ("builder, larger text", scaling["one_process"], megabytes * arguments.repeat),
        ("builder, two processes", scaling["two_processes"], megabytes * arguments.repeat),
    ):
        rates = (size / figures["seconds"], size / figures["cpu_seconds"])
        print(f"{label:<28}{rates[0]:>8.2f}{rates[1]:>14.2f}")
    for name, label in (("bare", "encode_batch"), ("bare_fast", "encode_batch_fast")):
        clock, cpu = (ratio[f"builder_speed_of_{name}_by_{u}"] for u in ("seconds", "cpu_seconds"))
        print(f"builder / {label}: {clock:.1%} by the clock, {cpu:.1%} by CPU time")
    print(f"two processes / one: {scaling['speedup']:.2f}, best {scaling['best_speedup']:.2f}")
    print(f"peak memory: {memory['1x']} MB for the text, {memory['4x']} MB for four times as much")
    print(json.dumps(result))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


if __name__ == "__main__":
    program.run(main)
