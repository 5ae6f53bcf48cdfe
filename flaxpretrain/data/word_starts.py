"""Which tokens open a word: by the vocabulary, by what stands before them, or by a segmenter.

Worked out once, when a dataset is built, and stored with its tokens.
"""

import abc
import dataclasses
import json
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers as library
from tokenizers import pre_tokenizers

from flaxpretrain.errors import UserError
from flaxpretrain.shapes import Bool, Int, Numpy, UInt

SEGMENTERS = ("jieba",)
"""Programs that find the words of text written without spaces."""

_NONE, _LETTER, _DIGIT, _OTHER, _UNSPACED = range(5)

# Han, kana, bopomofo, Thai, Lao, Burmese, Khmer: ranges of code points written without spaces.
UNSPACED_RANGES = (
    (0x0E00, 0x0EFF),
    (0x1000, 0x109F),
    (0x1780, 0x17FF),
    (0x3005, 0x3007),
    (0x3040, 0x31FF),
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
)


def unspaced(character: str) -> bool:
    """Whether a character belongs to a script that puts no spaces between words."""
    point = ord(character)
    return point >= 0x0E00 and any(first <= point <= last for first, last in UNSPACED_RANGES)


def character_kind(character: str) -> int:
    """A number above 0 for letters, digits, others, and scripts that put no spaces."""
    if unspaced(character):
        return _UNSPACED
    category = unicodedata.category(character)
    # A mark belongs to the letter before it.
    return {"L": _LETTER, "M": _LETTER, "N": _DIGIT}.get(category[0], _OTHER)


@dataclasses.dataclass(frozen=True, eq=False)
class WordRule:
    """Where words begin, for one vocabulary.

    WordPiece: a token without "##" opens a word. Byte-level BPE and SentencePiece: one that opens
    with a space does, one of another kind than the token before it (letters, digits, others), and
    each of a script without spaces. Any other model: every token is a word. Special tokens open
    words. A sentence's first token opens a word whatever it is; that is the builder's affair.

    Reference: google-research/bert create_pretraining_data.py. fairseq data/encoders/utils.py looks
    at the space alone, so that "playing." and "well-known" are one word; google-research/albert
    has punctuation, and all beside a to z, open words. Kinds are those by which GPT-2's own
    splitting goes.
    """

    opens: Bool[Numpy, " V"]
    """Tokens that open a word wherever they stand."""
    first: UInt[Numpy, " V"] | None = None
    """Kind of the first character of each token; None where kinds do not matter."""
    last: UInt[Numpy, " V"] | None = None

    def __call__(self, ids: Int[Numpy, " T"]) -> Bool[Numpy, " T"]:
        """Which of the tokens of a text open a word."""
        opens = self.opens[ids]
        if self.first is not None and self.last is not None:
            before = self.last[ids[:-1]]
            # After a token that is but a space, the word has begun.
            opens[1:] |= (self.first[ids[1:]] != before) & (before != _NONE)
        return opens


def word_rule(backend: library.Tokenizer, size: int, special_ids: Sequence[int]) -> WordRule:
    """The rule of a tokenizer of `size` ids."""
    content = json.loads(backend.to_str())
    model = content["model"]
    opens = np.ones(size, bool)
    tokens = backend.get_vocab(with_added_tokens=True)
    if model["type"] == "WordPiece":
        prefix = model["continuing_subword_prefix"]
        for token, i in tokens.items():
            opens[i] = not token.startswith(prefix)
        opens[list(special_ids)] = True
        return WordRule(opens)
    text_of = _text_of(content)
    if text_of is None:
        return WordRule(opens)
    first, last = np.zeros((2, size), np.uint8)
    for token, i in tokens.items():
        text = text_of(token)
        opens[i] = text.startswith(" ")
        if text := text.strip(" "):
            first[i], last[i] = character_kind(text[0]), character_kind(text[-1])
            opens[i] |= first[i] == _UNSPACED
    opens[list(special_ids)] = True
    first[list(special_ids)] = last[list(special_ids)] = _NONE
    return WordRule(opens, first, last)


