"""The training loop: prepare, restore or start, step, measure, save, finish.

The loop never waits for the device: the metrics of step n are read while step n + 1 runs.
"""

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PyTree

from flaxpretrain import program
from flaxpretrain.config import Phase, Run, render
from flaxpretrain.errors import UserError
from flaxpretrain.locations import Location
from flaxpretrain.training import sharding
from flaxpretrain.training.assembly import assemble
from flaxpretrain.training.checkpoints import Checkpoints
from flaxpretrain.training.compiler_options import compiler_options
from flaxpretrain.training.distributed import meet
from flaxpretrain.training.evaluate import due_evaluations
from flaxpretrain.training.executables import Executables, Loader
from flaxpretrain.training.goodput import (
    CHECKPOINT,
    COMPILE,
    DATA_WAIT,
    FINISH,
    LOAD,
    PREPARE,
    STARTUP,
    STEPS,
    Ledger,
)
from flaxpretrain.training.google_notice import GoogleNotice
from flaxpretrain.training.meter import Due, Meter
from flaxpretrain.training.metrics import (
    EVENTS,
    Events,
    JsonLines,
    TensorBoard,
    Terminal,
    Writer,
    duration,
)
from flaxpretrain.training.preemption import Preemption
from flaxpretrain.training.profiling import TRACES, Profiling, open_profiling
from flaxpretrain.training.programs import give_back_memory
from flaxpretrain.training.reporter import NotFinite, Reporter
from flaxpretrain.training.resume import start_state
from flaxpretrain.training.rewind import LossSpike, SpikeDetector, go_back
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
from flaxpretrain.training.watchdog import Watchdog
from flaxpretrain.training.workdirs import Workdir, open_workdir

__all__ = ["NotFinite", "train"]


def train(
    run: Run,
    workdir: Location,
    *,
    initial_params: Callable[[Run], PyTree] | None = None,
    command: str = "",
    quiet: bool = False,
    leave: Callable[[int, str], None] = lambda code, reason: None,
    profile_steps: range = range(0),
    executables: Executables | None = None,
) -> int:
    """Trains a run in its workdir from the newest checkpoint there, or from the start.

    Args:
        run: what to train.
        workdir: made if it is not there; a folder, or gs://BUCKET/FOLDER.
        initial_params: gives the weights a new workdir starts from, instead of random ones.
        command: what the user typed, for the model card.
        quiet: no progress on the terminal.
        leave: tells the other processes of the run why the watchdog ends this one.
        profile_steps: numbers of steps to trace, into tensorboard/ in the workdir.
        executables: steps that were compiled ahead, to be loaded where they fit.

    Returns:
        The exit code: 0 done, 75 preempted and saved.

    Raises:
        NotFinite: the loss is not finite, and stays so.
        UserError: the workdir cannot be written or belongs to another run, parts do not fit, or
            it has no such steps to trace.
    """
    first_process = jax.process_index() == 0
    opened = open_workdir(workdir, lambda line: print(line, file=sys.stderr, flush=True))
    workdir = opened.folder
    ledger = Ledger()
    with Watchdog(run.watchdog, ledger, leave):
        ledger.enter(PREPARE)
        for item in run.prepare:
            item.run(run, workdir)
        ledger.enter(STARTUP)
        dataset = open_run_dataset(run, workdir)
        keep_tokenizer(dataset, workdir, write=first_process)
        mesh = sharding.mesh_of(run.mesh)
        with jax.set_mesh(mesh):
            run = resolve_seconds(run, workdir, dataset, mesh)
            phases = resolve_phases(run, dataset)
            assembly = assemble(run, mesh, total_steps(phases))
            checkpoints = Checkpoints(opened.checkpoints, run.checkpoints)
            identity = dataset_identity(dataset)
            meet()
            state, step = start_state(
                run, workdir, assembly, checkpoints, identity, phases, initial_params
            )
            terminal = Terminal(total_steps(phases), step, quiet or not first_process)
            if note := note_of_warmup(run, total_steps(phases)):
                terminal.say(note)
            session = Session(
                run, workdir, dataset, phases, assembly, state, step, terminal.say, command=command
            )
            metadata = checkpoints.metadata() if checkpoints.latest() is not None else {}
            session.mix(metadata)
            session.rewinds = list(metadata.get("rewinds", ()))
            lost = ledger.go_on(metadata.get("wall_seconds", {}), step, workdir)
            if first_process:
                write_json(workdir / CONFIG, render(run))
                write_json(workdir / "run.json", facts(run, dataset, mesh) | {"command": command})
            profiling = open_profiling(profile_steps, session)
            writers = _open_writers(run, workdir, step, terminal)
            events = Events(workdir / EVENTS, write=first_process)
            if step < session.total_steps:
                again = "restart" if events.count("start") else "start"
                events.record(again, step, lost_seconds=lost, processes=jax.process_count())
            try:
                with profiling:
                    parts = checkpoints, writers, identity, ledger, events, opened
                    code = _Training(session, *parts, executables).run(profiling)
                checkpoints.close()
                return code
            except BaseException:
                if jax.process_count() == 1:  # else a save may wait for a process that is gone
                    with contextlib.suppress(UserError):
                        checkpoints.close()
                raise
            finally:
                for writer in writers:
                    writer.close()
                if first_process:
                    with contextlib.suppress(UserError):  # of a full disk something else tells
                        ledger.write(workdir, session.step, force=True)
                opened.copy(wait=True)


