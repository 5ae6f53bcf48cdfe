"""Compiles the train step of a recipe for a TPU slice on any machine: fits or not, and how fast.

    python tools/compile_for_topology.py configs/bert_base.py --topology v5e:16x16
    python tools/compile_for_topology.py configs/gpt2_small.py --topology v5e:4x4 --search

Needs the libtpu package (pip install libtpu), no TPU. Whether the step fits is the compiler's
verdict. Step time and what follows from it are estimates, by the cycles of XLA's cost model plus
the attention kernels' matrix products at no more than half of the peak; collectives are listed,
and not part of the estimate.

With --search it compiles combinations of batch size, remat policy and mesh, and prints the fastest
that fit with the commands that train them. What was found is kept in a file: an interrupted search,
or one whose budget is used up, goes on where it stopped when the same command is given again.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.table import Table

from flaxpretrain import program
from flaxpretrain.analysis.pods import source_hash
from flaxpretrain.analysis.search import (
    Budget,
    Found,
    Record,
    best,
    command,
    default_batch_sizes,
    default_meshes,
    default_remats,
    grid,
    search,
)
from flaxpretrain.analysis.topology import (
    Report,
    compile_step,
    devices_of,
    prepare_environment,
)
from flaxpretrain.config import Mesh, Run, load
from flaxpretrain.errors import UserError
from flaxpretrain.overrides import coerce, nearest


def parser() -> program.Parser:
    """The arguments."""
    parser = program.Parser(__doc__)
    parser.add_argument("recipe", metavar="RECIPE", help="a Python file with recipe() -> Run")
    parser.add_argument(
        "--topology",
        required=True,
        help="the slice: v5e:2x2 to v5e:16x16, v6e:2x2, v4:2x2x1, v5p:2x2x1, tpu7x:2x2x1",
    )
    parser.add_argument("--slices", type=int, default=1, help="how many such slices")
    parser.add_argument(
        "--mesh",
        metavar="AXIS=N,...",
        help="of data, fsdp, tensor, context; -1 is the rest; also shard_optimizer=true "
        "(default: the recipe's)",
    )
    parser.add_overrides("change a field of the recipe; repeatable")
    parser.add_argument("--phase", type=int, help="only this phase, from 0 (default: all)")
    parser.add_argument(
        "--json", action="store_true", help="one JSON object a phase on stdout, a line each"
    )
    parser.add_argument(
        "--hlo",
        type=Path,
        metavar="FILE",
        help="keep the compiled text; of several phases as FILE's name with .phaseN",
    )
    add_search(parser)
    return parser


def add_search(parser: program.Parser) -> None:
    """The arguments of --search."""
    group = parser.add_argument_group("search")
    group.add_argument(
        "--search", action="store_true", help="look for the fastest combination that fits"
    )
    group.add_argument(
        "--batch-sizes",
        metavar="N,...",
        help="rows of a global batch (default: the recipe's, 2 and 4 times as many, half)",
    )
    group.add_argument(
        "--remats", metavar="NAME,...", help="policies (default: no remat, dots and full)"
    )
    group.add_argument(
        "--meshes",
        metavar="MESH;...",
        help="as for --mesh (default: all data; that with shard_optimizer; all fsdp)",
    )
    group.add_argument(
        "--record",
        type=Path,
        metavar="FILE",
        help="what was found, JSON lines (default: runs/search/RECIPE-TOPOLOGY.jsonl)",
    )
    group.add_argument("--budget-minutes", type=float, help="begin no compilation after so long")
    group.add_argument("--max-compiles", type=int, help="begin no more compilations than these")
    group.add_argument("--best", type=int, default=5, help="how many to print")


def mesh_of(text: str) -> Mesh:
    """The mesh that --mesh names; axes that it leaves out are 1, `data` the rest."""
    named: dict[str, Any] = {}
    for part in text.split(","):
        axis, equals, size = part.partition("=")
        if not equals:
            raise UserError(f"--mesh {text}: expected AXIS=N, such as data=4,fsdp=2")
        named[axis.strip()] = size.strip()
    mesh: Any = Mesh(data=1) if "-1" in named.values() else Mesh()
    # All at once: between two of them the sizes may not fit each other.
    for axis, size in named.items():
        known = [field.name for field in dataclasses.fields(Mesh)]
        if axis not in known:
            raise UserError(f"--mesh {text}: no field {axis!r}{nearest(axis, known)}")
        named[axis] = coerce(mesh, axis, size, f"--mesh {text}")
    return dataclasses.replace(mesh, **named)


def main(argv: list[str]) -> int:
    """Runs the program; its exit code is 0 whether the step fits or not."""
    arguments = parser().parse_args(argv)
    prepare_environment()
    if arguments.slices < 1:
        raise UserError(f"--slices {arguments.slices}: expected 1 or more")
    devices = devices_of(arguments.topology, arguments.slices)
    mesh = mesh_of(arguments.mesh) if arguments.mesh else None
    run = load(arguments.recipe, arguments.overrides, devices, mesh)
    numbers = list(range(len(run.phases))) if arguments.phase is None else [arguments.phase]
    if arguments.phase is not None and not 0 <= arguments.phase < len(run.phases):
        raise UserError(
            f"--phase {arguments.phase}: the recipe has phases 0 to {len(run.phases) - 1}"
        )
    console = Console(stderr=arguments.json)
    if arguments.search:
        if len(numbers) > 1:
            raise UserError(
                f"--search needs one phase, and the recipe has {len(run.phases)}: add --phase "
                f"{numbers[0]} to --phase {numbers[-1]}"
            )
        return search_and_print(run, numbers[0], arguments, console)
    for number in numbers:
        report, text = compile_step(run, arguments.topology, number, arguments.slices)
        if arguments.json:
            print(json.dumps(dataclasses.asdict(report)), flush=True)
        console.print(table(report))
        if arguments.hlo is not None and text is not None:
            path = arguments.hlo
            if len(numbers) > 1:
                path = path.with_name(f"{path.stem}.phase{number}{path.suffix}")
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path}", file=sys.stderr)
    return program.EXIT_OK


def search_and_print(run: Run, phase: int, arguments: Any, console: Console) -> int:
    """Searches, and prints the best; 130 when interrupted, all found so far kept."""
    slices, topology = arguments.slices, arguments.topology
    sizes = default_batch_sizes(run.phases[phase].batch_size)
    if arguments.batch_sizes:
        sizes = whole_numbers(arguments.batch_sizes, "--batch-sizes")
    meshes = default_meshes(slices)
    if arguments.mesh or arguments.meshes:
        texts = (arguments.meshes or arguments.mesh).split(";")
        meshes = [mesh_of(text) for text in texts]
    remats = arguments.remats.split(",") if arguments.remats else default_remats(run)
    candidates = grid(sizes, remats, meshes)
    name = f"{run.name}-{topology.replace(':', '-')}" + (f"-x{slices}" if slices > 1 else "")
    path = arguments.record or Path("runs") / "search" / f"{name}.jsonl"
    record = Record(path, source_hash(Path(arguments.recipe)))
    budget = Budget(minutes=arguments.budget_minutes, compiles=arguments.max_compiles)
    found: list[Found] = []
    code = program.EXIT_OK
    try:
        for each in search(run, topology, slices, phase, candidates, record, budget, say):
            found.append(each)
    except KeyboardInterrupt:
        say("interrupted: the same command goes on from here")
        code = 130
    for each in best(found, arguments.best):
        line = command(each, arguments.recipe, arguments.overrides, run, phase)
        if arguments.json:
            print(json.dumps({"command": line, **dataclasses.asdict(each.report)}), flush=True)
        console.print(table(each.report))
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    if not best(found, 1):
        say("none of those compiled so far fits")
    say(f"all of it is in {path}")
    return code


def whole_numbers(text: str, flag: str) -> list[int]:
    """Numbers between commas."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"{flag} {text}: expected numbers, such as 256,512") from error


