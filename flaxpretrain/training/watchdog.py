"""Ends a run that hangs, with the stacks of all threads, so that something can start it again."""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable

from flaxpretrain import config, program
from flaxpretrain.training import goodput
from flaxpretrain.training.goodput import Ledger

LOOKS_EVERY = 1.0
"""Seconds, at most, between two looks at the clock."""

BACKSTOP_SECONDS = 60.0
"""By which the timer that needs no interpreter is behind: it fires when a thread holds the GIL."""

_FIELDS = {
    goodput.STARTUP: "startup_seconds",
    goodput.COMPILE: "startup_seconds",
    goodput.LOAD: "startup_seconds",
    goodput.STEPS: "step_seconds",
    goodput.DATA_WAIT: "step_seconds",
    goodput.CHECKPOINT: "save_seconds",
    goodput.EVALUATION: "evaluation_seconds",
}
"""Which deadline holds for which activity; what a recipe prepares and finishes has none."""


class Watchdog:
    """Looks whether the activity that a ledger shows has gone on for longer than it may."""

    def __init__(
        self,
        deadlines: config.Watchdog,
        ledger: Ledger,
        leave: Callable[[int, str], None] = lambda code, reason: None,
    ) -> None:
        """`leave` tells the other processes of a run, and may end this one."""
        self._deadlines, self._ledger, self._leave = deadlines, ledger, leave
        self._stop = threading.Event()
        given = [getattr(deadlines, name) for name in sorted(set(_FIELDS.values()))]
        self._shortest = min((s for s in given if s is not None), default=None)

    def __enter__(self) -> "Watchdog":
        """Starts to look, where there is a deadline."""
        if self._shortest is not None:
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()
        return self

    def __exit__(self, *error: object) -> None:
        """Stops."""
        self._stop.set()
        if self._shortest is not None:
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        every = min(LOOKS_EVERY, (self._shortest or LOOKS_EVERY) / 4)
        armed = 0.0
        while not self._stop.wait(every):
            activity, since = self._ledger.doing
            limit = getattr(self._deadlines, _FIELDS.get(activity, ""), None)
            passed = self._ledger.now() - since
            if limit is not None and passed > limit:
                self._end(activity, passed)
            if time.monotonic() - armed > BACKSTOP_SECONDS / 4:
                armed = time.monotonic()
                faulthandler.dump_traceback_later(
                    (limit or 3600.0) + BACKSTOP_SECONDS, exit=True, file=sys.__stderr__ or 2
                )

    def _end(self, activity: str, passed: float) -> None:
        faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr, all_threads=True)
        name = _FIELDS[activity]
        limit = getattr(self._deadlines, name)
        what = activity.replace("_", " ")
        reason = f"hangs: {what} for {passed:.0f} s, watchdog.{name} allows {limit:g}"
        print(
            f"run_pretraining.py: this process {reason}; the stacks of its threads are above, "
            "earlier checkpoints are whole",
            file=sys.stderr,
            flush=True,
        )
        self._leave(program.EXIT_WATCHDOG, reason)
        os._exit(program.EXIT_WATCHDOG)
