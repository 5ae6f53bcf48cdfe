"""Starts a program again when it crashes, hangs or is preempted: a bounded number of times.

The supervisor is the program's own first process. It imports nothing slow and touches no device,
so that it lives on when the training process dies.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from flaxpretrain import program

FLAG = "--restarts"

FINAL = {program.EXIT_OK, program.EXIT_USER, program.EXIT_NOT_FINITE, program.EXIT_INTERRUPTED}
"""Exit codes after which a program is not started again: it is done, or would fail again."""

FIRST_DELAY, LONGEST_DELAY = 1.0, 60.0
"""Seconds before a restart: doubled each time, and the first again after a long life."""

LONG_LIFE = 600.0
"""Seconds after which a process counts as healthy."""


def add_restarts(parser: argparse.ArgumentParser) -> None:
    """Adds the flag; the program itself never sees its value, but --help shows it."""
    parser.add_argument(
        FLAG,
        type=int,
        metavar="N",
        help="start again, N times at most, after a crash, a hang (124), a preemption (75) or the "
        "loss of another process (69)",
    )


def take_over() -> None:
    """Becomes the supervisor and exits with the last code, where the command says `--restarts`."""
    restarts, command = _without_flag(sys.orig_argv)
    if restarts is not None:
        raise SystemExit(supervise([sys.executable, *command[1:]], restarts))


def _without_flag(command: Sequence[str]) -> tuple[int | None, list[str]]:
    """The number of restarts, and the command of the process to be supervised."""
    parser = program.Parser(None, prog=os.path.basename(sys.argv[0]), add_help=False)
    parser.add_argument(FLAG, type=int)
    found, rest = parser.parse_known_args(list(command))
    if found.restarts is not None and found.restarts < 0:
        parser.error(f"{FLAG} must not be negative; got {found.restarts}")
    return found.restarts, rest + (["--debug"] if found.debug else [])


def supervise(
    command: Sequence[str],
    restarts: int,
    *,
    sleep: Callable[[float], Any] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Runs a command until it ends for good; returns its exit code (128 + n after signal n).

    SIGTERM and SIGINT are handed on; after them the command is not started again.
    """
    delay = FIRST_DELAY
    with _Child() as child:
        for left in range(restarts, -1, -1):
            begun = clock()
            code = child.run(command)
            if code in FINAL or child.told_to_stop:
                return code
            if left == 0:
                _say(f"{_reason(code)}; started {restarts + 1} times, giving up")
                return code
            if clock() - begun > LONG_LIFE:
                delay = FIRST_DELAY
            number = restarts - left + 1
            _say(f"{_reason(code)}; again in {delay:g} s, restart {number} of {restarts}")
            sleep(delay)
            delay = min(2 * delay, LONGEST_DELAY)
            if child.told_to_stop:
                return code
    raise AssertionError("the last pass returns")


class _Child:
    """The supervised process; hands signals on to it, and remembers that there was one."""

    def __init__(self) -> None:
        self.told_to_stop = False
        self._process: subprocess.Popen[bytes] | None = None
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "_Child":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._old[number] = signal.signal(number, self._hand_on)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def run(self, command: Sequence[str]) -> int:
        self._process = subprocess.Popen(command)
        code = self._process.wait()
        self._process = None
        return 128 - code if code < 0 else code

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        self.told_to_stop = True
        # Ctrl-C reaches the whole process group, the child included.
        if self._process is not None and number != signal.SIGINT:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)


def _reason(code: int) -> str:
    known = {
        program.EXIT_BUG: "it crashed",
        program.EXIT_PEER_GONE: "another process of the run is gone",
        program.EXIT_PREEMPTED: "it was preempted and has saved",
        program.EXIT_WATCHDOG: "it hung",
        128 + signal.SIGABRT: "it aborted, as JAX does when process 0 of a run is gone",
        128 + signal.SIGKILL: "it was killed, perhaps for want of memory",
    }
    text = known.get(code, f"signal {code - 128}" if code > 128 else "it crashed")
    return f"exit code {code}: {text}"


def _say(text: str) -> None:
    print(f"supervisor: {text}", file=sys.stderr, flush=True)
