"""Throughput of pretraining on one GPU, and of Transformers with torch.compile beside it.

    python benchmarks/gpu.py --peers

Every case is a recipe with a batch that fills the device, in bfloat16: the step alone on a batch
that lies on the device, then fed by the loader from a store of random text. Rates are medians over
five windows. The steps of all cases are compiled first, in parallel; nothing else runs on the
device while a case is timed. With --peers, benchmarks/gpu_peers.py trains GPT-2 and T5 of
Transformers at the same shapes in a process of its own, timed just before ours. --trace
FOLDER keeps a profile of three steps of each case. Writes benchmarks/results/gpu.json.
"""

import argparse
import concurrent.futures
import dataclasses
import datetime
import gzip
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the peers need memory too
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")

from flaxpretrain import program

RESULT = ROOT / "benchmarks" / "results" / "gpu.json"
TIMED_SECONDS = 3.0
"""About how long each of the two measurements of a case takes."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A recipe with overrides; `aim` is in `unit` a second, or a share of the peak."""

    name: str
    recipe: str
    overrides: tuple[str, ...]
    unit: str
    aim: float
    peer: str | None = None
    phase: int = 0


def _sized(length: int, rows: int, *more: str, phase: int | None = None) -> tuple[str, ...]:
    prefix = "" if phase is None else f"phases.{phase}."
    sizes = f"{prefix}length={length}", f"{prefix}batch_size={rows}", f"{prefix}microbatches=1"
    return (*sizes, *more)


NO_REMAT = ("remat=none", "scan_layers=false")
CASES = (
    Case("electra_small_128", "electra_small", _sized(128, 1024, *NO_REMAT), "rows", 20_000),
    Case("electra_base_128", "electra_base", _sized(128, 512, *NO_REMAT), "rows", 4_000),
    Case("electra_base_512", "electra_base", _sized(512, 128, *NO_REMAT), "rows", 0),
    Case(
        "bert_large_512",
        "bert_large_lamb",
        _sized(512, 64, *NO_REMAT, phase=1),
        "rows",
        430,
        phase=1,
    ),
    Case("bert_base_512", "bert_base", _sized(512, 128, *NO_REMAT, phase=1), "rows", 0, phase=1),
    Case("t5_v1_1_base", "t5_v1_1_base", _sized(512, 64, *NO_REMAT), "mfu", 0.35, "t5"),
    Case("gpt2_small", "gpt2_small", _sized(1024, 32, *NO_REMAT), "tokens", 450_000, "gpt2"),
)


@dataclasses.dataclass
class Prepared:
    """A case whose step is compiled."""

    case: Case
    run: Any
    assembly: Any
    phase: Any
    vocabulary: Any
    compiled: tuple[Any, float]


def prepared(case: Case, overrides: list[str]) -> Prepared:
    """Loads a case, puts it together and compiles its step."""
    import jax

    from flaxpretrain.analysis.throughput import compiled_step
    from flaxpretrain.config import load
    from flaxpretrain.training import sharding
    from flaxpretrain.training.assembly import assemble, stand_in_vocabulary

    path = ROOT / "configs" / f"{case.recipe}.py"
    run = load(path, [*case.overrides, *overrides])
    mesh = sharding.make_mesh()
    with jax.set_mesh(mesh):
        assembly = assemble(run, mesh, total_steps=1_000_000)
        phase = dataclasses.replace(
            run.phases[case.phase], steps=100_000, tokens=None, epochs=None, seconds=None
        )
        vocabulary = stand_in_vocabulary(run)
        compiled = compiled_step(assembly, phase, vocabulary)
    say(f"{case.name}: compiled in {compiled[1]:.1f} s")
    return Prepared(case, run, assembly, phase, vocabulary, compiled)


