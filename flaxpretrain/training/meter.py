"""What a step's answer comes to: figures, read one step late, and speed."""

import time
from typing import Any

import jax
import numpy as np

from flaxpretrain.training.session import Session
from flaxpretrain.training.step import StepMetrics

Due = tuple[int, dict[str, float | None]]
"""A step, and its figures."""


class Meter:
    """Turns the sums of a step into figures, one step late, and knows how fast steps are."""

    def __init__(self, session: Session) -> None:
        """The clock runs from now on."""
        self._session = session
        self._waiting: tuple[int, StepMetrics, float] | None = None
        self._since = time.monotonic()
        self._tokens = 0.0
        self._flops = 0.0
        mesh = session.assembly.mesh
        self._devices = int(np.size(mesh.devices))
        self._peak = session.assembly.peak_flops_per_second

    def start_clock(self) -> None:
        """Forgets the time since the last figures, which was not spent on steps."""
        self._since, self._tokens, self._flops = time.monotonic(), 0.0, 0.0

    def device_is_idle(self) -> bool:
        """Whether the device has done all that it was given."""
        if self._waiting is None:
            return True
        loss: Any = self._waiting[1].figures["loss"]
        return loss.is_ready()

    def forget(self) -> None:
        """Drops the figures still waiting, those of a step that is thrown away."""
        self._waiting = None

    def exchange(self, step: int, metrics: StepMetrics, flops: float) -> Due | None:
        """Hands in the device's answer for `step`; gets the figures of the step before."""
        due, self._waiting = self._waiting, (step, metrics, flops)
        return None if due is None else self._read(*due)

    def flush(self) -> Due | None:
        """The figures still waiting; waits for the device."""
        due, self._waiting = self._waiting, None
        return None if due is None else self._read(*due)

    def _read(self, step: int, metrics: StepMetrics, flops: float) -> Due:
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
