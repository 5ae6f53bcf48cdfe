"""How the next token is chosen, as frozen values.

Reference: Transformers generation/logits_process.py and generation/utils.py for what the options
mean.
"""

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from flaxpretrain.errors import UserError
from flaxpretrain.models.layers import row_bits

Scores = Float[Array, "B V"]
NEVER = -jnp.inf
"""Score of a token that is not chosen."""


class Filter(abc.ABC):
    """Changes the scores of the next token before one is drawn."""

    @abc.abstractmethod
    def __call__(self, scores: Scores) -> Scores:
        """The changed scores, row by row."""


@dataclasses.dataclass(frozen=True)
class Temperature(Filter):
    """Divides the scores: below 1 likely tokens become likelier, above 1 all become more alike."""

    value: float

    def __post_init__(self) -> None:
        """Raises UserError on a temperature that is not positive."""
        if not 0 < self.value < float("inf"):
            raise UserError(
                f"--temperature must be above 0; got {self.value} (for the likeliest token always, "
                "leave sampling out)"
            )

    def __call__(self, scores: Scores) -> Scores:
        """`scores / value`."""
        return scores / self.value


@dataclasses.dataclass(frozen=True)
class TopK(Filter):
    """Leaves the `count` likeliest tokens, and those as likely as the last of them.

    Reference: https://arxiv.org/abs/1805.04833, section 5.4.
    """

    count: int

    def __post_init__(self) -> None:
        """Raises UserError on a count that is not positive."""
        if self.count < 1:
            raise UserError(f"--top-k must be 1 or more; got {self.count}")

    def __call__(self, scores: Scores) -> Scores:
        """The scores of the others never chosen; all stay where there are no more than `count`."""
        if self.count >= scores.shape[1]:
            return scores
        last = jax.lax.top_k(scores, self.count)[0][:, -1:]
        return jnp.where(scores < last, NEVER, scores)


@dataclasses.dataclass(frozen=True)
class TopP(Filter):
    """Leaves the fewest tokens that have `mass` of the probability together, the likeliest ones.

    Tokens as likely as the last of them stay too.

    Reference: https://arxiv.org/abs/1904.09751, section 3.1.
    """

    mass: float

    def __post_init__(self) -> None:
        """Raises UserError on a mass outside (0, 1]."""
        if not 0 < self.mass <= 1:
            raise UserError(f"--top-p must lie above 0 and at most at 1; got {self.mass}")

    def __call__(self, scores: Scores) -> Scores:
        """The scores of the others never chosen.

        The least probability that stays is found bit by bit: positive floats are in the order of
        their bits, and 31 sums over a vocabulary take a tenth of the time of sorting it.
        """
        if self.mass == 1:
            return scores
        shares = jax.nn.softmax(scores, axis=-1)
        bits = jax.lax.bitcast_convert_type(shares, jnp.int32)

        def narrow(number: Any, least: Array) -> Array:
            higher = least | (jnp.int32(1) << (30 - number))
            kept = jnp.sum(jnp.where(bits >= higher[:, None], shares, 0.0), axis=-1)
            return jnp.where(kept >= self.mass, higher, least)

        least = jax.lax.fori_loop(0, 31, narrow, jnp.zeros(len(scores), jnp.int32))
        return jnp.where(bits < least[:, None], NEVER, scores)


@dataclasses.dataclass(frozen=True)
class Greedy:
    """The likeliest token, always."""

    def choose(self, scores: Scores, keys: Key[Array, "B"]) -> Int[Array, "B"]:
        """A token for every row; the first of those that are equal."""
        return jnp.argmax(scores, axis=-1).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Sample:
    """A token drawn with its probability, after filters that are applied in turn."""

    filters: tuple[Filter, ...] = ()

    def choose(self, scores: Scores, keys: Key[Array, "B"]) -> Int[Array, "B"]:
        """A token for every row, a function of the row's key and its scores alone.

        The largest of scores that each have Gumbel noise added is such a draw.
        """
        for each in self.filters:
            scores = each(scores)
        uniform = (row_bits(keys, scores.shape) >> 8).astype(jnp.float32) + 0.5
        noise = -jnp.log(-jnp.log(uniform * 2.0**-24))
        return jnp.argmax(scores + noise, axis=-1).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Beam:
    """The best texts found by going on with the `size` best beginnings at every token.

    A text's score is its log likelihood divided by its number of tokens to the power of
    `length_penalty`: above 0 prefers longer texts, below 0 shorter ones.

    early_stopping: True ends when there are `size` whole texts; False when going on is unlikely to
        find better ones; "never" when it cannot.
    """

    size: int = 4
    length_penalty: float = 1.0
    early_stopping: bool | str = False

    def __post_init__(self) -> None:
        """Raises UserError on a size or a way to stop that cannot be."""
        if self.size < 1:
            raise UserError(f"--beams must be 1 or more; got {self.size}")
        if self.early_stopping not in (True, False, "never"):
            raise UserError(
                f"--early-stopping: expected true, false or never; got {self.early_stopping!r}"
            )

    def check_fits(self, vocab_size: int) -> None:
        """Raises UserError where the vocabulary has too few tokens to keep so many beginnings."""
        if 2 * self.size > vocab_size:
            raise UserError(
                f"--beams {self.size}: the model has {vocab_size} tokens, which make at most "
                f"{vocab_size // 2} beams"
            )


Strategy = Greedy | Sample | Beam

__all__ = ["Beam", "Filter", "Greedy", "NEVER", "Sample", "Strategy", "Temperature", "TopK", "TopP"]