def measured(ready: Prepared, trace: Path | None) -> dict[str, Any]:
    """The figures of one case."""
    import jax

    from flaxpretrain.analysis import throughput
    from flaxpretrain.data.store import open_dataset
    from flaxpretrain.training.session import open_pipeline

    with tempfile.TemporaryDirectory() as name, jax.set_mesh(ready.assembly.mesh):
        throughput.synthetic_dataset(Path(name), ready.vocabulary, 1 << 21)
        dataset = open_dataset(Path(name))
        pipeline = open_pipeline(ready.run, dataset, (ready.phase,))
        bench = throughput.Bench(
            ready.assembly, ready.phase, ready.vocabulary, pipeline, ready.compiled
        )
        trial = bench.step_alone(5)
        steps = max(10, int(TIMED_SECONDS / trial.step_seconds))
        alone, both = bench.step_alone(steps), bench.both(steps)
        if trace is not None:
            keep_trace(bench, trace, ready.case.name)
    rows = ready.phase.batch_size
    stats = jax.devices()[0].memory_stats() or {}
    figures = {
        "case": ready.case.name,
        "recipe": ready.case.recipe,
        "overrides": list(ready.case.overrides),
        "attention": ready.assembly.execution.attention,
        "rows_a_step": rows,
        "length": ready.phase.length,
        "tokens_a_step": bench.tokens,
        "formula_tflop_a_step": bench.flops / 1e12,
        "steps": steps,
        "compile_seconds": round(bench.compile_seconds, 1),
        "rows_per_second": round(rows / both.step_seconds, 1),
        "tokens_per_second": round(both.tokens_per_second),
        "mfu": None if both.mfu is None else round(both.mfu, 4),
        "step": dataclasses.asdict(alone),
        "both": dataclasses.asdict(both),
        "peak_memory_bytes_so_far": stats.get("peak_bytes_in_use"),
        "aim": f"{ready.case.aim:,} {ready.case.unit}" if ready.case.aim else None,
    }
    say(
        f"{ready.case.name}: {rows} rows of {ready.phase.length}: step alone "
        f"{alone.step_seconds * 1e3:.2f} ms, with loader {both.step_seconds * 1e3:.2f} ms, "
        f"{figures['rows_per_second']:,} rows/s, {figures['tokens_per_second']:,} tokens/s, "
        f"MFU {figures['mfu']}, aim {figures['aim']}"
    )
    return figures


def keep_trace(bench: Any, folder: Path, name: str) -> None:
    """A profile of three steps, compressed: what TensorBoard's profile plugin opens."""
    import jax

    with tempfile.TemporaryDirectory() as scratch:
        with jax.profiler.trace(scratch):
            bench.steps(3)
        for file in Path(scratch).rglob("*.xplane.pb"):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{name}.xplane.pb.gz").write_bytes(gzip.compress(file.read_bytes()))


class Peers:
    """Transformers in a process of its own, which compiles while we do and waits for its turn."""

    def __init__(self, names: list[str]) -> None:
        """Starts to compile."""
        command = [sys.executable, str(ROOT / "benchmarks" / "gpu_peers.py"), *names]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def lines(self) -> Iterator[dict[str, Any]]:
        """Waits until all is compiled, gives the device over, and yields the figures."""
        reader, writer = self._process.stdout, self._process.stdin
        assert reader is not None and writer is not None
        while (line := reader.readline()) and line.strip() != "ready":
            say(line.rstrip())
        writer.write("go\n")
        writer.flush()
        yield from (json.loads(line) for line in reader if line.startswith("{"))
        self._process.wait()


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = program.Parser(__doc__)
    parser.add_argument("--only", nargs="*", default=[], help="cases (default: all)")
    parser.add_argument("--peers", action="store_true", help="Transformers beside it")
    parser.add_argument("--trace", type=Path, help="keep a profile of each case here")
    parser.add_argument("--output", type=Path, default=RESULT, help="file of the result")
    parser.add_argument(
        "--rows", type=int, nargs="*", default=[], help="other batch sizes to try of each case"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        dest="overrides",
        help="change every recipe further",
    )
    return parser


def chosen(only: list[str], rows: list[int]) -> list[Case]:
    """The cases asked for, `NAME@ROWS` for another batch size."""
    cases = []
    for name in only or [case.name for case in CASES]:
        name, _, size = name.partition("@")
        case = next((case for case in CASES if case.name == name), None)
        if case is None:
            raise SystemExit(f"no case {name!r}: {', '.join(case.name for case in CASES)}")
        for count in [int(size)] if size else rows or [None]:
            changed = case
            if count is not None:
                prefix = f"phases.{case.phase}." if case.phase else ""
                more = (*case.overrides, f"{prefix}batch_size={count}")
                changed = dataclasses.replace(case, name=f"{name}@{count}", overrides=more)
            cases.append(changed)
    return cases


def say(text: str) -> None:
    """A line on stderr, with the clock."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def main(argv: list[str]) -> None:
    """Measures and writes the result."""
    arguments = parser().parse_args(argv)
    cases = chosen(arguments.only, arguments.rows)
    names = sorted({case.peer for case in cases if case.peer})
    peers = Peers(names) if arguments.peers and names else None
    import jax

    device = jax.devices()[0]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(prepared, case, arguments.overrides) for case in cases]
        ready = [future.result() for future in futures]
    result: dict[str, Any] = {
        "benchmark": "gpu",
        "command": " ".join(["python", "benchmarks/gpu.py", *argv]),
        "date": datetime.date.today().isoformat(),
        "device": device.device_kind,
        "platform": device.platform,
        "packages": {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "peers": [],
        "cases": [],
    }
    if peers is not None:
        for line in peers.lines():
            say(f"peer {line}")
            result["peers"].append(line)
    while ready:  # freed one by one: each holds an executable
        try:
            result["cases"].append(measured(ready[0], arguments.trace))
        except Exception as error:  # one that does not fit must not take the others along
            say(f"{ready[0].case.name}: {type(error).__name__}: {str(error)[:300]}")
        ready.pop(0)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    program.run(main)