def say(text: str) -> None:
    """A line on stderr."""
    print(text, file=sys.stderr, flush=True)


def table(report: Report) -> Table:
    """The report for a reader."""
    size = f"{report.slices} x {report.topology}" if report.slices > 1 else report.topology
    out = Table(title=f"{report.recipe}, phase {report.phase}, on {size}", show_header=False)
    out.add_column("what")
    out.add_column("value", overflow="fold")
    mesh = " x ".join(f"{name} {size}" for name, size in report.mesh.items())
    out.add_row("devices", f"{report.devices} x {report.device_kind}, mesh {mesh}")
    out.add_row(
        "batch",
        f"{report.batch_size:,} rows of {report.length} in {report.microbatches} microbatches, "
        f"{report.tokens_per_step_per_chip:,.0f} tokens a chip",
    )
    out.add_row(
        "how",
        f"{report.attention} attention, remat {report.remat}, layers "
        f"{'scanned' if report.scan_layers else 'unrolled'}, {report.matmul} matrix products, "
        f"compiled in {report.compile_seconds:.0f} s",
    )
    out.add_row("fits", f"{'yes' if report.fits else 'NO'}: {report.verdict}")
    out.add_row(
        "memory a device",
        f"parameters {_gib(report.parameter_bytes)}, optimizer {_gib(report.optimizer_bytes)}",
    )
    if not report.fits:
        return out
    out.add_row(
        "",
        f"arguments {_gib(report.argument_bytes)}, temporaries {_gib(report.temporary_bytes)}, "
        f"outputs {_gib(report.output_bytes)} of which {_gib(report.aliased_bytes)} in place",
    )
    if report.cycles is None:  # a program that this jaxlib cannot read
        out.add_row("ESTIMATE", "; ".join(report.notes))
        return out
    compiled, formula = report.compiled_flops or 0.0, report.formula_flops
    out.add_row(
        "FLOPs a step",
        f"formula {formula / 1e12:.4g} T, compiled {compiled / 1e12:.4g} T "
        f"({compiled / formula:.3f} of it)",
    )
    out.add_row("memory traffic", f"{(report.bytes_accessed or 0) / 1e9:,.2f} GB a device and step")
    hidden = report.hidden_collective_bytes or {}
    collectives = [
        f"{kind} {count} x, {(report.collective_bytes or {})[kind] / 1e6:,.1f} MB"
        + (f", {hidden[kind] / 1e6:,.1f} of it beside computation" if kind in hidden else "")
        for kind, count in (report.collective_counts or {}).items()
    ]
    out.add_row("collectives a step", "; ".join(collectives) or "none")
    share = report.custom_call_peak_share
    kernels = (
        f", kernels {(report.custom_call_seconds or 0) * 1e3:.1f} ms at {share:.0%} of peak"
        if share
        else ""
    )
    out.add_row(
        "ESTIMATE",
        f"step {(report.estimated_step_seconds or 0) * 1e3:.1f} ms "
        f"({report.cycles:,} cycles{kernels}), "
        f"{report.estimated_tokens_per_second_per_chip:,.0f} tokens/s a chip, "
        f"MFU {report.estimated_mfu:.1%}",
    )
    for note in report.notes:
        out.add_row("note", note)
    return out


def _gib(size: int | None) -> str:
    return f"{(size or 0) / 2**30:.2f} GiB"


if __name__ == "__main__":
    program.run(main)
