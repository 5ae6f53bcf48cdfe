"""The main program: train or resume a recipe in a workdir, or plan it with --dry-run.

A workdir that holds checkpoints is resumed; the same command goes on where the last one stopped.
Exit codes: 0 done; 1 a bug of ours; 2 a mistake of yours; 3 loss not finite; 75 stopped on
request and saved.
"""

import contextlib
import dataclasses
import functools
import os
import shlex
import sys
from pathlib import Path

import jax

from flaxpretrain import program
from flaxpretrain.analysis.plan import print_plan
from flaxpretrain.config import Run, load
from flaxpretrain.conversion.init_from import weights_from
from flaxpretrain.errors import UserError
from flaxpretrain.training import sharding
from flaxpretrain.training.loop import NotFinite, train


def parser() -> program.Parser:
    """The arguments of run_pretraining.py."""
    parser = program.Parser(__doc__)
    parser.add_argument("recipe", metavar="RECIPE", help="a Python file with recipe() -> Run")
    parser.add_argument(
        "--workdir", type=Path, help="all output goes here (default: runs/<recipe's name>)"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        dest="overrides",
        help="change a field of the recipe, such as steps=60 or model.hidden_size=64; repeatable",
    )
    parser.add_argument("--data-dir", type=Path, help="folder of the dataset (data.folder)")
    parser.add_argument(
        "--init-from",
        metavar="DIR_OR_HUB_ID",
        help="start a new workdir from these weights: a workdir, a Hugging Face folder or a hub id",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the plan, its size and its cost; train nothing",
    )
    parser.add_argument(
        "--allow-cpu", action="store_true", help="run a recipe made for TPU or GPU on the CPU"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress on the terminal")
    parser.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="of process 0, to start several processes by hand; with the two flags below",
    )
    parser.add_argument("--num-processes", type=int, help="how many processes train together")
    parser.add_argument("--process-id", type=int, help="which of them this one is, from 0")
    return parser


def main(argv: list[str]) -> int:
    """Runs the program; returns its exit code."""
    arguments = parser().parse_args(argv)
    sharding.initialize_distributed(
        arguments.coordinator, arguments.num_processes, arguments.process_id
    )
    run = load(arguments.recipe, arguments.overrides)
    if arguments.data_dir is not None:
        data = dataclasses.replace(run.data, folder=str(arguments.data_dir))
        run = dataclasses.replace(run, data=data)
    workdir = arguments.workdir or Path("runs") / run.name
    if arguments.dry_run:
        print_plan(run, workdir)
        return program.EXIT_OK
    say_devices(run, arguments.allow_cpu)
    _use_compile_cache(workdir)
    initial = None
    if arguments.init_from is not None:
        initial = functools.partial(
            weights_from,
            arguments.init_from,
            say=lambda text: print(text, file=sys.stderr),
            workdir=workdir,
        )
    command = "python run_pretraining.py " + shlex.join(_public(argv))
    try:
        return train(run, workdir, initial_params=initial, command=command, quiet=arguments.quiet)
    except NotFinite as error:
        print(f"run_pretraining.py: {error}", file=sys.stderr)
        return program.EXIT_NOT_FINITE


def say_devices(run: Run, allow_cpu: bool) -> None:
    """Prints what the run will use, before anything else.

    Raises:
        UserError: the recipe is for an accelerator and only the CPU was found.
    """
    devices = jax.devices()
    kinds = {device.device_kind for device in devices}
    if jax.process_index() == 0:
        print(
            f"devices: {len(devices)} x {', '.join(sorted(kinds))} ({devices[0].platform}), "
            f"{jax.process_count()} process{'es' if jax.process_count() > 1 else ''}",
            file=sys.stderr,
        )
    if run.device != "any" and devices[0].platform == "cpu" and not allow_cpu:
        raise UserError(
            f"recipe {run.name} is made for {run.device.upper()}, but jax found only the CPU: "
            "install flaxpretrain[tpu] or flaxpretrain[cuda] and look whether another process "
            "holds the device, or say --allow-cpu"
        )


def _use_compile_cache(workdir: Path) -> None:
    """Keeps compiled programs in the workdir, so that a restart on a pod begins at once."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or jax.devices()[0].platform == "cpu":
        return
    jax.config.update("jax_compilation_cache_dir", str(workdir / "compile_cache"))


def _public(argv: list[str]) -> list[str]:
    """The arguments without private paths: a path under home is shown from `~`."""
    home = os.path.expanduser("~")
    shown = [a.replace(home + "/", "~/") for a in argv]
    with contextlib.suppress(ValueError):
        shown.remove("--debug")
    return shown
