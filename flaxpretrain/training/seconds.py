"""Phases given in seconds, as steps."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from flaxpretrain.config import Phase, Run
from flaxpretrain.training import sharding
from flaxpretrain.training.assembly import assemble, framing_of, random_batch
from flaxpretrain.training.session import write_json

SECONDS = "seconds.json"
"""The file of a workdir that remembers them."""


def resolve_seconds(run: Run, workdir: Path, dataset: Any, mesh: Any) -> Run:
    """Phases given in seconds as steps, by timing a few steps; the workdir remembers them."""
    if all(phase.seconds is None for phase in run.phases):
        return run
    kept = workdir / SECONDS
    if not kept.exists():
        steps = [
            None if phase.seconds is None else _timed_steps(run, phase, dataset, mesh)
            for phase in run.phases
        ]
        # All processes must agree, and the first one's clock decides.
        steps = multihost_utils.broadcast_one_to_all(np.array([s or 0 for s in steps]))
        if jax.process_index() == 0:
            write_json(kept, {"phase_steps": [int(s) for s in steps]})
    else:
        steps = json.loads(kept.read_text())["phase_steps"]
    phases = tuple(
        phase if not s else dataclasses.replace(phase, steps=int(s), seconds=None)
        for phase, s in zip(run.phases, steps, strict=True)
    )
    return dataclasses.replace(run, phases=phases)


def _timed_steps(run: Run, phase: Phase, dataset: Any, mesh: Any, timed: int = 8) -> int:
    """How many steps fit into `phase.seconds`, by running some on a state that is thrown away."""
    assembly = assemble(run, mesh, total_steps=10**6)
    step, state = assembly.train_step(phase), assembly.initial_state()
    framing = framing_of(run, dataset.vocabulary, phase.length)
    batch = random_batch(assembly.batch_spec(phase, dataset.vocabulary), framing)
    rows = sharding.process_rows(mesh, phase.batch_size)
    local = {name: array[rows] for name, array in batch.items()}
    placed = sharding.to_device(local, mesh, phase.batch_size)
    for count in (2, timed):  # the first round compiles and warms up
        started = time.monotonic()
        for _ in range(count):
            state, metrics = step(state, placed)
        jax.block_until_ready(metrics)
    seconds = (time.monotonic() - started) / timed
    return max(1, int((phase.seconds or 0) / seconds))
