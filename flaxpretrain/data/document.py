"""A document, and what reading documents left out."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

from flaxpretrain.errors import UserError

LONGEST_DOCUMENT = 1 << 22
"""Characters; a longer document is cut at a sentence's end, to bound memory.

No row is long enough to tell: it is about a million tokens.
"""

LONGEST_LINE = 1 << 24
"""Bytes; a longer line is no text, or text that should have been cut."""

TOLD = 20
"""Broken things of a source that are told one by one; the others are only counted."""


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """One document: what stood on each of its lines, a sentence or a paragraph; none is blank."""

    sentences: tuple[str, ...]


@dataclasses.dataclass
class Losses:
    """What reading a source left out: decides whether something broken stops it, and counts.

    skip_broken: goes on after what is broken, where by default that is an error.
    notify: is told of the first broken things, a line each.
    """

    skip_broken: bool = False
    notify: Callable[[str], None] = lambda message: None
    broken_count: int = 0
    """Lines, records or what else could not be read."""
    empty_count: int = 0
    """Records without text."""
    replaced_count: int = 0
    """Lines with bytes that are not UTF-8, which U+FFFD stands for now."""

    def broken(
        self,
        message: str,
        remedy: str = "mend it, or pass --skip-broken to leave such things out",
        count: int = 1,
    ) -> None:
        """Counts what `message` says is broken, with its file and line.

        Raises:
          UserError: nothing is to be skipped.
        """
        if not self.skip_broken:
            raise UserError(f"{message}; {remedy}")
        if self.broken_count < TOLD:
            self.notify(f"left out: {message}")
        elif self.broken_count < TOLD + count:
            self.notify(f"left out: more than {TOLD} broken things, the others are only counted")
        self.broken_count += count

    def counts(self) -> dict[str, int]:
        """What was left out or changed, by reason; reasons that never came up are not there."""
        found = {
            "broken": self.broken_count,
            "empty": self.empty_count,
            "replaced": self.replaced_count,
        }
        return {reason: count for reason, count in found.items() if count}


def told(name: str, counts: Mapping[str, int]) -> list[str]:
    """What a source lost, as `Losses.counts` has it, in a line; none where it lost nothing."""
    words = {
        "broken": "left out as broken",
        "empty": "records without text",
        "replaced": "lines with bytes that are not UTF-8, now U+FFFD",
    }
    what = "; ".join(f"{count:,} {words.get(reason, reason)}" for reason, count in counts.items())
    return [f"{name}: {what}"] if what else []


def blank(line: str) -> bool:
    """Whether a line has nothing but white space."""
    return not line or line.isspace()


def documents_of(sentences: Sequence[str]) -> Iterator[Document]:
    """One document of sentences, none of them blank; several where it is too long."""
    held: list[str] = []
    size = 0
    for sentence in sentences:
        held.append(sentence)
        size += len(sentence)
        if size >= LONGEST_DOCUMENT:
            yield Document(tuple(held))
            held, size = [], 0
    if held:
        yield Document(tuple(held))


__all__ = [
    "LONGEST_DOCUMENT",
    "LONGEST_LINE",
    "Document",
    "Losses",
    "blank",
    "documents_of",
    "told",
]
