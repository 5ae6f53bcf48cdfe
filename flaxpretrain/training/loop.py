"""The training loop: prepare, restore or start, step, measure, save, finish.

The loop never waits for the device: the metrics of step n are read while step n + 1 runs.
"""

import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree

import flaxpretrain
from flaxpretrain import program
from flaxpretrain.config import Phase, Run, differences, render
from flaxpretrain.data.pipeline import Batches
from flaxpretrain.errors import UserError
from flaxpretrain.hardware import peak_of
from flaxpretrain.training import sharding
from flaxpretrain.training.assembly import Assembly, assemble, framing_of, random_batch
from flaxpretrain.training.checkpoints import Checkpoints
from flaxpretrain.training.evaluate import due_evaluations
from flaxpretrain.training.metrics import (
    Figures,
    JsonLines,
    TensorBoard,
    Terminal,
    Writer,
    duration,
)
from flaxpretrain.training.preemption import Preemption
from flaxpretrain.training.session import (
    CONFIG,
    METRICS,
    Session,
    dataset_identity,
    facts,
    keep_tokenizer,
    note_of_warmup,
    open_run_dataset,
    resolve_phases,
    total_steps,
    write_json,
)
from flaxpretrain.training.step import StepMetrics

FORMAT = 1
"""Of checkpoints' metadata."""


class NotFinite(Exception):
    """The loss stayed without a finite value for as long as the guard allows."""


def train(
    run: Run,
    workdir: Path,
    *,
    initial_params: Callable[[Run], PyTree] | None = None,
    command: str = "",
    quiet: bool = False,
) -> int:
    """Trains a run in its workdir from the newest checkpoint there, or from the start.

    Args:
        run: what to train.
        workdir: made if it is not there.
        initial_params: gives the weights a new workdir starts from, instead of random ones.
        command: what the user typed, for the model card.
        quiet: no progress on the terminal.

    Returns:
        The exit code: 0 done, 3 loss not finite, 75 preempted and saved.

    Raises:
        UserError: the workdir cannot be written or belongs to another run, or parts do not fit.
    """
    first_process = jax.process_index() == 0
    _make_folder(workdir)
    for item in run.prepare:
        item.run(run, workdir)
    dataset = open_run_dataset(run, workdir)
    keep_tokenizer(dataset, workdir, write=first_process)
    mesh = sharding.make_mesh(run.mesh.data, run.mesh.fsdp, run.mesh.tensor)
    with jax.set_mesh(mesh):
        run = resolve_seconds(run, workdir, dataset, mesh)
        phases = resolve_phases(run, dataset)
        assembly = assemble(run, mesh, total_steps(phases))
        checkpoints = Checkpoints(workdir / "checkpoints", run.checkpoints)
        identity = dataset_identity(dataset)
        state, step = _start(run, workdir, assembly, checkpoints, identity, phases, initial_params)
        terminal = Terminal(total_steps(phases), step, quiet or not first_process)
        if note := note_of_warmup(run, total_steps(phases)):
            terminal.say(note)
        session = Session(
            run, workdir, dataset, phases, assembly, state, step, terminal.say, command=command
        )
        session.mix(checkpoints.metadata() if checkpoints.latest() is not None else {})
        if first_process:
            write_json(workdir / CONFIG, render(run))
            write_json(workdir / "run.json", facts(run, dataset, mesh) | {"command": command})
        writers: list[Writer] = [terminal]
        if first_process:
            writers.append(JsonLines(workdir / METRICS, step))
            if run.logging.tensorboard:
                writers.append(TensorBoard(workdir / "tensorboard", step))
        try:
            return _train(session, checkpoints, writers, terminal, identity)
        finally:
            checkpoints.close()
            for writer in writers:
                writer.close()


def _make_folder(workdir: Path) -> None:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / f".writable-{jax.process_index()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"--workdir {workdir} cannot be written ({error.strerror}): choose another folder"
        ) from error


