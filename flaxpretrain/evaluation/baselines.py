"""Values of a recipe that put its loss beside what counting achieves."""

import dataclasses
from typing import Any

import jax

from flaxpretrain.errors import UserError
from flaxpretrain.evaluation.fixed_masks import FixedMasks, baselines
from flaxpretrain.training.evaluate import FixedNoise


@dataclasses.dataclass(frozen=True, kw_only=True)
class NgramBaselines:
    """Unigram and bigram cross entropy at the positions of an evaluation: for `Run.finish`.

    `of` names a `FixedNoise` of the run, whose rows and masks are taken; its loss is the newest.
    The text of `train` is counted. The figures join the session's, so that a model card made
    after this tells them too.
    """

    of: str = "validation"
    train: str = "train"

    def run(self, session: Any) -> dict[str, float]:
        """Prints and returns the figures, in nats a token."""
        evaluation = self._evaluation(session)
        settings = FixedMasks(
            objective=evaluation.objective or session.run.objective,
            layout=session.run.data.layout,
            length=evaluation.length or session.phases[-1].length,
            split=evaluation.split,
            max_rows=evaluation.max_rows,
            seed=evaluation.seed,
        )
        if jax.process_index() != 0:
            return {}
        nats = baselines(session.dataset, settings, self.train)
        figures = {
            f"{self.of}/unigram": nats.unigram,
            f"{self.of}/bigram": nats.bigram,
        }
        terms = [f"{self.of}/{term}" for term in settings.objective.terms]
        losses = [session.figures[name] for name in terms if name in session.figures]
        session.figures |= figures
        session.say(comparison(self.of, losses[0] if losses else None, nats.unigram, nats.bigram))
        return figures

    def _evaluation(self, session: Any) -> FixedNoise:
        for evaluation in session.run.evaluations:
            if isinstance(evaluation, FixedNoise) and evaluation.name == self.of:
                return evaluation
        raise UserError(
            f"NgramBaselines(of={self.of!r}): the run's evaluations hold no FixedNoise of that name"
        )


def comparison(name: str, loss: float | None, unigram: float, bigram: float) -> str:
    """A line such as "validation loss 5.20, unigram 6.18 (0.98 nat under), bigram 4.90"."""
    if loss is None:
        return f"{name}: unigram {unigram:.4f}, bigram {bigram:.4f} nat"
    return (
        f"{name} loss {loss:.4f} nat, unigram {unigram:.4f} ({_beside(loss, unigram)}), "
        f"bigram {bigram:.4f} ({_beside(loss, bigram)})"
    )


def _beside(loss: float, other: float) -> str:
    return f"{abs(other - loss):.2f} nat {'under' if loss < other else 'over'}"