def _text_of(content: Mapping[str, Any]) -> Callable[[str], str] | None:
    """What a token spells, spaces included; None for models whose tokens are words."""
    steps = {
        step["type"] for part in ("pre_tokenizer", "decoder") for step in _steps(content[part])
    }
    if "ByteLevel" in steps:
        octets = _octets()

        def decoded(token: str) -> str:
            raw = bytes(octets.get(character, 0x3F) for character in token)
            text = raw.decode("utf-8", "replace")
            # Part of a character: its first byte tells the script, a later one goes on.
            lead = "\u4e00" if raw and 0xE3 <= raw[0] <= 0xE9 else "a"
            return text.replace("\ufffd", lead)

        return decoded
    spaces = any("▁" in str(step.get("pattern")) for step in _steps(content["decoder"]))
    if content["model"]["type"] == "Unigram" or "Metaspace" in steps or spaces:
        return lambda token: token.replace("▁", " ")
    return None


def _octets() -> dict[str, int]:
    """The byte that each character of a byte-level token stands for.

    Reference: bytes_to_unicode, openai/gpt-2 src/encoder.py.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [octet for octet in range(256) if octet not in printable]
    shown = [chr(octet) for octet in printable] + [chr(256 + n) for n in range(len(others))]
    if set(shown) != set(pre_tokenizers.ByteLevel.alphabet()):
        raise RuntimeError("the tokenizers library spells bytes in another way than GPT-2")
    return dict(zip(shown, printable + others, strict=True))


def _steps(part: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """A pre-tokenizer or decoder, or the members of a sequence of them."""
    if part is not None:
        yield part
        for name in ("pretokenizers", "decoders"):
            for member in part.get(name, ()):
                yield from _steps(member)


class Segmenter(abc.ABC):
    """Finds the words of text whose script has no spaces."""

    @abc.abstractmethod
    def starts(self, text: str) -> Bool[Numpy, " C"]:
        """Which characters open a word."""

    def mark(
        self,
        sentences: Sequence[str],
        offsets: Int[Numpy, " T"],
        lengths: Int[Numpy, " S"],
        opens: Bool[Numpy, " T"],
    ) -> Bool[Numpy, " T"]:
        """`opens`, but that tokens inside a word of an unspaced script open none.

        `offsets` are the characters, in their sentence, with which the tokens begin; `lengths` the
        tokens of each sentence. Where the two disagree, and a token reaches over the border of
        words, the token's own word goes on to the next token that opens one.
        """
        marked = opens.copy()
        ends = np.cumsum(lengths)
        for text, begin, end in zip(sentences, ends - lengths, ends, strict=True):
            if begin == end:
                continue
            here = offsets[begin:end]
            inside = np.fromiter(map(unspaced, text), bool, len(text))
            if inside.any():
                inside &= ~self.starts(text)
                marked[begin:end] &= ~inside[here]
        return marked


class Jieba(Segmenter):
    """Words by jieba, with its own dictionary and its model of unknown words.

    Reference: https://github.com/fxsjy/jieba; whole word masks by a segmenter, Cui et al. 2019,
    https://arxiv.org/abs/1906.08101, section 2.
    """

    def __init__(self) -> None:
        """Loads the dictionary, which takes a second.

        Raises:
            UserError: jieba is not installed.
        """
        try:
            with warnings.catch_warnings():
                # Its last release has escape sequences that Python now warns of.
                warnings.simplefilter("ignore")
                import jieba
        except ImportError:
            raise UserError(
                'words by jieba need the package jieba: pip install "flaxpretrain[chinese]"'
            ) from None
        jieba.setLogLevel("WARNING")
        jieba.initialize()
        self._cut = jieba.cut

    def starts(self, text: str) -> Bool[Numpy, " C"]:
        """Which characters open a word."""
        starts = np.zeros(len(text) + 1, bool)
        starts[0] = True
        starts[np.cumsum(np.fromiter(map(len, self._cut(text)), np.int64))] = True
        return starts[:-1]


def segmenter(name: str) -> Segmenter:
    """The segmenter of this name, one of `SEGMENTERS`.

    Raises:
        UserError: it is not installed, or unknown.
    """
    if name not in SEGMENTERS:
        raise UserError(f"words are found by {', '.join(SEGMENTERS)}; got {name!r}")
    return Jieba()


__all__ = [
    "SEGMENTERS",
    "Jieba",
    "Segmenter",
    "WordRule",
    "character_kind",
    "segmenter",
    "unspaced",
    "word_rule",
]
