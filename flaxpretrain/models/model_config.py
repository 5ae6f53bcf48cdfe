"""What the configurations of all architectures share: Transformers' spelling, there and back."""

import abc
import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from flax import nnx

from flaxpretrain.errors import UserError
from flaxpretrain.models.names import Entry

Sharding = tuple[tuple[str, tuple[str | tuple[str, ...] | None, ...] | str], ...]
"""Path regex of parameters -> mesh axis of each of their dimensions; the first match counts."""


Config = TypeVar("Config", bound="ModelConfig")


def _is_optional(kind: Any) -> bool:
    return type(None) in typing.get_args(kind)


class ModelConfig(abc.ABC):
    """A frozen dataclass whose fields are Transformers' options, and some of our own.

    Every architecture has two of these:
    heads: what stands on the network, as `architectures` names it.
    vocab_multiple: the word table is padded with rows to a multiple of this; the tokens it adds
        are never predicted, and exports leave them out.
    """

    vocab_size: int
    heads: tuple[str, ...]
    vocab_multiple: int

    model_type: ClassVar[str]
    """Transformers' name of the family, and the name of the file."""

    architectures: ClassVar[Mapping[str, tuple[str, ...]]]
    """Transformers' classes with the heads that each one has: the one for pretraining first, then
    the network without it."""

    hf_defaults: ClassVar[Mapping[str, Any]] = {}
    """What Transformers assumes for options that a config.json leaves out, where we differ."""

    fixed_options: ClassVar[Mapping[str, Any]] = {}
    """Options of Transformers with the only value that this family can represent."""

    own_fields: ClassVar[tuple[str, ...]] = ("heads", "vocab_multiple")
    """Fields that Transformers does not know."""

    names: ClassVar[tuple[Entry, ...]]
    """How the parameters are called in Transformers' checkpoints."""

    sharding: ClassVar[Sharding]
    """The sharding rules of the parameters."""

    def _require(self, fulfilled: bool, field: str, expected: str) -> None:
        if not fulfilled:
            raise UserError(
                f"{type(self).__name__}.{field}: expected {expected}, got {getattr(self, field)!r}"
            )

    def _require_positive(self, *fields: str) -> None:
        for name in fields:
            self._require(getattr(self, name) > 0, name, "a positive number")

    def _require_rates(self, *fields: str) -> None:
        for name in fields:
            self._require(0.0 <= getattr(self, name) < 1.0, name, "a number in [0, 1)")

    def _require_known_heads(self) -> None:
        known = sorted({head for heads in self.architectures.values() for head in heads})
        self._require(set(self.heads) <= set(known), "heads", f"some of {', '.join(known)}")

    @abc.abstractmethod
    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """The whole network."""

    @property
    @abc.abstractmethod
    def max_length(self) -> int | None:
        """Longest piece, in tokens, that the network has positions for; None for no limit."""

    @property
    @abc.abstractmethod
    def attention_dropout_rate(self) -> float:
        """Dropout on the attention weights, which flash kernels do not have."""

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the word embedding table."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    def takes_vocabulary(self, size: int) -> bool:
        """Whether a tokenizer of so many tokens is the one that the network is made for."""
        return size == self.vocab_size

    @classmethod
    def from_hf(
        cls: type[Config], values: Mapping[str, Any], *, heads: tuple[str, ...] | None = None
    ) -> Config:
        """The configuration that a Transformers config.json describes.

        `heads` takes the place of those of the class that it names. Raises UserError for an
        option that this family cannot represent.
        """
        for option, only in cls.fixed_options.items():
            if values.get(option) not in (only, None):
                raise UserError(
                    f"config.json: {option} is {values[option]!r}; only {only!r} can be loaded"
                )
        if heads is None:
            name = (values.get("architectures") or list(cls.architectures))[0]
            if name not in cls.architectures:
                raise UserError(
                    f"config.json: architectures names {name!r}; expected one of "
                    f"{', '.join(cls.architectures)}"
                )
            heads = cls.architectures[name]
        options: dict[str, Any] = {**cls.hf_defaults, **values}
        fields: Any = dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
        given: dict[str, Any] = {"heads": heads}
        for field in fields:
            if field.name in cls.own_fields or field.name not in options:
                continue
            value = options[field.name]
            if value is not None:
                given[field.name] = float(value) if field.type is float else value
            elif _is_optional(field.type):  # else null means the default
                given[field.name] = None
        return cls(**given)

    def to_hf(self) -> dict[str, Any]:
        """The content of Transformers' config.json for this network."""
        classes = {heads: name for name, heads in self.architectures.items()}
        whole, bare = list(self.architectures)[:2]
        some = set(self.heads) & set(self.architectures[whole])
        name = classes.get(self.heads, whole if some else bare)
        fields = dataclasses.asdict(self)  # pyright: ignore[reportArgumentType]
        values = {k: v for k, v in fields.items() if k not in self.own_fields}
        return {"architectures": [name], "model_type": self.model_type, **values}

    def fitted(self: Config, tensors: Mapping[str, Any]) -> Config:
        """The configuration that a checkpoint of these tensors has where config.json is vague."""
        return self
