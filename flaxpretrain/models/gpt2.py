"""GPT-2, https://openai.com/research/better-language-models: a decoder alone, norms first.

Reference: openai/gpt-2 src/model.py; Transformers models/gpt2 for the names and options.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from flaxpretrain.models.attention import Attention
from flaxpretrain.models.functional import fold, scan, stack
from flaxpretrain.models.language_head import LanguageHead, present
from flaxpretrain.models.layers import Dense, LayerNorm, activation, dropout, lean, normal, take
from flaxpretrain.models.memory import Kept, Memory
from flaxpretrain.models.model_config import ModelConfig
from flaxpretrain.models.names import (
    Drop,
    Entry,
    Flat,
    Kernel,
    Part,
    Prefix,
    Rule,
    Tie,
    Vocabulary,
)
from flaxpretrain.models.positions import restarting

_EMBEDDINGS = 0xFFFF_FFFF  # folded into a row's dropout key; the layers fold in their numbers

SHARDING = (
    # Rows over both axes, as the vocabulary of the logits is; the small table is on every device.
    (r"embeddings/words$", (("tensor", "fsdp"), None)),
    (r"embeddings/positions$", (None, None)),
    (r"layers/attention/(query|key|value)/kernel$", (None, "fsdp", "tensor", None)),
    (r"layers/attention/(query|key|value)/bias$", (None, "tensor", None)),
    (r"layers/attention/out/kernel$", (None, "tensor", None, "fsdp")),
    (r"layers/feed_forward/up/kernel$", (None, "fsdp", "tensor")),
    (r"layers/feed_forward/up/bias$", (None, "tensor")),
    (r"layers/feed_forward/down/kernel$", (None, "tensor", "fsdp")),
    (r"layers/.*(out|down)/bias$", (None, None)),
    (r"layers/.*norm/(scale|bias)$", (None, None)),
    (r"lm_head/kernel$", ("fsdp", "tensor")),
    (r"norm/(scale|bias)$", (None,)),
)
"""Path regex of parameters -> mesh axis of each of their dimensions."""


def _norm(name: str, path: str) -> tuple[Rule, ...]:
    return Rule(f"{name}.weight", f"{path}/scale"), Rule(f"{name}.bias", f"{path}/bias")


def _dense(name: str, path: str, inputs: int = 1) -> tuple[Rule, ...]:
    """Transformers' Conv1D has a kernel with the inputs first."""
    return (
        Rule(f"{name}.weight", f"{path}/kernel", Kernel(inputs, transposed=False)),
        Rule(f"{name}.bias", f"{path}/bias"),
    )


def _heads(name: str, path: str, index: int) -> tuple[Rule, ...]:
    """One of query, key and value, which Transformers keeps in one array."""
    return (
        Rule(f"{name}.weight", f"{path}/kernel", Part(index, 3, 1, Kernel(transposed=False))),
        Rule(f"{name}.bias", f"{path}/bias", Part(index, 3, 0, Flat())),
    )


_BLOCK, _LAYERS = "transformer.h.{}", "decoder/layers"

