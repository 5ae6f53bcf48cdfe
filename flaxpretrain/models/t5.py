"""T5, https://arxiv.org/abs/1910.10683, in both its versions: an encoder and a decoder.

Version 1.0 has ReLU and one table for words and logits, which are scaled; version 1.1 a gated
GELU and a vocabulary head of its own. Norms come first and have no biases, like all else; attention
is not scaled; positions are biases of its scores by distance, shared by the layers of a stack.

Reference: google-research/text-to-text-transfer-transformer; google/flaxformer for what is
initialised how; Transformers models/t5 for the names and options.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from flaxpretrain.models.attention import Attention
from flaxpretrain.models.functional import fold, scan, stack
from flaxpretrain.models.language_head import LanguageHead, present
from flaxpretrain.models.layers import Dense, RMSNorm, activation, dropout, lean, normal, take
from flaxpretrain.models.memory import Kept, Memory
from flaxpretrain.models.model_config import ModelConfig
from flaxpretrain.models.names import Drop, Entry, Kernel, Rule, Tie, Vocabulary
from flaxpretrain.models.positions import relative_bias, relative_bias_from

# Folded into a row's dropout key; the layers fold in their numbers.
_EMBEDDINGS, _OUTPUT, _DECODER = 0xFFFF_FFFF, 0xFFFF_FFFE, 0xFFFF_FFFD

SHARDING = (
    # Rows over both axes, as the vocabulary of the logits is; the small tables are on every device.
    (r"embeddings/words$", (("tensor", "fsdp"), None)),
    (r"relative_bias$", (None, None)),
    (r"layers/.*attention/(query|key|value)/kernel$", (None, "fsdp", "tensor", None)),
    (r"layers/.*attention/out/kernel$", (None, "tensor", None, "fsdp")),
    (r"layers/feed_forward/(up|gate|linear)/kernel$", (None, "fsdp", "tensor")),
    (r"layers/feed_forward/down/kernel$", (None, "tensor", "fsdp")),
    (r"layers/.*norm/scale$", (None, None)),
    (r"lm_head/kernel$", ("fsdp", "tensor")),
    (r"norm/scale$", (None,)),
)
"""Path regex of parameters -> mesh axis of each of their dimensions."""


def _attention_names(name: str, path: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{name}.q.weight", f"{path}/query/kernel", Kernel()),
        Rule(f"{name}.k.weight", f"{path}/key/kernel", Kernel()),
        Rule(f"{name}.v.weight", f"{path}/value/kernel", Kernel()),
        Rule(f"{name}.o.weight", f"{path}/out/kernel", Kernel(inputs=2)),
    )


def _feed_forward_names(name: str, path: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{name}.wi.weight", f"{path}/up/kernel", Kernel()),
        Rule(f"{name}.wi_0.weight", f"{path}/gate/kernel", Kernel()),
        Rule(f"{name}.wi_1.weight", f"{path}/linear/kernel", Kernel()),
        Rule(f"{name}.wo.weight", f"{path}/down/kernel", Kernel()),
    )


def _stack_names(side: str, last: int) -> tuple[Entry, ...]:
    """Names of the encoder or decoder, whose feed-forward is part `last` of a block."""
    block, layers = f"{side}.block.{{}}.layer", f"{side}/layers"
    first = f"{side}.block.0.layer.0.SelfAttention"
    return (
        Rule(f"{first}.relative_attention_bias.weight", f"{side}/relative_bias"),
        Rule(f"{block}.0.layer_norm.weight", f"{layers}/attention_norm/scale"),
        *_attention_names(f"{block}.0.SelfAttention", f"{layers}/attention"),
        Rule(f"{block}.{last}.layer_norm.weight", f"{layers}/feed_forward_norm/scale"),
        *_feed_forward_names(f"{block}.{last}.DenseReluDense", f"{layers}/feed_forward"),
        Rule(f"{side}.final_layer_norm.weight", f"{side}/norm/scale"),
        Tie(f"{side}.embed_tokens.weight", "shared.weight"),
    )


_CROSS = "decoder.block.{}.layer.1"

HF_NAMES: tuple[Entry, ...] = (
    Drop(
        r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
        "attention to the encoder has no bias",
    ),
    Rule("shared.weight", "embeddings/words", Vocabulary()),
    *_stack_names("encoder", 1),
    *_stack_names("decoder", 2),
    Rule(f"{_CROSS}.layer_norm.weight", "decoder/layers/cross_attention_norm/scale"),
    *_attention_names(f"{_CROSS}.EncDecAttention", "decoder/layers/cross_attention"),
    Rule("lm_head.weight", "lm_head/kernel", Vocabulary(transposed=True)),
    Tie("lm_head.weight", "shared.weight"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Config(ModelConfig):
    """T5, with the defaults of google-t5/t5-small.

    num_decoder_layers: None for as many as `num_layers`.
    feed_forward_proj: an activation ("relu"), or a gated one ("gated-gelu", "gated-silu").
    scale_decoder_outputs: whether hidden states are divided by the root of their width before the
        logits; None where that is so for tied tables and for no others, as T5 has it.
    heads: "lm", the vocabulary head.
    vocab_multiple: the word table is padded with rows to a multiple of this; the tokens it adds
        are never predicted, and exports leave them out.
    """

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_decoder_layers: int | None = None
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-6
    initializer_factor: float = 1.0
    feed_forward_proj: str = "relu"
    pad_token_id: int = 0
    eos_token_id: int | None = 1
    decoder_start_token_id: int = 0
    tie_word_embeddings: bool = True
    scale_decoder_outputs: bool | None = None
    heads: tuple[str, ...] = ("lm",)
    vocab_multiple: int = 128

    model_type: ClassVar = "t5"
    architectures: ClassVar = {"T5ForConditionalGeneration": ("lm",), "T5Model": ()}
    fixed_options: ClassVar = {"is_encoder_decoder": True, "is_decoder": False}
    names: ClassVar = HF_NAMES
    sharding: ClassVar = SHARDING

    def __post_init__(self):
        """Raises UserError on sizes and rates that cannot be."""
        if self.scale_decoder_outputs == self.tie_word_embeddings:
            object.__setattr__(self, "scale_decoder_outputs", None)
        if self.num_decoder_layers == self.num_layers:
            object.__setattr__(self, "num_decoder_layers", None)
        self._require_positive(
            "vocab_size",
            "d_model",
            "d_kv",
            "d_ff",
            "num_layers",
            "num_heads",
            "initializer_factor",
            "vocab_multiple",
        )
        few = "a positive number"
        self._require((self.num_decoder_layers or 1) > 0, "num_decoder_layers", few)
        buckets = self.relative_attention_num_buckets
        even = buckets >= 4 and buckets % 2 == 0
        self._require(even, "relative_attention_num_buckets", "an even number of 4 or more")
        far = self.relative_attention_max_distance > buckets // 2
        self._require(
            far, "relative_attention_max_distance", f"more than half of the {buckets} buckets"
        )
        self._require_rates("dropout_rate")
        self._require_known_heads()
        kind = self.feed_forward_proj.removeprefix("gated-")
        self._require("-" not in kind, "feed_forward_proj", "an activation or gated-ACTIVATION")
        activation(kind)

    @property
    def decoder_layers(self) -> int:
        """Layers of the decoder."""
        return self.num_decoder_layers or self.num_layers

    @property
    def gated(self) -> bool:
        """Whether the feed-forward layers are gated."""
        return self.feed_forward_proj.startswith("gated-")

    @property
    def act(self) -> str:
        """Activation of the feed-forward layers; "gated-gelu" means the approximate one."""
        if self.feed_forward_proj == "gated-gelu":
            return "gelu_new"
        return self.feed_forward_proj.removeprefix("gated-")

    @property
    def scales_logits(self) -> bool:
        """Whether hidden states are divided by the root of their width before the logits."""
        stated = self.scale_decoder_outputs
        return self.tie_word_embeddings if stated is None else stated

    @property
    def max_length(self) -> None:
        """No limit: positions are distances."""
        return None

    @property
    def attention_dropout_rate(self) -> float:
        """Dropout on the attention weights, which flash kernels do not have."""
        return self.dropout_rate

    def takes_vocabulary(self, size: int) -> bool:
        """Also for a few tokens less: T5's own 32,100 tokens have a table of 32,128 rows."""
        return 0 <= self.vocab_size - size < 128

    def build(self, rngs: nnx.Rngs) -> "T5":
        """The whole network."""
        return T5(self, rngs)

    def flops_per_row(self, length: int, target_length: int) -> float:
        """Model FLOPs, forward and backward, of a row of `length` inputs and its targets.

        Matrix products only, 2 FLOPs a multiply-add, the backward pass twice the forward pass. A
        token of the decoder attends half of the targets on average, and all inputs; the head
        counts at every target, for the true vocabulary.

        Reference: https://arxiv.org/abs/2001.08361, section 2.1.
        """
        width, heads = self.d_model, self.num_heads * self.d_kv
        feed_forward = (3 if self.gated else 2) * width * self.d_ff
        encoder = length * (4 * width * heads + feed_forward + 2 * length * heads)
        decoder = target_length * (4 * width * heads + feed_forward + target_length * heads)
        cross = 2 * (length + target_length) * width * heads + 2 * length * target_length * heads
        head = target_length * width * self.vocab_size if "lm" in self.heads else 0
        return 6.0 * (self.num_layers * encoder + self.decoder_layers * (decoder + cross) + head)

    def to_hf(self) -> dict[str, Any]:
        """The content of Transformers' config.json for this network.

        Releases before 5 read from `tie_word_embeddings` whether to scale; 5 ties what a checkpoint
        does not hold twice and reads `scale_decoder_outputs`.
        """
        return super().to_hf() | {
            "is_encoder_decoder": True,
            "num_decoder_layers": self.decoder_layers,
            "scale_decoder_outputs": self.scales_logits,
        }

    def fitted(self, tensors: Mapping[str, Any]) -> "T5Config":
        """Tied or not as the tensors show: Transformers 5 writes that all networks are tied."""
        if "lm" not in self.heads:
            return self
        kernel, words = tensors.get("lm_head.weight"), tensors.get("shared.weight")
        tied = kernel is None or words is None or np.array_equal(kernel, words)
        return dataclasses.replace(
            self, tie_word_embeddings=tied, scale_decoder_outputs=self.scales_logits
        )


