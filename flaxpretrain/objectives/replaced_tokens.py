"""Replaced token detection: a generator fills masks, a discriminator finds what it filled in.

Both are trained in one step. Generator, sharing of embeddings, sampling and the second network's
task are values; the defaults are ELECTRA's, `Disentangled` and `ContextHead` are DeBERTa-v3's.

Reference: ELECTRA, https://arxiv.org/abs/2003.10555; google-research/electra run_pretraining.py
and pretrain/pretrain_helpers.py. DeBERTa-v3, https://arxiv.org/abs/2111.09543;
microsoft/DeBERTa apps/tasks/rtd_task.py.
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key, PyTree, UInt

from flaxpretrain.data.framing import Framing, MaskedFraming
from flaxpretrain.data.masking import Masking
from flaxpretrain.data.vocabulary import Vocabulary
from flaxpretrain.errors import UserError
from flaxpretrain.models.functional import Model, fold, model_of
from flaxpretrain.models.layers import row_bits
from flaxpretrain.objectives.detection import (
    Corrupted,
    Detect,
    Task,
    Tree,
    area_under_curve,
    slots_at,
)
from flaxpretrain.objectives.objective import (
    Objective,
    Sum,
    accuracy,
    cross_entropy,
    dropout_keys,
    gather_positions,
    perplexity,
)

_GENERATOR, _DISCRIMINATOR, _SAMPLING = 1, 2, 3  # folded into a row's keys
_EMBEDDINGS = "embeddings"
_TABLES = ("words", "positions", "types")


class Generator(abc.ABC):
    """What proposes replacements."""

    @abc.abstractmethod
    def config(self, model_config: Any) -> Any:
        """The configuration of its network, without regard to embeddings; None for no network."""


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


class Sharing(abc.ABC):
    """Which parameters belong to both networks; trees are nested dicts of arrays."""

    def generator(self, config: Any, model_config: Any) -> Any:
        """The generator's configuration, its embeddings fitted to the sharing."""
        _require_same_embeddings(config, model_config)
        return config

    @abc.abstractmethod
    def split(self, generator: Tree, discriminator: Tree) -> dict[str, Tree]:
        """What is trained, nothing twice, from two whole networks."""

    @abc.abstractmethod
    def join(self, params: Tree, frozen: Callable[[Array], Array]) -> tuple[Tree, Tree]:
        """Two whole networks from what is trained; `frozen` is applied to what gets no gradient."""


