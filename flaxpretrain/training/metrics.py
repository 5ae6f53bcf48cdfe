"""Where figures go: metrics.jsonl, TensorBoard, and a line or a bar on the terminal."""

import contextlib
import datetime
import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from flaxpretrain.errors import UserError

Figures = Mapping[str, float | int | None]


@runtime_checkable
class Writer(Protocol):
    """A place that figures are written to; another tracker needs these two methods."""

    def write(self, step: int, figures: Figures) -> None:
        """Records the figures of a step."""
        ...

    def close(self) -> None:
        """Makes what was written last."""
        ...


class JsonLines:
    """metrics.jsonl: one object a logged step; rows past the restored step are cut at resume."""

    def __init__(self, path: Path, restored_step: int) -> None:
        """Raises UserError where the file cannot be written."""
        try:
            if path.exists():
                _cut(path, restored_step)
            self._file = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise _unwritable(path, error) from error
        self._path = path

    def write(self, step: int, figures: Figures) -> None:
        """Appends `{"step": step, ...}`; figures that are not finite become null."""
        row = {"step": step} | {
            name: value if value is None or math.isfinite(value) else None
            for name, value in figures.items()
        }
        try:
            self._file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise _unwritable(self._path, error) from error

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


EVENTS = "events.jsonl"


class Events:
    """events.jsonl: what happened to a run, over all its restarts; nothing is ever cut."""

    def __init__(self, path: Path, write: bool = True) -> None:
        """`write` is for one process of a run."""
        self._path, self._write = path, write

    def record(self, event: str, step: int, **facts: Any) -> None:
        """Appends `{"event": event, "step": step, "time": ..., ...}`."""
        if not self._write:
            return
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        row = {"event": event, "step": step, "time": now} | facts
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise _unwritable(self._path, error) from error

    def count(self, event: str) -> int:
        """How often an event was recorded so far."""
        return sum(row["event"] == event for row in read_events(self._path))


def read_events(path: Path) -> list[dict[str, Any]]:
    """The rows of an events.jsonl that are whole; none where there is no file."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):  # the last line of a killed process
            rows.append(json.loads(line))
    return rows


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot write {path}: {error.strerror}; make room or choose another folder, then run "
        "again: checkpoints are whole"
    )


def _cut(path: Path, last_step: int) -> None:
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # the last line of a killed process
        if row["step"] <= last_step:
            kept.append(line)
    aside = path.with_suffix(".jsonl.new")
    aside.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    aside.replace(path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class TensorBoard:
    """TensorBoard event files; a resumed run tells TensorBoard to forget the rows past it."""

    def __init__(self, folder: Path, restored_step: int) -> None:
        """Opens a new event file in `folder`."""
        # Imported here: half a second, and only the first process of a pod writes.
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=restored_step + 1)

    def write(self, step: int, figures: Figures) -> None:
        """Writes each figure as a scalar."""
        for name, value in figures.items():
            if value is not None:
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes and closes."""
        self._writer.close()


class Terminal:
    """A progress bar on a terminal; in a log file, a line each time figures are written."""

    def __init__(self, total_steps: int, first_step: int, quiet: bool = False) -> None:
        """Shows nothing when `quiet`, as on all processes but the first."""
        self._console = Console(file=sys.stderr)
        self._total, self._quiet = total_steps, quiet
        self._started, self._first = time.monotonic(), first_step
        self._bar = None
        if self._console.is_terminal and not quiet:
            self._bar = Progress(
                TextColumn("[bold]training"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task("", total=total_steps, completed=first_step, figures="")
            self._bar.start()

    def step(self, step: int) -> None:
        """Moves the bar."""
        if self._bar:
            self._bar.update(self._task, completed=step)

    def write(self, step: int, figures: Figures) -> None:
        """Shows the figures people watch."""
        if self._quiet:
            return
        text = _summary(figures)
        if self._bar:
            self._bar.update(self._task, completed=step, figures=text)
            return
        passed = time.monotonic() - self._started
        left = passed / max(step - self._first, 1) * (self._total - step)
        print(f"step {step}/{self._total}  {text}  ETA {duration(left)}", file=sys.stderr)

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        if self._quiet:
            return
        if self._bar:
            self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar:
            self._bar.stop()
            self._bar = None


def _summary(figures: Figures) -> str:
    parts = []
    for name, label, form in (
        ("loss", "loss", "{:.4f}"),
        ("learning_rate", "lr", "{:.2e}"),
        ("tokens_per_second", "tok/s", "{:,.0f}"),
        ("mfu", "MFU", "{:.1%}"),
    ):
        value = figures.get(name)
        if value is not None:
            parts.append(f"{label} {form.format(value)}")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """Seconds as people say them: `2h03m`, `4m10s`, `12s`."""
    if not math.isfinite(seconds):
        return "unknown"
    whole = int(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    if whole >= 60:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole}s"
