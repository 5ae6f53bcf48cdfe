"""The network that BERT and its relatives share: embeddings, post-norm layers and heads.

Reference: https://arxiv.org/abs/1810.04805; google-research/bert modeling.py.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from flaxpretrain.models.attention import Attention
from flaxpretrain.models.encoder_config import EncoderConfig
from flaxpretrain.models.functional import fold, scan, stack
from flaxpretrain.models.language_head import present, vocabulary_logits
from flaxpretrain.models.layers import (
    Dense,
    LayerNorm,
    activation,
    dropout,
    lean,
    sinusoidal,
    take,
    trailing,
    truncated_normal,
    zeros,
)

_EMBEDDINGS = 0xFFFF_FFFF  # folded into a row's dropout key; the layers fold in their numbers


class Embeddings(nnx.Module):
    """Sum of word, position and token type embeddings, normalised.

    `width` is the tables' own: a network may project it to its hidden size afterwards.
    """

    def __init__(self, config: EncoderConfig, width: int, rngs: nnx.Rngs):
        stddev = config.initializer_range
        self.words = truncated_normal(rngs, (config.padded_vocab_size, width), stddev)
        table = {"normal": truncated_normal, "sinusoidal": sinusoidal}[config.position_init]
        self.positions = table(rngs, (config.max_position_embeddings, width), stddev)
        types = config.type_vocab_size
        self.types = truncated_normal(rngs, (types, width), stddev) if types else None
        self.norm = LayerNorm(width, epsilon=config.layer_norm_eps)
        self.position_offset = config.position_offset
        self.dropout_rate = config.hidden_dropout_prob

    def __call__(
        self,
        input_ids: Int[Array, "B L"],
        position_ids: Int[Array, "B L"],
        token_type_ids: Int[Array, "B L"] | None = None,
        keys: Key[Array, "B"] | None = None,
    ) -> Float[Array, "B L D"]:
        """Embedded tokens; positions are 0-based, and token types 0 where they are not given.

        A network without a table of token types takes no notice of them.
        """
        hidden = take(self.words[...], input_ids)
        hidden += take(self.positions[...], position_ids + self.position_offset)
        if self.types is not None:
            types = self.types[...]
            if token_type_ids is None:
                hidden += trailing(types[0], hidden)
            else:
                hidden += take(types, token_type_ids)
        return dropout(self.norm(hidden), self.dropout_rate, fold(keys, _EMBEDDINGS))


class FeedForward(nnx.Module):
    """Two dense layers with an activation between them."""

    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
        width, inner = config.hidden_size, config.intermediate_size
        self.up = Dense(width, inner, rngs, stddev=config.initializer_range)
        self.down = Dense(inner, width, rngs, stddev=config.initializer_range)
        self.hidden_act = config.hidden_act

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """`down(activation(up(x)))`."""
        act = activation(self.hidden_act)
        return lean(lambda y: self.down(act(y)))(self.up(x))


class EncoderLayer(nnx.Module):
    """Attention and feed-forward, each added to its input and then normalised."""

    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs, *, causal: bool = False):
        width = config.hidden_size
        self.attention = Attention(
            width,
            config.num_attention_heads,
            rngs,
            stddev=config.initializer_range,
            dropout_rate=config.attention_probs_dropout_prob,
            causal=causal,
        )
        self.attention_norm = LayerNorm(width, epsilon=config.layer_norm_eps)
        self.feed_forward = FeedForward(config, rngs)
        self.feed_forward_norm = LayerNorm(width, epsilon=config.layer_norm_eps)
        self.dropout_rate = config.hidden_dropout_prob

    def __call__(
        self,
        x: Float[Array, "B L D"],
        segment_ids: Int[Array, "B L"],
        keys: Key[Array, "B"] | None = None,
    ) -> Float[Array, "B L D"]:
        """One layer over a row; tokens see their own segment only."""
        attended = self.attention(x, segment_ids, fold(keys, 0))
        x = self.attention_norm(x + dropout(attended, self.dropout_rate, fold(keys, 1)))
        fed = self.feed_forward(x)
        return self.feed_forward_norm(x + dropout(fed, self.dropout_rate, fold(keys, 2)))


class Encoder(nnx.Module):
    """The layers alone; where they are causal, no token sees those after it."""

    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs, *, causal: bool = False):
        def layer(rngs: nnx.Rngs) -> EncoderLayer:
            return EncoderLayer(config, rngs, causal=causal)

        self.layers = stack(layer, config.num_hidden_layers, rngs)

    def __call__(
        self,
        hidden: Float[Array, "B L D"],
        segment_ids: Int[Array, "B L"],
        keys: Key[Array, "B"] | None = None,
        *,
        remat: str | None = None,
    ) -> Float[Array, "B L D"]:
        """All layers in turn; `remat` overrides the policy of the surrounding `executing`."""
        return scan(
            self.layers,
            lambda layer, x, layer_keys: layer(x, segment_ids, layer_keys),
            hidden,
            keys,
            remat=remat,
        )


class MaskedHead(nnx.Module):
    """Transform and vocabulary: the words' own embeddings where tied, else a decoder of its own.

    `width` is that of the word table, by default the hidden size.
    """

    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs, width: int | None = None):
        width, stddev = width or config.hidden_size, config.initializer_range
        self.dense = Dense(config.hidden_size, width, rngs, stddev=stddev)
        self.norm = LayerNorm(width, epsilon=config.layer_norm_eps)
        rows, tied = config.padded_vocab_size, config.tie_word_embeddings
        self.decoder = None if tied else Dense(width, rows, rngs, stddev=stddev)
        self.bias = zeros((rows,)) if tied else None
        self.head_act = config.head_act
        self.vocab_size = config.vocab_size

    def __call__(
        self, hidden: Float[Array, "*B D"], words: Float[Array, "V width"]
    ) -> Float[Array, "*B V"]:
        """Logits in float32; those of the padded vocabulary's extra tokens are hugely negative."""
        x = self.norm(activation(self.head_act)(self.dense(hidden)))
        if self.decoder is not None:
            kernel, bias = self.decoder.kernel[...], present(self.decoder.bias, "mlm")[...]
        else:
            kernel, bias = words.T, present(self.bias, "mlm")[...]
        return vocabulary_logits(x, kernel, self.vocab_size, bias)