class FeedForward(nnx.Module):
    """Two dense layers without biases, the first one gated by another where so configured."""

    def __init__(self, config: T5Config, rngs: nnx.Rngs):
        def dense(inputs: int, outputs: int) -> Dense:
            stddev = config.initializer_factor * inputs**-0.5
            return Dense(inputs, outputs, rngs, stddev=stddev, bias=False, initial=normal)

        width, inner = config.d_model, config.d_ff
        self.up = None if config.gated else dense(width, inner)
        self.gate = dense(width, inner) if config.gated else None
        self.linear = dense(width, inner) if config.gated else None
        self.down = dense(inner, width)
        self.act = config.act
        self.dropout_rate = config.dropout_rate

    def __call__(
        self, x: Float[Array, "B L D"], keys: Key[Array, "B"] | None = None
    ) -> Float[Array, "B L D"]:
        """`down(activation(up(x)))`, or `down(activation(gate(x)) * linear(x))`."""
        act = activation(self.act)

        def out(*inner: Array) -> Array:
            hidden = act(inner[0]) if len(inner) == 1 else act(inner[0]) * inner[1]
            return self.down(dropout(hidden, self.dropout_rate, keys))

        parts = [part for part in (self.up, self.gate, self.linear) if part is not None]
        return lean(out)(*(part(x) for part in parts))


