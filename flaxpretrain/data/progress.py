"""Shows how far a long reading of text has come: a bar on a terminal, else a line now and then."""

import sys
import time
from types import TracebackType

LINE_SECONDS = 15.0
"""Between lines, where there is no terminal to draw on."""


class ReadingProgress:
    """Context manager whose `advance` is called with bytes read; writes to stderr.

    `total` None means that nobody knows how much is to come.
    """

    def __init__(self, label: str, total: int | None) -> None:
        self._label = label
        self._total = total
        self._done = 0
        self._bar = None

    def __enter__(self) -> "ReadingProgress":
        self._start = self._last = time.monotonic()
        if sys.stderr.isatty():
            self._bar = _bar()
            self._task = self._bar.add_task(self._label, total=self._total)
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, count: int) -> None:
        """Notes that `count` more bytes were read."""
        self._done += count
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)
        elif (now := time.monotonic()) - self._last >= LINE_SECONDS:
            self._last = now
            print(self.line(now - self._start), file=sys.stderr, flush=True)

    def line(self, seconds: float) -> str:
        """What is done after so many seconds, in words."""
        rate = self._done / max(seconds, 1e-9)
        text = f"{self._label}: {self._done / 1e6:.1f}"
        if self._total is not None:
            text += f" of {self._total / 1e6:.1f}"
        text += f" MB, {rate / 1e6:.2f} MB/s"
        if self._total and rate:
            left = max(self._total - self._done, 0) / rate
            text += f", {int(left) // 60}:{int(left) % 60:02d} left"
        return text

    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._start


def _bar():
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