class EncoderModel(nnx.Module):
    """Embeddings, layers and the heads that the configuration names."""

    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
        width, stddev = config.hidden_size, config.initializer_range
        narrow = config.table_width
        self.embeddings = Embeddings(config, narrow, rngs)
        self.encoder = config.trunk(rngs)
        self.mlm_head = MaskedHead(config, rngs, narrow) if "mlm" in config.heads else None
        self.pooler = Dense(width, width, rngs, stddev=stddev) if "pooler" in config.heads else None
        self.nsp_head = Dense(width, 2, rngs, stddev=stddev) if "nsp" in config.heads else None
        projects = config.projects
        self.embeddings_project = Dense(narrow, width, rngs, stddev=stddev) if projects else None

    def embed(
        self,
        input_ids: Int[Array, "B L"],
        segment_ids: Int[Array, "B L"],
        position_ids: Int[Array, "B L"],
        token_type_ids: Int[Array, "B L"] | None = None,
        keys: Key[Array, "B"] | None = None,
    ) -> Float[Array, "B L D"]:
        """Embedded tokens at the hidden width, with dropout where keys are given."""
        embedded = self.embeddings(input_ids, position_ids, token_type_ids, keys)
        return embedded if self.embeddings_project is None else self.embeddings_project(embedded)

    def encode(
        self,
        hidden: Float[Array, "B L D"],
        segment_ids: Int[Array, "B L"],
        keys: Key[Array, "B"] | None = None,
        *,
        remat: str | None = None,
    ) -> Float[Array, "B L D"]:
        """Hidden states after the last layer; tokens see their own segment only, 0 is padding."""
        return self.encoder(hidden, segment_ids, keys, remat=remat)

    def logits(self, hidden: Float[Array, "B M D"]) -> Float[Array, "B M V"]:
        """Scores in float32 of every token of the padded vocabulary."""
        return present(self.mlm_head, "mlm")(hidden, self.embeddings.words[...])

    def pool(
        self, hidden: Float[Array, "B L D"], positions: Int[Array, "B G"]
    ) -> Float[Array, "B G D"]:
        """What the pooler makes of the tokens at these positions: each piece's first."""
        first = jnp.take_along_axis(hidden, positions[..., None], axis=1)
        return jnp.tanh(present(self.pooler, "pooler")(first))

    def next_sentence_logits(self, pooled: Float[Array, "B G D"]) -> Float[Array, "B G 2"]:
        """Scores in float32 of "is the next sentence" (0) and "is a random one" (1)."""
        return present(self.nsp_head, "nsp")(pooled).astype(jnp.float32)