def _attention(config: T5Config, rngs: nnx.Rngs, *, causal: bool = False) -> Attention:
    factor, width = config.initializer_factor, config.d_model
    return Attention(
        width,
        config.num_heads,
        rngs,
        size=config.d_kv,
        # What other networks divide the scores by is in the start of the query instead.
        query_stddev=factor * (width * config.d_kv) ** -0.5,
        stddev=factor * width**-0.5,
        out_stddev=factor * (config.num_heads * config.d_kv) ** -0.5,
        dropout_rate=config.dropout_rate,
        causal=causal,
        scaled=False,
        bias=False,
        initial=normal,
    )


class Layer(nnx.Module):
    """Attention, attention to the encoder in the decoder, and feed-forward; norms come first."""

    def __init__(self, config: T5Config, rngs: nnx.Rngs, *, decoder: bool):
        width, epsilon = config.d_model, config.layer_norm_epsilon
        self.attention_norm = RMSNorm(width, epsilon=epsilon)
        self.attention = _attention(config, rngs, causal=decoder)
        self.cross_attention_norm = RMSNorm(width, epsilon=epsilon) if decoder else None
        self.cross_attention = _attention(config, rngs) if decoder else None
        self.feed_forward_norm = RMSNorm(width, epsilon=epsilon)
        self.feed_forward = FeedForward(config, rngs)
        self.dropout_rate = config.dropout_rate

    def __call__(
        self,
        x: Float[Array, "B L D"],
        segment_ids: Int[Array, "B L"],
        score_bias: Float[Array, "1 H L L"],
        encoded: Float[Array, "B S D"] | None = None,
        encoded_segment_ids: Int[Array, "B S"] | None = None,
        keys: Key[Array, "B"] | None = None,
    ) -> Float[Array, "B L D"]:
        """One layer over a row; tokens see their own segment only, in both rows."""
        attended = self.attention(
            self.attention_norm(x), segment_ids, fold(keys, 0), score_bias=score_bias
        )
        x += dropout(attended, self.dropout_rate, fold(keys, 1))
        if self.cross_attention is not None and self.cross_attention_norm is not None:
            attended = self.cross_attention(
                self.cross_attention_norm(x),
                segment_ids,
                fold(keys, 2),
                source=encoded,
                source_segment_ids=encoded_segment_ids,
            )
            x += dropout(attended, self.dropout_rate, fold(keys, 3))
        fed = self.feed_forward(self.feed_forward_norm(x), fold(keys, 4))
        return x + dropout(fed, self.dropout_rate, fold(keys, 5))

    def recall(
        self, x: Float[Array, "B L D"], segments: Array, memory: Memory, number: int, bias: Array
    ) -> tuple[Float[Array, "B L D"], Kept]:
        """As when called without dropout, for more tokens of a decoder's rows."""
        attended, kept = self.attention.recall(
            self.attention_norm(x),
            segments,
            memory.kept[number],
            memory.segment_ids,
            memory.place,
            score_bias=bias,
        )
        x += attended
        cross_norm, cross = self.cross_attention_norm, self.cross_attention
        source_segments = memory.source_segment_ids
        if cross is not None and cross_norm is not None and source_segments is not None:
            x += cross.recall(cross_norm(x), segments, memory.source[number], source_segments)[0]
        return x + self.feed_forward(self.feed_forward_norm(x)), kept


