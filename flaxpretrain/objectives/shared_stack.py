"""Denoising by a T5 whose encoder has no layers of its own: it uses those of the decoder.

Reference: T5, https://arxiv.org/abs/1910.10683, section 3.2.1 ("shared").
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
from flax import nnx
from jaxtyping import Array, Float, Int, Key, PyTree

from flaxpretrain.data.framing import Framing
from flaxpretrain.data.vocabulary import Vocabulary
from flaxpretrain.errors import UserError
from flaxpretrain.models.functional import Model, fold, scan
from flaxpretrain.models.layers import RMSNorm, dropout, normal
from flaxpretrain.models.positions import relative_bias
from flaxpretrain.models.t5 import T5, T5Config
from flaxpretrain.objectives.objective import Objective, Sum
from flaxpretrain.objectives.span_denoising import SpanDenoising

_OUTPUT = 0xFFFF_FFFB  # folded into a row's dropout key; the layers fold in their numbers


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedStack(Objective):
    """An encoder-decoder's task by a T5 that has one stack of layers, for both sides.

    Attention to the encoder is the decoder's alone, and so are the biases by distance and the last
    norm of each side. For a `T5Config` with as many layers on both sides.
    """

    task: SpanDenoising
    terms: Mapping[str, float] = dataclasses.field(default_factory=lambda: {"denoising": 1.0})

    requires: ClassVar[tuple[str, ...]] = SpanDenoising.requires

    def framing(self, vocabulary: Vocabulary, length: int) -> Framing:
        """As for the task."""
        return self.task.framing(vocabulary, length)

    def build(self, model_config: Any, rngs: nnx.Rngs) -> nnx.Module:
        """The network with one stack; raises UserError for a model that cannot have it."""
        if not isinstance(model_config, T5Config) or model_config.num_decoder_layers is not None:
            raise UserError(
                "SharedStack needs a T5Config with as many layers in the decoder as in the encoder"
            )
        return SharedT5(model_config, rngs)

    def weights(self, batch: Mapping[str, Array]) -> dict[str, Float[Array, ""]]:
        """How many labels count, for every term."""
        return dict.fromkeys(self.terms, self.task.weights(batch)["denoising"])

    def loss(
        self, model: Model, params: PyTree, batch: Mapping[str, Array], key: Array | None
    ) -> dict[str, Sum]:
        """As for the task."""
        task = dataclasses.replace(self.task, terms=self.terms)
        return task.loss(model, params, batch, key)

    def summarize(self, sums: Mapping[str, Sum]) -> dict[str, float]:
        """As for the task."""
        return self.task.summarize(sums)

    def flops(self, model_config: Any, spec: Mapping[str, jax.ShapeDtypeStruct]) -> float:
        """As for two stacks: each is computed."""
        return self.task.flops(model_config, spec)

    def parts(self, model_config: Any, params: PyTree) -> dict[str, tuple[Any, PyTree]]:
        """A T5 whose encoder has its own copy of the layers."""
        layers = params["decoder"]["layers"]
        alone = {name: layer for name, layer in layers.items() if not name.startswith("cross_")}
        whole = params | {"encoder": params["encoder"] | {"layers": alone}}
        return {"model": (model_config, whole)}


class Side(nnx.Module):
    """What an encoder without layers has: biases by distance and a last norm."""

    def __init__(self, config: T5Config, rngs: nnx.Rngs):
        shape = (config.relative_attention_num_buckets, config.num_heads)
        self.relative_bias = normal(rngs, shape, config.initializer_factor * config.d_model**-0.5)
        self.norm = RMSNorm(config.d_model, epsilon=config.layer_norm_epsilon)
        self.farthest = config.relative_attention_max_distance
        self.dropout_rate = config.dropout_rate


class SharedT5(nnx.Module):
    """A T5 whose encoder goes through the decoder's layers, without their attention to it."""

    def __init__(self, config: T5Config, rngs: nnx.Rngs):
        whole = T5(config, rngs)
        self.embeddings = whole.embeddings
        self.encoder = Side(config, rngs)
        self.decoder = whole.decoder
        self.lm_head = whole.lm_head
        self.scale = whole.scale
        self.dropout_rate = whole.dropout_rate

    embed = T5.embed
    embed_decoder = T5.embed_decoder
    decode = T5.decode
    logits = T5.logits

    def encode(
        self,
        hidden: Float[Array, "B S D"],
        segment_ids: Int[Array, "B S"],
        keys: Key[Array, "B"] | None = None,
        *,
        remat: str | None = None,
    ) -> Float[Array, "B S D"]:
        """Hidden states of the encoder; tokens see all of their own segment, 0 is padding."""
        side, length = self.encoder, hidden.shape[1]
        bias = relative_bias(
            side.relative_bias[...], length, length, farthest=side.farthest, causal=False
        )

        def apply(layer: Any, x: Array, layer_keys: Any) -> Array:
            rate = layer.dropout_rate
            attended = layer.attention(
                layer.attention_norm(x),
                segment_ids,
                fold(layer_keys, 0),
                prefix=segment_ids > 0,  # the decoder's attention is causal but for a prefix
                score_bias=bias,
            )
            x += dropout(attended, rate, fold(layer_keys, 1))
            fed = layer.feed_forward(layer.feed_forward_norm(x), fold(layer_keys, 4))
            return x + dropout(fed, rate, fold(layer_keys, 5))

        hidden = side.norm(scan(self.decoder.layers, apply, hidden, keys, remat=remat))
        return dropout(hidden, side.dropout_rate, fold(keys, _OUTPUT))
