"""How fast a recipe trains here: the step alone, the loader alone, and both together.

    python tools/benchmark.py configs/bert_small.py --set batch_size=16

Prints one JSON line on stdout and a table on stderr. The step alone runs on a batch of random ids
that lies on the devices; the loader reads the dataset of --data-dir, or a throw-away one of random
text. Rates are medians over five windows, after two steps that warm up.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
from rich.console import Console
from rich.table import Table

from flaxpretrain import program
from flaxpretrain.analysis import throughput
from flaxpretrain.config import Run, load, render
from flaxpretrain.data.buckets import LengthBuckets
from flaxpretrain.data.store import Dataset, open_dataset
from flaxpretrain.errors import UserError
from flaxpretrain.hardware import peak_of
from flaxpretrain.locations import Location, located
from flaxpretrain.training import sharding
from flaxpretrain.training.assembly import assemble, stand_in_vocabulary
from flaxpretrain.training.session import open_pipeline, open_run_dataset

SYNTHETIC_TOKENS = 1 << 22
"""Size of the throw-away dataset: more than the caches of a processor hold."""


def parser() -> program.Parser:
    """The arguments."""
    parser = program.Parser(__doc__)
    parser.add_argument("recipe", metavar="RECIPE", help="a Python file with recipe() -> Run")
    parser.add_overrides("change a field of the recipe, such as phases.0.batch_size=64; repeatable")
    parser.add_argument("--data-dir", type=located, help="a dataset (default: random text)")
    parser.add_argument("--steps", type=int, default=25, help="steps of each measurement")
    parser.add_argument("--phase", type=int, help="only this phase, from 0 (default: all)")
    return parser


@contextlib.contextmanager
def opened(run: Run, folder: Location | None) -> Iterator[Dataset]:
    """The dataset to load from."""
    if folder is not None:
        data = dataclasses.replace(run.data, folder=str(folder))
        yield open_run_dataset(dataclasses.replace(run, data=data), Path())
        return
    with tempfile.TemporaryDirectory(prefix="flaxpretrain-benchmark-") as name:
        throughput.synthetic_dataset(Path(name), stand_in_vocabulary(run), SYNTHETIC_TOKENS)
        yield open_dataset(Path(name))


def main(argv: list[str]) -> int:
    """Runs the program."""
    arguments = parser().parse_args(argv)
    run = load(arguments.recipe, arguments.overrides, jax.devices())
    if arguments.steps < 1:
        raise UserError(f"--steps {arguments.steps}: expected 1 or more")
    if arguments.phase is not None and not 0 <= arguments.phase < len(run.phases):
        raise UserError(
            f"--phase {arguments.phase}: the recipe has phases 0 to {len(run.phases) - 1}"
        )
    if isinstance(run.data.layout, LengthBuckets):
        say("rows of several lengths: measured are those of the longest, a text a row")
        run = dataclasses.replace(
            run, data=dataclasses.replace(run.data, layout=run.data.layout.layout)
        )
    numbers = range(len(run.phases)) if arguments.phase is None else [arguments.phase]
    mesh = sharding.mesh_of(run.mesh)
    needed = arguments.steps + throughput.WARM_UP + throughput.WINDOWS
    found = []
    with opened(run, arguments.data_dir) as dataset, jax.set_mesh(mesh):
        assembly = assemble(run, mesh, total_steps=1_000_000)
        for number in numbers:
            phase = dataclasses.replace(
                run.phases[number], steps=needed, tokens=None, epochs=None, seconds=None
            )
            pipeline = open_pipeline(run, dataset, (phase,))
            say(f"phase {number}: compiling and measuring ...")
            figures = throughput.measure(
                assembly, number, phase, dataset.vocabulary, pipeline, arguments.steps
            )
            found.append(figures)
    result = {
        **surroundings(run, mesh),
        "attention": assembly.execution.attention,
        "data": "synthetic" if arguments.data_dir is None else Path(dataset.folder).name,
        "steps": arguments.steps,
        "phases": [dataclasses.asdict(figures) for figures in found],
        "config": render(run),
    }
    print(json.dumps(result), flush=True)
    show(result, found)
    return program.EXIT_OK


def surroundings(run: Run, mesh: jax.sharding.Mesh) -> dict:
    """Where and with what it was measured."""
    device = mesh.devices.flat[0]
    peak = peak_of(device.device_kind)
    return {
        "recipe": run.name,
        "device_kind": device.device_kind,
        "platform": device.platform,
        "devices": mesh.size,
        "mesh": {name: int(size) for name, size in mesh.shape.items()},
        "precision": run.precision.compute,
        "matmul": run.precision.matmul,
        "remat": run.remat,
        "peak_flops_per_second": None if peak is None else peak.of_step(run.precision.matmul),
        "peak_of": None if peak is None else peak.name,
        "mfu_formula": throughput.FORMULA,
        "packages": {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")},
    }


def say(text: str) -> None:
    """A line on stderr."""
    print(text, file=sys.stderr, flush=True)


def show(result: dict, found: list[throughput.Figures]) -> None:
    """The table."""
    console = Console(stderr=True)
    peak = result["peak_flops_per_second"]
    basis = f"peak {peak / 1e12:.5g} TFLOP/s a device" if peak else "no peak is known: no MFU"
    for figures in found:
        table = Table(
            title=f"{result['recipe']}, phase {figures.phase}: {figures.batch_size} rows of "
            f"{figures.length}, {result['devices']} x {result['device_kind']}, "
            f"{result['precision']}, {result['matmul']} matrix products, "
            f"{result['attention']} attention"
        )
        table.add_column("measured")
        for name in ("ms a step", "tokens/s", "tokens/s a device", "TFLOP/s a device", "MFU"):
            table.add_column(name, justify="right")
        for name, rate in (
            ("step alone", figures.step),
            ("loader alone", figures.loader),
            ("both", figures.both),
        ):
            flops, mfu = rate.teraflops_per_second_per_device, rate.mfu
            table.add_row(
                name,
                f"{rate.step_seconds * 1e3:,.2f}",
                f"{rate.tokens_per_second:,.0f}",
                f"{rate.tokens_per_second_per_device:,.0f}",
                "" if flops is None else f"{flops:,.4g}",
                "" if mfu is None else f"{mfu:.1%}",
            )
        console.print(table)
        console.print(
            f"compiled in {figures.compile_seconds:.1f} s; peak memory of the "
            f"{figures.peak_memory_of} {figures.peak_memory_bytes / 2**30:.2f} GiB; "
            f"{figures.formula_flops / 1e12:.4g} TFLOP a step; {basis}",
            highlight=False,
        )
    console.print(throughput.FORMULA, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    program.use_huge_pages()
    program.run(main)
