"""The ids an objective must know about a tokenizer: its size and its special tokens."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from flaxpretrain.errors import UserError
from flaxpretrain.shapes import Int, Numpy


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Size and special ids of a tokenizer: numpy-only, hashable, cheap to send to a worker.

    The ids are read from the tokenizer, never assumed: BETO's [MASK] is 0, RoBERTa's <pad> is 1.
    RoBERTa-like tokenizers have cls = bos = <s> and sep = eos = </s>.
    """

    TOKENS: ClassVar[tuple[str, ...]] = ("pad", "cls", "sep", "mask", "bos", "eos", "unk")

    size: int
    """Number of ids of the tokenizer itself: a model may pad its tables, the vocabulary never."""
    pad: int | None = None
    cls: int | None = None
    sep: int | None = None
    mask: int | None = None
    bos: int | None = None
    eos: int | None = None
    unk: int | None = None
    sentinels: tuple[int, ...] = ()
    """T5's <extra_id_0>, <extra_id_1>, ..., descending from the tokenizer's size - 1."""
    special_ids: tuple[int, ...] = ()
    """All ids that never stand for text, sorted; holds every id named above."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"a vocabulary has at least one id; got size={self.size}")
        named = {getattr(self, name) for name in self.TOKENS} - {None}
        every = tuple(sorted(named | set(self.sentinels) | set(self.special_ids)))
        outside = [i for i in every if not 0 <= i < self.size]
        if outside:
            raise ValueError(f"special ids {outside} lie outside range({self.size})")
        object.__setattr__(self, "sentinels", tuple(self.sentinels))
        object.__setattr__(self, "special_ids", every)

    def require(self, *names: str) -> None:
        """Checks that the named tokens exist.

        Raises:
          UserError: a token is missing; the message names all that are.
        """
        missing = [name for name in names if getattr(self, name) in (None, ())]
        if missing:
            raise UserError(
                f"the tokenizer has no {' and no '.join(missing)} token, which this run needs: "
                "add it to the tokenizer (tools/train_tokenizer.py does) and build the dataset anew"
            )

    def regular_ids(self) -> Int[Numpy, " R"]:
        """Every id that may stand for text, ascending; computed once and read-only."""
        return _regular_ids(self.size, self.special_ids)

    def to_json(self) -> dict[str, Any]:
        """A dict of plain values, as `dataset.json` holds it."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Vocabulary":
        """The inverse of `to_json`.

        Raises:
          UserError: a field is unknown or missing.
        """
        fields = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - fields)
        if unknown or "size" not in values:
            raise UserError(
                f"a stored vocabulary has the fields {sorted(fields)}; "
                + (f"got unknown {unknown}" if unknown else "'size' is missing")
            )
        plain: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
        }
        return cls(**plain)


@functools.lru_cache(maxsize=8)
def _regular_ids(size: int, special_ids: tuple[int, ...]) -> np.ndarray:
    ids = np.setdiff1d(np.arange(size, dtype=np.int64), np.asarray(special_ids, np.int64))
    ids.flags.writeable = False
    return ids
