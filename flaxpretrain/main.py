"""The main program: train or resume a recipe in a workdir, or plan it with --dry-run.

A workdir that holds checkpoints is resumed; the same command goes on where the last one stopped.
Exit codes: 0 done; 1 a bug of ours; 2 a mistake of yours; 3 loss not finite; 69 another process of
the run is gone; 75 stopped on request and saved; 124 hung, ended by the watchdog.

Without RECIPE, --data-dir, --model-name and --hparams mean what they mean in google-research's
ELECTRA: the dataset is in the first, all output goes to models/ in it.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import logging
import os
import shlex
import sys
import traceback
from pathlib import Path
from typing import Any

import jax

from flaxpretrain import program
from flaxpretrain.analysis.plan import print_plan
from flaxpretrain.analysis.profile import step_times
from flaxpretrain.config import Run, dataset_folder, load, overridden
from flaxpretrain.conversion.init_from import weights_from
from flaxpretrain.data.store import open_dataset
from flaxpretrain.electra_hparams import HParams, notes_of, read_hparams, run_of
from flaxpretrain.errors import UserError
from flaxpretrain.evaluation.fixed_masks import evaluate, settings_of
from flaxpretrain.evaluation.subject import open_subject
from flaxpretrain.hardware import rule_for
from flaxpretrain.locations import is_remote, located
from flaxpretrain.supervisor import add_restarts
from flaxpretrain.training import sharding
from flaxpretrain.training.assembly import check_remat
from flaxpretrain.training.compile_cache import NONE, use_compile_cache
from flaxpretrain.training.distributed import (
    JOIN_SECONDS,
    Peers,
    initialize_distributed,
    is_failed_exchange,
)
from flaxpretrain.training.executables import open_executables
from flaxpretrain.training.loop import NotFinite, train
from flaxpretrain.training.profiling import TRACES
from flaxpretrain.training.workdirs import local_folder


def parser() -> program.Parser:
    """The arguments of run_pretraining.py."""
    parser = program.Parser(__doc__)
    parser.add_argument(
        "recipe", metavar="RECIPE", nargs="?", help="a Python file with recipe() -> Run"
    )
    parser.add_argument(
        "--workdir",
        type=located,
        help="all output goes to this folder or gs://BUCKET/FOLDER (default: runs/<recipe's name>)",
    )
    parser.add_overrides(
        "change a field of the recipe, such as steps=60 or model.hidden_size=64; repeatable"
    )
    parser.add_argument(
        "--data-dir", type=located, help="folder or URL of the dataset (data.folder)"
    )
    parser.add_argument(
        "--model-name", help="without RECIPE: the workdir is models/MODEL_NAME in --data-dir"
    )
    parser.add_argument(
        "--hparams",
        metavar="JSON",
        help="without RECIPE: an object of ELECTRA's hparams, as text or a path to a .json",
    )
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
    parser.add_argument(
        "--profile-steps",
        type=_steps,
        default=range(0),
        metavar="FIRST:STOP",
        help="trace these steps, STOP not included, for TensorBoard, and print where time goes",
    )
    parser.add_argument(
        "--compile-cache",
        type=lambda text: text if text == NONE else located(text),
        metavar="FOLDER",
        help="where compiled programs are kept for the next start, or none (default: "
        "compile_cache/ in the workdir)",
    )
    parser.add_argument(
        "--compiled",
        type=located,
        metavar="FOLDER",
        help="load the train step that tools/compile_ahead.py compiled, where it fits; a compiled "
        "program is code: take it only from whom you trust",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress on the terminal")
    parser.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="of process 0, to start several processes by hand; with the two flags below",
    )
    parser.add_argument("--num-processes", type=int, help="how many processes train together")
    parser.add_argument("--process-id", type=int, help="which of them this one is, from 0")
    parser.add_argument(
        "--join-seconds",
        type=float,
        default=JOIN_SECONDS,
        help="how long the processes wait for each other at the start",
    )
    add_restarts(parser)
    return parser


def main(argv: list[str]) -> int:
    """Runs the program; returns its exit code."""
    arguments = parser().parse_args(argv)
    if not arguments.debug:
        # Orbax logs each error of a thread with its traceback, and then raises it.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
    initialize_distributed(
        arguments.coordinator,
        arguments.num_processes,
        arguments.process_id,
        join_seconds=arguments.join_seconds,
    )
    with Peers() as peers:
        try:
            return _run(arguments, argv, peers)
        except NotFinite as error:
            print(f"run_pretraining.py: {error}", file=sys.stderr)
            peers.leave(program.EXIT_NOT_FINITE, f"stopped: {error}")
            return program.EXIT_NOT_FINITE
        except UserError as error:
            if peers.several:
                print(f"run_pretraining.py: error: {program.one_line(error)}", file=sys.stderr)
            peers.leave(program.EXIT_USER, f"stopped: {program.one_line(error)}")
            raise
        except Exception as error:
            if peers.several:
                _leave_on(error, peers)
            raise


def _leave_on(error: Exception, peers: Peers) -> None:
    """Ends one of several processes after an error that may be another one's."""
    text = f"{type(error).__name__}: {program.one_line(error)[:200]}"
    if is_failed_exchange(error):
        print(f"run_pretraining.py: an exchange between processes failed: {text}", file=sys.stderr)
        peers.wait_for_the_lost()
    traceback.print_exception(error)
    peers.leave(program.EXIT_BUG, f"stopped: {text}")


