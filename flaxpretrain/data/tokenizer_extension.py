"""More tokens for a tokenizer that is there: those that a domain's text lacks.

The tokens of the tokenizer keep their ids, so that a model trained with it can go on: new ids
follow, and only their embeddings are new.
"""

import heapq
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import tokenizers as library

from flaxpretrain.data.tokenizers import Tokenizer
from flaxpretrain.errors import UserError

LONGEST_WORD = 100
"""Characters; WordPiece cuts no longer word."""


class Extended(NamedTuple):
    """The larger tokenizer, and its new tokens in the order of their ids."""

    tokenizer: Tokenizer
    added: tuple[str, ...]


class Merge(NamedTuple):
    """Two neighbouring tokens that become one, and how often they stood in the text."""

    left: str
    right: str
    merged: str
    count: int


def extend(
    tokenizer: Tokenizer, texts: Iterable[str], vocab_size: int, *, min_frequency: int = 2
) -> Extended:
    """Adds tokens that shorten these texts, until there are `vocab_size` of them.

    First come characters that the tokenizer does not know, then merges of the most frequent
    neighbours within words, as byte pair encoding goes on from where the tokenizer stopped. What
    occurs less than `min_frequency` times is not added, so there may be fewer. In a Unigram model a
    new piece is as probable as it is frequent, but always better than the two pieces it replaces.
    The same texts give the same tokenizer.

    Raises:
      UserError: no text, or a size that the tokenizer has already.

    Reference: Sennrich et al. 2016, https://arxiv.org/abs/1508.07909, algorithm 1.
    """
    size = tokenizer.vocabulary.size
    if vocab_size <= size:
        raise UserError(
            f"the tokenizer has {size} tokens already: an extended one has more; got --vocab-size "
            f"{vocab_size}"
        )
    words = _words(tokenizer.backend, texts)
    if not words:
        raise UserError("there is no text to extend a tokenizer by")
    content = json.loads(tokenizer.backend.to_str())
    family = content["model"]["type"]
    if family not in ("WordPiece", "BPE", "Unigram"):
        raise UserError(f"tokens can be added to WordPiece, BPE and Unigram models, not {family}")
    grown = _Grown(content, size)
    for character in _missing(tokenizer, grown, words, min_frequency)[: vocab_size - size]:
        grown.add(character, grown.least_score())
    pieces = _cut(library.Tokenizer.from_str(grown.text()), words, tokenizer.vocabulary.unk)
    total = sum(len(cut) * words[word] for word, cut in pieces.items())
    join = _join_wordpiece if family == "WordPiece" else _join
    for merge in merges(list(pieces.values()), [words[word] for word in pieces], join):
        if grown.size >= vocab_size or merge.count < min_frequency:
            break
        grown.merge(merge, math.log(merge.count / total))
    backend = library.Tokenizer.from_str(grown.text())
    return Extended(
        Tokenizer(backend, tokenizer.roles, tokenizer.settings), tuple(grown.tokens[size:])
    )


def merges(
    words: Sequence[Sequence[str]], counts: Sequence[int], join: Callable[[str, str], str]
) -> Iterator[Merge]:
    """The most frequent pair of neighbours, which become one, then the next one, and so on.

    Of equally frequent pairs the first by their text. `counts` say how often each word occurs.
    """
    cut = [list(word) for word in words]
    pairs: Counter[tuple[str, str]] = Counter()
    places: defaultdict[tuple[str, str], set[int]] = defaultdict(set)
    for number, word in enumerate(cut):
        for pair in zip(word, word[1:], strict=False):
            pairs[pair] += counts[number]
            places[pair].add(number)
    heap = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(heap)
    while heap:
        negative, pair = heapq.heappop(heap)
        count = pairs[pair]
        if count != -negative:
            # Changed since it was put there.
            if count > 0:
                heapq.heappush(heap, (-count, pair))
            continue
        merged = join(*pair)
        yield Merge(*pair, merged, count)
        touched = set()
        for number in places.pop(pair):
            word, weight = cut[number], counts[number]
            for old in zip(word, word[1:], strict=False):
                pairs[old] -= weight
            cut[number] = word = _joined(word, pair, merged)
            for new in zip(word, word[1:], strict=False):
                pairs[new] += weight
                places[new].add(number)
                if merged in new:
                    touched.add(new)
        del pairs[pair]
        for new in touched:
            heapq.heappush(heap, (-pairs[new], new))


