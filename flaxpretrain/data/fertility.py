"""How well a tokenizer suits a text: tokens a word and a character, and what it does not know."""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from flaxpretrain.data.tokenizers import SENTENCES, Tokenizer
from flaxpretrain.data.word_starts import character_kind
from flaxpretrain.shapes import Int, Numpy

SAMPLE = 2_000_000
"""Characters that are measured of each text."""


@dataclasses.dataclass(frozen=True)
class Fertility:
    """What a tokenizer makes of a text.

    A word is a run of letters, of digits or of other characters but spaces; in scripts without
    spaces, each character. So a stop is a word, and "don't" are three, as in treebanks.

    Reference: fertility as in Ács 2019 and Rust et al. 2021, https://arxiv.org/abs/2012.15613.
    """

    name: str
    sentences: int = 0
    characters: int = 0
    words: int = 0
    tokens: int = 0
    unknown: int = 0

    @property
    def tokens_per_word(self) -> float:
        """The fertility; 1 where every word is a token."""
        return self.tokens / max(1, self.words)

    @property
    def tokens_per_character(self) -> float:
        """The same by characters, spaces included, which compares languages of any script."""
        return self.tokens / max(1, self.characters)

    @property
    def unknown_share(self) -> float:
        """Part of the tokens that is the unknown token."""
        return self.unknown / max(1, self.tokens)


def measure(tokenizer: Tokenizer, name: str, sentences: Iterable[str]) -> Fertility:
    """Fertility and unknown tokens of the first `SAMPLE` characters of a text."""
    found = Fertility(name)
    left = SAMPLE
    sentences = iter(sentences)
    unk = tokenizer.vocabulary.unk
    while left > 0 and (batch := list(itertools.islice(sentences, SENTENCES))):
        ids, _ = tokenizer.encode_sentences(batch)
        characters = sum(map(len, batch))
        left -= characters
        found = dataclasses.replace(
            found,
            sentences=found.sentences + len(batch),
            characters=found.characters + characters,
            words=found.words + count_words("\n".join(batch)),
            tokens=found.tokens + len(ids),
            unknown=found.unknown + (0 if unk is None else int((ids == unk).sum())),
        )
    return found


def table(figures: Sequence[Fertility]) -> list[str]:
    """The figures as aligned lines under a heading."""
    width = max([len("text"), *(len(figure.name) for figure in figures)])
    lines = [f"{'text':<{width}}  sentences  tokens/word  tokens/character  unknown"]
    for figure in figures:
        lines.append(
            f"{figure.name:<{width}}  {figure.sentences:>9,}  {figure.tokens_per_word:>11.3f}  "
            f"{figure.tokens_per_character:>16.3f}  {figure.unknown_share:>7.3%}"
        )
    return lines


def count_words(text: str) -> int:
    """Words of a text, as `Fertility` has them."""
    kinds = _kinds_of(np.frombuffer(text.encode("utf-32-le", "replace"), np.uint32))
    before = np.concatenate([[0], kinds[:-1]])
    unspaced = character_kind("中")
    return int(((kinds != 0) & ((kinds != before) | (kinds == unspaced))).sum())


def _kinds_of(points: np.ndarray) -> Int[Numpy, " C"]:
    """The kind of each character by its code point; 0 for spaces."""
    unique, places = np.unique(points, return_inverse=True)
    return np.array([_kind(int(point)) for point in unique], np.int64)[places]


@functools.lru_cache(maxsize=1 << 16)
def _kind(point: int) -> int:
    character = chr(point)
    return 0 if character.isspace() else character_kind(character)
