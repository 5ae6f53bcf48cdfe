"""What the wall time of a run was spent on, from its first start, over all restarts.

The account lies in the workdir (`goodput.json`) and, as it stood at each save, in the checkpoints.
What was spent after the checkpoint that a restart goes on from is lost work.
"""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flaxpretrain.errors import UserError
from flaxpretrain.training.session import write_json

GOODPUT = "goodput.json"

STEPS, DATA_WAIT = "steps", "data_wait"
STARTUP, COMPILE, LOAD = "startup", "compile", "load"
CHECKPOINT, EVALUATION = "checkpoint", "evaluation"
PREPARE, FINISH = "prepare", "finish"
LOST, STOPPED = "lost_work", "stopped"

ACTIVITIES = (
    STEPS,
    DATA_WAIT,
    COMPILE,
    LOAD,
    CHECKPOINT,
    EVALUATION,
    STARTUP,
    PREPARE,
    FINISH,
    LOST,
    STOPPED,
)
"""`load` stands for `compile` where a step was compiled ahead.

`stopped` is the time between the last sign of a process and the start of the next one."""

WRITE_SECONDS = 10.0
"""Least time between two writes of the account."""


class Ledger:
    """Seconds by activity; at any time exactly one activity is going on, so they sum to all."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """Begins with the startup."""
        self._clock, self._wall_clock = clock, wall_clock
        self.begun = wall_clock()
        # One tuple: another thread must not see one half of it new and the other old.
        self.doing = (STARTUP, clock())
        self._seconds: dict[str, float] = {name: 0.0 for name in ACTIVITIES}
        self._written = self.doing[1]

    def now(self) -> float:
        """The clock that `doing` tells the beginning by."""
        return self._clock()

    def enter(self, activity: str) -> None:
        """Ends the present activity and begins another, or the same one anew."""
        now = self._clock()
        before, since = self.doing
        self._seconds[before] += now - since
        self.doing = (activity, now)

    def move(self, seconds: float, source: str, target: str) -> None:
        """Books seconds of one activity on another."""
        self._seconds[source] -= seconds
        self._seconds[target] += seconds

    def seconds(self) -> dict[str, float]:
        """Seconds by activity until now."""
        activity, since = self.doing
        return self._seconds | {activity: self._seconds[activity] + self._clock() - since}

    def go_on(self, at_checkpoint: Mapping[str, float], step: int, workdir: Path) -> float:
        """Takes over the account of the processes before; returns the seconds of lost work.

        Args:
            at_checkpoint: the account as the restored checkpoint has it; empty at step 0.
            step: of that checkpoint.
            workdir: where the account lies.
        """
        last = _read(workdir / GOODPUT)
        kept, lost = at_checkpoint, 0.0
        if last is not None:
            self._seconds[STOPPED] += max(0.0, self.begun - last["time"])
            more = sum(last["seconds"].values()) - sum(at_checkpoint.values())
            if more > 0 and last["step"] > step:
                lost = more
            elif more > 0:  # it ended after its last step: what it finished is not lost
                kept = last["seconds"]
        for name, value in kept.items():
            self._seconds[name] = self._seconds.get(name, 0.0) + value
        self._seconds[LOST] += lost
        return lost

    def write(self, workdir: Path, step: int, force: bool = False) -> None:
        """Keeps the account after a step in the workdir, every ten seconds at most unless forced.

        Raises:
            UserError: the disk is full, say.
        """
        now = self._clock()
        if not force and now - self._written < WRITE_SECONDS:
            return
        self._written = now
        account = {"time": self._wall_clock(), "step": step, "seconds": self.seconds()}
        try:
            write_json(workdir / GOODPUT, account)
        except OSError as error:
            raise UserError(
                f"cannot write {workdir / GOODPUT}: {error.strerror}; make room"
            ) from error

    def figures(self) -> dict[str, float | None]:
        """`goodput`, the share of steps in the wall time so far; `time/*`, those of the rest."""
        seconds = self.seconds()
        total = max(sum(seconds.values()), 1e-9)
        rest = {f"time/{name}": s / total for name, s in seconds.items() if name != STEPS}
        return {"goodput": seconds[STEPS] / total, **rest}

    def line(self, restarts: int) -> str:
        """The account in words, the largest parts first."""
        seconds = self.seconds()
        total = max(sum(seconds.values()), 1e-9)
        parts = sorted(seconds.items(), key=lambda item: -item[1])
        rest = ", ".join(
            f"{name.replace('_', ' ')} {value / total:.1%}"
            for name, value in parts
            if name != STEPS and value / total >= 0.0005
        )
        again = f"; {restarts} restart{'s' if restarts > 1 else ''}" if restarts else ""
        return f"goodput {seconds[STEPS] / total:.1%} of {total:,.0f} s: {rest}{again}"


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
