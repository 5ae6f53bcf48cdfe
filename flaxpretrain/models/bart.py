"""BART, https://arxiv.org/abs/1910.13461: BERT's layers in an encoder and a decoder.

Norms come after, positions are learned, and one table serves both sides and the logits.

Reference: facebookresearch/fairseq models/bart; Transformers models/bart for names and options.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from flaxpretrain.models.attention import Attention
from flaxpretrain.models.functional import fold, scan, stack
from flaxpretrain.models.language_head import present, tied_logits
from flaxpretrain.models.layers import (
    Dense,
    LayerNorm,
    activation,
    dropout,
    lean,
    normal,
    take,
    zeros,
)
from flaxpretrain.models.memory import Kept, Memory
from flaxpretrain.models.model_config import ModelConfig
from flaxpretrain.models.names import Drop, Entry, Flat, Kernel, Prefix, Rule, Tie, Vocabulary
from flaxpretrain.models.positions import restarting

# Folded into a row's dropout key; the layers fold in their numbers.
_EMBEDDINGS, _DECODER = 0xFFFF_FFFF, 0xFFFF_FFFD

_POSITION_OFFSET = 2
"""Unused rows at the start of the position tables, a habit of fairseq."""

_EPSILON = 1e-5

SHARDING = (
    # Rows over both axes, as the vocabulary of the logits is; the small tables are on every device.
    (r"^embeddings/words$", (("tensor", "fsdp"), None)),
    (r"embeddings/positions$", (None, None)),
    (r"layers/.*attention/(query|key|value)/kernel$", (None, "fsdp", "tensor", None)),
    (r"layers/.*attention/(query|key|value)/bias$", (None, "tensor", None)),
    (r"layers/.*attention/out/kernel$", (None, "tensor", None, "fsdp")),
    (r"layers/feed_forward/up/kernel$", (None, "fsdp", "tensor")),
    (r"layers/feed_forward/up/bias$", (None, "tensor")),
    (r"layers/feed_forward/down/kernel$", (None, "tensor", "fsdp")),
    (r"layers/.*(out|down)/bias$", (None, None)),
    (r"layers/.*norm/(scale|bias)$", (None, None)),
    (r"lm_head/bias$", ("tensor",)),
    (r"norm/(scale|bias)$", (None,)),
)
"""Path regex of parameters -> mesh axis of each of their dimensions."""


def _norm_names(name: str, path: str) -> tuple[Rule, ...]:
    return Rule(f"{name}.weight", f"{path}/scale"), Rule(f"{name}.bias", f"{path}/bias")


def _dense_names(name: str, path: str, inputs: int = 1) -> tuple[Rule, ...]:
    return (
        Rule(f"{name}.weight", f"{path}/kernel", Kernel(inputs)),
        Rule(f"{name}.bias", f"{path}/bias"),
    )


def _attention_names(name: str, path: str) -> tuple[Rule, ...]:
    parts = {"q_proj": "query", "k_proj": "key", "v_proj": "value"}
    rules = [Rule(f"{name}.{n}.weight", f"{path}/{p}/kernel", Kernel()) for n, p in parts.items()]
    rules += [Rule(f"{name}.{n}.bias", f"{path}/{p}/bias", Flat()) for n, p in parts.items()]
    return (*rules, *_dense_names(f"{name}.out_proj", f"{path}/out", inputs=2))


def _stack_names(side: str) -> tuple[Entry, ...]:
    block, layers = f"model.{side}.layers.{{}}", f"{side}/layers"
    return (
        Rule(f"model.{side}.embed_positions.weight", f"{side}/embeddings/positions"),
        *_norm_names(f"model.{side}.layernorm_embedding", f"{side}/embeddings/norm"),
        *_attention_names(f"{block}.self_attn", f"{layers}/attention"),
        *_norm_names(f"{block}.self_attn_layer_norm", f"{layers}/attention_norm"),
        *_dense_names(f"{block}.fc1", f"{layers}/feed_forward/up"),
        *_dense_names(f"{block}.fc2", f"{layers}/feed_forward/down"),
        *_norm_names(f"{block}.final_layer_norm", f"{layers}/feed_forward_norm"),
        Tie(f"model.{side}.embed_tokens.weight", "model.shared.weight"),
    )


_CROSS = "model.decoder.layers.{}.encoder_attn"

HF_NAMES: tuple[Entry, ...] = (
    Prefix("model."),
    Drop(r"model\.(encoder|decoder)\.version", "a constant, not a parameter"),
    Rule("model.shared.weight", "embeddings/words", Vocabulary()),
    *_stack_names("encoder"),
    *_stack_names("decoder"),
    *_attention_names(_CROSS, "decoder/layers/cross_attention"),
    *_norm_names(f"{_CROSS}_layer_norm", "decoder/layers/cross_attention_norm"),
    Rule("final_logits_bias", "lm_head/bias", Vocabulary(lying=True)),
    Tie("lm_head.weight", "model.shared.weight"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BartConfig(ModelConfig):
    """BART, with the defaults of facebook/bart-base.

    heads: "lm", the vocabulary head: the table of words, and a bias that is never trained.
    vocab_multiple: the word table is padded with rows to a multiple of this; the tokens it adds
        are never predicted, and exports leave them out.
    """

    vocab_size: int = 50265
    max_position_embeddings: int = 1024
    d_model: int = 768
    encoder_layers: int = 6
    encoder_ffn_dim: int = 3072
    encoder_attention_heads: int = 12
    decoder_layers: int = 6
    decoder_ffn_dim: int = 3072
    decoder_attention_heads: int = 12
    activation_function: str = "gelu"
    dropout: float = 0.1
    attention_dropout: float = 0.1
    activation_dropout: float = 0.1
    init_std: float = 0.02
    scale_embedding: bool = False
    pad_token_id: int = 1
    bos_token_id: int | None = 0
    eos_token_id: int | None = 2
    decoder_start_token_id: int = 2
    forced_eos_token_id: int | None = 2
    heads: tuple[str, ...] = ("lm",)
    vocab_multiple: int = 128

    model_type: ClassVar = "bart"
    architectures: ClassVar = {"BartForConditionalGeneration": ("lm",), "BartModel": ()}
    hf_defaults: ClassVar = {
        "d_model": 1024,
        "encoder_layers": 12,
        "encoder_ffn_dim": 4096,
        "encoder_attention_heads": 16,
        "decoder_layers": 12,
        "decoder_ffn_dim": 4096,
        "decoder_attention_heads": 16,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
    }
    fixed_options: ClassVar = {
        "is_encoder_decoder": True,
        "is_decoder": False,
        "tie_word_embeddings": True,
        "normalize_before": False,
        "normalize_embedding": True,
        "add_final_layer_norm": False,
        "add_bias_logits": False,
        "static_position_embeddings": False,
        "extra_pos_embeddings": 2,
        "encoder_layerdrop": 0.0,
        "decoder_layerdrop": 0.0,
    }
    names: ClassVar = HF_NAMES
    sharding: ClassVar = SHARDING

    def __post_init__(self):
        """Raises UserError on sizes and rates that cannot be."""
        self._require_positive(
            "vocab_size", "max_position_embeddings", "d_model", "init_std", "vocab_multiple"
        )
        for side in ("encoder", "decoder"):
            heads = f"{side}_attention_heads"
            self._require_positive(f"{side}_layers", f"{side}_ffn_dim", heads)
            fits = self.d_model % getattr(self, heads) == 0
            self._require(fits, "d_model", f"a multiple of {heads} ({getattr(self, heads)})")
        self._require_rates("dropout", "attention_dropout", "activation_dropout")
        self._require_known_heads()
        activation(self.activation_function)

    @property
    def max_length(self) -> int:
        """Longest piece, in tokens, that the position tables have rows for."""
        return self.max_position_embeddings

    @property
    def attention_dropout_rate(self) -> float:
        """Dropout on the attention weights, which flash kernels do not have."""
        return self.attention_dropout

    def build(self, rngs: nnx.Rngs) -> "Bart":
        """The whole network."""
        return Bart(self, rngs)

    def flops_per_row(self, length: int, target_length: int) -> float:
        """Model FLOPs, forward and backward, of a row of `length` inputs and its targets.

        Matrix products only, 2 FLOPs a multiply-add, the backward pass twice the forward pass. A
        token of the decoder attends half of the targets on average, and all inputs; the head
        counts at every target, for the true vocabulary.

        Reference: https://arxiv.org/abs/2001.08361, section 2.1.
        """
        width, both = self.d_model, length + target_length
        encoder = length * (4 * width + 2 * self.encoder_ffn_dim + 2 * length)
        decoder = target_length * (4 * width + 2 * self.decoder_ffn_dim + target_length)
        cross = 2 * both * width + 2 * length * target_length
        head = target_length * self.vocab_size if "lm" in self.heads else 0
        layers = self.encoder_layers * encoder + self.decoder_layers * (decoder + cross)
        return 6.0 * width * (layers + head)

    def to_hf(self) -> dict[str, Any]:
        """The content of Transformers' config.json for this network."""
        return super().to_hf() | {"is_encoder_decoder": True, "tie_word_embeddings": True}


