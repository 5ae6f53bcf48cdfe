"""Measures rows that are read from a store far away: from requests to framed and masked batches.

The store is a web server in a process of its own on this machine, which waits before each answer.
Batches are made by the loader's thread, as a run has them, and counted as they come, from the first
batch on. Beside it, the same order of the same rows from this machine's disk. A token is a real
input token, special tokens included.

    python benchmarks/remote_rows.py
    python benchmarks/remote_rows.py --data-dir DATASET --output benchmarks/results/remote_rows.json

Without --data-dir it makes a throw-away store of random ids. Prints a table and one JSON line.
"""

import argparse
import json
import multiprocessing
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.loader import RATE, processor, synthetic_dataset
from flaxpretrain import program
from flaxpretrain.config import Phase
from flaxpretrain.data.framing import MaskedFraming
from flaxpretrain.data.masking import TokenMasking
from flaxpretrain.data.pipeline import Pipeline, digest
from flaxpretrain.data.rows import Blocks, Documents, Layout
from flaxpretrain.data.store import open_dataset
from flaxpretrain.locations import Location


def measure(location: Location, layout: Layout, args: argparse.Namespace) -> dict[str, Any]:
    """Speed from the first batch on, and how long that one took."""
    dataset = open_dataset(location)
    masking = TokenMasking(rate=RATE)
    batch_size = max(1, args.batch_tokens // args.length)
    pipeline = Pipeline(
        dataset.split(args.split),
        layout,
        lambda n: MaskedFraming(vocabulary=dataset.vocabulary, length=n, masking=masking),
        (Phase(length=args.length, batch_size=batch_size, steps=1 << 40),),
        order_seed=0,
        noise_seed=0,
        window_tokens=args.window_tokens,
    )
    begin = time.perf_counter()
    batches = pipeline.iterate(0, 1 << 40)
    hashes = [digest(next(batches))]
    first, core = time.perf_counter(), time.process_time()
    tokens = made = 0
    while (spent := time.perf_counter() - first) < args.seconds:
        batch = next(batches)
        tokens += int(np.count_nonzero(batch["segment_ids"]))
        made += 1
        if made < 4:
            hashes.append(digest(batch))
    batches.close()
    return {
        "layout": type(layout).__name__,
        "length": args.length,
        "batch_size": batch_size,
        "first_batch_seconds": round(first - begin, 3),
        "tokens": tokens,
        "seconds": round(spent, 2),
        "tokens_per_second": round(tokens / spent),
        "tokens_per_core_second": round(tokens / (time.process_time() - core)),
        "epochs": round(pipeline.epoch(made), 2),
        "digests": hashes,
    }


def compare(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Measures the store and the disk, a layout after the other, printing a line for each."""
    server = subprocess.Popen(
        [sys.executable, ROOT / "benchmarks" / "range_server.py", folder]
        + ["--delay-ms", str(args.delay_ms)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        found: dict[str, list[dict[str, Any]]] = {"remote": [], "local": []}
        print(f"{'':8}{'layout':12}{'first batch, s':>16}{'M tokens/s':>12}{'a core':>8}")
        for layout in (Blocks(), Documents()):
            for name, location in (("remote", url), ("local", folder)):
                figures = measure(location, layout, args)
                found[name].append(figures)
                print(
                    f"{name:8}{figures['layout']:12}{figures['first_batch_seconds']:16.2f}"
                    f"{figures['tokens_per_second'] / 1e6:12.2f}"
                    f"{figures['tokens_per_core_second'] / 1e6:8.2f}"
                )
    finally:
        server.terminate()
        server.wait()
    same = all(
        a.pop("digests") == b.pop("digests")
        for a, b in zip(found["remote"], found["local"], strict=True)
    )
    split = open_dataset(folder).split(args.split)
    return {
        "benchmark": "remote_rows",
        "delay_ms": args.delay_ms,
        "window_tokens": args.window_tokens,
        "split_tokens": split.tokens,
        "shards": len(split.shards),
        "same_batches": same,
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "processor": processor(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        **found,
    }


def main(argv: list[str]) -> None:
    """Parses arguments, measures, prints."""
    parser = program.Parser(__doc__)
    parser.add_argument("--data-dir", type=Path, help="a dataset; without it one is made up")
    parser.add_argument("--split", default="train", help="which split of it")
    parser.add_argument("--tokens", type=int, default=100_000_000, help="tokens to make up")
    parser.add_argument("--length", type=int, default=512, help="row length")
    parser.add_argument("--window-tokens", type=int, default=1 << 24, help="tokens of a window")
    parser.add_argument("--delay-ms", type=float, default=50.0, help="the server's, a request")
    parser.add_argument(
        "--batch-tokens", type=int, default=1 << 17, help="positions a batch, padding included"
    )
    parser.add_argument("--seconds", type=float, default=15.0, help="seconds of each measurement")
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.data_dir or Path(scratch)
        if args.data_dir is None:
            # In a process of its own, so that its memory does not count.
            maker = multiprocessing.Process(target=synthetic_dataset, args=(folder, args.tokens))
            maker.start()
            maker.join()
        result = compare(folder, args)
    private = {str(args.data_dir): "DATASET", str(args.output): "RESULT.json"}
    result["command"] = " ".join(
        ["python benchmarks/remote_rows.py", *(private.get(a, a) for a in argv)]
    )
    print(json.dumps(result))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    program.run(main)