def _start(
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


def resolve_seconds(run: Run, workdir: Path, dataset: Any, mesh: Any) -> Run:
    """Phases given in seconds as steps, by timing a few steps; the workdir remembers them."""
    if all(phase.seconds is None for phase in run.phases):
        return run
    kept = workdir / "seconds.json"
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


def spans(phases: tuple[Phase, ...]) -> Iterator[tuple[Phase, int, int]]:
    """Each phase with its first step and the step after its last."""
    first = 0
    for phase in phases:
        yield phase, first, first + (phase.steps or 0)
        first += phase.steps or 0


class _Meter:
    """Turns the sums of a step into figures, one step late, and knows how fast steps are."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._waiting: tuple[int, StepMetrics, float] | None = None
        self._since = time.monotonic()
        self._tokens = 0.0
        self._flops = 0.0
        mesh = session.assembly.mesh
        self._devices = int(np.size(mesh.devices))
        peak = peak_of(mesh.devices.flat[0].device_kind)
        self._peak = peak.flops_per_second if peak else None

    def start_clock(self) -> None:
        """Forgets the time since the last figures, which was not spent on steps."""
        self._since, self._tokens, self._flops = time.monotonic(), 0.0, 0.0

    def exchange(
        self, step: int, metrics: StepMetrics, flops: float
    ) -> tuple[int, dict[str, float | None]] | None:
        """Hands in the device's answer for `step`; gets the figures of the step before."""
        due, self._waiting = self._waiting, (step, metrics, flops)
        return None if due is None else self._read(*due)

    def flush(self) -> tuple[int, dict[str, float | None]] | None:
        """The figures still waiting; waits for the device."""
        due, self._waiting = self._waiting, None
        return None if due is None else self._read(*due)

    def _read(
        self, step: int, metrics: StepMetrics, flops: float
    ) -> tuple[int, dict[str, float | None]]:
        sums, scalars = jax.device_get(metrics)
        objective = self._session.run.objective
        figures: dict[str, float | None] = {n: float(v) for n, v in scalars.items()}
        for name, value in objective.summarize(sums).items():
            figures[f"loss/{name}" if name in objective.terms else name] = value
        self._tokens += figures["tokens"] or 0
        self._flops += flops
        return step, figures

    def rates(self) -> dict[str, float | None]:
        """Speed since it was last asked."""
        seconds = max(time.monotonic() - self._since, 1e-9)
        speed, flops = self._tokens / seconds, self._flops / seconds / self._devices
        self.start_clock()
        return {
            "tokens_per_second": speed,
            "tokens_per_second_per_device": speed / self._devices,
            "mfu": flops / self._peak if self._peak else None,
        }


def _train(
    session: Session,
    checkpoints: Checkpoints,
    writers: list[Writer],
    terminal: Terminal,
    identity: str,
) -> int:
    run, pipeline = session.run, session.pipeline
    meter = _Meter(session)
    saver = _Saver(session, checkpoints, identity)
    started, begun = time.monotonic(), session.step
    if session.step == 0:
        _evaluate(session, writers, due_evaluations(session))
    with Preemption() as preemption:
        for phase, first, last in spans(session.phases):
            if session.step >= last:
                continue
            stopped = _run_phase(
                session, pipeline, phase, (first, last), meter, saver, writers, preemption
            )
            if stopped:
                saver.save(force=True)
                checkpoints.wait()
                session.say(
                    f"stopped on request at step {session.step}, saved; run the same command again "
                    "to go on"
                )
                return program.EXIT_PREEMPTED
    _evaluate(session, writers, run.evaluations)
    saver.save(force=True)
    checkpoints.wait()
    terminal.close()
    if session.step == begun:
        session.say(f"all {begun} steps were trained before; evaluated again")
    else:
        session.say(f"trained to step {session.step} in {duration(time.monotonic() - started)}")
    for item in run.finish:
        item.run(session)
    return program.EXIT_OK


def _run_phase(
    session: Session,
    pipeline: Batches,
    phase: Phase,
    borders: tuple[int, int],
    meter: _Meter,
    saver: "_Saver",
    writers: list[Writer],
    preemption: Preemption,
) -> bool:
    """Runs the steps of a phase that are left; True when asked to stop."""
    assembly, (_, last) = session.assembly, borders
    rows = functools.partial(sharding.process_rows, assembly.mesh)
    step_function = assembly.train_step(phase)
    flops = assembly.flops_per_step(phase, session.dataset.vocabulary)
    batches = pipeline.iterate(session.step, last, rows)
    fresh = True
    for batch in batches:
        placed = sharding.to_device(batch, assembly.mesh, phase.batch_size)
        session.state, metrics = step_function(session.state, placed)
        if fresh:
            # The first call compiles: its time is nobody's speed.
            jax.block_until_ready(metrics)
            meter.start_clock()
            fresh = False
        session.step += 1
        _log(session, meter, writers, meter.exchange(session.step, metrics, flops))
        stop = preemption.requested(session.step)
        evaluate = bool(due_evaluations(session))
        save = saver.due() and not stop
        if evaluate or save or stop or session.step == last:
            _log(session, meter, writers, meter.flush())
        if evaluate and session.step < session.total_steps:
            _evaluate(session, writers, due_evaluations(session))
        if save:
            saver.save()
        if evaluate or save:
            meter.start_clock()
        if stop:
            return True
    return False


def _log(
    session: Session,
    meter: _Meter,
    writers: list[Writer],
    due: tuple[int, dict[str, float | None]] | None,
) -> None:
    """Writes a step's figures when they are due, and reports steps that the guard skipped."""
    if due is None:
        return
    step, figures = due
    guard = session.run.guard
    if figures.get("skipped"):
        session.say(
            f"step {step}: update skipped, loss {figures['loss']:.4g}, gradient norm "
            f"{figures['grad_norm']:.4g} ({figures['skipped_total']:.0f} skipped so far)"
        )
    if guard is None:
        given_up = not math.isfinite(figures["loss"] or 0)
    else:
        given_up = (figures.get("skipped_in_a_row") or 0) >= guard.max_consecutive
    if given_up:
        raise NotFinite(
            f"step {step}: the loss is {figures['loss']}, the gradient norm "
            f"{figures['grad_norm']}, and "
            + (
                "no guard skips such updates"
                if guard is None
                else f"so it was for {guard.max_consecutive} steps in a row"
            )
            + "; the newest checkpoint is older: lower the learning rate or look at the data"
        )
    if step % session.run.logging.every_steps == 0 or step == session.total_steps:
        rates = meter.rates()
        for writer in writers:
            writer.write(step, figures | rates | session.epochs(step))
    else:
        for writer in writers:
            if isinstance(writer, Terminal):
                writer.step(step)


def _evaluate(session: Session, writers: list[Writer], evaluations: Iterable[Any]) -> None:
    for evaluation in evaluations:
        figures = evaluation.run(session)
        if not figures:
            continue  # a push to the hub, say
        named: Figures = {f"{evaluation.name}/{n}": v for n, v in figures.items()}
        session.figures |= {n: v for n, v in named.items() if v is not None}
        text = ", ".join(f"{n} {v:.4f}" for n, v in named.items() if v is not None)
        session.say(f"step {session.step}: {text}")
        for writer in writers:
            if not isinstance(writer, Terminal):
                writer.write(session.step, named)


class _Saver:
    """Saves the session's state when the policy says so."""

    def __init__(self, session: Session, checkpoints: Checkpoints, identity: str) -> None:
        self._session, self._checkpoints, self._identity = session, checkpoints, identity
        self._saved = session.step if checkpoints.latest() is not None else -1
        self._config = render(session.run)

    def due(self) -> bool:
        """Whether the state of this step is to be saved."""
        return self._checkpoints.due(self._session.step)

    def save(self, force: bool = False) -> None:
        """Starts saving; a step that is already saved is not saved again."""
        session = self._session
        if session.step == self._saved:
            return
        metadata = {
            "format": FORMAT,
            "step": session.step,
            "run": self._config,
            "phase_steps": [phase.steps for phase in session.phases],
            "dataset": self._identity,
            "tokenizer": session.dataset.fingerprint,
            "code_version": flaxpretrain.__version__,
            "figures": session.figures,
            "mixing": session.history,
        }
        self._checkpoints.save(
            session.step, session.state, metadata, metrics=session.figures, force=force
        )
        self._saved = session.step