class SideEmbeddings(nnx.Module):
    """What a side makes of words: positions added, normalised."""

    def __init__(self, config: BartConfig, rngs: nnx.Rngs):
        shape = (config.max_position_embeddings + _POSITION_OFFSET, config.d_model)
        self.positions = normal(rngs, shape, config.init_std)
        self.norm = LayerNorm(config.d_model, epsilon=_EPSILON)
        self.dropout_rate = config.dropout

    def __call__(
        self,
        words: Float[Array, "B L D"],
        position_ids: Int[Array, "B L"],
        keys: Key[Array, "B"] | None = None,
    ) -> Float[Array, "B L D"]:
        """Embedded tokens; positions are 0-based."""
        hidden = words + take(self.positions[...], position_ids + _POSITION_OFFSET)
        return dropout(self.norm(hidden), self.dropout_rate, fold(keys, _EMBEDDINGS))


class FeedForward(nnx.Module):
    """Two dense layers with an activation between them."""

    def __init__(self, config: BartConfig, inner: int, rngs: nnx.Rngs):
        width, stddev = config.d_model, config.init_std
        self.up = Dense(width, inner, rngs, stddev=stddev, initial=normal)
        self.down = Dense(inner, width, rngs, stddev=stddev, initial=normal)
        self.activation_function = config.activation_function
        self.dropout_rate = config.activation_dropout

    def __call__(
        self, x: Float[Array, "B L D"], keys: Key[Array, "B"] | None = None
    ) -> Float[Array, "B L D"]:
        """`down(activation(up(x)))`."""
        act = activation(self.activation_function)
        return lean(lambda y: self.down(dropout(act(y), self.dropout_rate, keys)))(self.up(x))


