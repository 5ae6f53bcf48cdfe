"""What proposes the replacements of `ReplacedTokens`, and how they are drawn.

Reference: ELECTRA, https://arxiv.org/abs/2003.10555, section 2; google-research/electra
run_pretraining.py and pretrain/pretrain_helpers.py.
"""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt

from flaxpretrain.data.framing import ClozeFraming, Framing, MaskedFraming
from flaxpretrain.data.masking import Masking
from flaxpretrain.data.vocabulary import Vocabulary
from flaxpretrain.errors import UserError
from flaxpretrain.models.layers import place_of_largest, row_bits
from flaxpretrain.models.two_towers import TwoTowerConfig
from flaxpretrain.objectives.objective import Sum, cross_entropy, gather_positions

_SAMPLING = 3  # folded into a row's keys


class Proposal(NamedTuple):
    """What a generator says of a batch.

    slots: logits of what was at each masked slot.
    everywhere: logits, without gradient, of what is at each position given the rest of its
        segment; None from a generator that reads masked rows.
    sums: its loss term `masked_lm`, and metrics of its own.
    """

    slots: Float[Array, "B M V"]
    everywhere: Float[Array, "B L V"] | None
    sums: dict[str, Sum]


class Generator(abc.ABC):
    """What proposes replacements: by default, a masked language model."""

    is_cloze: ClassVar[bool] = False
    """Whether it tells the likelihood of every token of unmasked rows."""

    @abc.abstractmethod
    def config(self, model_config: Any) -> Any:
        """The configuration of its layers, without regard to embeddings; None for no network."""

    def network(self, config: Any) -> Any:
        """The configuration of the whole network, from that of layers whose embeddings fit."""
        return dataclasses.replace(config, heads=("mlm",))

    def framing(self, vocabulary: Vocabulary, length: int, masking: Masking) -> Framing:
        """What makes its batches."""
        return MaskedFraming(vocabulary=vocabulary, length=length, masking=masking)

    def weight(self, batch: Mapping[str, Array]) -> Float[Array, ""]:
        """Of its loss term."""
        return jnp.sum(batch["masked_weights"])

    def propose(
        self,
        network: Any,
        vocab_size: int,
        batch: Mapping[str, Array],
        originals: Int[Array, "B L"],
        keys: Key[Array, "B"] | None,
    ) -> Proposal:
        """What the bound network says; `originals` are the rows without masks."""
        hidden = hidden_states(network, batch["input_ids"], batch, keys)
        logits = network.logits(gather_positions(hidden, batch["masked_positions"]))
        return _at_slots(logits, batch)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scaled(Generator):
    """The discriminator's architecture with its widths times `width`, its depth times `depth`."""

    width: float = 0.25
    depth: float = 1.0

    def __post_init__(self) -> None:
        """Raises UserError on fractions that are not positive."""
        if min(self.width, self.depth) <= 0:
            raise UserError(
                "objective.generator: width and depth must be positive fractions of the "
                f"discriminator's; got {self.width} and {self.depth}"
            )

    def config(self, model_config: Any) -> Any:
        """Widths and depth rounded; at least one layer."""
        layers = max(1, round(self.depth * model_config.num_hidden_layers))
        return dataclasses.replace(model_config.scaled(self.width), num_hidden_layers=layers)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sized(Generator):
    """A generator of the discriminator's architecture with its own sizes; None keeps a size."""

    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    intermediate_size: int | None = None

    def config(self, model_config: Any) -> Any:
        """The discriminator's configuration with these sizes."""
        sizes = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        return dataclasses.replace(model_config, **sizes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Uniform(Generator):
    """No network: every token of the vocabulary is as likely. `masked_lm` is then a constant."""

    def config(self, model_config: Any) -> None:
        """There is none."""
        return None

    def propose(
        self,
        network: Any,
        vocab_size: int,
        batch: Mapping[str, Array],
        originals: Int[Array, "B L"],
        keys: Key[Array, "B"] | None,
    ) -> Proposal:
        """Equal logits."""
        return _at_slots(jnp.zeros((*batch["masked_labels"].shape, vocab_size)), batch)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoTower(Generator):
    """Two towers of `tower`'s size that predict every token of unmasked rows from all the others.

    Its term `masked_lm` is over all tokens that might be masked; `masked_lm_loss`, as the metrics
    beside it, is over those that are. Both towers read the same embeddings, also where these are
    not the discriminator's (the original then has a set for each). A piece's first token has no
    left neighbour and its last no right one; in the original they read the row's other end.

    Reference: google-research/electra run_pretraining.py, TwoTowerClozeTransformer.
    """

    tower: Generator = Scaled()

    is_cloze: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Raises UserError on towers without layers."""
        if isinstance(self.tower, Uniform | TwoTower):
            raise UserError(
                "objective.generator.tower: expected Scaled(...) or Sized(...); got "
                f"{type(self.tower).__name__}"
            )

    def config(self, model_config: Any) -> Any:
        """That of a tower."""
        return self.tower.config(model_config)

    def network(self, config: Any) -> TwoTowerConfig:
        """Two such towers."""
        return TwoTowerConfig(tower=dataclasses.replace(config, heads=()))

    def framing(self, vocabulary: Vocabulary, length: int, masking: Masking) -> Framing:
        """What also tells which tokens might be masked."""
        return ClozeFraming(vocabulary=vocabulary, length=length, masking=masking)

    def weight(self, batch: Mapping[str, Array]) -> Float[Array, ""]:
        """All tokens that might be masked."""
        return jnp.sum(batch["candidates"])

    def propose(
        self,
        network: Any,
        vocab_size: int,
        batch: Mapping[str, Array],
        originals: Int[Array, "B L"],
        keys: Key[Array, "B"] | None,
    ) -> Proposal:
        """From unmasked rows."""
        logits = network.logits(hidden_states(network, originals, batch, keys))
        everywhere = jax.lax.stop_gradient(logits)
        slots = _at_slots(gather_positions(everywhere, batch["masked_positions"]), batch)
        sums = {
            "masked_lm": cross_entropy(logits, originals, batch["candidates"]),
            "masked_lm_loss": slots.sums["masked_lm"],
        }
        return Proposal(slots.slots, everywhere, sums)


def _at_slots(logits: Float[Array, "B M V"], batch: Mapping[str, Array]) -> Proposal:
    loss = cross_entropy(logits, batch["masked_labels"], batch["masked_weights"])
    return Proposal(logits, None, {"masked_lm": loss})


def hidden_states(
    network: Any,
    input_ids: Int[Array, "B L"],
    batch: Mapping[str, Array],
    keys: Key[Array, "B"] | None,
) -> Float[Array, "B L D"]:
    """A bound network's last hidden states of these rows in the batch's pieces."""
    segments = batch["segment_ids"]
    types = batch.get("token_type_ids")
    hidden = network.embed(
        input_ids, segments, batch["position_ids"], token_type_ids=types, keys=keys
    )
    return network.encode(hidden, segments, keys=keys)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """`argmax(logits / temperature + Gumbel noise)`.

    disallow_correct: never the original token.
    """

    temperature: float = 1.0
    disallow_correct: bool = False

    def __post_init__(self) -> None:
        """Raises UserError on a temperature that is not positive."""
        if self.temperature <= 0:
            raise UserError(
                f"objective.sampling.temperature must be positive; got {self.temperature}"
            )

    def sample(
        self,
        logits: Float[Array, "B M V"],
        originals: Int[Array, "B M"],
        noise_key: UInt[Array, "B 2"],
    ) -> Int[Array, "B M"]:
        """A token for every slot, a function of the row's own noise; no gradient passes."""
        scores = jax.lax.stop_gradient(logits) / self.temperature
        if self.disallow_correct:
            correct = jnp.arange(logits.shape[-1])[None, None] == originals[..., None]
            scores = jnp.where(correct, -1e30, scores)
        keys = jax.random.wrap_key_data(noise_key, impl="threefry2x32")
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, _SAMPLING)
        return place_of_largest(scores + gumbel(keys, scores.shape))


def gumbel(keys: Key[Array, "B"], shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Standard Gumbel noise, a function of each row's key.

    By `-log(-log1p(-u))`, which is exact where it matters: for u near 0, the largest values.
    """
    uniform = (row_bits(keys, shape).astype(jnp.float32) + 0.5) * 2.0**-32
    return -jnp.log(-jnp.log1p(-jnp.minimum(uniform, 1.0 - 2.0**-24)))
