"""Tells people and files how a run goes: figures of steps, evaluations, skipped updates."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from flaxpretrain.training.meter import Due, Meter
from flaxpretrain.training.metrics import Figures, Terminal, Writer
from flaxpretrain.training.session import Session


class NotFinite(Exception):
    """The loss stayed without a finite value for as long as the guard allows."""


class Reporter:
    """Writes what a session's steps and evaluations come to, and stops a run that is lost."""

    def __init__(self, session: Session, meter: Meter, writers: Sequence[Writer]) -> None:
        """Closing the writers is left to who opened them."""
        self._session, self._meter, self._writers = session, meter, writers

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
        self._check_finite(step, figures)
        if step % session.run.logging.every_steps == 0 or step == session.total_steps:
            rates = self._meter.rates()
            for writer in self._writers:
                writer.write(step, figures | rates | session.epochs(step))
        else:
            for writer in self._writers:
                if isinstance(writer, Terminal):
                    writer.step(step)

    def _check_finite(self, step: int, figures: dict[str, float | None]) -> None:
        guard = self._session.run.guard
        if guard is None:
            given_up = not math.isfinite(figures["loss"] or 0)
        else:
            given_up = (figures.get("skipped_in_a_row") or 0) >= guard.max_consecutive
        if given_up:
            raise NotFinite(
                f"step {step}: the loss is {figures['loss']}, the gradient norm "
                f"{figures['grad_norm']}, and "
                + (
                    "no guard skips such updates"
                    if guard is None
                    else f"so it was for {guard.max_consecutive} steps in a row"
                )
                + "; the newest checkpoint is older: lower the learning rate or look at the data"
            )

    def evaluate(self, evaluations: Iterable[Any]) -> None:
        """Runs evaluations on the session's present state, and writes their figures."""
        session = self._session
        for evaluation in evaluations:
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