class Layer(nnx.Module):
    """Attention, attention to the encoder in the decoder, and feed-forward; norms come after."""

    def __init__(self, config: BartConfig, rngs: nnx.Rngs, *, decoder: bool):
        width = config.d_model
        heads = config.decoder_attention_heads if decoder else config.encoder_attention_heads
        inner = config.decoder_ffn_dim if decoder else config.encoder_ffn_dim

        def attention(*, causal: bool) -> Attention:
            return Attention(
                width,
                heads,
                rngs,
                stddev=config.init_std,
                dropout_rate=config.attention_dropout,
                causal=causal,
                initial=normal,
            )

        self.attention = attention(causal=decoder)
        self.attention_norm = LayerNorm(width, epsilon=_EPSILON)
        self.cross_attention = attention(causal=False) if decoder else None
        self.cross_attention_norm = LayerNorm(width, epsilon=_EPSILON) if decoder else None
        self.feed_forward = FeedForward(config, inner, rngs)
        self.feed_forward_norm = LayerNorm(width, epsilon=_EPSILON)
        self.dropout_rate = config.dropout

    def __call__(
        self,
        x: Float[Array, "B L D"],
        segment_ids: Int[Array, "B L"],
        encoded: Float[Array, "B S D"] | None = None,
        encoded_segment_ids: Int[Array, "B S"] | None = None,
        keys: Key[Array, "B"] | None = None,
    ) -> Float[Array, "B L D"]:
        """One layer over a row; tokens see their own segment only, in both rows."""
        attended = self.attention(x, segment_ids, fold(keys, 0))
        x = self.attention_norm(x + dropout(attended, self.dropout_rate, fold(keys, 1)))
        if self.cross_attention is not None and self.cross_attention_norm is not None:
            attended = self.cross_attention(
                x,
                segment_ids,
                fold(keys, 2),
                source=encoded,
                source_segment_ids=encoded_segment_ids,
            )
            x = self.cross_attention_norm(x + dropout(attended, self.dropout_rate, fold(keys, 3)))
        fed = self.feed_forward(x, fold(keys, 4))
        return self.feed_forward_norm(x + dropout(fed, self.dropout_rate, fold(keys, 5)))

    def recall(
        self, x: Float[Array, "B L D"], segments: Array, memory: Memory, number: int
    ) -> tuple[Float[Array, "B L D"], Kept]:
        """As when called without dropout, for more tokens of a decoder's rows."""
        attended, kept = self.attention.recall(
            x, segments, memory.kept[number], memory.segment_ids, memory.place
        )
        x = self.attention_norm(x + attended)
        cross_norm, cross = self.cross_attention_norm, self.cross_attention
        source_segments = memory.source_segment_ids
        if cross is not None and cross_norm is not None and source_segments is not None:
            seen = cross.recall(x, segments, memory.source[number], source_segments)[0]
            x = cross_norm(x + seen)
        return self.feed_forward_norm(x + self.feed_forward(x)), kept


