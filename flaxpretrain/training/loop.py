"""The training loop: prepare, restore or start, step, measure, save, finish.

The loop never waits for the device: the metrics of step n are read while step n + 1 runs.
"""

import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from jaxtyping import PyTree

from flaxpretrain import program
from flaxpretrain.config import Phase, Run, render
from flaxpretrain.training import sharding
from flaxpretrain.training.assembly import assemble
from flaxpretrain.training.checkpoints import Checkpoints
from flaxpretrain.training.evaluate import due_evaluations
from flaxpretrain.training.meter import Meter
from flaxpretrain.training.metrics import JsonLines, TensorBoard, Terminal, Writer, duration
from flaxpretrain.training.preemption import Preemption
from flaxpretrain.training.reporter import NotFinite, Reporter
from flaxpretrain.training.resume import make_folder, start_state
from flaxpretrain.training.saver import Saver
from flaxpretrain.training.seconds import resolve_seconds
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

__all__ = ["NotFinite", "train"]


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
        The exit code: 0 done, 75 preempted and saved.

    Raises:
        NotFinite: the loss is not finite, and stays so.
        UserError: the workdir cannot be written or belongs to another run, or parts do not fit.
    """
    first_process = jax.process_index() == 0
    make_folder(workdir)
    for item in run.prepare:
        item.run(run, workdir)
    dataset = open_run_dataset(run, workdir)
    keep_tokenizer(dataset, workdir, write=first_process)
    mesh = sharding.mesh_of(run.mesh)
    with jax.set_mesh(mesh):
        run = resolve_seconds(run, workdir, dataset, mesh)
        phases = resolve_phases(run, dataset)
        assembly = assemble(run, mesh, total_steps(phases))
        checkpoints = Checkpoints(workdir / "checkpoints", run.checkpoints)
        identity = dataset_identity(dataset)
        state, step = start_state(
            run, workdir, assembly, checkpoints, identity, phases, initial_params
        )
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
        writers = _open_writers(run, workdir, step, terminal)
        try:
            return _Training(session, checkpoints, writers, identity).run()
        finally:
            checkpoints.close()
            for writer in writers:
                writer.close()


def _open_writers(run: Run, workdir: Path, step: int, terminal: Terminal) -> list[Writer]:
    """Where figures go; one process writes files."""
    writers: list[Writer] = [terminal]
    if jax.process_index() == 0:
        writers.append(JsonLines(workdir / METRICS, step))
        if run.logging.tensorboard:
            writers.append(TensorBoard(workdir / "tensorboard", step))
    return writers


def spans(phases: tuple[Phase, ...]) -> Iterator[tuple[Phase, int]]:
    """Each phase with the step after its last."""
    last = 0
    for phase in phases:
        last += phase.steps or 0
        yield phase, last


class _Training:
    """The steps of a session that are left."""

    def __init__(
        self, session: Session, checkpoints: Checkpoints, writers: list[Writer], identity: str
    ) -> None:
        self._session, self._checkpoints = session, checkpoints
        self._meter = Meter(session)
        self._reporter = Reporter(session, self._meter, writers)
        self._saver = Saver(session, checkpoints, identity)

    def run(self) -> int:
        """Trains to the end, or until asked to stop; returns the exit code."""
        session, run = self._session, self._session.run
        started, begun = time.monotonic(), session.step
        if session.step == 0:
            self._reporter.evaluate(due_evaluations(session))
        with Preemption() as preemption:
            for phase, last in spans(session.phases):
                if session.step < last and self._run_phase(phase, last, preemption):
                    self._save_and_wait()
                    session.say(
                        f"stopped on request at step {session.step}, saved; run the same command "
                        "again to go on"
                    )
                    return program.EXIT_PREEMPTED
        self._reporter.evaluate(run.evaluations)
        self._save_and_wait()
        self._reporter.close_bar()
        if session.step == begun:
            session.say(f"all {begun} steps were trained before; evaluated again")
        else:
            session.say(f"trained to step {session.step} in {duration(time.monotonic() - started)}")
        for item in run.finish:
            item.run(session)
        return program.EXIT_OK

    def _save_and_wait(self) -> None:
        self._saver.save(force=True)
        self._checkpoints.wait()

    def _run_phase(self, phase: Phase, last: int, preemption: Preemption) -> bool:
        """Runs the steps of a phase that are left; True when asked to stop."""
        session, meter, reporter = self._session, self._meter, self._reporter
        assembly = session.assembly
        rows = functools.partial(sharding.process_rows, assembly.mesh)
        step_function = assembly.train_step(phase)
        flops: dict[Phase, float] = {}
        for batch in session.pipeline.iterate(session.step, last, rows):
            shape = session.pipeline.shape(session.step)
            placed = sharding.to_device(batch, assembly.mesh, shape.batch_size)
            session.state, metrics = step_function(session.state, placed)
            if shape not in flops:
                # The first call of a shape compiles: its time is nobody's speed.
                jax.block_until_ready(metrics)
                meter.start_clock()
                flops[shape] = assembly.flops_per_step(shape, session.dataset.vocabulary)
            session.step += 1
            reporter.step(meter.exchange(session.step, metrics, flops[shape]))
            stop = preemption.requested(session.step)
            evaluate = bool(due_evaluations(session))
            save = self._saver.due() and not stop
            if evaluate or save or stop or session.step == last:
                reporter.step(meter.flush())
            if evaluate and session.step < session.total_steps:
                reporter.evaluate(due_evaluations(session))
            if save:
                self._saver.save()
            if evaluate or save:
                meter.start_clock()
            if stop:
                return True
        return False
