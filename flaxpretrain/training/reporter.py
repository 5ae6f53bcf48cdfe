"""Tells people and files how a run goes: figures of steps, evaluations, skipped updates."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax

from flaxpretrain.training.goodput import EVALUATION, Ledger
from flaxpretrain.training.guard import guard_of
from flaxpretrain.training.meter import Due, Meter
from flaxpretrain.training.metrics import Figures, Terminal, Writer
from flaxpretrain.training.session import Session


class NotFinite(Exception):
    """The loss had no finite value from `first_step` on, for as long as the guard allows."""

    def __init__(self, first_step: int, text: str) -> None:
        """`text` is what the user reads."""
        super().__init__(text)
        self.first_step = first_step


class Reporter:
    """Writes what a session's steps and evaluations come to, and stops a run that is lost."""

    def __init__(
        self, session: Session, meter: Meter, writers: Sequence[Writer], ledger: Ledger
    ) -> None:
        """Closing the writers is left to who opened them."""
        self._session, self._meter, self._writers = session, meter, writers
        self._ledger = ledger

    def step(self, due: Due | None) -> None:
        """Writes a step's figures where they are due, and reports an update the guard skipped.

        Raises:
            NotFinite: the loss is not finite, and no guard says to go on.
        """
        if due is None:
            return
        step, figures = due
        session = self._session
        if figures.get("skipped"):
            session.say(
                f"step {step}: update skipped, loss {figures['loss']:.4g}, gradient norm "
                f"{figures['grad_norm']:.4g} ({figures['skipped_total']:.0f} skipped so far)"
            )
        if step % session.run.logging.every_steps == 0 or step == session.total_steps:
            more = self._meter.rates() | session.epochs(step) | self._ledger.figures()
            for writer in self._writers:
                writer.write(step, figures | more)
            if jax.process_index() == 0:
                self._ledger.write(session.workdir, step)
        else:
            for writer in self._writers:
                if isinstance(writer, Terminal):
                    writer.step(step)
        self._check_finite(step, figures)

    def _check_finite(self, step: int, figures: dict[str, float | None]) -> None:
        guard = guard_of(self._session.run)
        if guard is None:
            in_a_row, allowed = int(not math.isfinite(figures["loss"] or 0)), 1
        else:
            in_a_row = int(figures.get("skipped_in_a_row") or 0)
            allowed = guard.max_consecutive
        if in_a_row >= allowed:
            raise NotFinite(
                step - in_a_row + 1,
                f"step {step}: the loss is {figures['loss']}, the gradient norm "
                f"{figures['grad_norm']}, and "
                + (
                    "no guard skips such updates"
                    if guard is None
                    else f"so it was for {guard.max_consecutive} steps in a row"
                )
                + "; the newest checkpoint is older: lower the learning rate or look at the data",
            )

    def evaluate(self, evaluations: Iterable[Any]) -> None:
        """Runs evaluations on the session's present state, and writes their figures."""
        session = self._session
        for evaluation in evaluations:
            self._ledger.enter(EVALUATION)
            figures = evaluation.run(session)
            if not figures:
                continue  # a push to the hub, say
            named: Figures = {f"{evaluation.name}/{n}": v for n, v in figures.items()}
            session.figures |= {n: v for n, v in named.items() if v is not None}
            text = ", ".join(f"{n} {v:.4f}" for n, v in named.items() if v is not None)
            session.say(f"step {session.step}: {text}")
            for writer in self._writers:
                if not isinstance(writer, Terminal):
                    writer.write(session.step, named)

    def close_bar(self) -> None:
        """Leaves the terminal's bar as it stands: what follows are lines."""
        for writer in self._writers:
            if isinstance(writer, Terminal):
                writer.close()
