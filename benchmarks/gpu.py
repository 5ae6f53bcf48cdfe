"""Throughput of pretraining on one GPU, and of Transformers with torch.compile beside it.

    python benchmarks/gpu.py --peers

Every case is a recipe with a batch that fills the device, in bfloat16: the step alone on a batch
that lies on the device, then fed by the loader from a store of random text. Rates are medians over
five windows. Each case is a process of its own; all compile at once, then take turns, and nothing
else runs on the device while one is timed. With --peers, benchmarks/gpu_peers.py trains GPT-2 and
T5 of Transformers at the same shapes, timed last. --trace FOLDER keeps a profile of three steps of
each case. Writes benchmarks/results/gpu.json.
"""

import argparse
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
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the peers need memory too
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")

from flaxpretrain import program

RESULT = ROOT / "benchmarks" / "results" / "gpu.json"
TIMED_SECONDS = 2.0
"""About how long each of the two measurements of a case takes."""


PEER = "peer "


@dataclasses.dataclass(frozen=True)
class Case:
    """A recipe with overrides; `aim` is in `unit` a second, or a share of the peak."""

    name: str
    recipe: str
    overrides: tuple[str, ...]
    unit: str
    aim: float = 0.0
    peer: str | None = None
    phase: int = 0
    xla_flags: str = ""


def _sized(length: int, rows: int, *more: str, phase: int | None = None) -> tuple[str, ...]:
    prefix = "" if phase is None else f"phases.{phase}."
    sizes = f"{prefix}length={length}", f"{prefix}batch_size={rows}", f"{prefix}microbatches=1"
    return (*sizes, *more)


UNROLLED = ("remat=none", "scan_layers=false")
FLASH = ("model.attention_probs_dropout_prob=0.0",)
"""cuDNN's flash attention has no dropout of its own that a row's key decides."""

CASES = (
    Case("electra_small_128", "electra_small", _sized(128, 1024, *UNROLLED), "rows", 20_000),
    Case("electra_small_128_flash", "electra_small", _sized(128, 1024, *UNROLLED, *FLASH), "rows"),
    Case("electra_base_128", "electra_base", _sized(128, 512, *UNROLLED), "rows", 4_000),
    Case("electra_base_512", "electra_base", _sized(512, 128, *UNROLLED), "rows"),
    Case("electra_base_512_flash", "electra_base", _sized(512, 128, *UNROLLED, *FLASH), "rows"),
    Case(
        "bert_large_512",
        "bert_large_lamb",
        _sized(512, 64, *UNROLLED, phase=1),
        "rows",
        430,
        phase=1,
    ),
    Case("t5_v1_1_base", "t5_v1_1_base", _sized(512, 64, *UNROLLED), "mfu", 0.35, "t5"),
    Case("gpt2_small", "gpt2_small", _sized(1024, 32, *UNROLLED), "tokens", 450_000, "gpt2"),
)


@dataclasses.dataclass
class Prepared:
    """A case whose step is compiled and has run, with its state on the device."""

    case: Case
    bench: Any
    run: Any
    phase: Any
    attention: str


def prepared(case: Case, overrides: list[str], folder: Path) -> Prepared:
    """Loads a case, puts it together, compiles its step and runs it; `folder` gets its dataset."""
    import jax

    from flaxpretrain.analysis import throughput
    from flaxpretrain.config import load
    from flaxpretrain.data.store import open_dataset
    from flaxpretrain.training import sharding
    from flaxpretrain.training.assembly import assemble, stand_in_vocabulary
    from flaxpretrain.training.session import open_pipeline

    path = ROOT / "configs" / f"{case.recipe}.py"
    run = load(path, [*case.overrides, *overrides])
    mesh = sharding.make_mesh()
    with jax.set_mesh(mesh):
        assembly = assemble(run, mesh, total_steps=1_000_000)
        phase = dataclasses.replace(
            run.phases[case.phase], steps=100_000, tokens=None, epochs=None, seconds=None
        )
        vocabulary = stand_in_vocabulary(run)
        throughput.synthetic_dataset(folder, vocabulary, 1 << 21)
        pipeline = open_pipeline(run, open_dataset(folder), (phase,))
        bench = throughput.Bench(assembly, phase, vocabulary, pipeline)
        bench.steps(2)
    say(f"{case.name}: step compiled in {bench.compile_seconds:.1f} s")
    return Prepared(case, bench, run, phase, assembly.execution.attention)