class Stack(nnx.Module):
    """The encoder or the decoder: positions and layers."""

    def __init__(self, config: BartConfig, rngs: nnx.Rngs, *, decoder: bool):
        count = config.decoder_layers if decoder else config.encoder_layers
        self.embeddings = SideEmbeddings(config, rngs)
        self.layers = stack(lambda rngs: Layer(config, rngs, decoder=decoder), count, rngs)

    def __call__(
        self,
        hidden: Float[Array, "B L D"],
        segment_ids: Int[Array, "B L"],
        encoded: Float[Array, "B S D"] | None = None,
        encoded_segment_ids: Int[Array, "B S"] | None = None,
        keys: Key[Array, "B"] | None = None,
        *,
        remat: str | None = None,
    ) -> Float[Array, "B L D"]:
        """All layers in turn; `remat` overrides the policy of the surrounding `executing`."""

        def apply(layer: Any, x: Array, layer_keys: Any) -> Array:
            return layer(x, segment_ids, encoded, encoded_segment_ids, layer_keys)

        return scan(self.layers, apply, hidden, keys, remat=remat)


class Words(nnx.Module):
    """The table of words."""

    def __init__(self, config: BartConfig, rngs: nnx.Rngs):
        self.words = normal(rngs, (config.padded_vocab_size, config.d_model), config.init_std)


class Head(nnx.Module):
    """Transformers' bias of the logits: a constant there, so it is not trained here either."""

    def __init__(self, config: BartConfig):
        self.bias = zeros((config.padded_vocab_size,))
        self.vocab_size = config.vocab_size

    def __call__(
        self, hidden: Float[Array, "*B D"], words: Float[Array, "V D"]
    ) -> Float[Array, "*B V"]:
        """Scores in float32 of every token of the padded vocabulary."""
        bias = jax.lax.stop_gradient(self.bias[...])
        return tied_logits(hidden, words, self.vocab_size, bias)


