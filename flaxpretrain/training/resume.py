"""Where a run begins: in a new workdir, or at the newest checkpoint of a workdir that has some."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PyTree

from flaxpretrain.config import Phase, Run, differences, render
from flaxpretrain.errors import UserError
from flaxpretrain.training.assembly import Assembly
from flaxpretrain.training.checkpoints import Checkpoints

FORMAT = 1
"""Of checkpoints' metadata."""


def start_state(
    run: Run,
    workdir: Path,
    assembly: Assembly,
    checkpoints: Checkpoints,
    identity: str,
    phases: tuple[Phase, ...],
    initial_params: Callable[[Run], PyTree] | None,
) -> tuple[Any, int]:
    """The state to go on from, and its step."""
    if checkpoints.latest() is None:
        state = assembly.initial_state()
        if initial_params is not None:
            state = _with_params(state, initial_params(run))
        return state, 0
    if initial_params is not None:
        raise UserError(
            f"--init-from starts a new workdir, but {workdir} has checkpoints: leave out "
            "--init-from to go on with them, or choose another --workdir"
        )
    _check_same_run(run, workdir, checkpoints, identity, phases)
    if checkpoints.params_only():
        params, metadata, step = checkpoints.restore_params(assembly.state.params)
        return _with_params(assembly.initial_state(), params), step
    state, _, step = checkpoints.restore(assembly.state)
    return state, step


def _with_params(state: Any, params: PyTree) -> Any:
    """A fresh state around given weights, which are put where the fresh ones lie."""
    placed = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), params, state.params)
    return state._replace(params=placed)


def _check_same_run(
    run: Run, workdir: Path, checkpoints: Checkpoints, identity: str, phases: tuple[Phase, ...]
) -> None:
    metadata = checkpoints.metadata()
    if metadata.get("format") != FORMAT:
        raise UserError(
            f"the checkpoints in {workdir} have format {metadata.get('format')}, this version "
            f"reads {FORMAT}: use the version that wrote them ({metadata.get('code_version')})"
        )
    recorded = metadata["run"]
    if checkpoints.params_only():
        # Nothing was trained yet: the run may differ in all but what the weights compute.
        model = recorded["model"] if recorded is not None else metadata.get("model")
        if model is not None:
            _check_same_model(model, run, workdir)
    elif recorded is not None:
        lines = differences(recorded, render(run))
        if lines:
            raise UserError(
                f"{workdir} holds checkpoints of another run; choose another --workdir, or undo: "
                + "; ".join(lines)
            )
    if metadata["dataset"] not in (None, identity):
        raise UserError(
            f"the checkpoints in {workdir} were trained on another dataset (identity "
            f"{metadata['dataset'][:12]}, now {identity[:12]}): give the one they were trained on"
        )
    _check_past(metadata, phases, workdir)


def _check_same_model(model: Mapping[str, Any], run: Run, workdir: Path) -> None:
    """Imported weights must go on computing what they were made for; how they train is free."""
    lines = [
        line
        for line in differences({"model": model}, {"model": render(run.model)})
        if "dropout" not in line and "initializer_range" not in line
    ]
    if lines:
        raise UserError(
            f"{workdir} holds the weights of another model than the run's; choose another "
            "--workdir, import them with --recipe, or undo: " + "; ".join(lines)
        )


def _check_past(metadata: Mapping[str, Any], phases: tuple[Phase, ...], workdir: Path) -> None:
    """Phases that are over must have been as long as they are now, or the rows would shift."""
    before = 0
    for old, new in zip(metadata["phase_steps"], phases, strict=False):
        if metadata["step"] <= before:
            return
        if old != new.steps and metadata["step"] > before + min(old, new.steps or 0):
            raise UserError(
                f"{workdir} is at step {metadata['step']}, past a phase of {old} steps that is "
                f"now {new.steps} steps long: only phases that are not over may change"
            )
        before += old
