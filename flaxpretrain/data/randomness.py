"""Counter-based random numbers: each is a pure function of (seed, epoch, row, stream, counter).

No generator holds a state, so any row of any step can be drawn anywhere, in any order and in
batches of any size, and comes out the same.

Reference: SplitMix64, Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
OOPSLA 2014, for the mixing function and its counter; Kensler, "Correlated multi-jittered
sampling", Pixar technical memo 13-01, for permutations evaluated a point at a time.
"""

import enum

import numpy as np

from flaxpretrain.shapes import Bool, Float, Int, Numpy, UInt

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
# Two rounds a key; with half as many, ranges below ten come out visibly uneven.
_PERMUTE_KEYS = 4
# Up to here a 32-bit ticket leaves at least 19 random bits above the position.
_SHORT_TICKET_BITS = 13

Keys = UInt[Numpy, " B"]
"""One uint64 key a row, from `row_keys`."""


class Stream(enum.IntEnum):
    """What a draw is for. Draws of one row for different purposes never share numbers.

    The values enter the hash: never renumber one, or every dataset's order and noise changes.
    """

    ORDER = 1
    PIECES = 2
    NOISE_KEY = 3
    MASK_POSITIONS = 4
    MASK_COUNT = 5
    MASK_REPLACEMENT = 6
    MASK_SHARES = 7
    SEGMENTS = 8
    SEGMENT_LENGTH = 9
    MASK_NGRAMS = 20
    MASK_ANCHORS = 21
    PAIRS = 22
    PAIR_CUT_A = 23
    PAIR_CUT_B = 24
    NOISED_PIECE = 40
    NOISE_CUTS = 41
    TEXT_CUTS = 42
    ROLL = 43
    INDEPENDENT = 44
    SHUFFLE = 45
    RANDOM_SHARE = 46
    RANDOM_TOKEN = 47
    SPLIT_POINT = 48
    SPAN_LENGTHS = 49
    SPAN_STARTS = 50
    SENTENCE_CHOICE = 51
    SENTENCE_ORDER = 52
    INSERT_POSITIONS = 53
    INSERT_TOKENS = 54
    NOISE_POSITIONS = 55
    NOISE_TOKENS = 56
    ROTATION = 57
    WORD_ORDER = 58
    NGRAM_LENGTHS = 59
    CYCLE = 60
    SECTIONS = 80


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer, in place: a bijection of 64 bits in which every bit moves all."""
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def fold(keys: UInt[Numpy, "*B"], value: Int[Numpy, "*#B"] | int) -> UInt[Numpy, "*B"]:
    """Keys that depend on `keys` and `value`; distinct values give distinct keys."""
    if isinstance(value, int):
        value = np.asarray(value & _WORD, np.uint64)
    # A copy, not a view: numpy warns of overflow on scalars, never on arrays of rank 1 or more.
    folded = np.array(keys, np.uint64, ndmin=1)
    folded += np.uint64(_GOLDEN)
    folded = _mix(folded) ^ value.astype(np.uint64)
    return _mix(folded).reshape(np.broadcast_shapes(np.shape(keys), np.shape(value)))


def row_keys(seed: int, epoch: Int[Numpy, " B"], row: Int[Numpy, " B"]) -> Keys:
    """One key for each (seed, epoch, row)."""
    root = np.full(np.shape(row), seed & _WORD, np.uint64)
    return fold(fold(root, epoch), row)


def bits(keys: Keys, stream: int, count: int) -> UInt[Numpy, "B C"]:
    """`count` uniform uint64 a row; a larger count begins with the same numbers."""
    counters = np.arange(1, count + 1, dtype=np.uint64)
    counters *= np.uint64(_GOLDEN)
    return _mix(fold(keys, int(stream))[:, None] + counters)


def words(keys: Keys, stream: int, count: int) -> UInt[Numpy, "B C"]:
    """`count` uniform uint32 a row: the halves of `bits`, the lower half first."""
    halves = bits(keys, stream, -(-count // 2)).astype("<u8", copy=False).view("<u4")
    return halves[:, :count]


def words_of(keys: Keys, stream: int, counts: Int[Numpy, " B"]) -> UInt[Numpy, " T"]:
    """`counts[i]` uniform uint32 of the i-th key, end to end: the same as `words` gives."""
    counts = np.asarray(counts, np.int64)
    halves = (counts + 1) >> 1
    ends = np.cumsum(halves)
    counters = np.arange(1, halves.sum() + 1, dtype=np.uint64)
    counters -= np.repeat((ends - halves).astype(np.uint64), halves)
    counters *= np.uint64(_GOLDEN)
    counters += np.repeat(fold(keys, int(stream)), halves)
    pairs = _mix(counters).astype("<u8", copy=False).view("<u4")
    odd = counts & 1 > 0
    if not odd.any():
        return pairs
    wanted = np.ones(len(pairs), bool)
    wanted[2 * ends[odd] - 1] = False
    return pairs[wanted]


def uniform(keys: Keys, stream: int, count: int) -> Float[Numpy, "B C"]:
    """`count` float32 a row, uniform over the multiples of 2**-24 in [0, 1)."""
    return (words(keys, stream, count) >> np.uint32(8)).astype(np.float32) * np.float32(2**-24)


def scaled(draws: UInt[Numpy, "*B"], high: Int[Numpy, "*#B"] | int) -> Int[Numpy, "*B"]:
    """Uniform uint32 draws as int64 in range(high); no value is off by more than 2**-32.

    `high` may differ by element; where it is 0, so is the draw.
    """
    product = draws.astype(np.uint64) * np.asarray(high).astype(np.uint64)
    return (product >> np.uint64(32)).astype(np.int64)


def integers(keys: Keys, stream: int, count: int, high: int) -> Int[Numpy, "B C"]:
    """`count` integers a row, uniform over range(high); `high` is at most 2**32."""
    return scaled(words(keys, stream, count), high)


def noise_key(keys: Keys) -> UInt[Numpy, "B 2"]:
    """The uint32 pair of a row from which the device draws all its own noise."""
    return words(keys, Stream.NOISE_KEY, 2)


def lottery(
    keys: Keys, stream: int, eligible: Bool[Numpy, "B L"], slots: int
) -> tuple[UInt[Numpy, "B M"], int]:
    """The `slots` lowest tickets of each row, ascending, and the number of position bits in one.

    Every eligible position holds a ticket: random upper bits, the position in the lower bits. The
    others hold the highest ticket of all. Positions so come with their rank and need no argsort.
    """
    length = eligible.shape[1]
    position_bits = max(length - 1, 1).bit_length()
    draw = words if position_bits <= _SHORT_TICKET_BITS else bits
    tickets = draw(keys, stream, length)
    kind = tickets.dtype.type
    low = (1 << position_bits) - 1
    tickets &= kind(~low & int(np.iinfo(kind).max))
    tickets |= np.arange(length, dtype=kind)
    # True becomes 0, False becomes all ones.
    tickets |= eligible.astype(kind) - kind(1)
    if slots < length:
        tickets.partition(slots - 1, axis=1)
    lowest = tickets[:, :slots].copy()
    lowest.sort(axis=1)
    return lowest, position_bits


def chosen(
    tickets: UInt[Numpy, "B M"], position_bits: int, counts: Int[Numpy, " B"]
) -> tuple[Int[Numpy, "B M"], Bool[Numpy, "B M"]]:
    """The positions of the `counts` lowest tickets of a row, ascending, and which slots are used.

    Unused slots come last and hold 0. No count may exceed the eligible positions of its row.
    """
    kind = tickets.dtype.type
    used = np.arange(tickets.shape[1]) < counts[:, None]
    low = kind((1 << position_bits) - 1)
    positions = (tickets & low).astype(np.int32)
    positions[~used] = np.iinfo(np.int32).max
    positions.sort(axis=1)
    positions *= used
    return positions, used


def choose(
    keys: Keys,
    stream: int,
    eligible: Bool[Numpy, "B L"],
    counts: Int[Numpy, " B"],
    slots: int,
) -> tuple[Int[Numpy, "B M"], Bool[Numpy, "B M"]]:
    """`counts` distinct eligible positions a row, every subset alike likely.

    Returns:
        Positions, ascending, int32, 0 in unused slots; and which slots are used: as many as were
        asked for, as are eligible and as there are slots, whichever is least.
    """
    slots = min(slots, eligible.shape[1])
    tickets, position_bits = lottery(keys, stream, eligible, slots)
    return chosen(tickets, position_bits, np.minimum(counts, np.count_nonzero(eligible, axis=1)))


def permute(
    index: Int[Numpy, "*B"], size: Int[Numpy, "*#B"] | int, keys: UInt[Numpy, "*#B"]
) -> Int[Numpy, "*B"]:
    """Where a pseudo-random permutation of range(size), picked by the key, sends each index.

    Needs no table: a keyed bijection of the next power of two is applied until the value falls
    below `size` again, fewer than two times on average. `size` and `keys` may differ by element.

    Raises:
        ValueError: an index is not in range(size).
    """
    shape = np.broadcast_shapes(np.shape(index), np.shape(size), np.shape(keys))
    sizes = np.broadcast_to(np.asarray(size, np.uint64), shape).ravel()
    x = np.broadcast_to(np.asarray(index), shape).ravel().astype(np.uint64)
    key = np.broadcast_to(keys, shape).ravel()
    if (x >= sizes).any():
        raise ValueError(f"permute: every index must be in range(size); got {index} of {size}")
    # frexp gives the bit length exactly for sizes below 2**53.
    width = np.frexp((sizes - np.uint64(1)).astype(np.float64))[1].astype(np.uint64)
    width = np.maximum(width, np.uint64(1))
    mask = (np.uint64(1) << width) - np.uint64(1)
    shift = (width + np.uint64(1)) >> np.uint64(1)
    rounds = [fold(key, number) for number in range(_PERMUTE_KEYS)]
    outside = np.arange(x.size)
    while outside.size:
        x[outside] = _bijection(
            x[outside], mask[outside], shift[outside], [r[outside] for r in rounds]
        )
        outside = outside[x[outside] >= sizes[outside]]
    return x.astype(np.int64).reshape(shape)


def _bijection(
    x: np.ndarray, mask: np.ndarray, shift: np.ndarray, rounds: list[np.ndarray]
) -> np.ndarray:
    """A keyed bijection of range(mask + 1): additions, odd factors and folded upper bits."""
    for key in rounds:
        # Two rounds a key: the four numbers share no bits in ranges below 2**12, where it shows.
        for addend, factor in ((40, 0), (24, 12)):
            x += key >> np.uint64(addend)
            x *= (key >> np.uint64(factor)) | np.uint64(1)
            x &= mask
            x ^= x >> shift
    return x


__all__ = [
    "Keys",
    "Stream",
    "bits",
    "choose",
    "chosen",
    "fold",
    "integers",
    "lottery",
    "noise_key",
    "permute",
    "row_keys",
    "scaled",
    "uniform",
    "words",
    "words_of",
]