class Stack(nnx.Module):
    """The layers of the encoder or of the decoder, their biases by distance, and a last norm."""

    def __init__(self, config: T5Config, rngs: nnx.Rngs, *, decoder: bool):
        count = config.decoder_layers if decoder else config.num_layers
        shape = (config.relative_attention_num_buckets, config.num_heads)
        self.layers = stack(lambda rngs: Layer(config, rngs, decoder=decoder), count, rngs)
        self.relative_bias = normal(rngs, shape, config.initializer_factor * config.d_model**-0.5)
        self.norm = RMSNorm(config.d_model, epsilon=config.layer_norm_epsilon)
        self.farthest = config.relative_attention_max_distance
        self.dropout_rate = config.dropout_rate
        self.causal = decoder

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
        length = hidden.shape[1]
        bias = relative_bias(
            self.relative_bias[...], length, length, farthest=self.farthest, causal=self.causal
        )

        def apply(layer: Any, x: Array, layer_keys: Any) -> Array:
            return layer(x, segment_ids, bias, encoded, encoded_segment_ids, layer_keys)

        hidden = self.norm(scan(self.layers, apply, hidden, keys, remat=remat))
        return dropout(hidden, self.dropout_rate, fold(keys, _OUTPUT))


class Embeddings(nnx.Module):
    """The table of words."""

    def __init__(self, config: T5Config, rngs: nnx.Rngs):
        shape = (config.padded_vocab_size, config.d_model)
        self.words = normal(rngs, shape, config.initializer_factor)


class T5(nnx.Module):
    """Embeddings, encoder, decoder and the vocabulary head."""

    def __init__(self, config: T5Config, rngs: nnx.Rngs):
        width = config.d_model
        self.embeddings = Embeddings(config, rngs)
        self.encoder = Stack(config, rngs, decoder=False)
        self.decoder = Stack(config, rngs, decoder=True)
        self.lm_head = (
            LanguageHead(
                width,
                config.padded_vocab_size,
                config.vocab_size,
                rngs,
                tied=config.tie_word_embeddings,
                stddev=config.initializer_factor * width**-0.5,
            )
            if "lm" in config.heads
            else None
        )
        self.scale = width**-0.5 if config.scales_logits else 1.0
        self.dropout_rate = config.dropout_rate

    def embed(
        self,
        input_ids: Int[Array, "B S"],
        segment_ids: Int[Array, "B S"],
        position_ids: Int[Array, "B S"] | None = None,
        keys: Key[Array, "B"] | None = None,
    ) -> Float[Array, "B S D"]:
        """Embedded tokens, with dropout where keys are given; positions play no part here."""
        hidden = take(self.embeddings.words[...], input_ids)
        return dropout(hidden, self.dropout_rate, fold(keys, _EMBEDDINGS))

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
        return self.embed(decoder_input_ids, decoder_segment_ids, None, fold(keys, _DECODER))

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
        memory, side, length = memory.noted(segment_ids), self.decoder, hidden.shape[1]
        table, room = side.relative_bias[...], memory.segment_ids.shape[1]
        bias = relative_bias_from(table, memory.place, length, room, farthest=side.farthest)
        found = []
        for number, layer in enumerate(layers):
            hidden, kept = layer.recall(hidden, segment_ids, memory, number, bias)
            found.append(kept)
        return side.norm(hidden), memory.advanced(tuple(found), length)

    def logits(self, hidden: Float[Array, "B M D"]) -> Float[Array, "B M V"]:
        """Scores in float32 of every token of the padded vocabulary."""
        return present(self.lm_head, "lm")(hidden * self.scale, self.embeddings.words[...])
