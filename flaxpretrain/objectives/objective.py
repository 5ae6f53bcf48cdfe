"""What an objective is: the contract between data, models and training; and the losses they share.

Losses and metrics travel as `Sum(total, weight)` pairs, never as means: the mean of the means of
microbatches with unequal numbers of targets is another number, and another gradient.
"""

import abc
import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree, Shaped

from flaxpretrain.data.framing import Framing
from flaxpretrain.data.store import Split
from flaxpretrain.data.vocabulary import Vocabulary
from flaxpretrain.models.functional import Model
from flaxpretrain.models.layers import place_of_largest


class Sum(NamedTuple):
    """A sum and its weight; the mean is `total / weight`, taken once, at the very end.

    `total` may be an array (a histogram, say). A weight of 0 means that nothing was measured.
    """

    total: Shaped[Any, "..."]
    weight: Shaped[Any, ""]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective(abc.ABC):
    """A pretraining objective: frames rows for the host, and scores a batch on the device.

    A new objective is one file with one subclass. Its fields are its numbers, so that a recipe can
    state them and an override can reach them.
    """

    terms: Mapping[str, float]
    """Coefficient of each loss term, by the name under which `loss` returns its Sum."""

    requires: ClassVar[tuple[str, ...]] = ()
    """Methods that the built module must have, for an error before anything is compiled."""

    groups: ClassVar[Mapping[str, str]] = {}
    """Parameter path regex -> optimizer group, for objectives that train two networks."""

    sharding: ClassVar[tuple[Any, ...]] = ()
    """Rules, beside the architecture's, for parameters that the objective adds to the model's."""

    @abc.abstractmethod
    def framing(self, vocabulary: Vocabulary, length: int) -> Framing:
        """The frozen, numpy-only value that turns rows into batches of this objective."""

    @abc.abstractmethod
    def loss(
        self, model: Model, params: PyTree, batch: Mapping[str, Array], key: Array | None
    ) -> dict[str, Sum]:
        """Sums of all loss terms and metrics; `key` drives dropout only (None: no dropout).

        All other noise comes from `batch["noise_key"]`, so that it depends on the row alone.
        """

    @abc.abstractmethod
    def weights(self, batch: Mapping[str, Array]) -> dict[str, Float[Array, ""]]:
        """Weight of each term over the whole global batch, from the batch alone."""

    @abc.abstractmethod
    def flops(self, model_config: Any, spec: Mapping[str, jax.ShapeDtypeStruct]) -> float:
        """Model FLOPs of one training step over a batch of this shape, by formula."""

    def tokens(self, batch: Mapping[str, Array]) -> Int[Array, ""]:
        """Real input tokens of a batch: positions of segment 0 are padding and do not count."""
        return sum(
            (jnp.sum(v > 0) for n, v in batch.items() if n.endswith("segment_ids")),
            start=jnp.int32(0),
        )

    def build(self, model_config: Any, rngs: nnx.Rngs) -> nnx.Module:
        """The module that holds this objective's parameters."""
        return model_config.build(rngs)

    def summarize(self, sums: Mapping[str, Sum]) -> dict[str, float]:
        """Figures to report, on the host: the mean of each Sum that measured something."""
        return {
            name: float(np.asarray(s.total, np.float64) / s.weight)
            for name, s in sums.items()
            if np.ndim(s.total) == 0 and s.weight > 0
        }

    def per_text(self, figures: Mapping[str, float], split: Split) -> dict[str, float]:
        """More figures of an evaluation on a split: those that depend on the text behind tokens.

        `figures` are what `summarize` gave.
        """
        return {}

    def parts(self, model_config: Any, params: PyTree) -> dict[str, tuple[Any, PyTree]]:
        """The networks a reader may want on the hub: name -> (configuration, parameters)."""
        return {"model": (model_config, params)}


def perplexity(nats: float) -> float:
    """`exp(nats)`, infinite where a float cannot hold it."""
    return math.exp(nats) if nats < 700 else math.inf


def cross_entropy(
    logits: Float[Array, "*B V"], labels: Int[Array, "*B"], weights: Float[Array, "*B"]
) -> Sum:
    """Weighted softmax cross entropy in float32, by log-sum-exp and without one-hot labels."""
    # A weight of zero must silence even an infinite loss.
    nats = jnp.where(weights > 0, -log_likelihood(logits, labels), 0.0)
    return Sum(jnp.sum(nats * weights), jnp.sum(weights))


def log_likelihood(logits: Float[Array, "*B V"], labels: Int[Array, "*B"]) -> Float[Array, "*B"]:
    """The logarithm, in float32, of the softmax at the labels."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def accuracy(
    logits: Float[Array, "*B V"], labels: Int[Array, "*B"], weights: Float[Array, "*B"]
) -> Sum:
    """How often the largest logit is the label's; ties go to the lower id."""
    right = (place_of_largest(logits) == labels).astype(jnp.float32)
    return Sum(jnp.sum(right * weights), jnp.sum(weights))


def gather_positions(
    hidden: Float[Array, "B L D"], positions: Int[Array, "B M"]
) -> Float[Array, "B M D"]:
    """The hidden states at M positions of each row."""
    return jnp.take_along_axis(hidden, positions[..., None], axis=1)


def dropout_keys(key: Array | None, noise_key: Shaped[Array, "B 2"]) -> Array | None:
    """One dropout key a row, made of the step's key and the row's own number.

    A row so keeps its dropout mask in whatever microbatch or device it lands.
    """
    if key is None:
        return None

    def row_key(words: Array) -> Array:
        return jax.random.fold_in(jax.random.fold_in(key, words[0]), words[1])

    return jax.vmap(row_key)(noise_key)
