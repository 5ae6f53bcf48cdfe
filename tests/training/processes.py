"""The main program on a toy, in processes of its own that tests may stop and kill."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flaxpretrain.training.metrics import read_metrics
from tests import toys
from tests.conftest import CACHE

ROOT = Path(__file__).parents[2]

RECIPE = """
from tests import toys
from flaxpretrain.training.schedules import Constant
def recipe():
    return toys.packed_run({data!r}, steps=60, guard=None, schedule=Constant())
"""


def write_recipe(folder):
    """A recipe of 60 steps, saved every 4, and its dataset; returns the recipe's path."""
    path = folder / "toy_recipe.py"
    path.write_text(RECIPE.format(data=str(toys.dataset(folder / "toy"))))
    return path


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def started(recipe, workdir, count, *overrides, extra=(), only=None, devices=1):
    """`count` processes of the main program over loopback, or those of them in `only`."""
    address = f"127.0.0.1:{free_port()}"
    sets = [text for override in overrides for text in ("--set", override)]
    command = [sys.executable, "run_pretraining.py", str(recipe), *sets]
    if count > 1:
        command += ["--coordinator", address, "--num-processes", str(count), *extra]
    workdirs = workdir if isinstance(workdir, list) else [workdir] * count
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": str(CACHE),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    processes = [
        subprocess.Popen(
            [
                *command,
                *("--workdir", str(workdirs[index])),
                *(("--process-id", str(index)) if count > 1 else ()),
            ],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in (range(count) if only is None else only)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


def ended(processes, seconds=240):
    """The exit codes and outputs."""
    outputs = [process.communicate(timeout=seconds)[0] for process in processes]
    return [process.returncode for process in processes], outputs


def losses(workdir):
    rows = read_metrics(workdir / "metrics.jsonl")
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def wait_for(seen, processes, seconds=240):
    deadline = time.monotonic() + seconds
    while not seen():
        if time.monotonic() > deadline or any(p.poll() is not None for p in processes):
            for process in processes:
                process.kill()
            pytest.fail(f"never seen: {[p.communicate()[0] for p in processes]}")
        time.sleep(0.02)


def reached(workdir, step):
    def seen():
        path = workdir / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return any(json.loads(n)["step"] >= step for n in lines if n.endswith("\n"))

    return seen