HF_NAMES: tuple[Entry, ...] = (
    Prefix("transformer.", always=True),
    Drop(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)", "a constant, not a parameter"),
    Rule("transformer.wte.weight", "embeddings/words", Vocabulary()),
    Rule("transformer.wpe.weight", "embeddings/positions"),
    *_norm(f"{_BLOCK}.ln_1", f"{_LAYERS}/attention_norm"),
    *_heads(f"{_BLOCK}.attn.c_attn", f"{_LAYERS}/attention/query", 0),
    *_heads(f"{_BLOCK}.attn.c_attn", f"{_LAYERS}/attention/key", 1),
    *_heads(f"{_BLOCK}.attn.c_attn", f"{_LAYERS}/attention/value", 2),
    *_dense(f"{_BLOCK}.attn.c_proj", f"{_LAYERS}/attention/out", inputs=2),
    *_norm(f"{_BLOCK}.ln_2", f"{_LAYERS}/feed_forward_norm"),
    *_dense(f"{_BLOCK}.mlp.c_fc", f"{_LAYERS}/feed_forward/up"),
    *_dense(f"{_BLOCK}.mlp.c_proj", f"{_LAYERS}/feed_forward/down"),
    *_norm("transformer.ln_f", "decoder/norm"),
    Rule("lm_head.weight", "lm_head/kernel", Vocabulary(transposed=True)),
    Tie("lm_head.weight", "transformer.wte.weight"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPT2Config(ModelConfig):
    """GPT-2, with the defaults of openai-community/gpt2, the smallest.

    reorder_and_upcast_attn: kept for Transformers; here attention scores are always float32.
    heads: "lm", the language modelling head.
    vocab_multiple: the word table is padded with rows to a multiple of this; the tokens it adds
        are never predicted, and exports leave them out.
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False
    bos_token_id: int | None = 50256
    eos_token_id: int | None = 50256
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True
    heads: tuple[str, ...] = ("lm",)
    vocab_multiple: int = 128

    model_type: ClassVar = "gpt2"
    architectures: ClassVar = {"GPT2LMHeadModel": ("lm",), "GPT2Model": ()}
    fixed_options: ClassVar = {"add_cross_attention": False, "is_encoder_decoder": False}
    names: ClassVar = HF_NAMES
    sharding: ClassVar = SHARDING

    def __post_init__(self):
        """Raises UserError on sizes and rates that cannot be."""
        self._require_positive(
            "vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "vocab_multiple"
        )
        self._require(self.n_inner is None or self.n_inner > 0, "n_inner", "a positive number")
        self._require_rates("resid_pdrop", "embd_pdrop", "attn_pdrop")
        fits = self.n_embd % self.n_head == 0
        self._require(fits, "n_embd", f"a multiple of n_head ({self.n_head})")
        self._require_known_heads()
        activation(self.activation_function)

    @property
    def max_length(self) -> int:
        """Longest piece, in tokens, that the position table has rows for."""
        return self.n_positions

    @property
    def attention_dropout_rate(self) -> float:
        """Dropout on the attention weights, which flash kernels do not have."""
        return self.attn_pdrop

    @property
    def inner(self) -> int:
        """Width of the feed-forward layers."""
        return self.n_inner or 4 * self.n_embd

    def build(self, rngs: nnx.Rngs) -> "GPT2":
        """The whole network."""
        return GPT2(self, rngs)

    def flops_per_token(self, length: int, predicted_share: float = 1.0) -> float:
        """Model FLOPs, forward and backward, of one token in a row of `length` tokens.

        Matrix products only, 2 FLOPs a multiply-add, the backward pass twice the forward pass. A
        token attends half of its row on average, and no kernel need compute the other half. The
        head counts at `predicted_share` of the tokens, for the true vocabulary. Rows of several
        documents are counted as if they were one.

        Reference: https://arxiv.org/abs/2001.08361, section 2.1; attention as in karpathy/llm.c
        train_gpt2.cu (karpathy/nanoGPT counts the scores in full).
        """
        width = self.n_embd
        layer = 4 * width**2 + 2 * width * self.inner + length * width
        head = width * self.vocab_size if "lm" in self.heads else 0
        return 3.0 * 2.0 * (self.n_layer * layer + predicted_share * head)


class Embeddings(nnx.Module):
    """Sum of word and position embeddings."""

    def __init__(self, config: GPT2Config, rngs: nnx.Rngs):
        stddev = config.initializer_range
        self.words = normal(rngs, (config.padded_vocab_size, config.n_embd), stddev)
        self.positions = normal(rngs, (config.n_positions, config.n_embd), stddev)
        self.dropout_rate = config.embd_pdrop

    def __call__(
        self,
        input_ids: Int[Array, "B L"],
        position_ids: Int[Array, "B L"],
        keys: Key[Array, "B"] | None = None,
    ) -> Float[Array, "B L D"]:
        """Embedded tokens."""
        hidden = take(self.words[...], input_ids) + take(self.positions[...], position_ids)
        return dropout(hidden, self.dropout_rate, fold(keys, _EMBEDDINGS))


class FeedForward(nnx.Module):
    """Two dense layers with an activation between them."""

    def __init__(self, config: GPT2Config, rngs: nnx.Rngs):
        stddev, width, inner = config.initializer_range, config.n_embd, config.inner
        residual = stddev / (2 * config.n_layer) ** 0.5
        self.up = Dense(width, inner, rngs, stddev=stddev, initial=normal)
        self.down = Dense(inner, width, rngs, stddev=residual, initial=normal)
        self.activation_function = config.activation_function

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """`down(activation(up(x)))`."""
        act = activation(self.activation_function)
        return lean(lambda y: self.down(act(y)))(self.up(x))


class DecoderLayer(nnx.Module):
    """Causal attention and feed-forward, each of its normalised input and added to it.

    What is added starts smaller the more layers there are: section 2.3 of the paper.
    """

    def __init__(self, config: GPT2Config, rngs: nnx.Rngs):
        stddev, width = config.initializer_range, config.n_embd
        self.attention_norm = LayerNorm(width, epsilon=config.layer_norm_epsilon)
        self.attention = Attention(
            width,
            config.n_head,
            rngs,
            stddev=stddev,
            out_stddev=stddev / (2 * config.n_layer) ** 0.5,
            dropout_rate=config.attn_pdrop,
            causal=True,
            scaled=config.scale_attn_weights,
            initial=normal,
        )
        self.feed_forward_norm = LayerNorm(width, epsilon=config.layer_norm_epsilon)
        self.feed_forward = FeedForward(config, rngs)
        self.dropout_rate = config.resid_pdrop

    def __call__(
        self,
        x: Float[Array, "B L D"],
        segment_ids: Int[Array, "B L"],
        keys: Key[Array, "B"] | None = None,
        *,
        prefix: Bool[Array, "B L"] | None = None,
        scale: Any = 1.0,
    ) -> Float[Array, "B L D"]:
        """One layer over a row; `scale` multiplies the attention scores."""
        attended = self.attention(
            self.attention_norm(x), segment_ids, fold(keys, 0), prefix=prefix, scale=scale
        )
        x += dropout(attended, self.dropout_rate, fold(keys, 1))
        fed = self.feed_forward(self.feed_forward_norm(x))
        return x + dropout(fed, self.dropout_rate, fold(keys, 2))

    def recall(
        self,
        x: Float[Array, "B L D"],
        segment_ids: Int[Array, "B L"],
        memory: Memory,
        kept: Kept,
        scale: Any = 1.0,
    ) -> tuple[Float[Array, "B L D"], Kept]:
        """As when called without dropout, for more tokens of rows that are remembered."""
        attended, kept = self.attention.recall(
            self.attention_norm(x), segment_ids, kept, memory.segment_ids, memory.place, scale=scale
        )
        x += attended
        return x + self.feed_forward(self.feed_forward_norm(x)), kept


class Decoder(nnx.Module):
    """The layers and the norm after them."""

    def __init__(self, config: GPT2Config, rngs: nnx.Rngs):
        self.layers = stack(lambda rngs: DecoderLayer(config, rngs), config.n_layer, rngs)
        self.norm = LayerNorm(config.n_embd, epsilon=config.layer_norm_epsilon)
        by_layer = config.scale_attn_by_inverse_layer_idx
        self.scaled_layers = config.n_layer if by_layer else None

    def __call__(
        self,
        hidden: Float[Array, "B L D"],
        segment_ids: Int[Array, "B L"],
        keys: Key[Array, "B"] | None = None,
        *,
        prefix: Bool[Array, "B L"] | None = None,
        remat: str | None = None,
    ) -> Float[Array, "B L D"]:
        """All layers in turn; `remat` overrides the policy of the surrounding `executing`."""

        def apply(layer: Any, x: Array, layer_keys: Any, scale: Any = 1.0) -> Array:
            return layer(x, segment_ids, layer_keys, prefix=prefix, scale=scale)

        count = self.scaled_layers
        scales = None if count is None else 1.0 / jnp.arange(1, count + 1, dtype=jnp.float32)
        return self.norm(scan(self.layers, apply, hidden, keys, each=scales, remat=remat))


class GPT2(nnx.Module):
    """Embeddings, layers and the language modelling head."""

    def __init__(self, config: GPT2Config, rngs: nnx.Rngs):
        self.embeddings = Embeddings(config, rngs)
        self.decoder = Decoder(config, rngs)
        self.lm_head = (
            LanguageHead(
                config.n_embd,
                config.padded_vocab_size,
                config.vocab_size,
                rngs,
                tied=config.tie_word_embeddings,
                stddev=config.initializer_range,
            )
            if "lm" in config.heads
            else None
        )

    def embed(
        self,
        input_ids: Int[Array, "B L"],
        segment_ids: Int[Array, "B L"],
        position_ids: Int[Array, "B L"] | None = None,
        keys: Key[Array, "B"] | None = None,
    ) -> Float[Array, "B L D"]:
        """Embedded tokens, with dropout where keys are given; positions restart by default."""
        if position_ids is None:
            position_ids = restarting(segment_ids)
        return self.embeddings(input_ids, position_ids, keys)

    def decode_causally(
        self,
        hidden: Float[Array, "B L D"],
        segment_ids: Int[Array, "B L"],
        keys: Key[Array, "B"] | None = None,
        *,
        prefix: Bool[Array, "B L"] | None = None,
        remat: str | None = None,
    ) -> Float[Array, "B L D"]:
        """Hidden states after the last layer; tokens see those before them in their segment.

        The tokens of a `prefix` are seen by all of their segment.
        """
        return self.decoder(hidden, segment_ids, keys, prefix=prefix, remat=remat)

    def recall(
        self,
        layers: Sequence[DecoderLayer],
        hidden: Float[Array, "B L D"],
        segment_ids: Int[Array, "B L"],
        memory: Memory,
    ) -> tuple[Float[Array, "B L D"], Memory]:
        """Hidden states of more tokens after those remembered; several only at the beginning.

        `layers` are the decoder's own, `apart`.
        """
        memory = memory.noted(segment_ids)
        found = []
        for number, (layer, kept) in enumerate(zip(layers, memory.kept, strict=True)):
            scale = 1.0 if self.decoder.scaled_layers is None else 1.0 / (number + 1)
            hidden, kept = layer.recall(hidden, segment_ids, memory, kept, scale)
            found.append(kept)
        return self.decoder.norm(hidden), memory.advanced(tuple(found), hidden.shape[1])

    def logits(self, hidden: Float[Array, "B M D"]) -> Float[Array, "B M V"]:
        """Scores in float32 of every token of the padded vocabulary."""
        return present(self.lm_head, "lm")(hidden, self.embeddings.words[...])
