"""Reads many views of a split's stream at once, of any lengths, end to end.

One fancy index a shard reads all tokens wanted from it, in about a nanosecond each: a call for each
view would cost more than its tokens.
"""

import numpy as np

from flaxpretrain.data.store import Shard, Split
from flaxpretrain.shapes import Int, Numpy


def read_views(
    split: Split,
    starts: Int[Numpy, " N"],
    lengths: Int[Numpy, " N"],
    *,
    word_starts: bool = True,
) -> dict[str, np.ndarray]:
    """`ids` (int32) and, if wanted, `word_starts` (bool) of N views, one after another.

    A view may span shards.

    Raises:
        IndexError: a view leaves the stream.
    """
    starts, lengths = starts[lengths > 0], lengths[lengths > 0]
    ends = starts + lengths
    if len(starts) and (starts.min() < 0 or ends.max() > split.tokens):
        raise IndexError(f"a view leaves the {split.tokens} tokens of split {split.name!r}")
    shards = [shard for shard in split.shards if shard.stop > shard.start]
    if len(shards) <= 1 or len(starts) == 0:
        return _read(shards, [0] * len(shards), _ranges(starts, lengths), word_starts)
    stops = np.array([shard.stop for shard in shards])
    starts, lengths = _cut(starts, lengths, stops)
    targets = np.cumsum(lengths) - lengths
    order = np.argsort(starts)
    starts, lengths = starts[order], lengths[order]
    shard_of_view = np.searchsorted(stops, starts, side="right")
    tokens_before = np.concatenate([[0], np.cumsum(lengths)])
    borders = tokens_before[np.searchsorted(shard_of_view, np.arange(len(shards)))]
    shard_starts = np.array([shard.start for shard in shards])
    local = _ranges(starts - shard_starts[shard_of_view], lengths)
    target = _ranges(targets[order], lengths)
    found = {}
    for name, ordered in _read(shards, borders.tolist(), local, word_starts).items():
        found[name] = np.empty_like(ordered)
        found[name][target] = ordered
    return found


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """range(start, start + length) of all views, end to end."""
    ends = np.cumsum(lengths)
    ranges = np.repeat(starts - (ends - lengths), lengths)
    ranges += np.arange(len(ranges))
    return ranges


def _cut(
    starts: np.ndarray, lengths: np.ndarray, stops: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The same views cut where a shard stops, in the same order."""
    first = np.searchsorted(stops, starts, side="right")
    last = np.searchsorted(stops, starts + lengths - 1, side="right")
    parts = last - first + 1
    if (parts == 1).all():
        return starts, lengths
    view = np.repeat(np.arange(len(starts)), parts)
    shard = _ranges(first, parts)
    begins = np.concatenate([[0], stops])[shard]
    cut_starts = np.maximum(starts[view], begins)
    return cut_starts, np.minimum((starts + lengths)[view], stops[shard]) - cut_starts


def _read(
    shards: list[Shard], borders: list[int], local: np.ndarray, word_starts: bool
) -> dict[str, np.ndarray]:
    """Ids and word starts at positions inside shards, those of shard i from borders[i] on."""
    ids = np.empty(len(local), np.int32)
    parts = [
        (shard, slice(begin, end))
        for shard, begin, end in zip(shards, borders, [*borders[1:], len(local)], strict=True)
        if begin < end
    ]
    for shard, part in parts:
        ids[part] = shard.ids[local[part]]
    if not word_starts:
        return {"ids": ids}
    octets, octet_of = np.empty(len(local), np.uint8), local >> 3
    for shard, part in parts:
        octets[part] = shard.words[octet_of[part]]
    octets >>= (local & 7).astype(np.uint8)
    octets &= np.uint8(1)
    return {"ids": ids, "word_starts": octets.view(np.bool_)}