def _open_writers(run: Run, workdir: Path, step: int, terminal: Terminal) -> list[Writer]:
    """Where figures go; one process writes files."""
    writers: list[Writer] = [terminal]
    if jax.process_index() == 0:
        writers.append(JsonLines(workdir / METRICS, step))
        if run.logging.tensorboard:
            writers.append(TensorBoard(workdir / TRACES, step))
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
        self,
        session: Session,
        checkpoints: Checkpoints,
        writers: list[Writer],
        identity: str,
        ledger: Ledger,
        events: Events,
        workdir: Workdir,
        executables: Executables | None = None,
    ) -> None:
        self._session, self._checkpoints = session, checkpoints
        self._ledger, self._events = ledger, events
        options = self._compiler_options = compiler_options(session.assembly.mesh)
        self._loader = None
        if executables is not None:
            facts = session.assembly, session.dataset.vocabulary, session.total_steps, options
            self._loader = Loader(executables, *facts, session.say)
        self._meter = Meter(session)
        self._reporter = Reporter(session, self._meter, writers, ledger)
        self._detector = None
        if session.run.rewind is not None:
            kept = {} if session.step == 0 else checkpoints.metadata(session.step)
            self._detector = SpikeDetector(session.run.rewind, kept.get("spikes", {}))
        self._saver = Saver(session, checkpoints, identity, ledger, self._detector, workdir)

    def run(self, profiling: Profiling) -> int:
        """Trains to the end, or until asked to stop; returns the exit code."""
        self._profiling = profiling
        session, ledger = self._session, self._ledger
        started, begun = time.monotonic(), session.step
        if session.step == 0:
            self._reporter.evaluate(due_evaluations(session))
        with Preemption() as preemption, GoogleNotice():
            for phase, last in spans(session.phases):
                if self._detector is not None and session.step == last - (phase.steps or 0):
                    self._detector.forget()  # longer rows may be harder
                if self._run_phase(phase, last, preemption):
                    self._save_and_wait()
                    self._events.record("preempted", session.step)
                    session.say(
                        f"stopped on request at step {session.step}, saved; run the same command "
                        "again to go on"
                    )
                    return program.EXIT_PREEMPTED
        self._reporter.evaluate(session.run.evaluations)
        self._save_and_wait()
        self._reporter.close_bar()
        if session.step == begun:
            session.say(f"all {begun} steps were trained before; evaluated again")
        else:
            session.say(f"trained to step {session.step} in {duration(time.monotonic() - started)}")
            session.say(ledger.line(self._events.count("restart")))
            self._events.record("trained", session.step)
        ledger.enter(FINISH)
        for item in session.run.finish:
            item.run(session)
        return program.EXIT_OK

    def _save_and_wait(self) -> None:
        self._ledger.enter(CHECKPOINT)
        self._saver.save(force=True)
        self._checkpoints.wait()

    def _run_phase(self, phase: Phase, last: int, preemption: Preemption) -> bool:
        """Runs the steps of a phase that are left; True when asked to stop."""
        session = self._session
        step = session.assembly.train_step(phase, self._compiler_options)
        step_function = _StepFunction(step, self._loader)
        flops: dict[Phase, float] = {}
        while session.step < last:
            with contextlib.suppress(_Rewound):
                return self._run_steps(last, preemption, step_function, flops)
        return False

    def _run_steps(
        self,
        last: int,
        preemption: Preemption,
        step_function: "_StepFunction",
        flops: dict[Phase, float],
    ) -> bool:
        """Runs steps up to `last`; `flops` are those of the shapes that are compiled."""
        session, meter, ledger = self._session, self._meter, self._ledger
        assembly = session.assembly
        rows = functools.partial(sharding.process_rows, assembly.mesh)
        loaded: Any = session.pipeline.iterate(session.step, last, rows)
        with contextlib.closing(loaded) as batches:
            while session.step < last:
                shape = session.pipeline.shape(session.step)
                placed = sharding.to_device(self._next(batches), assembly.mesh, shape.batch_size)
                if shape not in flops:
                    # The first call of a shape compiles: its time is nobody's speed.
                    step_function.make_ready(ledger, shape, session.state, placed)
                    session.state, metrics = step_function(shape, session.state, placed)
                    jax.block_until_ready(metrics)
                    flops[shape] = assembly.flops_per_step(shape, session.dataset.vocabulary)
                    meter.start_clock()
                    ledger.enter(STEPS)
                else:
                    with self._profiling.begin(session.step + 1, session.state):
                        session.state, metrics = step_function(shape, session.state, placed)
                session.step += 1
                if self._profiling.end(session.step, session.state):
                    session.say(f"step {session.step}: the trace is in {TRACES}/ of the workdir")
                    meter.start_clock()
                self._report(meter.exchange(session.step, metrics, flops[shape]))
                if self._between_steps(last, preemption):
                    return True
        return False

    def _next(self, batches: Iterator[Any]) -> Any:
        """The next batch; waiting for it counts only where the device waits too."""
        self._ledger.enter(STEPS)
        since = time.monotonic()
        batch = next(batches)
        if self._meter.device_is_idle():
            self._ledger.move(time.monotonic() - since, STEPS, DATA_WAIT)
        return batch

    def _between_steps(self, last: int, preemption: Preemption) -> bool:
        """Evaluates and saves where it is time to; True when asked to stop."""
        session, meter, reporter = self._session, self._meter, self._reporter
        stop = preemption.requested()
        evaluate = bool(due_evaluations(session))
        save = self._saver.due() and not stop
        if evaluate or save or stop or session.step == last:
            self._report(meter.flush())
        if evaluate and session.step < session.total_steps:
            reporter.evaluate(due_evaluations(session))
        if save:
            self._ledger.enter(CHECKPOINT)
            self._saver.save()
        if evaluate or save:
            meter.start_clock()
        return stop

    def _report(self, due: Due | None) -> None:
        """Writes the figures of a step that is over, and goes back where its loss is a spike."""
        if due is None:
            return
        detector = self._detector if self._may_rewind() else None
        try:
            self._reporter.step(due)
            if detector is not None:
                detector.see(due[0], due[1]["loss"] or 0.0)
        except (LossSpike, NotFinite) as spike:
            if detector is None:
                raise
            self._go_back(spike, detector)

    def _may_rewind(self) -> bool:
        rewind = self._session.run.rewind
        return rewind is not None and len(self._session.rewinds) < rewind.max_rewinds

    def _go_back(self, spike: "LossSpike | NotFinite", detector: SpikeDetector) -> None:
        session = self._session
        self._ledger.enter(CHECKPOINT)
        detector.forget()
        done = go_back(session, self._checkpoints, spike.first_step)
        if done is None:
            if isinstance(spike, NotFinite):
                raise spike
            session.say(f"step {session.step}: {spike}; no checkpoint lies before it, going on")
            return
        self._meter.forget()
        self._save_and_wait()
        self._events.record("rewind", done["from"], reason=str(spike), **done)
        session.say(
            f"step {done['from']}: {spike}; back to the weights of step {done['to']}, which go on "
            f"as step {done['resumed']} ({len(session.rewinds)} of "
            f"{session.run.rewind.max_rewinds} rewinds)"
        )
        raise _Rewound


class _Rewound(Exception):
    """The session stands at another step now."""


class _StepFunction:
    """A jitted step function and, if loaded or if there are several processes, its programs."""

    def __init__(self, function: Any, loader: Loader | None) -> None:
        self._function, self._loader, self._compiled = function, loader, {}
        self._new = False

    def make_ready(self, ledger: Ledger, shape: Phase, *arguments: Any) -> None:
        """Loads the program that was compiled ahead, or compiles.

        None of several processes runs before all have: the first one would else wait in its first
        exchange, which ends after 30 s on CPUs. One process alone compiles when it calls.
        """
        if self._loader is not None:
            ledger.enter(LOAD)
            lowered, compiled = self._loader.load(self._function, shape)
            if compiled is None:
                ledger.enter(COMPILE)
                compiled = lowered.compile()
            self._compiled[shape] = compiled
        else:
            ledger.enter(COMPILE)
            if jax.process_count() > 1:
                self._compiled[shape] = self._function.lower(*arguments).compile()
        self._new = True
        meet()

    def __call__(self, shape: Phase, *arguments: Any) -> Any:
        results = self._compiled.get(shape, self._function)(*arguments)
        if self._new:  # and compiled by now, wherever that was
            give_back_memory()
            self._new = False
        return results
