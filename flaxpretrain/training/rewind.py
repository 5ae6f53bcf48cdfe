"""Back to an earlier checkpoint when the loss leaps, with the data of the bad stretch left out.

The steps go on counting: the older weights and optimizer state stand in for those of a step behind
the stretch, so that its batches, a function of the step, are never seen again. As after an update
that the guard skips, the schedule goes on from the updates that were kept.

Reference: PaLM (arXiv:2204.02311, section 5.1): spikes vanished when training was restarted about
100 steps before them and 200 to 500 batches were skipped.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from flaxpretrain.errors import UserError
from flaxpretrain.training.checkpoints import Checkpoints
from flaxpretrain.training.session import Session


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rewind:
    """When and how far a run goes back.

    A loss is high when it exceeds the mean of the last `window` ordinary losses by `spike_factor`
    standard deviations, the deviation taken as at least `least_deviation` of the mean; `patience`
    high losses in a row, or a loss for which the run would give up, are a spike. The run goes back
    to the newest checkpoint that lies `margin_steps` before it, or else to the oldest one before
    it, and skips `skip_steps` batches after it. After `max_rewinds` spikes are left to the guard.
    """

    window: int = 128
    spike_factor: float = 6.0
    least_deviation: float = 0.01
    patience: int = 4
    margin_steps: int = 100
    skip_steps: int = 200
    max_rewinds: int = 4

    def __post_init__(self) -> None:
        """Raises UserError on numbers that cannot be."""
        for name in ("window", "patience", "skip_steps", "max_rewinds"):
            if getattr(self, name) < 1:
                raise UserError(f"rewind.{name} must be at least 1; got {getattr(self, name)}")
        if self.margin_steps < 0:
            raise UserError(f"rewind.margin_steps must not be negative; got {self.margin_steps}")
        for name in ("spike_factor", "least_deviation"):
            if getattr(self, name) <= 0:
                raise UserError(f"rewind.{name} must be positive; got {getattr(self, name)}")


class LossSpike(Exception):
    """The loss stayed high, or was not finite, from `first_step` on."""

    def __init__(self, first_step: int, text: str) -> None:
        """`text` says what was seen."""
        super().__init__(text)
        self.first_step = first_step


class SpikeDetector:
    """Rolling statistics of the losses of a run: the same losses give the same spikes."""

    def __init__(self, rewind: Rewind, kept: Mapping[str, Any]) -> None:
        """`kept` is what `state` gave at the checkpoint that the run goes on from, or nothing."""
        self._rewind = rewind
        self._losses: list[float] = list(kept.get("losses", ()))[-rewind.window :]
        self._high: int = kept.get("high", 0)

    def state(self) -> dict[str, Any]:
        """What it takes to go on as if there had been no stop."""
        return {"losses": self._losses, "high": self._high}

    def forget(self) -> None:
        """Begins anew, as when rows get longer and the level of the loss with them changes."""
        self._losses, self._high = [], 0

    def see(self, step: int, loss: float) -> None:
        """Takes the loss of a step.

        Raises:
            LossSpike: the last `patience` losses were high.
        """
        rewind = self._rewind
        if not self._is_high(loss):
            self._losses = [*self._losses, loss][-rewind.window :]
            self._high = 0
            return
        self._high += 1
        if self._high >= rewind.patience:
            mean = sum(self._losses) / len(self._losses)
            text = f"the loss is {loss:.4g} after {rewind.window} losses around {mean:.4g}"
            raise LossSpike(step - self._high + 1, text)

    def _is_high(self, loss: float) -> bool:
        if not math.isfinite(loss):
            return bool(self._losses)
        if len(self._losses) < self._rewind.window:
            return False
        losses = np.array(self._losses)
        mean = float(losses.mean())
        deviation = max(float(losses.std()), self._rewind.least_deviation * abs(mean))
        return loss > mean + self._rewind.spike_factor * deviation


def checkpoint_before(steps: Sequence[int], first_step: int, margin: int) -> int | None:
    """The newest of some checkpoints that lies `margin` before a step, else the oldest before it.

    A checkpoint of step n holds what the updates of the steps 1 to n made.
    """
    before = [step for step in sorted(steps) if step < first_step]
    early = [step for step in before if step < first_step - margin]
    return early[-1] if early else before[0] if before else None


def go_back(session: Session, checkpoints: Checkpoints, first_step: int) -> dict[str, Any] | None:
    """Puts the state of an earlier checkpoint in the place of a step behind a spike.

    Args:
        session: at the last step that was run.
        checkpoints: where the states are.
        first_step: of the spike.

    Returns:
        What was done; None where no checkpoint lies before the spike.
    """
    rewind: Rewind = session.run.rewind
    checkpoints.wait()
    chosen = checkpoint_before(checkpoints.regular(), first_step, rewind.margin_steps)
    if jax.process_count() > 1:
        # The first process may be deleting: what it sees holds for all.
        told = multihost_utils.broadcast_one_to_all(np.array(-1 if chosen is None else chosen))
        chosen = None if int(told) < 0 else int(told)
    if chosen is None:
        return None
    state, _, _ = checkpoints.restore(session.assembly.state, chosen)
    step = min(session.step + rewind.skip_steps, session.total_steps)
    number = jax.device_put(jnp.int32(step), session.assembly.state.step.sharding)
    session.state = state._replace(step=number)
    done = {"from": session.step, "first": first_step, "to": chosen, "resumed": step}
    session.step = step
    session.rewinds.append(done)
    return done
