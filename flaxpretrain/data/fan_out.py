"""Builds the parts of a dataset by Apache Beam, on whatever its runner runs on, and merges them.

Each part is one run of the builder's program, so that what a worker does is what a person at a
terminal would do; a part that was built already takes no time when the pipeline is run again.
"""

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flaxpretrain.data.merging import merge
from flaxpretrain.errors import UserError


class FailedPart(Exception):
    """A builder that did not end well; the message is its last line."""


def build_part(index: int, count: int, command: Sequence[str]) -> int:
    """Runs the builder on one part, with one process: parts are the parallelism.

    Raises:
      FailedPart: it ended with an error, for whose mending Beam may try again.
    """
    part = ["--shard", f"{index}/{count}", "--num-processes", "1"]
    done = subprocess.run([*command, *part], capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().split("\n")
        raise FailedPart(f"part {index}/{count}: {lines[-1] or f'exit code {done.returncode}'}")
    return index


def merge_parts(built: Sequence[int], output: str, count: int, overwrite: bool) -> str:
    """Puts all parts together once all are built; a line that says what came of it."""
    missing = sorted(set(range(count)) - set(built))
    if missing:
        raise FailedPart(f"parts {missing} are missing")
    dataset = merge(Path(output), count, overwrite=overwrite)
    tokens = sum(split.tokens for split in dataset.splits.values())
    return f"{dataset.folder}: {tokens:,} tokens from {count} parts"


def run(
    command: Sequence[str],
    output: Path,
    count: int,
    options: Sequence[str] = (),
    *,
    overwrite: bool = False,
) -> None:
    """Builds `count` parts by `command` and merges them; `options` are Beam's own.

    Raises:
      UserError: Beam is not installed, or a part cannot be built.
    """
    if count < 1:
        raise UserError(f"--parts is 1 or more; got {count}")
    try:
        import apache_beam as beam  # pyright: ignore[reportMissingImports]
        from apache_beam.options.pipeline_options import (  # pyright: ignore[reportMissingImports]
            PipelineOptions,
        )
    except ImportError:
        raise UserError("this takes a package: pip install 'flaxpretrain[beam]'") from None
    try:
        with beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
            parts: Any = pipeline | "parts" >> beam.Create(list(range(count)))
            # Without it a runner may give all parts to one worker.
            parts = parts | "spread" >> beam.Reshuffle()
            built = parts | "build" >> beam.Map(build_part, count, list(command))
            built = built | "all" >> beam.combiners.ToList()
            done = built | "merge" >> beam.Map(merge_parts, str(output), count, overwrite)
            _ = done | "tell" >> beam.Map(print)
    except Exception as error:
        # Runners wrap what a worker raised, each in its own way.
        lines = [line for line in str(error).split("\n") if "FailedPart: " in line]
        if not lines and not isinstance(error, FailedPart | UserError):
            raise
        raise UserError((lines or [str(error)])[-1].rpartition("FailedPart: ")[2]) from error


__all__ = ["FailedPart", "build_part", "merge_parts", "run"]