def _run(arguments: Any, argv: list[str], peers: Peers) -> int:
    hparams = None
    if arguments.recipe is None:
        hparams = _hparams(arguments)
        run = overridden(
            run_of(hparams, arguments.model_name, arguments.data_dir), arguments.overrides
        )
        workdir = arguments.workdir or arguments.data_dir / "models" / arguments.model_name
        if any(e.split == run.data.split for e in run.evaluations):
            print(
                f"{arguments.data_dir} holds no text out: evaluations read training rows, as the "
                "original's do",
                file=sys.stderr,
            )
    else:
        _no_hparams(arguments)
        run = load(arguments.recipe, arguments.overrides, jax.devices())
        if arguments.data_dir is not None:
            data = dataclasses.replace(run.data, folder=str(arguments.data_dir))
            run = dataclasses.replace(run, data=data)
        workdir = arguments.workdir or Path("runs") / run.name
    if isinstance(arguments.data_dir, Path) and not arguments.data_dir.is_dir():
        raise UserError(f"--data-dir {arguments.data_dir}: there is no such folder")
    check_remat(run)  # before hours of preparation
    if arguments.dry_run:
        print_plan(run, local_folder(workdir))
        return program.EXIT_OK
    say_devices(run, arguments.allow_cpu)
    peers.seconds = run.watchdog.peer_seconds
    use_compile_cache(workdir, arguments.compile_cache)
    if hparams is not None and not hparams.do_train:
        evaluate_workdir(workdir, run, hparams)
        return program.EXIT_OK
    executables = None
    if arguments.compiled is not None:
        executables = open_executables(arguments.compiled)
    initial = None
    if arguments.init_from is not None:
        initial = functools.partial(
            weights_from,
            arguments.init_from,
            say=lambda text: print(text, file=sys.stderr),
            workdir=local_folder(workdir),
        )
    command = "python run_pretraining.py " + shlex.join(_public(argv))
    code = train(
        run,
        workdir,
        initial_params=initial,
        command=command,
        quiet=arguments.quiet,
        leave=peers.leave,
        profile_steps=arguments.profile_steps,
        executables=executables,
    )
    if arguments.profile_steps and jax.process_index() == 0:
        say_profile(local_folder(workdir))
    if hparams is not None and hparams.do_eval and code == program.EXIT_OK:
        evaluate_workdir(workdir, run, hparams)
    return code


