"""ALBERT, https://arxiv.org/abs/1909.11942: narrow embeddings, and layers that share parameters.

Reference: google-research/albert modeling.py; Transformers models/albert for names and options.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from flaxpretrain.models import bert
from flaxpretrain.models.encoder import EncoderLayer, EncoderModel
from flaxpretrain.models.encoder_config import EncoderConfig
from flaxpretrain.models.functional import scan, stack
from flaxpretrain.models.names import Drop, Entry, Flat, Kernel, Prefix, Rule, Vocabulary
from flaxpretrain.models.partition import gathered

SHARDING = (
    *bert.SHARDING,
    (r"embeddings_project/kernel$", (None, "fsdp")),
    (r"embeddings_project/bias$", (None,)),
)
"""Path regex of parameters -> mesh axis of each of their dimensions."""


def _heads(name: str, path: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{name}.weight", f"{path}/kernel", Kernel()),
        Rule(f"{name}.bias", f"{path}/bias", Flat()),
    )


_TABLES, _WORDS = "albert.embeddings", "albert.embeddings.word_embeddings.weight"
_BLOCK, _LAYERS = "albert.encoder.albert_layer_groups.{}.albert_layers.0", "encoder/layers"

HF_NAMES: tuple[Entry, ...] = (
    Prefix("albert."),
    Drop(r"albert\.embeddings\.(position_ids|token_type_ids)", "a constant, not a parameter"),
    Rule(_WORDS, "embeddings/words", Vocabulary()),
    Rule(f"{_TABLES}.position_embeddings.weight", "embeddings/positions"),
    Rule(f"{_TABLES}.token_type_embeddings.weight", "embeddings/types"),
    *bert.norm_names(f"{_TABLES}.LayerNorm", "embeddings/norm"),
    *bert.dense_names("albert.encoder.embedding_hidden_mapping_in", "embeddings_project"),
    *_heads(f"{_BLOCK}.attention.query", f"{_LAYERS}/attention/query"),
    *_heads(f"{_BLOCK}.attention.key", f"{_LAYERS}/attention/key"),
    *_heads(f"{_BLOCK}.attention.value", f"{_LAYERS}/attention/value"),
    Rule(f"{_BLOCK}.attention.dense.weight", f"{_LAYERS}/attention/out/kernel", Kernel(inputs=2)),
    Rule(f"{_BLOCK}.attention.dense.bias", f"{_LAYERS}/attention/out/bias"),
    *bert.norm_names(f"{_BLOCK}.attention.LayerNorm", f"{_LAYERS}/attention_norm"),
    *bert.dense_names(f"{_BLOCK}.ffn", f"{_LAYERS}/feed_forward/up"),
    *bert.dense_names(f"{_BLOCK}.ffn_output", f"{_LAYERS}/feed_forward/down"),
    *bert.norm_names(f"{_BLOCK}.full_layer_layer_norm", f"{_LAYERS}/feed_forward_norm"),
    *bert.dense_names("albert.pooler", "pooler"),
    *bert.masked_head_names("predictions", "predictions.dense", "predictions.LayerNorm", _WORDS),
    *bert.dense_names("sop_classifier.classifier", "nsp_head"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlbertConfig(EncoderConfig):
    """ALBERT, with the defaults of albert-base-v2.

    embedding_size: width of the tables and of the vocabulary head; a dense layer leads from it to
        `hidden_size`.
    num_hidden_groups: so many layers have parameters; each serves equally many in a row.
    heads: as BERT's; "nsp", which reads the pooler, is sentence order prediction here.
    """

    vocab_size: int = 30000
    embedding_size: int = 128
    num_hidden_groups: int = 1
    hidden_act: str = "gelu_new"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    pad_token_id: int = 0
    bos_token_id: int | None = 2
    eos_token_id: int | None = 3

    model_type: ClassVar = "albert"
    architectures: ClassVar = {
        "AlbertForMaskedLM": ("mlm",),
        "AlbertModel": ("pooler",),
        "AlbertForPreTraining": ("mlm", "pooler", "nsp"),
    }
    hf_defaults: ClassVar = {
        "hidden_size": 4096,
        "num_attention_heads": 64,
        "intermediate_size": 16384,
    }
    fixed_options: ClassVar = {**EncoderConfig.fixed_options, "inner_group_num": 1}
    projects: ClassVar = True
    names: ClassVar = HF_NAMES
    sharding: ClassVar = SHARDING

    def __post_init__(self):
        """Raises UserError on sizes that cannot be."""
        super().__post_init__()
        self._require_positive("embedding_size", "num_hidden_groups")
        self._require(
            self.num_hidden_groups <= self.num_hidden_layers,
            "num_hidden_groups",
            f"at most num_hidden_layers ({self.num_hidden_layers})",
        )

    @property
    def position_offset(self) -> int:
        """The first token has the table's first row."""
        return 0

    @property
    def head_act(self) -> str:
        """The masked LM head uses the activation of the layers."""
        return self.hidden_act

    @property
    def table_width(self) -> int:
        """Columns of the tables of embeddings."""
        return self.embedding_size

    def build(self, rngs: nnx.Rngs) -> EncoderModel:
        """The whole network: embeddings, layers and heads."""
        return EncoderModel(self, rngs)

    def trunk(self, rngs: nnx.Rngs, *, causal: bool = False) -> "SharedEncoder":
        """The layers alone, for a network whose embeddings are owned by another."""
        return SharedEncoder(self, rngs, causal=causal)

    def flops_per_token(self, length: int, masked_share: float) -> float:
        """As for BERT, with the projection of the embeddings and the narrow vocabulary head."""
        hidden, width = self.hidden_size, self.embedding_size
        products = hidden * width
        if "mlm" in self.heads:
            products += masked_share * (hidden * width + width * self.vocab_size)
        # No share of BERT's own head: the layers alone.
        return super().flops_per_token(length, 0.0) + 6.0 * products


class _Turns(nnx.Module):
    """What is there to loop over where the parameters are shared: which of them a layer uses."""

    def __init__(self, layers: int, groups: int):
        self.group = nnx.Variable(jnp.arange(layers) * groups // layers)


class SharedEncoder(nnx.Module):
    """More layers than there are parameters of layers; where causal, no token sees later ones."""

    def __init__(self, config: AlbertConfig, rngs: nnx.Rngs, *, causal: bool = False):
        def layer(rngs: nnx.Rngs) -> EncoderLayer:
            return EncoderLayer(config, rngs, causal=causal)

        self.layers = stack(layer, config.num_hidden_groups, rngs)
        self.count, self.groups = config.num_hidden_layers, config.num_hidden_groups

    def __call__(
        self,
        hidden: Float[Array, "B L D"],
        segment_ids: Int[Array, "B L"],
        keys: Key[Array, "B"] | None = None,
        *,
        remat: str | None = None,
    ) -> Float[Array, "B L D"]:
        """All layers in turn; `remat` overrides the policy of the surrounding `executing`."""
        graph, state = nnx.split(self.layers)
        state = gathered(state)  # gathered once for all turns, and their gradients summed once

        def apply(turn: _Turns, x: Array, layer_keys: Array | None) -> Array:
            group = turn.group[...]
            shared = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[group], state))
            return shared(x, segment_ids, layer_keys)

        return scan(_Turns(self.count, self.groups), apply, hidden, keys, remat=remat)
