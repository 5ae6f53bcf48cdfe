"""Compiles every recipe for the TPU slice that it names, and keeps a dated record.

    python tools/compile_all.py

Needs the libtpu package, no TPU; one to three minutes a phase on two cores. One recipe of each
family is compiled for a slice of every generation of TPUs. Recipes whose code has not changed since
their entry was written are left alone, and where the changed code still gives the compiler the same
program (some seconds), the entry is kept; --all compiles all again. What is compiled for tpu7x can
be read, and so estimated, from jaxlib 0.12 on; each entry tells its versions. The record is
benchmarks/results/tpu_compile.json; a test fails when an entry is out of date.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from rich.console import Console
from rich.table import Table

from flaxpretrain import program
from flaxpretrain.analysis.pods import slices_of, source_hash
from flaxpretrain.analysis.topology import compile_step, devices_of, lower_step, prepare_environment
from flaxpretrain.config import Run, load

RECORD = ROOT / "benchmarks" / "results" / "tpu_compile.json"
RECIPES = ROOT / "configs"


def packages() -> dict[str, str]:
    """Versions of what compiles; asked for once it is known that libtpu is there."""
    return {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}


def parser() -> program.Parser:
    """The arguments."""
    parser = program.Parser(__doc__)
    parser.add_argument(
        "recipes", nargs="*", type=Path, help="only these (default: all of configs/)"
    )
    parser.add_argument("--all", action="store_true", help="also those that are up to date")
    return parser


def main(argv: list[str]) -> int:
    """Runs the program; 1 when a recipe does not fit its slice."""
    arguments = parser().parse_args(argv)
    prepare_environment()
    recipes = arguments.recipes or sorted(RECIPES.glob("*.py"))
    for recipe in recipes:
        code = source_hash(recipe)
        if not arguments.all and read().get(recipe.stem, {}).get("source_hash") == code:
            print(f"{recipe.stem}: up to date", file=sys.stderr)
            continue
        new = entry(recipe, code, {} if arguments.all else read().get(recipe.stem, {}))
        # Read again: another process may have compiled other recipes meanwhile.
        keep(read() | {recipe.stem: new})
    record = read()
    Console().print(table(record))
    misfits = [name for name, e in record.items() if not all(p["fits"] for p in e["phases"])]
    if misfits:
        print(f"do not fit: {', '.join(misfits)}", file=sys.stderr)
    return program.EXIT_BUG if misfits else program.EXIT_OK


def read() -> dict:
    """The record as it is kept."""
    return json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}


def keep(record: dict) -> None:
    """Writes the record, aside first."""
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    aside = RECORD.with_suffix(".new")
    aside.write_text(json.dumps(dict(sorted(record.items())), indent=1) + "\n", encoding="utf-8")
    aside.replace(RECORD)


def entry(recipe: Path, code: str, before: dict) -> dict:
    """Compiles the phases of a recipe that differ in shape, where the program is a new one."""
    phases: dict[tuple, dict] = {}
    for pod in slices_of(recipe):
        run = load(recipe, devices=devices_of(pod))
        for number, phase in enumerate(run.phases):
            shape = (pod, phase.length, phase.batch_size, phase.microbatches)
            if shape not in phases:
                print(f"{run.name}, phase {number}, {pod} ...", file=sys.stderr, flush=True)
                phases[shape] = same_program(run, pod, number, before) or dataclasses.asdict(
                    compile_step(run, pod, number)[0]
                )
    if before and list(phases.values()) == before["phases"]:
        return before | {"source_hash": code}
    return {
        "source_hash": code,
        "date": datetime.date.today().isoformat(),
        "packages": packages(),
        "phases": list(phases.values()),
    }


def same_program(run: Run, pod: str, number: int, before: dict) -> dict | None:
    """The recorded report of a phase, if what the compiler would be given has not changed."""
    if before.get("packages") != packages():
        return None
    known = lower_step(run, pod, number)[2]
    for report in before["phases"]:
        if all(report.get(name) == value for name, value in known.items()):
            return report
    return None


def table(record: dict) -> Table:
    """The record for a reader."""
    table = Table(title="train steps compiled for TPU slices; step, tokens/s and MFU are ESTIMATES")
    for name in ("recipe", "slice"):
        table.add_column(name)
    for name in (
        "rows x length",
        "fits",
        "GiB temp",
        "all-reduce MB",
        "ms",
        "tokens/s/chip",
        "MFU",
    ):
        table.add_column(name, justify="right")
    for name, values in record.items():
        for phase in values["phases"]:
            fits, estimated = phase["fits"], phase["cycles"] is not None
            bytes_by_kind = phase["collective_bytes"] or {}
            table.add_row(
                name,
                phase["topology"],
                f"{phase['batch_size']:,} x {phase['length']}",
                "yes" if fits else "NO",
                f"{phase['temporary_bytes'] / 2**30:.2f}" if fits else phase["verdict"],
                f"{bytes_by_kind.get('all-reduce', 0) / 1e6:,.0f}",
                f"{phase['estimated_step_seconds'] * 1e3:,.1f}" if estimated else "",
                f"{phase['estimated_tokens_per_second_per_chip']:,.0f}" if estimated else "",
                f"{phase['estimated_mfu']:.1%}" if estimated else "",
            )
    return table


if __name__ == "__main__":
    program.run(main)