def _steps(text: str) -> range:
    """Two numbers of steps, of which the second is the first one not meant."""
    first, _, stop = text.partition(":")
    if not (first.isdecimal() and stop.isdecimal() and 0 < int(first) < int(stop)):
        raise argparse.ArgumentTypeError(f"expected FIRST:STOP, such as 10:13; got {text!r}")
    return range(int(first), int(stop))


def say_profile(workdir: Path) -> None:
    """Prints where the time of the steps went that were traced, and keeps it in profile.txt."""
    traces = workdir / TRACES
    if not any(traces.rglob("*.xplane.pb")):
        return  # the run was stopped before
    text = "\n\n".join("\n".join(times.lines()) for times in step_times(traces))
    (workdir / "profile.txt").write_text(text + "\n", encoding="utf-8")
    print(text, file=sys.stderr)


def _hparams(arguments: Any) -> HParams:
    """The hparams of a command without a recipe."""
    for name in ("data_dir", "model_name"):
        if getattr(arguments, name) is None:
            raise UserError(
                "give a RECIPE such as configs/quickstart.py, or, as with the original ELECTRA, "
                f"--data-dir, --model-name and --hparams; --{name.replace('_', '-')} is missing"
            )
    for name in ("data_dir", "workdir"):
        if is_remote(getattr(arguments, name)):
            raise UserError(
                f"--{name.replace('_', '-')} {getattr(arguments, name)}: without a RECIPE it must "
                "be a folder of this machine; give a RECIPE"
            )
    if Path(arguments.model_name).name != arguments.model_name:
        raise UserError(
            f"--model-name: expected a name without folders; got {arguments.model_name!r}"
        )
    text = arguments.hparams or "{}"
    hparams = read_hparams(text)
    for line in notes_of(text):
        print(line, file=sys.stderr)
    return hparams


def _no_hparams(arguments: Any) -> None:
    for name in ("model_name", "hparams"):
        if getattr(arguments, name) is not None:
            raise UserError(
                f"--{name.replace('_', '-')} takes the place of a RECIPE, but there is one, "
                f"{arguments.recipe}: leave one of them out, or change the recipe's fields by --set"
            )


def evaluate_workdir(workdir: Path, run: Run, hparams: HParams) -> None:
    """Prints the figures of a workdir's newest checkpoint, and writes them to eval_results.json."""
    subject = open_subject(workdir)
    rows = hparams.num_eval_steps * hparams.eval_batch_size
    split = next((e.split for e in run.evaluations), "validation")
    settings = settings_of(subject, split=split, max_rows=rows)
    mesh = sharding.mesh_of(run.mesh)
    dataset = open_dataset(dataset_folder(run, workdir))
    figures = evaluate(subject, dataset, settings, mesh, hparams.eval_batch_size)
    figures = {"global_step": subject.step, **figures}
    if jax.process_index() != 0:
        return
    for name, value in figures.items():
        print(f"{name} = {value}")
    (workdir / "eval_results.json").write_text(json.dumps(figures, indent=2) + "\n")


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
        if rule := rule_for(run.hardware, devices[0].device_kind, len(devices)):
            print(rule, file=sys.stderr)
    if run.device != "any" and devices[0].platform == "cpu" and not allow_cpu:
        raise UserError(
            f"recipe {run.name} is made for {run.device.upper()}, but jax found only the CPU: "
            "install flaxpretrain[tpu] or flaxpretrain[cuda] and look whether another process "
            "holds the device, or say --allow-cpu"
        )


def _public(argv: list[str]) -> list[str]:
    """The arguments without private paths: a path under home is shown from `~`."""
    home = os.path.expanduser("~")
    shown = [a.replace(home + "/", "~/") for a in argv]
    with contextlib.suppress(ValueError):
        shown.remove("--debug")
    return shown
