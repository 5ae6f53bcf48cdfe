"""The configuration that BERT and its relatives share, in Transformers' spelling."""

import abc
import dataclasses
import re
from collections.abc import Mapping
from typing import Any, ClassVar

from flax import nnx

from flaxpretrain.models.layers import activation
from flaxpretrain.models.model_config import ModelConfig

POSITION_INITS = ("normal", "sinusoidal")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig(ModelConfig):
    """Fields of the encoder family, named as in Transformers, and three of our own.

    heads: what stands on the encoder: "mlm" (masked LM head), "pooler", and "nsp" (the next
        sentence head, which reads the pooler).
    vocab_multiple: the word table is padded with rows to a multiple of this; the tokens it adds
        are never predicted, and exports leave them out.
    position_init: what the position table starts from: "normal" as in BERT, or "sinusoidal", with
        which a layer reads distances from the first step on; a small model on little text learns
        the order of words several times sooner.
    """

    vocab_size: int
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int
    bos_token_id: int | None
    eos_token_id: int | None
    tie_word_embeddings: bool = True
    heads: tuple[str, ...] = ("mlm",)
    vocab_multiple: int = 128
    position_init: str = "normal"

    fixed_options: ClassVar = {
        "is_decoder": False,
        "is_encoder_decoder": False,
        "add_cross_attention": False,
        "position_embedding_type": "absolute",
        "pruned_heads": {},
    }
    own_fields: ClassVar = ("heads", "vocab_multiple", "position_init")
    least_types: ClassVar[int] = 1
    """Fewest rows of the table of token types."""
    projects: ClassVar[bool] = False
    """Whether a dense layer leads from the embeddings to the layers."""

    def __post_init__(self):
        self._require_positive(
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "vocab_multiple",
            "max_length",
        )
        self._require(
            self.type_vocab_size >= self.least_types, "type_vocab_size", "a positive number"
        )
        self._require_rates("hidden_dropout_prob", "attention_probs_dropout_prob")
        self._require(
            self.hidden_size % self.num_attention_heads == 0,
            "hidden_size",
            f"a multiple of num_attention_heads ({self.num_attention_heads})",
        )
        self._require_known_heads()
        self._require(
            "nsp" not in self.heads or "pooler" in self.heads, "heads", "'pooler' beside 'nsp'"
        )
        choices = " or ".join(POSITION_INITS)
        self._require(self.position_init in POSITION_INITS, "position_init", choices)
        activation(self.hidden_act)

    @property
    @abc.abstractmethod
    def position_offset(self) -> int:
        """Row of the position table that belongs to the first token of a piece."""

    @property
    @abc.abstractmethod
    def head_act(self) -> str:
        """Activation of the masked LM head."""

    @abc.abstractmethod
    def trunk(self, rngs: nnx.Rngs, *, causal: bool = False) -> nnx.Module:
        """The layers alone, for a network whose embeddings are owned by another.

        `causal` layers let no token see those after it.
        """

    @property
    def max_length(self) -> int:
        """Longest piece, in tokens, that the position table has rows for."""
        return self.max_position_embeddings - self.position_offset

    @property
    def table_width(self) -> int:
        """Columns of the tables of embeddings."""
        return self.hidden_size

    @property
    def attention_dropout_rate(self) -> float:
        """Dropout on the attention weights, which flash kernels do not have."""
        return self.attention_probs_dropout_prob

    def scaled(self, fraction: float) -> "EncoderConfig":
        """The same network with its widths and heads multiplied by `fraction`, at equal depth.

        Reference: the generators of ELECTRA, https://arxiv.org/abs/2003.10555, appendix A, and
        google-research/electra util/training_utils.py.
        """
        return dataclasses.replace(
            self,
            hidden_size=round(self.hidden_size * fraction),
            num_attention_heads=max(1, round(self.num_attention_heads * fraction)),
            intermediate_size=round(self.intermediate_size * fraction),
        )

    def flops_per_token(self, length: int, masked_share: float) -> float:
        """Model FLOPs, forward and backward, of one token in a piece of `length` tokens.

        Matrix products only, 2 FLOPs a multiply-add, the backward pass twice the forward pass.
        The masked LM head counts at `masked_share` of the tokens, for the true vocabulary; the
        pooler, once a piece, is left out.

        Reference: https://arxiv.org/abs/2001.08361, section 2.1, but with the attention scores
        in full, since every token attends every other.
        """
        width = self.hidden_size
        layer = 4 * width**2 + 2 * width * self.intermediate_size + 2 * length * width
        head = width**2 + width * self.vocab_size if "mlm" in self.heads else 0
        return 3.0 * 2.0 * (self.num_hidden_layers * layer + masked_share * head)

    def fitted(self, tensors: Mapping[str, Any]) -> "EncoderConfig":
        """Without the pooler that is optional in a bare network and named nowhere else."""
        if self.heads != ("pooler",) or any(re.search(r"(^|\.)pooler\.", name) for name in tensors):
            return self
        return dataclasses.replace(self, heads=())
