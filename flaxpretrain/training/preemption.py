"""A run that is told to stop saves first: SIGTERM, SIGINT, and a pod's preemption notice."""

import os
import signal
from types import FrameType

import jax
from jax.experimental import multihost_utils


class Preemption:
    """Notes a request to stop; the loop asks once a step and all processes answer alike."""

    def __init__(self) -> None:
        """Nothing is caught until the context is entered."""
        self._asked = False
        self._calls = 0
        self._old: dict[int, object] = {}

    def __enter__(self) -> "Preemption":
        """Catches SIGTERM and SIGINT; a second SIGINT interrupts as usual."""
        # With several processes, jax's coordination service holds SIGTERM and agrees on a step.
        signals = [signal.SIGINT]
        if jax.process_count() == 1:
            signals.append(signal.SIGTERM)
        for number in signals:
            self._old[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        """Restores the handlers."""
        for number, handler in self._old.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
        self._old.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = True
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)  # which the coordination service understands

    def requested(self) -> bool:
        """Whether to save and leave after this step: the same answer on every process."""
        if jax.process_count() == 1:
            return self._asked
        # Counted here: a rewind leaves out steps, and the point agreed on may be one of them.
        self._calls += 1
        return multihost_utils.reached_preemption_sync_point(self._calls)
