"""An encoder-decoder's task by a decoder alone: source and target stand in one row.

Reference: T5, https://arxiv.org/abs/1910.10683, section 3.2, figures 3 and 4.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from flaxpretrain.data.framing import Framing
from flaxpretrain.data.vocabulary import Vocabulary
from flaxpretrain.models.functional import Model
from flaxpretrain.objectives.next_token import scored_in_chunks, sums_of
from flaxpretrain.objectives.objective import Objective, Sum, dropout_keys, perplexity
from flaxpretrain.objectives.span_denoising import SpanDenoising


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixLM(Objective):
    """Cross entropy of the target's tokens, each from the source and the tokens before it.

    task: what source and target are.
    sees_source: the tokens of a source see all of it, as those of an encoder do; else only those
        before them, as in a language model.
    terms: with "z_loss" beside "denoising", the mean square of log Z is added with its coefficient.
    """

    task: SpanDenoising
    sees_source: bool = True
    terms: Mapping[str, float] = dataclasses.field(default_factory=lambda: {"denoising": 1.0})

    requires: ClassVar[tuple[str, ...]] = ("embed", "decode_causally", "logits")

    def framing(self, vocabulary: Vocabulary, length: int) -> Framing:
        """Sources of `length` positions, and their targets, as for an encoder-decoder."""
        return self.task.framing(vocabulary, length)

    def weights(self, batch: Mapping[str, Array]) -> dict[str, Float[Array, ""]]:
        """How many labels count, for every term."""
        return dict.fromkeys(self.terms, jnp.sum(batch["label_weights"]))

    def loss(
        self, model: Model, params: PyTree, batch: Mapping[str, Array], key: Array | None
    ) -> dict[str, Sum]:
        """Sums of the loss in nats, of right predictions, and of the z-loss where it is a term."""
        module: Any = model.bind(params)
        keys = dropout_keys(key, batch["noise_key"])
        source, target = batch["segment_ids"], batch["decoder_segment_ids"]
        ids = jnp.concatenate([batch["input_ids"], batch["decoder_input_ids"]], axis=1)
        segments = jnp.concatenate([source, target], axis=1)
        places = jnp.concatenate([batch["position_ids"], _after_sources(batch)], axis=1)
        prefix = jnp.concatenate([source > 0, target < 0], axis=1) if self.sees_source else None
        hidden = module.embed(ids, segments, places, keys=keys)
        hidden = module.decode_causally(hidden, segments, keys=keys, prefix=prefix)
        hidden = hidden[:, source.shape[1] :]
        weights = batch["label_weights"]
        labels, chunks = batch["labels"], self.task.chunks
        scores = scored_in_chunks(model, params, hidden, labels, weights, chunks)
        sums = sums_of(scores, jnp.sum(weights), "denoising")
        return {n: s for n, s in sums.items() if n != "z_loss" or n in self.terms}

    def summarize(self, sums: Mapping[str, Sum]) -> dict[str, float]:
        """The means, and the perplexity of the targets."""
        means = super().summarize(sums)
        if "denoising" in means:
            means["perplexity"] = perplexity(means["denoising"])
        return means

    def flops(self, model_config: Any, spec: Mapping[str, jax.ShapeDtypeStruct]) -> float:
        """Forward and backward over every position, the vocabulary head at those of targets.

        The attention of a source's tokens to later ones is not counted.
        """
        rows, length = spec["input_ids"].shape
        targets = spec["labels"].shape[1]
        both = length + targets
        return rows * both * model_config.flops_per_token(both, targets / both)


def _after_sources(batch: Mapping[str, Array]) -> Int[Array, "B T"]:
    """Positions of target tokens that count on from the end of their own source."""
    source, target = batch["segment_ids"], batch["decoder_segment_ids"]
    own = (target[:, :, None] == source[:, None]).astype(jnp.int32)
    positions = batch["decoder_position_ids"] + jnp.sum(own, axis=2)
    return jnp.where(target > 0, positions, 0)
