"""Steps that clean documents, one by one: each a small pure value, switched on by being listed.

A step takes the sentences of a document and gives those that remain, or None where the document is
dropped. What it did is counted by comparing the two. Steps that compare documents with one another
are in `deduplication`, those that compare them with test sets in `decontamination`.
"""

import abc
import dataclasses
import functools
import html
import re
import unicodedata
from collections import Counter
from typing import Any, ClassVar

from flaxpretrain.errors import UserError

Sentences = tuple[str, ...]

_CONTROLS = re.compile(
    # Controls, soft hyphens, marks of direction and width, byte order marks, tags. The joiners
    # U+200C and U+200D stay: Persian, the languages of India and emoji need them.
    "[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064"
    "\u2066-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)
_SPACES = re.compile(r"\s+")

_BLOCK_TAGS = (
    "blockquote|br|center|dd|div|dl|dt|gallery|h[1-6]|hr|li|ol|p|poem|pre|section|table|tbody|td|th|"
    "tr|ul"
)
_TAGS = (
    "a|abbr|b|big|cite|code|del|em|font|i|img|includeonly|ins|math|noinclude|nowiki|ref|references|"
    "s|small|span|strike|strong|sub|sup|tt|u|var"
)
_MARKUP: tuple[tuple[re.Pattern, str], ...] = (
    (re.compile(r"<!--.*?-->"), " "),
    (re.compile(r"<(ref|script|style)\b[^<>]*(?<!/)>.*?</\1\s*>", re.I), ""),
    (re.compile(rf"</?(?:{_BLOCK_TAGS})(?:\s[^<>]*)?/?>", re.I), " "),
    (re.compile(rf"</?(?:{_TAGS})(?:\s[^<>]*)?/?>", re.I), ""),
    (re.compile(r"\{\{[^{}]*\}\}|\{\|[^{}]*\|\}"), ""),
    (re.compile(r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]"), r"\1"),
    (re.compile(r"\[https?://\S+ ([^\]]*)\]"), r"\1"),
    (re.compile(r"\[(?:\d{1,3}|edit|citation needed|clarification needed|note \d+)\]"), ""),
    (re.compile(r"'{2,5}"), ""),
)
# What stood between brackets was markup: a template, a pronunciation, a foreign word. Before a
# bracket of code, print(), there is no space.
_EMPTY = re.compile(r"(?:(?:^|\s+)[(\[][\s,;:/]*[)\]]|\s*[（［【][\s,;:，；：、]*[）］】])")
_EMPTY_START = re.compile(r"((?:^|(?<=\s))[(]|（)[\s]*[,;，；、](?:[\s,;，；、])*")
_SPACE_BEFORE_STOP = re.compile(r"(?<=\w) +(?=[,.;:!?](?:\s|$))")


@dataclasses.dataclass(frozen=True)
class Step(abc.ABC):
    """Cleans or drops a document."""

    name: ClassVar[str]

    @abc.abstractmethod
    def __call__(self, sentences: Sentences) -> Sentences | None:
        """The sentences that remain, none of them blank; None drops the document."""


@dataclasses.dataclass(frozen=True)
class SentenceStep(Step):
    """Works on each sentence alone; a document without any left is dropped."""

    @abc.abstractmethod
    def clean(self, sentence: str) -> str:
        """The sentence as it should be; blank drops it."""

    def __call__(self, sentences: Sentences) -> Sentences | None:
        """Cleans all sentences."""
        cleaned = map(self.clean, sentences)
        return (
            tuple(sentence for sentence in cleaned if sentence and not sentence.isspace()) or None
        )


@dataclasses.dataclass(frozen=True)
class NormalizeUnicode(SentenceStep):
    """One spelling for what looks the same: a Unicode normal form, NFC or NFKC."""

    name: ClassVar[str] = "unicode"
    form: str = "NFC"

    def __post_init__(self) -> None:
        if self.form not in ("NFC", "NFKC"):
            raise UserError(f"a corpus is normalised to NFC or NFKC; got {self.form!r}")

    def clean(self, sentence: str) -> str:
        """The normal form."""
        form: Any = self.form  # checked above; the library's stubs want one of its literals
        if unicodedata.is_normalized(form, sentence):
            return sentence
        return unicodedata.normalize(form, sentence)


@dataclasses.dataclass(frozen=True)
class RemoveControls(SentenceStep):
    """Takes out control and invisible characters; any white space becomes one space."""

    name: ClassVar[str] = "controls"

    def clean(self, sentence: str) -> str:
        """Without them."""
        return _SPACES.sub(" ", _CONTROLS.sub("", sentence)).strip(" ")


@dataclasses.dataclass(frozen=True)
class RemoveMarkup(SentenceStep):
    """Takes out what is left of HTML and wiki markup, and brackets that it left empty."""

    name: ClassVar[str] = "markup"

    def clean(self, sentence: str) -> str:
        """Without markup; text between tags stays, footnotes and templates go."""
        text = html.unescape(sentence) if "&" in sentence else sentence
        if any(character in text for character in "<{['"):
            for pattern, replacement in _MARKUP:
                text = pattern.sub(replacement, text)
        before = None
        while before != text:
            before, text = text, _EMPTY.sub("", _EMPTY_START.sub(r"\1", text))
        if text == sentence:
            return sentence
        return _SPACE_BEFORE_STOP.sub("", _SPACES.sub(" ", text)).strip(" ")


LANGUAGE_SCRIPTS: dict[str, tuple[str, ...]] = {
    "ar": ("ARABIC",),
    "bg": ("CYRILLIC",),
    "el": ("GREEK",),
    "fa": ("ARABIC",),
    "he": ("HEBREW",),
    "hi": ("DEVANAGARI",),
    "ja": ("CJK", "HIRAGANA", "KATAKANA"),
    "ko": ("HANGUL", "CJK"),
    "ru": ("CYRILLIC",),
    "th": ("THAI",),
    "uk": ("CYRILLIC",),
    "zh": ("CJK",),
    **dict.fromkeys(("de", "en", "es", "fr", "it", "nl", "pl", "pt", "tr", "vi"), ("LATIN",)),
}
"""The scripts of some languages, by ISO 639-1."""


@functools.lru_cache(maxsize=1 << 16)
def script_of(character: str) -> str | None:
    """The script of a letter as Unicode's names have it, LATIN or CJK say; None for no letter."""
    if not character.isalpha():
        return None
    words = unicodedata.name(character, "UNKNOWN").split(" ")
    return (
        words[1] if words[0] in ("FULLWIDTH", "HALFWIDTH", "MODIFIER") and words[1:] else words[0]
    )


@dataclasses.dataclass(frozen=True)
class KeepScripts(Step):
    """Drops documents that are not in a language, as far as its script tells.

    Languages of one script are not told apart: Latin is Latin.
    """

    name: ClassVar[str] = "script"
    scripts: tuple[str, ...]
    share: float = 0.5
    """Of the letters, that must be in these scripts."""

    def __post_init__(self) -> None:
        if not self.scripts or not 0 < self.share <= 1:
            raise UserError(
                "keeping scripts takes one or more, and a share above 0 and at most 1; got "
                f"{self.scripts} and {self.share}"
            )

    def __call__(self, sentences: Sentences) -> Sentences | None:
        """The document, or None."""
        letters = inside = 0
        for character, count in Counter("".join(sentences)).items():
            script = script_of(character)
            letters += count if script else 0
            inside += count if script in self.scripts else 0
        return sentences if letters and inside >= self.share * letters else None


@dataclasses.dataclass(frozen=True)
class Lengths(Step):
    """Drops sentences and documents that are too short or too long, in characters."""

    name: ClassVar[str] = "length"
    document: tuple[int, int | None] = (0, None)
    """Shortest and longest; None: no limit."""
    sentence: tuple[int, int | None] = (0, None)

    def __post_init__(self) -> None:
        for least, most in (self.document, self.sentence):
            if least < 0 or (most is not None and most < least):
                raise UserError(f"lengths go from a least to a most; got {least} to {most}")

    def __call__(self, sentences: Sentences) -> Sentences | None:
        """The sentences in range; None where too little or too much is left."""
        kept = tuple(s for s in sentences if _within(len(s), self.sentence))
        return kept if kept and _within(sum(map(len, kept)), self.document) else None


def _within(size: int, limits: tuple[int, int | None]) -> bool:
    least, most = limits
    return size >= least and (most is None or size <= most)


@dataclasses.dataclass(frozen=True)
class Symbols(SentenceStep):
    """Drops sentences of too many symbols: characters but letters, marks, digits and spaces.

    Reference: the symbol rules of Rae et al. 2021, https://arxiv.org/abs/2112.11446, A.1.1, here by
    characters.
    """

    name: ClassVar[str] = "symbols"
    most: float = 0.3
    """Share of the characters that may be symbols."""
    digits: float = 0.5
    """Share that may be digits."""

    def __post_init__(self) -> None:
        if not (0 <= self.most <= 1 and 0 <= self.digits <= 1):
            raise UserError(f"shares of symbols and digits lie in [0, 1]; got {self}")

    def clean(self, sentence: str) -> str:
        """The sentence, or nothing."""
        symbols = digits = total = 0
        for character, count in Counter(sentence).items():
            kind = _category(character)
            if kind != "Z":
                total += count
                digits += count if kind == "N" else 0
                symbols += count if kind not in "LMN" else 0
        few = symbols <= self.most * total and digits <= self.digits * total
        return sentence if few else ""


@functools.lru_cache(maxsize=1 << 16)
def _category(character: str) -> str:
    return unicodedata.category(character)[0]


_SECRETS = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|$)"
    r"|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"
    r"|\bgh[pousr]_[A-Za-z0-9]{36,}\b|\bgithub_pat_[A-Za-z0-9_]{22,}\b|\bglpat-[\w-]{20,}"
    r"|\bhf_[A-Za-z0-9]{30,}\b|\bsk-[A-Za-z0-9_-]{20,}|\bxox[abprs]-[A-Za-z0-9-]{10,}"
    r"|\bAIza[\w-]{35}|\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]{8,}"
)
_NAMED_SECRET = re.compile(
    r"(\b(?:api[_-]?key|secret(?:[_-]?key)?|access[_-]?token|auth[_-]?token|password|passwd)"
    r"[\"']?\s*[:=]\s*[\"']?)([^\s\"',;]{6,})",
    re.I,
)
_EMAIL = re.compile(r"\b[\w.+-]+@[\w-]+(?:\.[\w-]+)*\.[A-Za-z]{2,}\b")
# With a country's code, or grouped like a phone number: years and plain numbers are none.
_PHONE = re.compile(
    r"(?<![\w.,+-])(?:\+\d{1,3}[ .\-/]?(?:\(\d{1,4}\)[ .\-/]?)?(?:\d[ .\-/]?){6,12}\d"
    r"|\(\d{2,4}\) ?\d{3,4}[ .-]?\d{3,4}|\d{3}[.-]\d{3,4}[.-]\d{4})(?![\w-])"
)


@dataclasses.dataclass(frozen=True)
class Scrub(SentenceStep):
    """Puts placeholders for e-mail addresses, phone numbers, and keys and passwords.

    Patterns know what they look like, not what they are: some are missed, some are none.
    """

    name: ClassVar[str] = "scrub"
    email: str = "(e-mail address)"
    phone: str = "(phone number)"
    secret: str = "(secret)"

    def clean(self, sentence: str) -> str:
        """With placeholders."""
        text = _SECRETS.sub(self.secret, sentence)
        text = _NAMED_SECRET.sub(rf"\g<1>{self.secret}", text)
        if "@" in text:
            text = _EMAIL.sub(self.email, text)
        return _PHONE.sub(self.phone, text)
