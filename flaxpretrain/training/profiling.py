"""Records what the devices do in some steps of a run, in the form that TensorBoard opens."""

import contextlib
from pathlib import Path
from typing import Any

import jax

from flaxpretrain.errors import UserError
from flaxpretrain.training.session import Session

STEP = "train"
"""What profilers call an annotation that marks a step."""

TRACES = "tensorboard"
"""Folder in a workdir whose plugins/profile/ TensorBoard reads."""


def open_profiling(steps: range, session: Session) -> "Profiling":
    """A profiling of what is left of a session, whose next step compiles.

    Raises:
        UserError: the run has no such steps.
    """
    begun, total = session.step, session.total_steps
    if steps and steps.stop > total + 1:
        raise UserError(
            f"--profile-steps {steps.start}:{steps.stop}: the run ends with step {total}, so "
            f"choose two numbers up to {total + 1}"
        )
    left = range(max(steps.start, begun + 2), steps.stop)
    if steps and left != steps:
        what = f"{len(left)} of these steps" if left else "none of these steps"
        session.say(
            f"--profile-steps {steps.start}:{steps.stop}: step {begun + 1} comes next and "
            f"compiles, so {what} will be traced"
        )
    return Profiling(left, session.workdir / TRACES)


class Profiling:
    """Traces the steps first <= step < last of a run into `folder`/plugins/profile."""

    def __init__(self, steps: range, folder: Path) -> None:
        """An empty range traces nothing."""
        self._steps, self._folder = steps, folder
        self._running = False

    def begin(self, step: int, state: Any) -> contextlib.AbstractContextManager[Any]:
        """To be entered around the dispatch of a step, which goes on from `state`."""
        if step not in self._steps:
            return contextlib.nullcontext()
        if not self._running:
            # What was dispatched before is none of these steps' work.
            jax.block_until_ready(state)
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # slows down the host, which is then what one sees
            jax.profiler.start_trace(str(self._folder), profiler_options=options)
            self._running = True
        return jax.profiler.StepTraceAnnotation(STEP, step_num=step)

    def end(self, step: int, state: Any) -> bool:
        """To be called when a step is dispatched; true when that was the last one to trace."""
        if not self._running or step + 1 in self._steps:
            return False
        jax.block_until_ready(state)
        self.close()
        return True

    def __enter__(self) -> "Profiling":
        """What is traced when the context ends is written."""
        return self

    def __exit__(self, *error: object) -> None:
        """As `close`."""
        self.close()

    def close(self) -> None:
        """Writes what was traced, if a run ends within the steps."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
