"""Is finding near duplicates linear? Processor time and memory at sizes that double.

    python benchmarks/deduplication.py --corpus train.txt --output FIGURES.json

Documents are paragraphs of a corpus, so many as asked for: when the text is used up, it comes again
with a fifth of its words replaced, so that nothing is a duplicate; every tenth document is one of
before with two words replaced, which is to be found.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flaxpretrain import program
from flaxpretrain.data.deduplication import Duplicates, MinHash, prints_of
from flaxpretrain.data.shingles import word_hashes
from flaxpretrain.data.sources import text_files

BATCH = 500
WORDS = 120
"""Words of a document."""


def documents(words: list[str], count: int, seed: int = 0) -> Iterator[tuple[str, bool]]:
    """So many documents, and whether each is a near duplicate of one before."""
    random = np.random.default_rng(seed)
    vocabulary = sorted(set(words))
    kept: list[str] = []
    place = 0
    for number in range(count):
        if number % 10 == 9:
            part = kept[int(random.integers(len(kept)))].split(" ")
            for spot in random.integers(len(part), size=2):
                part[spot] = vocabulary[int(random.integers(len(vocabulary)))]
            yield " ".join(part), True
            continue
        start = place % (len(words) - WORDS)
        part = words[start : start + WORDS]
        if place >= len(words) - WORDS:
            chosen = random.choice(WORDS, WORDS // 5, replace=False)
            for spot in chosen:
                part[spot] = vocabulary[int(random.integers(len(vocabulary)))]
        place += WORDS
        kept = [*kept[-2000:], " ".join(part)]
        yield kept[-1], False


def measure(words: list[str], count: int) -> dict[str, float]:
    """Processor time, memory, and how many duplicates were found, among so many documents."""
    settings = MinHash()
    duplicates = Duplicates(True, settings)
    sketching = judging = 0.0
    found = wrong = planted = 0
    stream = documents(words, count)
    while batch := [pair for _, pair in zip(range(BATCH), stream, strict=False)]:
        texts = [text for text, _ in batch]
        start = time.process_time()
        prints = prints_of(texts, [word_hashes(text) for text in texts], settings)
        middle = time.process_time()
        verdicts = duplicates.judge(prints)
        sketching += middle - start
        judging += time.process_time() - middle
        for (_, duplicate), verdict in zip(batch, verdicts, strict=True):
            planted += duplicate
            found += duplicate and verdict is not None
            wrong += not duplicate and verdict is not None
    kept = count - found - wrong
    return {
        "documents": count,
        "sketch_microseconds_a_document": round(1e6 * sketching / count, 1),
        "judge_microseconds_a_document": round(1e6 * judging / count, 1),
        "bytes_a_kept_document": round(duplicates.bytes / kept, 1),
        "planted_duplicates": planted,
        "found_share": round(found / planted, 4),
        "wrongly_dropped": wrong,
    }


def main(argv: list[str]) -> None:
    """Measures each size and writes the figures."""
    parser = program.Parser(__doc__)
    parser.add_argument("--corpus", type=Path, required=True, help="text to make documents of")
    parser.add_argument("--sizes", type=int, nargs="+", default=[5000, 10000, 20000])
    parser.add_argument("--output", type=Path, help="a .json for the figures")
    arguments: argparse.Namespace = parser.parse_args(argv)
    source = text_files(arguments.corpus)
    words = [w for d in source.documents() for s in d.sentences for w in s.split(" ")]
    measure(words, BATCH)  # the library loads
    rows = []
    for size in arguments.sizes:
        rows.append(measure(words, size))
        print(json.dumps(rows[-1]))
    figures = {"machine": platform.processor() or platform.machine(), "processes": 1, "rows": rows}
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    program.run(main)
