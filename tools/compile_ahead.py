"""Compiles the train steps of a recipe ahead of its run, which then loads them.

    python tools/compile_ahead.py configs/bert_base.py --topology v5e:4x4 --output-dir COMPILED
    python run_pretraining.py configs/bert_base.py --compiled COMPILED     # on the slice

For the devices of this machine, or with --topology for a TPU slice that is not there (by the
libtpu package, which must be of the version that the slice has). Give the same --set and
--data-dir as the run: a step that differs from the run's in anything is not loaded, and the run
says what differs and compiles. Without a dataset, phases must be given in steps.

A compiled program is code, and its file a pickle: a run that loads one trusts whoever wrote it.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax

from flaxpretrain import program
from flaxpretrain.analysis.topology import devices_of, out_of_memory, prepare_environment
from flaxpretrain.config import Phase, Run, load
from flaxpretrain.data.store import Dataset
from flaxpretrain.errors import UserError
from flaxpretrain.locations import located
from flaxpretrain.training import sharding
from flaxpretrain.training.assembly import assemble, check_remat, stand_in_vocabulary
from flaxpretrain.training.compiler_options import compiler_options
from flaxpretrain.training.executables import compile_ahead
from flaxpretrain.training.seconds import SECONDS, resolve_seconds
from flaxpretrain.training.session import (
    dataset_if_built,
    open_run_dataset,
    resolve_phases,
    step_shapes,
    total_steps,
)
from flaxpretrain.training.workdirs import local_folder


def parser() -> program.Parser:
    """The arguments."""
    parser = program.Parser(__doc__)
    parser.add_argument("recipe", metavar="RECIPE", help="a Python file with recipe() -> Run")
    parser.add_argument(
        "--output-dir", type=program.output_folder, required=True, help="what --compiled takes"
    )
    parser.add_argument(
        "--topology",
        help="a slice, as in v5e:4x4 or v5p:2x2x1 (default: the devices of this machine)",
    )
    parser.add_argument("--slices", type=int, default=1, help="how many such slices")
    parser.add_overrides("change a field of the recipe, as for the run; repeatable")
    parser.add_argument(
        "--data-dir", type=located, help="folder or URL of the dataset (default: the recipe's)"
    )
    parser.add_argument(
        "--workdir", type=located, help="of the run (default: runs/<recipe's name>)"
    )
    return parser


def main(argv: list[str]) -> int:
    """Runs the program."""
    arguments = parser().parse_args(argv)
    devices = devices_asked_for(arguments.topology, arguments.slices)
    # What jax reads from its cache cannot be written again: on CPUs it then lacks its functions.
    jax.config.update("jax_enable_compilation_cache", False)
    run = load(arguments.recipe, arguments.overrides, devices)
    if arguments.data_dir is not None:
        data = dataclasses.replace(run.data, folder=str(arguments.data_dir))
        run = dataclasses.replace(run, data=data)
    check_remat(run)
    workdir = local_folder(arguments.workdir or Path("runs") / run.name)
    # One that is named must be there; the recipe's own may be built later.
    opened = dataset_if_built if arguments.data_dir is None else open_run_dataset
    dataset = opened(run, workdir)
    run, phases = resolved(run, workdir, dataset)
    mesh = sharding.mesh_of(run.mesh, devices)
    with jax.set_mesh(mesh):
        assembly = assemble(run, mesh, total_steps(phases))
        try:
            compile_ahead(
                assembly,
                step_shapes(run, dataset, phases),
                dataset.vocabulary if dataset else stand_in_vocabulary(run),
                total_steps(phases),
                compiler_options(mesh),
                arguments.output_dir,
                say,
            )
        except jax.errors.JaxRuntimeError as error:
            verdict = out_of_memory(str(error))
            if verdict is None:
                raise
            raise UserError(f"a step does not fit the devices: {verdict}") from error
    say(f"train with: python run_pretraining.py ... --compiled {arguments.output_dir}")
    return program.EXIT_OK


def devices_asked_for(topology: str | None, slices: int) -> list[Any]:
    """Those of a slice that is not there, or else those of this machine."""
    if slices < 1 or (slices > 1 and topology is None):
        raise UserError(f"--slices {slices}: expected 1 or more, and --topology beside it")
    if topology is None:
        return jax.devices()
    prepare_environment()
    return devices_of(topology, slices)


def resolved(run: Run, workdir: Path, dataset: Dataset | None) -> tuple[Run, tuple[Phase, ...]]:
    """The run with its phases in steps."""
    if any(phase.seconds is not None for phase in run.phases):
        if not (workdir / SECONDS).exists():
            raise UserError(
                "a phase is given in seconds, which become steps when the run begins: give "
                "--workdir of a run that began, or steps, as in --set steps=N"
            )
        run = resolve_seconds(run, workdir, dataset, None)
    if dataset is not None:
        return run, resolve_phases(run, dataset)
    if any(phase.steps is None for phase in run.phases):
        raise UserError(
            "a phase is given in tokens or epochs, which only the dataset turns into steps: build "
            "it first, name it with --data-dir, or give --set steps=N"
        )
    return run, run.phases


def say(text: str) -> None:
    """A line on stderr."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    program.run(main)