def measured(ready: Prepared, trace: Path | None) -> dict[str, Any]:
    """The figures of one case."""
    import jax

    bench, case, phase = ready.bench, ready.case, ready.phase
    trial = bench.step_alone(5)
    steps = max(10, int(TIMED_SECONDS / trial.step_seconds))
    alone, both = bench.step_alone(steps), bench.both(steps)
    if trace is not None:
        keep_trace(bench, trace, case.name)
    stats = jax.devices()[0].memory_stats() or {}
    figures = {
        "case": case.name,
        "device": jax.devices()[0].device_kind,
        "packages": {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")},
        "recipe": case.recipe,
        "overrides": list(case.overrides),
        "attention": ready.attention,
        "rows_a_step": phase.batch_size,
        "length": phase.length,
        "tokens_a_step": bench.tokens,
        "formula_tflop_a_step": bench.flops / 1e12,
        "steps": steps,
        "compile_seconds": round(bench.compile_seconds, 1),
        "rows_per_second": round(phase.batch_size / both.step_seconds, 1),
        "tokens_per_second": round(both.tokens_per_second),
        "mfu": None if both.mfu is None else round(both.mfu, 4),
        "step": dataclasses.asdict(alone),
        "both": dataclasses.asdict(both),
        "peak_memory_bytes": stats.get("peak_bytes_in_use"),
        "aim": f"{case.aim:,} {case.unit}" if case.aim else None,
    }
    say(
        f"{case.name}: {phase.batch_size} rows of {phase.length}: step alone "
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


class Turn:
    """A process that compiles at once, says `ready`, and waits for its turn on the device."""

    def __init__(self, name: str, command: list[str], xla_flags: str = "") -> None:
        """Starts it."""
        self.name = name
        flags = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags}".strip()
        self._process = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "XLA_FLAGS": flags} if flags else None,
        )

    def wait_until_ready(self) -> None:
        """Returns when it has compiled, or has failed."""
        reader = self._process.stdout
        assert reader is not None
        while (line := reader.readline()) and line.strip() != "ready":
            say(f"{self.name}: {line.rstrip()}")

    def figures(self) -> list[dict[str, Any]]:
        """Gives it the device and waits for what it finds: nothing where it failed."""
        try:
            out, _ = self._process.communicate("go\n")
        except BrokenPipeError:
            return []
        return [json.loads(line) for line in out.splitlines() if line.startswith("{")]


def one_case(case: Case, arguments: argparse.Namespace) -> None:
    """Compiles, says `ready`, waits for a line on stdin, measures and prints a JSON line."""
    with tempfile.TemporaryDirectory() as folder:
        ready = prepared(case, arguments.overrides, Path(folder))
        print("ready", flush=True)
        sys.stdin.readline()
        print(json.dumps(measured(ready, arguments.trace)), flush=True)


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = program.Parser(__doc__)
    parser.add_argument("--only", nargs="*", default=[], help="cases (default: all)")
    parser.add_argument("--one", action="store_true", help="only the first, in this process")
    parser.add_argument("--peers", action="store_true", help="Transformers beside it")
    parser.add_argument("--trace", type=Path, help="keep a profile of each case here")
    parser.add_argument("--traced", nargs="*", default=[], help="of these cases only")
    parser.add_argument("--output", type=Path, default=RESULT, help="file of the result")
    parser.add_argument(
        "--rows", type=int, nargs="*", default=[], help="other batch sizes to try of each case"
    )
    parser.add_overrides("change every recipe further")
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


def traced(case: Case, arguments: argparse.Namespace) -> list[str]:
    """The option that has this case keep a profile, where it shall."""
    wanted = arguments.trace and (not arguments.traced or case.name in arguments.traced)
    return [f"--trace={arguments.trace}"] if wanted else []


def say(text: str) -> None:
    """A line on stderr, with the clock."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def main(argv: list[str]) -> None:
    """Measures and writes the result."""
    arguments = parser().parse_args(argv)
    cases = chosen(arguments.only, arguments.rows)
    if arguments.one:
        return one_case(cases[0], arguments)
    more = [f"--set={text}" for text in arguments.overrides]
    program_file, peer_file = (str(ROOT / "benchmarks" / n) for n in ("gpu.py", "gpu_peers.py"))
    turns = [
        Turn(
            case.name,
            [program_file, "--one", *more, *traced(case, arguments), "--only", case.name],
            case.xla_flags,
        )
        for case in cases
    ]
    for name in sorted({case.peer for case in cases if case.peer} if arguments.peers else ()):
        turns.append(Turn(PEER + name, [peer_file, name]))
    for turn in turns:
        turn.wait_until_ready()
    result: dict[str, Any] = {
        "benchmark": "gpu",
        "command": " ".join(["python", "benchmarks/gpu.py", *argv]),
        "date": datetime.date.today().isoformat(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "peers": [],
        "cases": [],
    }
    for turn in turns:
        found = turn.figures()
        if turn.name.startswith(PEER):
            result["peers"] += found
            say(f"{turn.name}: {found}")
        else:
            result["cases"] += found
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    program.run(main)
