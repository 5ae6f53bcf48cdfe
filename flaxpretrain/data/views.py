"""Reads many views of a split's stream at once, of any lengths, end to end.

One fancy index a shard reads all tokens wanted from it, in about a nanosecond each: a call for each
view would cost more than its tokens.
"""

import numpy as np

from flaxpretrain.data.store import Shard, Split
from flaxpretrain.shapes import Bool, Int, Numpy


def read_views(
    split: Split, starts: Int[Numpy, " N"], lengths: Int[Numpy, " N"]
) -> tuple[Int[Numpy, " T"], Bool[Numpy, " T"]]:
    """The ids (int32) and word starts of N views, one after another; a view may span shards.

    Raises:
        IndexError: a view leaves the stream.
    """
    starts, lengths = starts[lengths > 0], lengths[lengths > 0]
    ends = starts + lengths
    if len(starts) == 0:
        return np.zeros(0, np.int32), np.zeros(0, np.bool_)
    if starts.min() < 0 or ends.max() > split.tokens:
        raise IndexError(f"a view leaves the {split.tokens} tokens of split {split.name!r}")
    shards = [shard for shard in split.shards if shard.stop > shard.start]
    if len(shards) == 1:
        return _read(shards, np.zeros(1, np.int64), _ranges(starts, lengths))
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
    sorted_ids, sorted_word_starts = _read(shards, borders, local)
    target = _ranges(targets[order], lengths)
    ids, word_starts = np.empty_like(sorted_ids), np.empty_like(sorted_word_starts)
    ids[target] = sorted_ids
    word_starts[target] = sorted_word_starts
    return ids, word_starts


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """range(start, start + length) of all views, end to end."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1]) + np.repeat(starts - (ends - lengths), lengths)


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
    shards: list[Shard], borders: np.ndarray, local: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and word starts at positions inside shards, those of shard i from borders[i] on."""
    ids, octets = np.empty(len(local), np.int32), np.empty(len(local), np.uint8)
    octet_of = local >> 3
    ends = [*borders[1:].tolist(), len(local)]
    for shard, begin, end in zip(shards, borders.tolist(), ends, strict=True):
        if begin < end:
            ids[begin:end] = shard.ids[local[begin:end]]
            octets[begin:end] = shard.words[octet_of[begin:end]]
    octets >>= (local & 7).astype(np.uint8)
    octets &= np.uint8(1)
    return ids, octets.view(np.bool_)