def _require_same_embeddings(config: Any, model_config: Any) -> None:
    width = getattr(config, "embedding_size", config.hidden_size)
    own = getattr(model_config, "embedding_size", model_config.hidden_size)
    if width != own:
        raise UserError(
            f"objective.sharing: a generator {width} wide cannot share embeddings {own} wide, for "
            f"a {type(config).__name__} has no projection between them: use a generator as wide "
            "(Scaled(width=1.0, depth=0.5)), Untied() embeddings, or an ElectraConfig"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tied(Sharing):
    """Word, position and type tables and their norm are one; gradients of both reach them."""

    def split(self, generator: Tree, discriminator: Tree) -> dict[str, Tree]:
        """The embeddings, and what is left of both."""
        return {
            _EMBEDDINGS: discriminator[_EMBEDDINGS],
            "generator": _without_embeddings(generator),
            "discriminator": _without_embeddings(discriminator),
        }

    def join(self, params: Tree, frozen: Callable[[Array], Array]) -> tuple[Tree, Tree]:
        """Both with the same embeddings."""
        shared = {_EMBEDDINGS: params[_EMBEDDINGS]}
        return {**params["generator"], **shared}, {**params["discriminator"], **shared}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Untied(Sharing):
    """Nothing is shared; the generator's embeddings are as wide as its layers."""

    def generator(self, config: Any, model_config: Any) -> Any:
        """With embeddings of its own hidden width."""
        if not hasattr(config, "embedding_size"):
            return config
        return dataclasses.replace(config, embedding_size=config.hidden_size)

    def split(self, generator: Tree, discriminator: Tree) -> dict[str, Tree]:
        """Both as they are."""
        return {"generator": generator, "discriminator": discriminator}

    def join(self, params: Tree, frozen: Callable[[Array], Array]) -> tuple[Tree, Tree]:
        """Both as they are."""
        return params["generator"], params["discriminator"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Disentangled(Sharing):
    """The discriminator's tables are the generator's, without gradient, plus a residue of its own.

    The residue starts at zero. Each network has an embedding norm of its own.

    Reference: gradient-disentangled embedding sharing, https://arxiv.org/abs/2111.09543, section
    3.3; microsoft/DeBERTa apps/models/replaced_token_detection_model.py (which has no type table).
    """

    def split(self, generator: Tree, discriminator: Tree) -> dict[str, Tree]:
        """The discriminator's tables become zeros."""
        own = discriminator[_EMBEDDINGS]
        residue = {n: jnp.zeros_like(v) if n in _TABLES else v for n, v in own.items()}
        return {"generator": generator, "discriminator": {**discriminator, _EMBEDDINGS: residue}}

    def join(self, params: Tree, frozen: Callable[[Array], Array]) -> tuple[Tree, Tree]:
        """The sums of tables in place of the residues."""
        tables, residue = params["generator"][_EMBEDDINGS], params["discriminator"][_EMBEDDINGS]
        summed = {n: frozen(tables[n]) + residue[n] for n in _TABLES if n in residue}
        embeddings = {**residue, **summed}
        return params["generator"], {**params["discriminator"], _EMBEDDINGS: embeddings}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Whole(Sharing):
    """One network is both; the generator differs by its head. Both must be of one size."""

    def generator(self, config: Any, model_config: Any) -> Any:
        """The discriminator's configuration."""
        if dataclasses.replace(config, heads=model_config.heads) != model_config:
            raise UserError(
                "objective.sharing: Whole() needs a generator as large as the discriminator; use "
                "Scaled(width=1.0)"
            )
        return config

    def split(self, generator: Tree, discriminator: Tree) -> dict[str, Tree]:
        """The discriminator, and of the generator what the discriminator lacks: its head."""
        own = {name: tree for name, tree in generator.items() if name not in discriminator}
        return {"generator": own, "discriminator": discriminator}

    def join(self, params: Tree, frozen: Callable[[Array], Array]) -> tuple[Tree, Tree]:
        """The generator is the discriminator's trunk with its own head."""
        own = params.get("generator", {})
        return {**params["discriminator"], **own}, params["discriminator"]


def _without_embeddings(tree: Tree) -> dict[str, Any]:
    return {name: branch for name, branch in tree.items() if name != _EMBEDDINGS}


class Branch(nnx.Module):
    """Holds a nested dict of arrays as parameters."""

    def __init__(self, tree: Tree):
        for name, value in tree.items():
            setattr(self, name, Branch(value) if isinstance(value, Mapping) else nnx.Param(value))


class Networks(Branch):
    """All that is trained: as the sharing splits it, and the head of the second network."""

    def __init__(
        self,
        tree: Tree,
        head: nnx.Module | None,
        generator: Model | None,
        discriminator: Model,
        vocab_size: int,
    ):
        super().__init__(tree)
        self.head = head
        self.generator_model = generator
        self.discriminator_model = discriminator
        self.vocab_size = vocab_size


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
        return jnp.argmax(scores + gumbel(keys, scores.shape), axis=-1)


def gumbel(keys: Key[Array, "B"], shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Standard Gumbel noise, a function of each row's key.

    By `-log(-log1p(-u))`, which is exact where it matters: for u near 0, the largest values.
    """
    uniform = (row_bits(keys, shape).astype(jnp.float32) + 0.5) * 2.0**-32
    return -jnp.log(-jnp.log1p(-jnp.minimum(uniform, 1.0 - 2.0**-24)))


def place(
    ids: Int[Array, "B L"],
    positions: Int[Array, "B M"],
    values: Int[Array, "B M"],
    weights: Float[Array, "B M"],
) -> Int[Array, "B L"]:
    """Rows with the values of used slots at their positions.

    Where several slots name one position their ids are averaged, rounding down, as the original's
    scatter_update does; masks without duplicates never make it so.
    """
    hits = slots_at(positions, weights, ids.shape[1])
    count = jnp.sum(hits, axis=1)
    total = jnp.sum(jnp.where(hits, values[..., None], 0), axis=1)
    return jnp.where(count > 0, total // jnp.maximum(count, 1), ids)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplacedTokens(Objective):
    """A generator's masked LM and a second network's detection of what it filled in.

    The run's model is the second network, the one that is fine-tuned afterwards.

    separate_optimizers: two optimizer groups, `generator` (with what is shared) and
        `discriminator`, each with its own clipping, as in DeBERTa-v3. Both step together, after one
        backward pass: with `Disentangled` embeddings no gradient of one reaches the other, so it
        only differs from stepping the generator first in that the samples are those of the
        generator before its step, as in DeBERTa-v3 too.
    """

    masking: Masking
    generator: Generator = Scaled()
    sharing: Sharing = Tied()
    sampling: Sampling = Sampling()
    task: Task = Detect()
    separate_optimizers: bool = False
    terms: Mapping[str, float] = dataclasses.field(
        default_factory=lambda: {"masked_lm": 1.0, "discriminator": 50.0}
    )

    # A generator may have a single head, which no tensor axis divides.
    sharding: ClassVar = (
        (r"^generator/.*attention/(query|key|value)/kernel$", (None, "fsdp", None, None)),
        (r"^generator/.*attention/(query|key|value)/bias$", (None, None, None)),
        (r"^generator/.*attention/out/kernel$", (None, None, None, "fsdp")),
        (r"^head/dense/kernel$", ("fsdp", None)),
        (r"^head/score/kernel$", (None, None)),
        (r"^head/.*(bias|scale)$", (None,)),
    )

    @property
    def groups(self) -> Mapping[str, str]:
        """Optimizer groups, where they are separate."""
        if not self.separate_optimizers:
            return {}
        return {r"^(discriminator|head)/": "discriminator", "": "generator"}

    def framing(self, vocabulary: Vocabulary, length: int) -> Framing:
        """Rows as `[CLS] piece [SEP]`, masked by `masking`."""
        return MaskedFraming(vocabulary=vocabulary, length=length, masking=self.masking)

    def configs(self, model_config: Any) -> tuple[Any | None, Any]:
        """Of the generator (None where it is no network) and of the second network."""
        if "mlm" not in {h for heads in model_config.architectures.values() for h in heads}:
            raise UserError(
                f"ReplacedTokens needs a masked LM head for its generator, which "
                f"{type(model_config).__name__} does not have: choose another model"
            )
        second = dataclasses.replace(model_config, heads=self.task.heads)
        config = self.generator.config(model_config)
        if config is None:
            return None, second
        config = self.sharing.generator(config, model_config)
        return dataclasses.replace(config, heads=("mlm",)), second

    def build(self, model_config: Any, rngs: nnx.Rngs) -> Networks:
        """Both networks, shared parameters held once."""
        generator_config, second_config = self.configs(model_config)
        second = model_of(second_config.build)
        head = self.task.head(second_config, rngs)
        tree: Tree = {"discriminator": second.init(rngs.params())}
        generator = None
        if generator_config is not None:
            generator = model_of(generator_config.build)
            tree = self.sharing.split(generator.init(rngs.params()), tree["discriminator"])
        return Networks(tree, head, generator, second, model_config.vocab_size)

    def weights(self, batch: Mapping[str, Array]) -> dict[str, Float[Array, ""]]:
        """How many slots, and how many positions of the second network, count."""
        return {
            "masked_lm": jnp.sum(batch["masked_weights"]),
            "discriminator": jnp.sum(self.task.weights(batch)),
        }

    def loss(
        self, model: Model, params: PyTree, batch: Mapping[str, Array], key: Array | None
    ) -> dict[str, Sum]:
        """Sums of both losses and their metrics; in evaluation also what the AUC is read from."""
        networks: Any = model.bind(params)
        generator_params, second_params = self._join(params, jax.lax.stop_gradient)
        keys = dropout_keys(key, batch["noise_key"])
        labels, weights = batch["masked_labels"], batch["masked_weights"]
        positions = batch["masked_positions"]
        if networks.generator_model is None:
            logits = jnp.zeros((*labels.shape, networks.vocab_size))
        else:
            network: Any = networks.generator_model.bind(generator_params)
            hidden = _hidden(network, batch["input_ids"], batch, fold(keys, _GENERATOR))
            logits = network.logits(gather_positions(hidden, positions))
        sampled = self.sampling.sample(logits, labels, batch["noise_key"])
        originals = place(batch["input_ids"], positions, labels, weights)
        fakes = place(originals, positions, sampled, weights)
        corrupted = Corrupted(fakes, originals, fakes != originals)
        second: Any = networks.discriminator_model.bind(second_params)
        hidden = _hidden(second, fakes, batch, fold(keys, _DISCRIMINATOR))
        return {
            "masked_lm": cross_entropy(logits, labels, weights),
            "masked_lm_accuracy": accuracy(logits, labels, weights),
            "sampled_masked_lm_accuracy": Sum(
                jnp.sum(jnp.where(sampled == labels, weights, 0.0)), jnp.sum(weights)
            ),
        } | self.task.sums(second, networks.head, hidden, corrupted, batch, key is None)

    def summarize(self, sums: Mapping[str, Sum]) -> dict[str, float]:
        """The means, under the original's names too, the generator's perplexity, and the AUC."""
        means = super().summarize(sums)
        for ours, theirs in (("masked_lm", "masked_lm_loss"), ("discriminator", "disc_loss")):
            if ours in means:
                means[theirs] = means[ours]
        if "masked_lm" in means:
            means["perplexity"] = perplexity(means["masked_lm"])
        # Without a guess the precision, and without a replaced token the recall, is 0 over 0.
        for name in ("disc_precision", "disc_recall"):
            if name in sums:
                means.setdefault(name, 0.0)
        if "disc_auc" in sums:
            area = area_under_curve(np.asarray(sums["disc_auc"].total))
            if area is not None:
                means["disc_auc"] = area
        return means

    def flops(self, model_config: Any, spec: Mapping[str, jax.ShapeDtypeStruct]) -> float:
        """Both networks over every position; the generator's vocabulary head over the slots."""
        rows, length = spec["input_ids"].shape
        share = spec["masked_labels"].shape[1] / length
        generator, second = self.configs(model_config)
        each = self.task.flops_per_token(second, length, share)
        if generator is not None:
            each += generator.flops_per_token(length, share)
        return rows * length * each

    def parts(self, model_config: Any, params: PyTree) -> dict[str, tuple[Any, PyTree]]:
        """`discriminator` and `generator`, each a whole network of its architecture."""
        generator_config, second_config = self.configs(model_config)
        generator_params, second_params = self._join(params, lambda array: array)
        head = params.get("head")
        parts = {"discriminator": self.task.part(second_config, second_params, head)}
        if generator_config is not None:
            parts["generator"] = (generator_config, generator_params)
        return parts

    def _join(self, params: Tree, frozen: Callable[[Array], Array]) -> tuple[Any, Any]:
        if isinstance(self.generator, Uniform):
            return None, params["discriminator"]
        return self.sharing.join(params, frozen)


def _hidden(
    network: Any,
    input_ids: Int[Array, "B L"],
    batch: Mapping[str, Array],
    keys: Key[Array, "B"] | None,
) -> Float[Array, "B L D"]:
    segments = batch["segment_ids"]
    types = batch.get("token_type_ids")
    hidden = network.embed(
        input_ids, segments, batch["position_ids"], token_type_ids=types, keys=keys
    )
    return network.encode(hidden, segments, keys=keys)
