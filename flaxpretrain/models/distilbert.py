"""DistilBERT, https://arxiv.org/abs/1910.01108: BERT without token types and without a pooler.

Reference: Transformers models/distilbert for the names and options.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

from flaxpretrain.models import bert
from flaxpretrain.models.encoder import Encoder, EncoderModel
from flaxpretrain.models.encoder_config import POSITION_INITS
from flaxpretrain.models.model_config import ModelConfig
from flaxpretrain.models.names import Drop, Entry, Flat, Kernel, Prefix, Rule, Tie, Vocabulary
from flaxpretrain.shapes import Float, Numpy

SHARDING = bert.SHARDING
"""The parameters, and how they are sharded, are BERT's."""


def _heads(name: str, path: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{name}.weight", f"{path}/kernel", Kernel()),
        Rule(f"{name}.bias", f"{path}/bias", Flat()),
    )


_TABLES, _WORDS = "distilbert.embeddings", "distilbert.embeddings.word_embeddings.weight"
_BLOCK, _LAYERS = "distilbert.transformer.layer.{}", "encoder/layers"

HF_NAMES: tuple[Entry, ...] = (
    Prefix("distilbert."),
    Drop(r"distilbert\.embeddings\.position_ids", "a constant, not a parameter"),
    Rule(_WORDS, "embeddings/words", Vocabulary()),
    Rule(f"{_TABLES}.position_embeddings.weight", "embeddings/positions"),
    *bert.norm_names(f"{_TABLES}.LayerNorm", "embeddings/norm"),
    *_heads(f"{_BLOCK}.attention.q_lin", f"{_LAYERS}/attention/query"),
    *_heads(f"{_BLOCK}.attention.k_lin", f"{_LAYERS}/attention/key"),
    *_heads(f"{_BLOCK}.attention.v_lin", f"{_LAYERS}/attention/value"),
    Rule(f"{_BLOCK}.attention.out_lin.weight", f"{_LAYERS}/attention/out/kernel", Kernel(inputs=2)),
    Rule(f"{_BLOCK}.attention.out_lin.bias", f"{_LAYERS}/attention/out/bias"),
    *bert.norm_names(f"{_BLOCK}.sa_layer_norm", f"{_LAYERS}/attention_norm"),
    *bert.dense_names(f"{_BLOCK}.ffn.lin1", f"{_LAYERS}/feed_forward/up"),
    *bert.dense_names(f"{_BLOCK}.ffn.lin2", f"{_LAYERS}/feed_forward/down"),
    *bert.norm_names(f"{_BLOCK}.output_layer_norm", f"{_LAYERS}/feed_forward_norm"),
    *bert.dense_names("vocab_transform", "mlm_head/dense"),
    *bert.norm_names("vocab_layer_norm", "mlm_head/norm"),
    Rule("vocab_projector.bias", "mlm_head/bias", Vocabulary()),
    Rule("vocab_projector.bias", "mlm_head/decoder/bias", Vocabulary()),
    Rule("vocab_projector.weight", "mlm_head/decoder/kernel", Vocabulary(transposed=True)),
    Tie("vocab_projector.weight", _WORDS),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _WithoutTypes(bert.BertConfig):
    """The BERT that computes what a DistilBERT does."""

    type_vocab_size: int = 0
    least_types: ClassVar[int] = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistilBertConfig(ModelConfig):
    """DistilBERT, with the defaults of distilbert-base-uncased.

    sinusoidal_pos_embds: positions start as the sines and cosines of Transformers, as large as
        they are, and are trained from there.
    heads: "mlm", the masked LM head, or none.
    vocab_multiple: the word table is padded with rows to a multiple of this; the tokens it adds
        are never predicted, and exports leave them out.
    position_init: as in BERT, where `sinusoidal_pos_embds` is off.
    """

    vocab_size: int = 30522
    max_position_embeddings: int = 512
    sinusoidal_pos_embds: bool = False
    n_layers: int = 6
    n_heads: int = 12
    dim: int = 768
    hidden_dim: int = 3072
    dropout: float = 0.1
    attention_dropout: float = 0.1
    activation: str = "gelu"
    initializer_range: float = 0.02
    pad_token_id: int = 0
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    tie_word_embeddings: bool = True
    heads: tuple[str, ...] = ("mlm",)
    vocab_multiple: int = 128
    position_init: str = "normal"

    model_type: ClassVar = "distilbert"
    architectures: ClassVar = {"DistilBertForMaskedLM": ("mlm",), "DistilBertModel": ()}
    own_fields: ClassVar = ("heads", "vocab_multiple", "position_init")
    names: ClassVar = HF_NAMES
    sharding: ClassVar = SHARDING

    def __post_init__(self):
        """Raises UserError on sizes that cannot be."""
        self._require_positive("dim", "n_layers", "n_heads", "hidden_dim")
        self._require_positive("vocab_size", "vocab_multiple", "max_position_embeddings")
        self._require(self.dim % self.n_heads == 0, "dim", f"a multiple of n_heads {self.n_heads}")
        self._require_rates("dropout", "attention_dropout")
        self._require_known_heads()
        choices = " or ".join(POSITION_INITS)
        self._require(self.position_init in POSITION_INITS, "position_init", choices)
        self.as_bert()  # checks the activation

    def as_bert(self) -> bert.BertConfig:
        """The same network in BERT's words, with no token types."""
        return _WithoutTypes(
            vocab_size=self.vocab_size,
            hidden_size=self.dim,
            num_hidden_layers=self.n_layers,
            num_attention_heads=self.n_heads,
            intermediate_size=self.hidden_dim,
            hidden_act=self.activation,
            hidden_dropout_prob=self.dropout,
            attention_probs_dropout_prob=self.attention_dropout,
            max_position_embeddings=self.max_position_embeddings,
            initializer_range=self.initializer_range,
            pad_token_id=self.pad_token_id,
            bos_token_id=self.bos_token_id,
            eos_token_id=self.eos_token_id,
            tie_word_embeddings=self.tie_word_embeddings,
            heads=self.heads,
            vocab_multiple=self.vocab_multiple,
            position_init=self.position_init,
        )

    @property
    def hidden_size(self) -> int:
        """Another name of `dim`, in Transformers too."""
        return self.dim

    @property
    def max_length(self) -> int:
        """Longest piece, in tokens, that the position table has rows for."""
        return self.max_position_embeddings

    @property
    def attention_dropout_rate(self) -> float:
        """Dropout on the attention weights, which flash kernels do not have."""
        return self.attention_dropout

    def build(self, rngs: nnx.Rngs) -> EncoderModel:
        """The whole network: embeddings, layers and heads."""
        network = EncoderModel(self.as_bert(), rngs)
        if self.sinusoidal_pos_embds:
            table = interleaved_waves(self.max_position_embeddings, self.dim)
            network.embeddings.positions = nnx.Param(jnp.asarray(table, jnp.float32))
        return network

    def trunk(self, rngs: nnx.Rngs, *, causal: bool = False) -> Encoder:
        """The layers alone, for a network whose embeddings are owned by another."""
        return self.as_bert().trunk(rngs, causal=causal)

    def scaled(self, fraction: float) -> "DistilBertConfig":
        """The same network with its widths and heads multiplied by `fraction`, at equal depth."""
        return dataclasses.replace(
            self,
            dim=round(self.dim * fraction),
            n_heads=max(1, round(self.n_heads * fraction)),
            hidden_dim=round(self.hidden_dim * fraction),
        )

    def flops_per_token(self, length: int, masked_share: float) -> float:
        """Model FLOPs, forward and backward, of one token: BERT's."""
        return self.as_bert().flops_per_token(length, masked_share)


def interleaved_waves(rows: int, width: int) -> Float[Numpy, "P D"]:
    """A row of sines (even columns) and cosines (odd ones) for each position.

    Reference: https://arxiv.org/abs/1706.03762, section 3.5; create_sinusoidal_embeddings of
    Transformers models/distilbert.
    """
    column = np.arange(width)
    angles = np.arange(rows)[:, None] / 10_000 ** (2 * (column // 2) / width)
    return np.where(column % 2 == 0, np.sin(angles), np.cos(angles))
