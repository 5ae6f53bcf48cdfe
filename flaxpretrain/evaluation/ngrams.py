"""What counting achieves at the same masked positions: unigram and bigram models of the corpus.

A masked language model that has learned nothing but how frequent words are has the unigram
model's loss; one that looks at its left neighbour too has the bigram model's.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from flaxpretrain.data.framing import is_text
from flaxpretrain.data.store import Split
from flaxpretrain.data.vocabulary import Vocabulary
from flaxpretrain.errors import UserError
from flaxpretrain.shapes import Batch, Float, Int, Numpy, Shaped

_MOST_TOKENS = 20_000_000
_HELD_OUT = 0.1
_DISCOUNTS = np.linspace(0.05, 0.95, 19)


class Nats(NamedTuple):
    """Cross entropies in nats a token, and over how many positions."""

    unigram: float
    bigram: float
    positions: int


@dataclasses.dataclass(frozen=True, eq=False)
class Ngrams:
    """Counts of tokens and of neighbours in a training text.

    Unigrams have one added to every count. Bigrams are interpolated with them after absolute
    discounting, P(w | v) = max(c(vw) - d, 0) / c(v) + d n(v) / c(v) P(w), with n(v) the number
    of different tokens seen after v; `discount` d is the best on text held out from the counting.
    Where nothing is known of the left neighbour it is P(w).

    Reference: Chen and Goodman 1999, "An empirical study of smoothing techniques for language
    modeling", section 2.6; Ney, Essen and Kneser 1994.
    """

    size: int
    discount: float
    unigram: Float[Numpy, " V"]
    """Probability of each token."""
    context: Float[Numpy, " V"]
    """How often each token has a right neighbour."""
    followers: Float[Numpy, " V"]
    """How many different right neighbours it has."""
    pairs: Int[Numpy, " P"]
    """left * V + right of the pairs seen, ascending."""
    pair_counts: Float[Numpy, " P"]

    def unigram_nats(self, labels: Int[Numpy, " N"]) -> Float[Numpy, " N"]:
        """-log P(label)."""
        return -np.log(self.unigram[labels])

    def bigram_nats(
        self,
        left: Int[Numpy, " N"],
        labels: Int[Numpy, " N"],
        known: Shaped[Numpy, " N"],
        discount: float | None = None,
    ) -> Float[Numpy, " N"]:
        """-log P(label | left), and -log P(label) where `known` is false."""
        discount = self.discount if discount is None else discount
        context = np.where(known, self.context[left], 0)
        pair = left.astype(np.int64) * self.size + labels
        place = np.minimum(np.searchsorted(self.pairs, pair), max(len(self.pairs) - 1, 0))
        seen = np.zeros(len(labels))
        if len(self.pairs):
            seen = np.where(self.pairs[place] == pair, self.pair_counts[place], 0.0)
        whole = np.maximum(context, 1)
        kept = np.maximum(seen - discount, 0) / whole
        backed_off = np.where(context > 0, discount * self.followers[left] / whole, 1.0)
        return -np.log(kept * (context > 0) + backed_off * self.unigram[labels])


def fit(split: Split, vocabulary: Vocabulary, max_tokens: int = _MOST_TOKENS) -> Ngrams:
    """Counts a split, its first `max_tokens` tokens where it is larger.

    Raises:
        UserError: the split is empty.
    """
    ids, starts = _read(split, min(split.tokens, max_tokens))
    if len(ids) < 2:
        raise UserError(f"split {split.name!r} has {len(ids)} tokens: too few to count")
    border = int(len(ids) * (1 - _HELD_OUT))
    counted = _count(ids[:border], starts[:border], vocabulary, 0.5)
    left, right = ids[border:-1], ids[border + 1 :]
    # Unknown tokens are special: they are never masked, and have no chance.
    scored = ~starts[border + 1 :] & is_text(vocabulary)[right]
    left, right = left[scored], right[scored]
    known = np.ones(len(left), bool)
    nats = [counted.bigram_nats(left, right, known, d).sum() for d in _DISCOUNTS]
    return _count(ids, starts, vocabulary, float(_DISCOUNTS[int(np.argmin(nats))]))


def _read(split: Split, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """The first ids of a split, and which of them begin a document."""
    parts = [np.asarray(shard.ids[: max(tokens - shard.start, 0)]) for shard in split.shards]
    ids = np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)
    starts = np.zeros(len(ids), bool)
    offsets = split.document_offsets
    starts[offsets[: int(offsets.searchsorted(np.array(len(ids))))]] = True
    return ids, starts


def _count(ids: np.ndarray, starts: np.ndarray, vocabulary: Vocabulary, discount: float) -> Ngrams:
    size = vocabulary.size
    text = is_text(vocabulary)
    # Masked tokens are never special, so a special token has no chance; others have one more.
    counts = np.bincount(ids, minlength=size) * text + text
    joined = ~starts[1:]
    pairs, pair_counts = np.unique(ids[:-1][joined] * size + ids[1:][joined], return_counts=True)
    return Ngrams(
        size=size,
        discount=discount,
        unigram=counts / counts.sum(),
        context=np.bincount(pairs // size, pair_counts, size),
        followers=np.bincount(pairs // size, minlength=size).astype(np.float64),
        pairs=pairs,
        pair_counts=pair_counts.astype(np.float64),
    )


def score(ngrams: Ngrams, batches: Iterable[Batch], vocabulary: Vocabulary) -> Nats:
    """Cross entropies at the masked positions of batches of masked rows.

    The left neighbour counts as known when it is text of the same piece and not masked itself.

    Raises:
        UserError: the batches hold no masked positions.
    """
    text = is_text(vocabulary)
    unigram, bigram, positions = 0.0, 0.0, 0
    for batch in batches:
        left, labels, known = _masked(batch, text)
        unigram += float(ngrams.unigram_nats(labels).sum())
        bigram += float(ngrams.bigram_nats(left, labels, known).sum())
        positions += len(labels)
    if positions == 0:
        raise UserError("the evaluation has no masked positions: nothing to compare with")
    return Nats(unigram / positions, bigram / positions, positions)


def _masked(
    batch: Mapping[str, np.ndarray], text: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Left neighbours and labels of the masked positions, and whether the former are known."""
    if "masked_positions" not in batch:
        raise UserError("n-gram baselines need batches with masked_positions; these have none")
    row, slot = np.nonzero(batch["masked_weights"])
    position = batch["masked_positions"][row, slot]
    hidden = np.zeros(batch["input_ids"].shape, bool)
    hidden[row, position] = True
    before = np.maximum(position - 1, 0)
    left, segments = batch["input_ids"][row, before], batch["segment_ids"]
    known = (position > 0) & ~hidden[row, before] & text[left]
    known &= segments[row, before] == segments[row, position]
    return left, batch["masked_labels"][row, slot], known