class Bart(nnx.Module):
    """Embeddings, encoder, decoder and the vocabulary head."""

    def __init__(self, config: BartConfig, rngs: nnx.Rngs):
        self.embeddings = Words(config, rngs)
        self.encoder = Stack(config, rngs, decoder=False)
        self.decoder = Stack(config, rngs, decoder=True)
        self.lm_head = Head(config) if "lm" in config.heads else None
        self.scale = config.d_model**0.5 if config.scale_embedding else 1.0

    def _embedded(
        self, side: Stack, ids: Array, segment_ids: Array, position_ids: Any, keys: Any
    ) -> Array:
        if position_ids is None:
            position_ids = restarting(segment_ids)
        words = take(self.embeddings.words[...], ids) * self.scale
        return side.embeddings(words, position_ids, keys)

    def embed(
        self,
        input_ids: Int[Array, "B S"],
        segment_ids: Int[Array, "B S"],
        position_ids: Int[Array, "B S"] | None = None,
        keys: Key[Array, "B"] | None = None,
    ) -> Float[Array, "B S D"]:
        """Embedded tokens, with dropout where keys are given; positions restart by default."""
        return self._embedded(self.encoder, input_ids, segment_ids, position_ids, keys)

    def encode(
        self,
        hidden: Float[Array, "B S D"],
        segment_ids: Int[Array, "B S"],
        keys: Key[Array, "B"] | None = None,
        *,
        remat: str | None = None,
    ) -> Float[Array, "B S D"]:
        """Hidden states of the encoder; tokens see their own segment only, 0 is padding."""
        return self.encoder(hidden, segment_ids, keys=keys, remat=remat)

    def embed_decoder(
        self,
        decoder_input_ids: Int[Array, "B T"],
        decoder_segment_ids: Int[Array, "B T"],
        decoder_position_ids: Int[Array, "B T"] | None = None,
        keys: Key[Array, "B"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Embedded tokens of the decoder, which are the targets shifted right."""
        return self._embedded(
            self.decoder,
            decoder_input_ids,
            decoder_segment_ids,
            decoder_position_ids,
            fold(keys, _DECODER),
        )

    def decode(
        self,
        hidden: Float[Array, "B T D"],
        decoder_segment_ids: Int[Array, "B T"],
        encoded: Float[Array, "B S D"],
        segment_ids: Int[Array, "B S"],
        keys: Key[Array, "B"] | None = None,
        *,
        remat: str | None = None,
    ) -> Float[Array, "B T D"]:
        """Hidden states of the decoder.

        Tokens see those before them in their own segment, and all of that segment in the encoder.
        """
        keys = fold(keys, _DECODER)
        return self.decoder(hidden, decoder_segment_ids, encoded, segment_ids, keys, remat=remat)

    def recall(
        self,
        layers: Sequence[Layer],
        hidden: Float[Array, "B L D"],
        segment_ids: Int[Array, "B L"],
        memory: Memory,
    ) -> tuple[Float[Array, "B L D"], Memory]:
        """Hidden states of more tokens after those remembered; several only at the beginning.

        `layers` are the decoder's own, `apart`.
        """
        memory, found = memory.noted(segment_ids), []
        for number, layer in enumerate(layers):
            hidden, kept = layer.recall(hidden, segment_ids, memory, number)
            found.append(kept)
        return hidden, memory.advanced(tuple(found), hidden.shape[1])

    def logits(self, hidden: Float[Array, "B M D"]) -> Float[Array, "B M V"]:
        """Scores in float32 of every token of the padded vocabulary."""
        return present(self.lm_head, "lm")(hidden, self.embeddings.words[...])