def _joined(word: list[str], pair: tuple[str, str], merged: str) -> list[str]:
    """A word with each occurrence of the pair, from the left, as one token."""
    result: list[str] = []
    at = 0
    while at < len(word):
        found = tuple(word[at : at + 2]) == pair
        result.append(merged if found else word[at])
        at += 2 if found else 1
    return result


def _join(left: str, right: str) -> str:
    return left + right


def _join_wordpiece(left: str, right: str) -> str:
    return left + right.removeprefix("##")


class _Grown:
    """A tokenizer's file, whose model gets more tokens."""

    def __init__(self, content: dict[str, Any], size: int) -> None:
        self._content = content
        self._model = content["model"]
        self._list = self._model["type"] == "Unigram"
        vocab = self._model["vocab"]
        names = {n: token for n, (token, _) in enumerate(vocab)} if self._list else {}
        names |= {} if self._list else {n: token for token, n in vocab.items()}
        # Added tokens that the model does not hold would move behind the new ones.
        names |= {token["id"]: token["content"] for token in content["added_tokens"]}
        self.tokens = [names.get(n, "") for n in range(size)]
        self.known = {token for token in self.tokens if token}
        if self._list:
            vocab += [[self.tokens[n], 0.0] for n in range(len(vocab), size)]
            self._scores = dict(vocab)
        else:
            vocab |= {token: n for n, token in enumerate(self.tokens) if token}

    @property
    def size(self) -> int:
        return len(self.tokens)

    def least_score(self) -> float:
        """That of the worst piece."""
        return min(self._scores.values()) if self._list else 0.0

    def add(self, token: str, score: float) -> None:
        if token in self.known:
            return
        if self._list:
            self._model["vocab"].append([token, score])
            self._scores[token] = score
        else:
            self._model["vocab"][token] = self.size
        self.tokens.append(token)
        self.known.add(token)

    def merge(self, merge: Merge, score: float) -> None:
        if self._list and merge.merged not in self.known:
            parts = self._scores[merge.left] + self._scores[merge.right]
            score = max(score, parts + 0.1)
        self.add(merge.merged, score)
        if self._model["type"] == "BPE":
            self._model["merges"].append([merge.left, merge.right])

    def text(self) -> str:
        return json.dumps(self._content, ensure_ascii=False)


def _words(backend: library.Tokenizer, texts: Iterable[str]) -> Counter[str]:
    """What the model is asked to cut, and how often."""
    normalizer, splitter = backend.normalizer, backend.pre_tokenizer
    words: Counter[str] = Counter()
    for text in texts:
        text = text if normalizer is None else normalizer.normalize_str(text)
        if splitter is not None:
            words.update(word for word, _ in splitter.pre_tokenize_str(text))
        else:
            words.update(word for word in re.split("(?=▁)", text) if word)
    return words


def _missing(
    tokenizer: Tokenizer, grown: _Grown, words: Counter[str], min_frequency: int
) -> list[str]:
    """Characters without a token, as the model would need them, the most frequent first."""
    continuing = "##" if json.loads(grown.text())["model"]["type"] == "WordPiece" else ""
    unk = tokenizer.vocabulary.unk
    if unk is None:
        return []
    counts: Counter[str] = Counter()
    for word, count in words.items():
        if len(word) > LONGEST_WORD or all(
            token.id != unk for token in tokenizer.backend.model.tokenize(word)
        ):
            continue
        for place, character in enumerate(word):
            counts[f"{continuing}{character}" if place else character] += count
    found = [
        token for token, n in counts.items() if token not in grown.known and n >= min_frequency
    ]
    return sorted(found, key=lambda token: (-counts[token], token))


def _cut(backend: library.Tokenizer, words: Counter[str], unk: int | None) -> dict[str, list[str]]:
    """The tokens of each word that has several and is known."""
    pieces = {}
    for word in sorted(words):
        tokens = backend.model.tokenize(word)
        if len(tokens) > 1 and all(token.id != unk for token in tokens):
            pieces[word] = [token.value for token in tokens]
    return pieces
