"""Compiles the train step of a recipe for a TPU slice on any machine: fits or not, and how fast.

    python tools/compile_for_topology.py configs/bert_base.py --topology v5e:16x16

Needs the libtpu package (pip install libtpu), no TPU. Whether the step fits is the compiler's
verdict. Step time and what follows from it are estimates, by the cycles of XLA's cost model plus
the attention kernels' matrix products at no more than half of the peak; collectives are listed,
and not part of the estimate.
"""

import dataclasses
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.table import Table

from flaxpretrain import program
from flaxpretrain.analysis.topology import Report, compile_step, prepare_environment
from flaxpretrain.config import Run, load, override
from flaxpretrain.errors import UserError


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
        "--mesh", metavar="AXIS=N,...", help="data, fsdp, tensor; -1 is the rest (default: recipe)"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        dest="overrides",
        help="change a field of the recipe; repeatable",
    )
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
    return parser


def with_mesh(run: Run, text: str | None) -> Run:
    """The run on the mesh that --mesh names."""
    for part in text.split(",") if text else ():
        axis, equals, size = part.partition("=")
        if not equals:
            raise UserError(f"--mesh {text}: expected AXIS=N, such as data=4,fsdp=2")
        run = override(run, f"mesh.{axis.strip()}", size.strip())
    return run


def main(argv: list[str]) -> int:
    """Runs the program; its exit code is 0 whether the step fits or not."""
    arguments = parser().parse_args(argv)
    prepare_environment()
    run = with_mesh(load(arguments.recipe, arguments.overrides), arguments.mesh)
    numbers = range(len(run.phases)) if arguments.phase is None else [arguments.phase]
    if arguments.phase is not None and not 0 <= arguments.phase < len(run.phases):
        raise UserError(
            f"--phase {arguments.phase}: the recipe has phases 0 to {len(run.phases) - 1}"
        )
    if arguments.slices < 1:
        raise UserError(f"--slices {arguments.slices}: expected 1 or more")
    console = Console(stderr=arguments.json)
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
        f"{'scanned' if report.scan_layers else 'unrolled'}, "
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
    compiled, formula = report.compiled_flops or 0.0, report.formula_flops
    out.add_row(
        "FLOPs a step",
        f"formula {formula / 1e12:.4g} T, compiled {compiled / 1e12:.4g} T "
        f"({compiled / formula:.3f} of it)",
    )
    collectives = [
        f"{kind} {count} x, {(report.collective_bytes or {})[kind] / 1e6:,.1f} MB"
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
