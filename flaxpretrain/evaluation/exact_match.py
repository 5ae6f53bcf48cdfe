"""How often a model answers a source with exactly its target: text-to-text tasks."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from flaxpretrain.errors import UserError
from flaxpretrain.generation.strategies import Strategy
from flaxpretrain.generation.writer import Writer

_ROWS = 32

Watch = Callable[[Iterable, int], Iterable]
"""Passes parts on, of which there are so many, and shows how far they are."""


class Pair(NamedTuple):
    """A source and what a model is to make of it."""

    source: str
    target: str


class Answer(NamedTuple):
    """What a model made of a source."""

    pair: Pair
    text: str
    is_exact: bool


def read_pairs(path: Path) -> list[Pair]:
    """Pairs of a file with one `{"source": ..., "target": ...}` a line; empty lines are skipped.

    Raises:
        UserError: no such file, a line that is no such object, or no line at all.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected one JSON object a line")
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        given = row if isinstance(row, dict) else {}
        texts = [t for name in Pair._fields if isinstance(t := given.get(name), str) and t]
        if len(texts) < len(Pair._fields):
            raise UserError(
                f'{path}, line {number}: expected {{"source": "...", "target": "..."}}, both texts '
                f"that are not empty; got {line.strip()[:60]}"
            )
        pairs.append(Pair(*texts))
    if not pairs:
        raise UserError(f"{path} has no pairs: expected one JSON object a line")
    return pairs


def answers(
    writer: Writer,
    pairs: Sequence[Pair],
    *,
    max_new_tokens: int,
    strategy: Strategy | None = None,
    joint: str = " ",
    watch: Watch = lambda parts, count: parts,
) -> Iterator[Answer]:
    """What the model answers to every source, and whether it is the target but for outer spaces.

    A decoder alone goes on from the source and `joint`; only its first line counts, since many of
    them do not end an answer.
    """
    parts = [pairs[first : first + _ROWS] for first in range(0, len(pairs), _ROWS)]
    alone = not writer.generator.has_encoder
    for part in watch(parts, len(parts)):
        sources = [pair.source + (joint.rstrip() if alone else "") for pair in part]
        found = writer.write(sources, strategy, max_new_tokens=max_new_tokens)
        for pair, (written, *_) in zip(part, found, strict=True):
            text = written.text.strip()
            if alone:
                text = text.partition("\n")[0].strip()
            yield Answer(pair, text, text == pair.target.strip())


def teacher_forced(writer: Writer, pairs: Sequence[Pair], joint: str = " ") -> dict[str, float]:
    """How the model does when it is given the target's own tokens up to each.

    `loss` is in nats a token, `accuracy` the share of tokens that are the likeliest, `exact_match`
    that of targets all of whose tokens are.
    """
    found = writer.likelihoods([p.source for p in pairs], [p.target for p in pairs], joint)
    tokens = sum(each.tokens for each in found)
    loss = -sum(each.nats for each in found) / tokens
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "accuracy": sum(each.right for each in found) / tokens,
        "exact_match": sum(each.right == each.tokens for each in found) / len(found),
    }
